"""A run folder that version 0.1 wrote is continued as version 0.1 would have continued it.

With transformers' own patch embedding and norms, as version 0.1 used them, that is so bit for bit. The replacements
that are faster today agree with them to rounding.
"""

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
TIMED = {"data_s", "step_s", "samples_per_s"}
NEW = ("memory_gib", "grad_norm/")  # what version 0.1 did not log


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    """A copy of the old run, killed after step 3 of 6."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def continued() -> Path:
    """The run finished by the present code."""
    return train(load_config("runs/llava", "--trainer.resume true")).resolve()


def weights(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the run ended with, and what version 0.1 ended with, under the names of now."""
    found = load_file(run / "checkpoints/step_000006/model.safetensors")
    expected = load_file(OLD / "llava_step6.safetensors")
    expected = {RENAMED.get(key, key) if key not in found else key: value for key, value in expected.items()}
    assert found.keys() == expected.keys()
    return found, expected


def numbers(run: Path) -> list[list[dict[str, float]]]:
    """The logged rows without the times and what is new, and those of version 0.1."""
    kept = lambda key: key not in TIMED and not key.startswith(NEW)
    return [
        [{key: value for key, value in row.items() if kept(key)} for row in read_metrics(path)]
        for path in (run / "metrics.jsonl", OLD / "llava_metrics.jsonl")
    ]


def test_an_old_run_reaches_the_same_weights(old_run, as_in_0_1):
    found, expected = weights(continued())
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_an_old_run_logs_the_same_numbers(old_run, as_in_0_1):
    found, expected = numbers(continued())
    assert found == expected


def test_an_old_run_goes_on_faster_with_the_same_numbers_but_for_rounding(old_run):
    run = continued()
    (found, expected), (rows, rows_then) = weights(run), numbers(run)
    # AdamW divides by the gradient's own size: where that is rounding alone, a step may differ by its length
    far = torch.cat([(found[key] - expected[key]).abs().flatten() for key in found])
    assert far.max() < 1e-4 and far.mean() < 1e-7
    assert [row.keys() for row in rows] == [row.keys() for row in rows_then]
    for row, then in zip(rows, rows_then, strict=True):
        assert row == pytest.approx(then, abs=1e-5)
