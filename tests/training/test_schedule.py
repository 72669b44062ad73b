"""The learning rate over a run, and what it does in a run that is made longer."""

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train
from vla_bench.training.optim import warmup_cosine
from vla_bench.training.run import set_up
from vla_bench.training.schedule import SCHEDULES, decay_start, make_schedule, wsd_factor


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.25, 3e-4)]
    return torch.optim.SGD(groups)


def rates(scheduler, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("steps, warmup, ratio", [(9, 0, 0.0), (9, 3, 0.1), (2, 1, 1.0)])
def test_the_cosine_is_that_of_before(steps, warmup, ratio):
    before = rates(warmup_cosine(optimizer(), steps, warmup, ratio), steps)
    assert rates(make_schedule(optimizer(), "cosine", steps, warmup, ratio), steps) == before


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_every_schedule_rises_to_the_peak_and_keeps_the_ratio_of_the_groups(schedule, warmup):
    found = rates(make_schedule(optimizer(), schedule, 20, warmup), 20)
    assert [low / high for high, low in found if high] == pytest.approx(
        [3e-4 / 0.25] * len([r for r in found if r[0]])
    )
    assert [rate for rate, _ in found[:warmup]] == pytest.approx(
        [0.25 * (n + 1) / warmup for n in range(warmup)]
    )


@pytest.mark.parametrize("steps, warmup, decay, start", [(20, 0, None, 18), (5, 0, None, 4), (5, 4, None, 4),
                                                        (100, 95, None, 95), (20, 3, 17, 3), (20, 3, 1, 19)])  # fmt: skip
def test_the_descent_begins_here(steps, warmup, decay, start):
    assert decay_start(steps, warmup, decay) == start
    found = [rate for rate, _ in rates(make_schedule(optimizer(), "wsd", steps, warmup, 0.5, decay), steps)]
    assert found[warmup:start] == [0.25] * (start - warmup) and found[-1] == pytest.approx(0.125)
    falls = [b - a for a, b in zip([0.25, *found[start:]], found[start:])]
    assert falls == pytest.approx([-0.125 / (steps - start)] * (steps - start))


@pytest.mark.parametrize("step", [19, 20, 500])
def test_after_the_last_step_the_rate_stays(step):
    assert wsd_factor(step, warmup_steps=2, start=10, steps=20, min_lr_ratio=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--trainer.schedule linear", "trainer.schedule is 'linear'"),
        ("--trainer.schedule wds", "did you mean 'wsd'"),
        ("--trainer.schedule constant_with_warmup --trainer.min_lr_ratio 0.1", "never descends"),
        ("--trainer.decay_steps 2", "only trainer.schedule: wsd reads it"),
        ("--trainer.schedule wsd --trainer.decay_steps 5", "expected 1 … 4"),
        ("--trainer.schedule wsd --trainer.decay_steps 0", "trainer.decay_steps must be at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        set_up(config(options))


WHOLE = {  # schedule: options of the long run, and whether the short run's checkpoint is one of it
    "wsd": ("--trainer.schedule wsd --trainer.decay_steps 2", True),
    "constant": ("--trainer.schedule constant_with_warmup", True),
    "cosine": ("--trainer.schedule cosine", False),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_run_that_is_made_longer(config, losses, capsys, name):
    """Six steps, of which the first four come with the peak rate, are made eight."""
    options, exact = WHOLE[name]
    options += " --trainer.save_interval 4"
    long = train(config(f"{options} --trainer.max_train_steps 8 --run_id long"))
    run = train(config(f"{options} --trainer.max_train_steps 6"))
    latest_checkpoint(run).rename(run / "step_6")
    capsys.readouterr()
    train(load_config(run, "--trainer.resume true --trainer.max_train_steps 8"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step_000004: ")]
    assert len(said) == 1 and "ends at step 8 instead of 6; in step 5 the rates are" in said[0]
    assert [step for step, _, _ in losses(run)] == list(range(1, 9))
    assert (losses(run) == losses(long)) is exact
    ours, theirs = ((latest_checkpoint(r) / "model.safetensors").read_bytes() for r in (run, long))
    assert (ours == theirs) is exact
    assert load_config(run).to_dict()["trainer"]["max_train_steps"] == 8


def test_a_finished_run_is_made_longer_from_its_last_step(config, losses, capsys):
    run = train(config("--trainer.max_train_steps 4"))
    before, weights = losses(run), (latest_checkpoint(run) / "model.safetensors").read_bytes()
    again = set_up(load_config(run, "--trainer.resume true --trainer.max_train_steps 6"))
    expected = rates(make_schedule(optimizer(), "cosine", 6, 2), 5)[4][0] / 0.25
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(again.scheduler.base_lrs[0] * expected)
    assert (
        f"in step 5 the rates are {expected:.4g} of their peaks, with 4 they would be"
        in capsys.readouterr().err
    )
    del again
    train(load_config(run, "--trainer.resume true --trainer.max_train_steps 6"))
    assert losses(run)[:4] == before and [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert (run / "checkpoints/step_000004/model.safetensors").read_bytes() == weights


def test_a_run_is_not_made_shorter_than_it_is(config):
    run = train(config("--trainer.max_train_steps 4 --trainer.warmup_steps 1"))
    with pytest.raises(
        ConfigError, match="max_train_steps is 3, but step_000004 has done 4 steps: set 4 or more"
    ):
        set_up(load_config(run, "--trainer.resume true --trainer.max_train_steps 3"))
    assert train(load_config(run, "--trainer.resume true --trainer.max_train_steps 4")) == run
