"""Which checkpoints of a run are kept, and that none goes before the new one stands."""

import os
import random
import shutil

import pytest

from vla_bench.files import list_checkpoints, write_json
from vla_bench.training import retention, run
from vla_bench.training.imitation import train
from vla_bench.training.retention import remove_superfluous, superfluous


def names(folder) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


@pytest.mark.parametrize("case", range(50))
def test_what_is_kept_is_what_was_asked_for(case):
    rng = random.Random(case)
    steps = sorted(rng.sample(range(1, 60), rng.randint(0, 12)))
    last, every = rng.randint(1, 5), rng.choice([None, 1, 3, 10])
    best = rng.choice([None, *steps])
    gone = superfluous(steps, last, every, best)
    left = [step for step in steps if step not in gone]
    expected = set(steps[-last:]) | {step for step in steps if step == best or (every and step % every == 0)}
    assert set(left) == expected and left[-1:] == steps[-1:]


def test_a_run_keeps_the_newest_the_multiples_and_the_best(config, tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/best.json", {"step": 1, "eval/action_error": 0.5})
    folder = train(config("--trainer.save_interval 1 --trainer.keep_last 2 --trainer.keep_every 3"))
    assert names(folder) == [1, 3, 5, 6]


def test_without_a_word_all_are_kept(config):
    assert names(train(config("--trainer.save_interval 2"))) == [2, 4, 6]


def test_nothing_goes_before_the_new_one_stands(config, monkeypatch):
    seen, clean = [], retention.superfluous
    folder = []

    def superfluous(steps, *rest):
        seen.append((list(steps), names(folder[0])))
        return clean(steps, *rest)

    real = run.remove_superfluous
    monkeypatch.setattr(retention, "superfluous", superfluous)
    monkeypatch.setattr(
        run, "remove_superfluous", lambda place, *rest: folder.append(place) or real(place, *rest)
    )
    train(config("--trainer.save_interval 2 --trainer.keep_last 1"))
    assert seen == [([2], [2]), ([2, 4], [2, 4]), ([4, 6], [4, 6])]


def test_a_checkpoint_disappears_at_one_instant(tmp_path, monkeypatch):
    """Its files go one by one, under a name that is no checkpoint's."""
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:06d}/policy.json").write_text("{}")
    seen, clean = [], shutil.rmtree

    def rmtree(path, ignore_errors=False):
        seen.append((path.name, names(tmp_path), path.exists()))
        clean(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(retention.shutil, "rmtree", rmtree)
    assert remove_superfluous(tmp_path, 1) == ["step_000001"]
    assert seen == [(".step_000001.old.tmp", [1, 2], False), (".step_000001.old.tmp", [2], True)]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "1"}', '{"step": true}'])
def test_a_damaged_best_removes_nothing_and_says_so(tmp_path, capsys, content):
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    (tmp_path / "best.json").write_text(content)
    assert remove_superfluous(tmp_path, 1) == [] and names(tmp_path) == [1, 2]
    said = capsys.readouterr().err
    assert said.startswith("no checkpoint is removed: ") and "best.json" in said and said.count("\n") == 1


def test_a_best_that_is_gone_protects_nothing(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    write_json(tmp_path / "best.json", {"step": 7})
    assert remove_superfluous(tmp_path, 1) == ["step_000001"]


def test_what_cannot_be_deleted_is_no_checkpoint_any_more(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)

    def busy(path, ignore_errors=False):
        assert ignore_errors

    monkeypatch.setattr(retention.shutil, "rmtree", busy)
    remove_superfluous(tmp_path, 1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [".step_000001.old.tmp", "step_000002"]
