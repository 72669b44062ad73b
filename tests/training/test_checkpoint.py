"""A process that is killed while it writes a checkpoint leaves the one before, whole."""

import json
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla_bench.config import load_config
from vla_bench.serving.policy import Policy
from vla_bench.training.checkpoint import (
    find_checkpoint,
    identity_differences,
    latest_checkpoint,
    list_checkpoints,
    rng_state,
    set_aside,
    set_rng_state,
)
from vla_bench.training.imitation import train

KILLED = """
import os, sys
from pathlib import Path
from vla_bench.config import load_config
from vla_bench.training import checkpoint, imitation

where, source = sys.argv[1:]
owner = {"save_trainer": checkpoint, "replace": os}[where]
real = getattr(owner, where)

def killed(*args, **kwargs):
    if "step_000004" in Path(args[-1]).name:  # the folder itself, not a file in it
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)

setattr(owner, where, killed)
imitation.train(load_config(source))
"""


@pytest.fixture(scope="module", params=["save_trainer", "replace"])
def killed(request, home, tmp_path_factory) -> SimpleNamespace:
    """A run that was killed in the middle of step 4's checkpoint, or right before its last rename; and what it left."""
    folder = tmp_path_factory.mktemp("killed")
    source = load_config(home / "toy.yaml", f"--run_root_dir {folder} --trainer.save_interval 2")
    source.save(folder / "source.yaml")
    command = [sys.executable, "-c", KILLED, request.param, folder / "source.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    run = folder / "run"
    files = {str(path.relative_to(run / "checkpoints")) for path in (run / "checkpoints").rglob("*")}
    return SimpleNamespace(run=run, files=files, whole=[path.name for path in list_checkpoints(run)])


def test_the_unfinished_checkpoint_is_no_checkpoint(killed):
    assert ".step_000004.tmp/model.safetensors" in killed.files
    assert killed.whole == ["step_000002"]


def test_the_one_before_can_be_served(killed, observation):
    assert np.isfinite(Policy.from_pretrained(killed.run).predict(observation(), seed=0)).all()


def test_a_restart_removes_the_unfinished_one_and_goes_on(killed, losses):
    train(load_config(killed.run, "--trainer.resume true"))
    assert not (killed.run / "checkpoints/.step_000004.tmp").exists()
    assert [p.name for p in list_checkpoints(killed.run)] == ["step_000002", "step_000004", "step_000006"]
    assert [step for step, _, _ in losses(killed.run)] == [1, 2, 3, 4, 5, 6]


def draws() -> list:
    """Numbers of all three generators; numpy keeps half of a pair for the next call."""
    numbers = [torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)]
    return [*numbers, np.random.rand(), random.random()]


def test_all_three_generators_come_back():
    np.random.standard_normal()
    state = json.loads(json.dumps(rng_state()))
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first


@pytest.fixture
def three(tmp_path):
    """A run with checkpoints of steps 2, 10 and 1,000,000."""
    for step in (2, 10, 1_000_000):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    return tmp_path


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(three):
    assert latest_checkpoint(three).name == find_checkpoint(three).name == "step_1000000"
    assert find_checkpoint(three, 10).name == find_checkpoint(three, "step_000010").name == "step_000010"
    assert latest_checkpoint(three / "elsewhere") is None


def test_only_checkpoints_beyond_the_step_are_set_aside(three):
    assert set_aside(three, 10) == ["step_1000000.damaged"]
    assert [path.name for path in list_checkpoints(three)] == ["step_000002", "step_000010"]


@pytest.mark.parametrize("part, name", [("metadata", "meta/tasks.parquet"), ("columns", "data/a.parquet")])
def test_a_file_that_a_dataset_lacks_is_named(part, name):
    parts = {"metadata": {}, "columns": {}, "videos": {}}
    saved = {**parts, part: {name: "5f", "kept": "00"}}
    assert identity_differences(saved, {**parts, part: {"kept": "00"}}) == [f"{name} is missing"]
    assert identity_differences({**parts, part: {"kept": "00"}}, saved) == [f"{name} is new"]
