"""Every notebook of the package runs top to bottom: its cells are the unit tests."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


@pytest.fixture
def run(server):
    """Runs a notebook in a copy of a process that has imported torch and transformers."""
    return lambda path: server({"notebook": str(path)})


def written(folder: Path, name: str, code: str) -> Path:
    """A notebook of one cell."""
    cell = {"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": []}
    notebook = {"cells": [cell | {"source": code}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps(notebook))
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_runs(run, path):
    done = run(path)
    assert done["returncode"] == 0, done["output"][-4000:]


def test_a_notebook_that_fails_says_where(run, tmp_path):
    done = run(written(tmp_path, "wrong", "assert 1 + 1 == 3, 'sums'"))
    assert done["returncode"] == 1 and "AssertionError: sums" in done["output"]


def test_a_notebook_that_dies_is_not_waited_for(run, tmp_path):
    done = run(written(tmp_path, "dies", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert done["returncode"] == -9


def test_a_notebook_keeps_nothing_of_another(run, tmp_path):
    """What one notebook sets is gone in the next, as in a process of its own."""
    sets = "import os, sys, torch\ntorch.kept = sys.modules['kept'] = os.environ['KEPT'] = 'x'"
    looks = "import os, sys, torch\nassert 'kept' not in {*sys.modules, *vars(torch)} and 'KEPT' not in os.environ"
    assert [run(written(tmp_path, *pair))["returncode"] for pair in (("sets", sets), ("looks", looks))] == [
        0,
        0,
    ]
