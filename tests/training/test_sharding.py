"""Two processes in every mode against one, and checkpoints that any mode reads."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.files import list_checkpoints
from vla_bench.serving.policy import Policy
from vla_bench.training.imitation import train

pytest.importorskip("deepspeed")

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
ENVIRON = {
    "ddp": {},
    "fsdp2": FSDP,
    **{f"zero{stage}": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)},
}
STEPS = 20 if "VLA_BENCH_CASES" in os.environ else 6


@pytest.fixture
def run_in(config, several):
    """`run_in(mode, overrides, framework, processes)`: a run in a mode, `one` for one process; its folder."""

    def run(mode, overrides, framework="OFT", processes=2):
        cfg = overrides if isinstance(overrides, Path) else config(overrides, framework)
        if isinstance(overrides, Path):
            cfg = load_config(overrides, "--trainer.resume true")
        if mode == "one":
            return train(cfg)
        several(lambda: train(cfg), processes, ENVIRON[mode])
        return Path(cfg["run_root_dir"]) / cfg["run_id"]

    return run


def options(name, batch, accumulation=1, more=""):
    numbers = f"--trainer.per_device_batch_size {batch} --trainer.gradient_accumulation_steps {accumulation}"
    return f"--run_id {name} --trainer.max_train_steps {STEPS} {numbers} {more}"


def state(run, step=-1):
    """Weights and optimizer of a checkpoint, flat."""
    folder = list_checkpoints(run)[step]
    trainer = torch.load(folder / "trainer/optimizer.pt", weights_only=True)["optimizer"]
    moments = {f"{i}.{k}": v for i, values in trainer["state"].items() for k, v in values.items()}
    return load_file(folder / "model.safetensors"), moments, trainer["param_groups"]


@pytest.mark.parametrize("mode", ENVIRON)
def test_two_processes_give_the_losses_of_one(mode, run_in, losses):
    one, two = run_in("one", options("one", 4)), run_in(mode, options("two", 2))
    assert [row[1] for row in losses(two)] == pytest.approx([row[1] for row in losses(one)], abs=1e-5)
    assert [row[2] for row in losses(two)] == pytest.approx([row[2] for row in losses(one)], rel=1e-4)
    (weights, moments, groups), (others, other_moments, other_groups) = state(two), state(one)
    assert (
        weights.keys() == others.keys() and moments.keys() == other_moments.keys() and groups == other_groups
    )
    for ours, theirs in ((weights, others), (moments, other_moments)):
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert Policy.from_pretrained(two).spec.horizon == 4


@pytest.mark.parametrize("mode", [mode for mode in ENVIRON if mode != "ddp"])
def test_accumulation_and_clipping_are_those_of_one_process(mode, run_in, losses):
    tight = "--trainer.gradient_clipping 0.05"
    one, two = run_in("one", options("one", 8, more=tight)), run_in(mode, options("two", 2, 2, tight))
    for column in (1, 2):
        ours, theirs = ([row[column] for row in losses(run)] for run in (two, one))
        assert ours == pytest.approx(theirs, abs=1e-5 if column == 1 else 0, rel=1e-4)


def stopped_at_three(run):
    """A copy of a run with its checkpoint of step 3 only."""
    copy = run.with_name(f"{run.name}_3")
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy)[1:]:
        shutil.rmtree(checkpoint)
    return copy


@pytest.mark.parametrize("mode", ENVIRON)
def test_a_continued_run_is_the_uninterrupted_one(mode, run_in, losses):
    straight = run_in(mode, options("run", 2, more="--trainer.save_interval 3"))
    again = stopped_at_three(straight)
    cfg = load_config(again, f"--run_id {again.name}")
    cfg.save(again / "config.yaml")
    run_in(mode, again)
    assert losses(again) == losses(straight)
    (weights, moments, groups), (others, other_moments, other_groups) = state(again), state(straight)
    assert (
        weights.keys() == others.keys() and moments.keys() == other_moments.keys() and groups == other_groups
    )
    assert [name for name in others if not torch.equal(weights[name], others[name])] == []
    assert [name for name in other_moments if not torch.equal(moments[name], other_moments[name])] == []
