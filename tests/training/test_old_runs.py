"""A run folder that version 0.1 wrote is continued as version 0.1 would have continued it, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics

OLD = Path(__file__).parents[1] / "fixtures/version_0_1"
RENAMED = {"action_model.blanks": "action_model.action_queries"}  # names of then and of now


@pytest.fixture
def continued(tmp_path, monkeypatch) -> Path:
    """The old run, killed after step 3 of 6 and finished by the present code."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return train(load_config("runs/llava", "--trainer.resume true")).resolve()


def test_an_old_run_reaches_the_same_weights(continued):
    found = load_file(continued / "checkpoints/step_000006/model.safetensors")
    expected = load_file(OLD / "llava_step6.safetensors")
    expected = {RENAMED.get(key, key) if key not in found else key: value for key, value in expected.items()}
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_an_old_run_logs_the_same_numbers(continued):
    timed = {"data_s", "step_s", "samples_per_s"}
    found, expected = (
        [{key: value for key, value in row.items() if key not in timed} for row in read_metrics(path)]
        for path in (continued / "metrics.jsonl", OLD / "llava_metrics.jsonl")
    )
    assert found == expected
