"""Spikes and numbers that are not finite: refused before the update, kept on the disk, and a way back."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.models.frameworks.framework import Framework
from vla_bench.training.guard import SpikeGuard, load_offending, spike_guard
from vla_bench.training.imitation import train
from vla_bench.training.loop import AugmentedView, read_metrics
from vla_bench.training.run import set_up

GUARD = "--trainer.spike_guard '{factor: 20, window: 2, action: %s, in_a_row: 2}' --trainer.save_interval 1"


@pytest.fixture
def spoil(config, monkeypatch):
    """Makes the actions of one sample of a step, counted from 0, larger by a number."""

    def spoilt_at(step, by, framework="OFT"):
        probe = set_up(config("--run_id probe", framework))
        offending = probe.view[probe.sampler().batch(step)[1]]["origin"]
        clean = AugmentedView.__getitem__

        def spoilt(self, key):
            sample = clean(self, key)
            wrong = sample["origin"] == offending
            return {**sample, "action": sample["action"] + np.float32(by)} if wrong else sample

        monkeypatch.setattr(AugmentedView, "__getitem__", spoilt)
        first = next(
            n for n in range(9) if offending in [probe.view[k]["origin"] for k in probe.sampler().batch(n)]
        )
        return offending, first

    return spoilt_at


@pytest.mark.parametrize("framework", ["OFT", "GR00T"])
def test_the_batch_of_a_loss_that_is_no_number_is_kept_and_gives_it_again(config, spoil, framework):
    offending, step = spoil(3, 3e38, framework)
    with pytest.raises(FloatingPointError, match="its batch is in offending/step_") as error:
        train(config("--trainer.save_interval 1", framework))
    assert offending in str(error.value) and "the same command with --trainer.resume last_good" in str(
        error.value
    )
    (folder,) = (set_folder(config) / "offending").glob("step_*/process_0")
    assert folder.parent.name == f"step_{step + 1:06d}"
    kept = load_offending(folder)
    assert offending in kept.told["origins"][0]["vla"] and len(kept.told["origins"][0]["vla"]) == 4
    (again,) = kept.losses(Framework.from_pretrained(folder / "weights"))
    assert not np.isfinite(again["action_loss"])


def set_folder(config):
    return Path(config().get("run_root_dir")) / "run"


@pytest.mark.parametrize("framework", ["OFT", "GR00T"])
def test_the_batch_of_a_spike_gives_the_loss_that_was_refused(config, spoil, framework):
    _, step = spoil(3, 1e4, framework)
    if step < 2:
        pytest.skip("the sample comes before a median is known")
    with pytest.raises(FloatingPointError, match=f"still those of step {step}; its batch is in offending"):
        train(config(GUARD % "stop", framework))
    folder = set_folder(config) / f"offending/step_{step + 1:06d}/process_0"
    kept, torch_state = load_offending(folder), torch.get_rng_state()
    told = float(re.search(r"loss is (\S+),", kept.told["what"])[1])
    framework = Framework.from_pretrained(folder / "weights")
    (again,) = kept.losses(framework.eval())
    assert again["action_loss"] == pytest.approx(told, rel=1e-3) and told > 100
    assert torch.equal(torch.get_rng_state(), torch_state) and not framework.training


def test_a_spike_is_left_out_and_the_next_step_is_taken(config, spoil, capsys):
    _, step = spoil(3, 1e4)
    run = train(config(GUARD % "skip"))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    large = [row["step"] for row in rows if row["loss"] > 100]
    assert step + 1 in large and rows[-1]["skipped_updates"] == len(large)
    assert (
        f"the weights are still those of step {step}; left out, its batch is in offending"
        in capsys.readouterr().err
    )
    before, after = (load_file(run / f"checkpoints/step_{n:06d}/model.safetensors") for n in (step, step + 1))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_guard_that_finds_nothing_changes_nothing(config, straight, losses):
    run = train(config("--trainer.spike_guard '{factor: 1e6, window: 2}'", straight.framework))
    assert losses(run) == straight.losses and not (run / "offending").exists()


def test_a_run_that_is_continued_refuses_what_it_would_have_refused(config, spoil, losses):
    _, step = spoil(3, 1e4)
    run = train(config(GUARD % "skip"))
    expected = losses(run)
    for path in sorted((run / "checkpoints").glob("step_*"))[step:]:
        shutil.rmtree(path)  # the spike is the first step that comes again
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == expected
    assert [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row][-1]["skipped_updates"] >= 1


def test_the_way_back_is_the_one_that_is_printed(config, spoil):
    _, step = spoil(3, 1e4)
    with pytest.raises(
        FloatingPointError, match="--trainer.resume last_good --trainer.spike_guard.action skip"
    ):
        train(config(GUARD % "stop"))
    run = set_folder(config)
    train(load_config(run, "--trainer.resume last_good --trainer.spike_guard.action skip"))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_too_many_spikes_in_a_row_stop_a_run_that_skips():
    guard = SpikeGuard(factor=2, window=2, action="skip", in_a_row=2)
    found = [(bool(guard.judge(loss, 1.0)), guard.run_of, guard.stops()) for loss in (1, 1, 5, 1, 5, 5, 1)]
    assert [each for each, _, _ in found] == [False, False, True, False, True, True, False]
    assert [stops for spike, _, stops in found if spike] == [False, False, True]
    assert guard.skipped == 3


def test_the_norm_of_the_gradient_is_judged_as_well():
    guard = SpikeGuard(factor=2, window=2)
    assert not guard.judge(1.0, 1.0) and not guard.judge(1.0, 1.0)
    assert guard.judge(1.0, 2.5) == "grad_norm is 2.5, 2.5 times the median 1 of 2 steps" and guard.stops()
    assert not guard.judge(1.0, 2.0)


@pytest.mark.parametrize(
    "section, message",
    [
        (True, "trainer.spike_guard must be a section of factor"),
        ({"facter": 2}, "did you mean 'factor'"),
        ({"factor": 1.0}, "trainer.spike_guard.factor must be a finite number above 1"),
        ({"window": 1}, "trainer.spike_guard.window must be at least 2"),
        ({"action": "warn"}, "trainer.spike_guard.action must be stop or skip"),
        ({"in_a_row": 0}, "trainer.spike_guard.in_a_row must be at least 1"),
    ],
)
def test_a_guard_that_cannot_be_meant_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        spike_guard(section)


def test_a_full_disk_does_not_hide_what_happened(config, spoil, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    offending, _ = spoil(3, 3e38)
    monkeypatch.setattr("vla_bench.training.imitation.write_offending", full)
    with pytest.raises(
        FloatingPointError, match="its batch could not be kept .No space left on device"
    ) as error:
        train(config())
    assert offending in str(error.value)
