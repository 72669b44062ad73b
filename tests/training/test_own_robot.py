"""`experiments/train.ipynb` with a robot that has no simulator, and with one that is not the simulator's."""

import json
from pathlib import Path

import papermill
import pytest

NOTEBOOK = Path(__file__).parents[2] / "experiments/train.ipynb"


def execute(config, tmp_path) -> list[dict]:
    """The outputs of the executed notebook."""
    config.save(tmp_path / "own.yaml")
    words = {"config": str(tmp_path / "own.yaml"), "overrides": ""}
    papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", words, progress_bar=False, cwd=tmp_path)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_without_a_simulator_predictions_are_shown_beside_what_was_recorded(config, tmp_path):
    outputs = execute(config("datasets.vla_data.held_out=0.3"), tmp_path)
    assert any("held out" in "".join(output.get("text", "")) for output in outputs)
    assert any("image/webp" in output.get("data", {}) for output in outputs)
    assert not any("VBox" in json.dumps(output) for output in outputs)
    assert not (tmp_path / "run/eval").exists()


def test_a_simulator_of_another_robot_is_refused_before_the_first_step(config, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="camera"):
        execute(config("evaluation.benchmark=point"), tmp_path)
    assert not (tmp_path / "run/checkpoints").exists()
