"""Episodes while a run trains: the same as afterwards, and no other training."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.evaluation import during_training
from vla_bench.evaluation.during_training import rollout_row, share
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate, read_episodes
from vla_bench.evaluation.workers import WorkerError
from vla_bench.serving.policy import Policy
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
ASKED = "--trainer.rollout_interval 2 --trainer.rollout_episodes 2 --trainer.save_interval 2"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Six steps on the small data of `point`, with changes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tree = load_config(FIXTURES / "runs" / "llava").to_dict()
    tree["framework"]["vlm"]["base_vlm"] = str(FIXTURES / "tiny")
    tree["datasets"]["vla_data"]["root"] = str(FIXTURES / "dataset")
    tree["run_root_dir"] = str(tmp_path)
    return lambda text: load_config(tree, text)


def rows_with(run, key):
    return {row["step"]: row for row in read_metrics(run / "metrics.jsonl") if key in row}


def weights(run):
    return load_file(run / "checkpoints/step_000006/model.safetensors")


def test_a_run_is_bit_equal_with_and_without_episodes(config):
    plain, played = train(config("--run_id plain")), train(config(f"--run_id played {ASKED}"))
    losses = [{step: row["loss"] for step, row in rows_with(run, "loss").items()} for run in (plain, played)]
    assert losses[0] == losses[1] and sorted(rows_with(played, "eval/success_rate")) == [2, 4, 6]
    one, other = weights(plain), weights(played)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ema", ["", "--trainer.ema_decay 0.5"])
def test_the_episodes_are_those_of_the_checkpoint_of_that_step(config, tmp_path, ema):
    run = train(config(f"--run_id played {ASKED} {ema}"))
    asked = EvaluationSettings("point", episodes=2, first_seed=40000, n_action_steps=2, max_steps=12)
    for step in (2, 6):
        policy = Policy.from_pretrained(run, checkpoint=step)
        summary = evaluate(policy, None, asked, tmp_path / f"{step}", show_progress=False)
        row = rows_with(run, "eval/success_rate")[step]
        low, high = summary["confidence_interval"]
        found = [row[f"eval/{name}"] for name in ("success_rate", "success_low", "success_high", "episodes")]
        assert found == [summary["success_rate"], low, high, 4]
        played = read_episodes(run / f"rollouts/step_{step:06d}/process_0/episodes.jsonl")
        assert played == read_episodes(tmp_path / f"{step}" / "episodes.jsonl")


def test_a_run_that_was_killed_plays_its_episodes_again(config):
    run = train(config(f"--run_id played {ASKED}"))
    before = rows_with(run, "eval/success_rate")
    for step in (4, 6):
        shutil.rmtree(run / f"checkpoints/step_{step:06d}")
    train(load_config(run, "--trainer.resume true"))
    assert rows_with(run, "eval/success_rate") == before


def test_the_best_is_chosen_by_episodes_where_some_are_played(config, monkeypatch):
    rates = iter([0.25, 0.75, 0.5])
    told = {"eval/episodes": 4, "eval/action_error": 9.0}
    monkeypatch.setattr(
        during_training.Rollouts, "__call__", lambda *_: {**told, "eval/success_rate": next(rates)}
    )
    best = json.loads((train(config(f"--run_id played {ASKED}")) / "best.json").read_text())
    assert (best["step"], best["value"], best["metric"]) == (4, 0.75, "eval/success_rate")
    assert best["candidates"] == [[2, 0.25], [4, 0.75], [6, 0.5]]
    assert (best["episodes"], best["seeds"]) == (4, [40000, 40002])


def test_a_simulator_that_cannot_be_used_ends_no_training(config, monkeypatch, capsys):
    def broken(*_, **__):
        raise WorkerError("no simulator has shown a scene")

    monkeypatch.setattr(during_training, "evaluate", broken)
    run = train(config(f"--run_id played {ASKED}"))
    assert {row["eval/rollout_errors"] for row in rows_with(run, "eval/rollout_errors").values()} == {4}
    assert not rows_with(run, "eval/success_rate")
    assert "no episodes after step 2: no simulator has shown a scene" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ("--evaluation.n_action_steps 9", "the policy's horizon is 4"),
        ("--evaluation.benchmark pont", "did you mean 'point'"),
        ("--evaluation.tasks [reach-green]", "reach-green"),
        ("--trainer.rollout_episodes 0", "trainer.rollout_episodes must be at least 1"),
        ("--trainer.rollout_first_seed -1", "trainer.rollout_first_seed must be at least 0"),
    ],
)
def test_what_cannot_be_played_is_refused_before_anything_is_written(config, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        set_up(config(f"--run_id refused {ASKED} {change}"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("interval", ["null", "0"])
def test_no_interval_is_no_episodes_and_no_simulator(config, interval, monkeypatch):
    monkeypatch.setattr("vla_bench.training.best.import_module", None)
    run = set_up(config(f"--run_id none --trainer.rollout_interval {interval}"))
    assert run.rollouts is None


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_counts_of_several_processes_add_up_to_those_of_one(config, processes):
    run = set_up(config("--run_id shared --trainer.rollout_interval 2 --trainer.rollout_episodes 4"))
    whole, counts = run.rollouts(run), []
    for process in range(processes):
        accelerator = SimpleNamespace(
            process_index=process, num_processes=processes, device="cpu",
            reduce=lambda total, how: counts.append(total.numpy()) or total,
        )  # fmt: skip
        told = SimpleNamespace(
            accelerator=accelerator,
            framework=run.framework,
            spec=run.spec,
            data=run.data,
            folder=run.folder,
            step=0,
        )
        run.rollouts(told)
    assert rollout_row(["reach-red", "reach-blue"], np.sum(counts, axis=0)) == whole


def test_seeds_are_shared_without_a_gap_or_an_overlap():
    settings = EvaluationSettings("point", episodes=7, first_seed=3)
    for processes in (1, 2, 3, 7, 9):
        parts = [part for p in range(processes) if (part := share(settings, p, processes))]
        assert [part.first_seed + i for part in parts for i in range(part.episodes)] == list(range(3, 10))
