"""The figure of a night's training: stored once, small, and on the first screens of the executed notebook."""

import base64
import json

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

TRAINING = """
import json, math, time
from pathlib import Path
from vla_bench.viz.live import LiveFigure, live

def begin(name):
    run = Path(name)
    run.mkdir()
    (run / "config.yaml").write_text("trainer: {max_train_steps: 72000}")
    return run, (run / "metrics.jsonl").open("a")

run, file = begin("night")

def write(steps):
    for step in steps:
        row = {"step": step, "loss": math.exp(-step / 9000) + 0.1, "learning_rate/base": 1e-3, "data_s": 0.1, "step_s": 0.4}
        file.write(json.dumps(row) + "\\n")
        if step % 1000 == 0:
            errors = {f"eval/action_error/{n}": math.exp(-step / 9000 - n) for n in range(7)}
            file.write(json.dumps({"step": step, "eval/action_error": 0.2, **errors}) + "\\n")
    file.flush()
"""
TEN_HOURS = """
figure = LiveFigure(run)
drawn = 0
for hour in range(10):  # a row every five seconds
    write(range(7200 * hour + 10, 7200 * hour + 7201, 10))
    drawn += figure.look(now=1e6 * (hour + 1))
print(drawn)
"""
BESIDE = """
run, file = begin("evening")
with live(run, every=0):
    write(range(10, 501, 10))
    late = time.monotonic() + 60
    while len(shown) < 2 and time.monotonic() < late:
        time.sleep(0.01)
    write(range(510, 1001, 10))
"""
COUNTED = """
shown, update = [], LiveFigure.look
def look(self, *words, **more):
    done = update(self, *words, **more)
    shown.extend([done] * done)
    return done
LiveFigure.look = look
shown.append(True)
"""


FAILS = """
with live(run):
    write(range(1010, 1101, 10))
    raise FloatingPointError("no number")
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The path of a notebook of three trainings, as papermill leaves it."""
    folder = tmp_path_factory.mktemp("live")
    cells = [new_code_cell(source) for source in (TRAINING, TEN_HOURS, COUNTED, BESIDE, FAILS)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="no number"):
        papermill.execute_notebook(folder / "in.ipynb", folder / "out.ipynb", cwd=folder, progress_bar=False)
    return folder / "out.ipynb"


def outputs(executed, place: int) -> list[dict]:
    """Those of a cell, counted from the last one."""
    cells = [cell for cell in json.loads(executed.read_text())["cells"] if cell["cell_type"] == "code"]
    return cells[place]["outputs"]


def test_ten_hours_leave_one_figure_in_a_small_notebook(executed):
    figure, printed = outputs(executed, -4)
    assert "".join(printed["text"]) == "10\n"
    assert "".join(figure["data"]["text/plain"]) == "night: step 72000 of 72000, finished"
    image = base64.b64decode(figure["data"]["image/png"])
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width < 860 and height < 300
    assert executed.stat().st_size < 500_000  # with the figures of three trainings


def test_a_training_cell_keeps_the_last_of_its_figures(executed):
    (figure,) = outputs(executed, -2)
    assert "".join(figure["data"]["text/plain"]).startswith("evening: step 1000 of 72000")


def test_a_training_that_fails_leaves_its_curves(executed):
    figure, error = outputs(executed, -1)
    assert "".join(figure["data"]["text/plain"]).startswith("evening: step 1100 of 72000")
    assert "image/png" in figure["data"] and error["ename"] == "FloatingPointError"
