"""`best.json`: the checkpoint that measured best, among which, and what of it survives a restart."""

import json

import pytest

from vla_bench.config import load_config
from vla_bench.training.best import ERROR, RATE, choose, note_candidate
from vla_bench.training.checkpoint import find_checkpoint
from vla_bench.training.imitation import fit, train
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

EVERY = "--trainer.eval_interval 1 --trainer.save_interval 2"


def best_of(run):
    return json.loads((run / "best.json").read_text())


def test_the_best_is_what_was_measured_and_saved(config):
    run = train(config(EVERY))
    errors = {row["step"]: row[ERROR] for row in read_metrics(run / "metrics.jsonl") if ERROR in row}
    best = best_of(run)
    assert best["candidates"] == [[step, errors[step]] for step in (2, 4, 6)]
    assert best["value"] == min(value for _, value in best["candidates"]) == errors[best["step"]]
    assert best["metric"] == ERROR and "episodes" not in best
    assert find_checkpoint(run, "best").name == best["checkpoint"] == f"step_{best['step']:06d}"


def test_the_best_stays_where_only_the_last_is_kept(config):
    rising = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    run = set_up(config(f"{EVERY} --trainer.keep_last 1"))
    run = fit(run, measure=lambda run: {ERROR: next(rising)})
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_000002", "step_000006"]
    assert best_of(run)["step"] == 2 and find_checkpoint(run, "best").name == "step_000002"


def test_a_restart_ends_with_the_same_best(config):
    run = train(config(EVERY))
    expected = best_of(run)
    for step in (4, 6):
        (run / f"checkpoints/step_{step:06d}").rename(run / f"gone_{step}")
    train(load_config(run, "--trainer.resume true"))
    assert best_of(run) == expected


def test_without_anything_held_out_there_is_no_best(config):
    run = train(config("--datasets.vla_data.held_out 0"))
    assert not (run / "best.json").exists()
    with pytest.raises(FileNotFoundError, match="has no best.json: nothing was measured"):
        find_checkpoint(run, "best")


@pytest.mark.parametrize(
    "metric, values, kept, best",
    [
        (RATE, [0.2, 0.9, 0.9], [1, 2, 3], (2, 0.9)),
        (RATE, [0.2, 0.9, 0.9], [1, 3], (3, 0.9)),
        (RATE, [0.2, 0.9, 0.9], [1], (1, 0.2)),
        (ERROR, [0.2, 0.1, 0.1], [1, 2, 3], (2, 0.1)),
        (ERROR, [0.2, 0.1, 0.3], [], None),
    ],
)
def test_high_rates_and_small_errors_are_good(metric, values, kept, best):
    assert choose(list(enumerate(values, 1)), kept, metric) == best


def test_candidates_by_another_number_are_forgotten(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    note_candidate(tmp_path, 1, {ERROR: 0.1}, ERROR)
    note_candidate(tmp_path, 2, {ERROR: 0.2, RATE: 0.5}, RATE, episodes=4, seeds=[7, 9])
    assert best_of(tmp_path) == {
        "step": 2, "checkpoint": "step_000002", "metric": RATE, "value": 0.5, "episodes": 4, "seeds": [7, 9],
        "candidates": [[2, 0.5]],
    }  # fmt: skip
