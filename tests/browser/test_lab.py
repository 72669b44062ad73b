"""JupyterLab as people have it: executed notebooks opened untrusted, the explorer, a tutorial run from top to bottom."""

import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "experiments/train.ipynb"
EXECUTED = ROOT / "experiments/runs/smoke/train.ipynb"
TUTORIAL = ROOT / "nbs/tutorials/10_own_head.ipynb"
VIDEO = "img[src^='data:image/webp']"
WIDGETS = {
    "explorer": """from vla_bench.evaluation.rollout import Recording
from vla_bench.viz.widgets import explore
explore(Recording.load(ROOT + "/nbs/viz/recording.npz"), names=["x", "y", "z", "gripper"])""",
    "player": """from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.viz.episodes import play_episodes
play_episodes(LeRobotDataset(ROOT + "/tests/fixtures/version_0_1/dataset"))""",
    "what if": """import numpy as np
from PIL import Image
from vla_bench.viz.what_if import ask_what_if
class Bright:  # moves as far as the image is bright
    spec = type("Spec", (), {"action": type("Layout", (), {"names": tuple("xyz") + ("roll", "pitch", "yaw", "gripper")})})
    def predict(self, observation, *, seed):
        return np.full((8, 7), np.asarray(observation["image"][0]).mean() / 255)
ask_what_if(Bright(), {"image": [Image.new("RGB", (64, 64), "orange")], "lang": "open the drawer"})""",
}
PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
SHOWN = "const shown = jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.outputs?.length);"
CURVES = """
const panel = jupyterapp.shell.currentWidget.content;
const cell = panel.widgets.find(c => c.model.type == 'code' && /plot_curves\\(run\\)|live/.test(
    c.model.sharedModel.getSource()) && c.node.querySelector('.jp-OutputArea img'));
if (!cell) { return null; }
const image = cell.node.querySelector('.jp-OutputArea img');
const top = panel.widgets[0].node.getBoundingClientRect().top;
return image.naturalWidth > 0 ? image.getBoundingClientRect().bottom - top : null;
"""


@pytest.fixture
def executed(absent, lab):
    """A notebook that papermill has written, in a JupyterLab that has not signed it."""
    if not EXECUTED.is_file() or EXECUTED.stat().st_mtime < TRAIN.stat().st_mtime:
        absent("experiments/runs/smoke/train.ipynb is absent, or older than experiments/train.ipynb")
    return shutil.copy(EXECUTED, lab.root / "train.ipynb")


def moves(window, image) -> None:
    """Waits until an image is drawn otherwise than before, and is not black."""
    window.wait(lambda: window.run("return arguments[0].naturalWidth", image) > 0, "the image")
    first = window.seen(image)
    assert first.mean() > 20 and first.std() > 5, "the video is black"
    window.wait(lambda: (window.seen(image) != first).any(), "another frame of the video", 20)


def test_an_executed_training_plays_its_video_untrusted(executed, lab, window):
    lab.open(window, "train.ipynb")
    assert window.run(SHOWN + "return shown.length && shown.every(c => !c.model.trusted)")
    image = scrolled_to(window, VIDEO)
    window.keep("video")
    moves(window, image)


def test_an_executed_training_shows_its_curves_on_its_first_2000_pixels(executed, lab, window):
    window.size(1280, 2100)
    lab.open(window, "train.ipynb")
    bottom = window.wait(CURVES, "the curves")
    window.keep("curves")
    assert bottom <= 2000


def scrolled_to(window, selector: str):
    """The first element of its kind, in the middle of the window; cells are drawn only when they come into sight."""
    return window.wait(lambda: window.run(SCROLL, selector), selector)


SCROLL = """
for (const cell of jupyterapp.shell.currentWidget.content.widgets) {
    cell.node.scrollIntoView();
    const found = cell.node.querySelector(arguments[0]);
    if (found) {
        found.scrollIntoView({block: 'center'});
        return found;
    }
}
"""
RECTANGLES = """
return ['.widget-image', '.widget-slider'].map(kind => {
    const r = document.querySelector(kind).getBoundingClientRect();
    return [r.left, r.top, innerWidth - r.right, innerHeight - r.bottom];
});
"""


def open_widget(lab, window, source: str) -> None:
    """Runs a cell that shows a widget with an image, in a window of 900 x 700 pixels."""
    cell = new_code_cell(source.replace("ROOT", repr(str(ROOT))))
    nbformat.write(new_notebook(cells=[cell], metadata=PYTHON), lab.root / "widget.ipynb")
    window.size(900, 700)
    lab.open(window, "widget.ipynb")
    lab.run_all(window)
    assert not lab.errors(window)
    window.wait("return document.querySelector('.widget-image')?.naturalWidth > 0", "the widget")
    window.run("document.querySelector('.widget-image').parentElement.scrollIntoView({block: 'nearest'})")


@pytest.mark.parametrize("source", WIDGETS.values(), ids=WIDGETS)
def test_a_drag_on_a_slider_changes_the_image_while_both_are_visible(source, lab, window):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    open_widget(lab, window, source)
    image = window.driver.find_element(By.CSS_SELECTOR, ".widget-image")
    before = image.get_attribute("src")
    handle = window.driver.find_element(By.CSS_SELECTOR, ".widget-slider .noUi-handle")
    ActionChains(window.driver).drag_and_drop_by_offset(
        handle, -30 if "what_if" in source else 60, 0
    ).perform()
    window.wait(lambda: image.get_attribute("src") != before, "another image")
    window.keep(f"widget_{list(WIDGETS.values()).index(source)}")
    assert np.min(window.run(RECTANGLES)) >= 0, "image and slider are not visible together"


def test_the_tutorial_of_an_own_head_runs_from_top_to_bottom(lab, window):
    shutil.copy(TUTORIAL, lab.root / "own_head.ipynb")
    content = json.loads((lab.root / "own_head.ipynb").read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    (lab.root / "own_head.ipynb").write_text(json.dumps(content))
    lab.open(window, "own_head.ipynb")
    lab.run_all(window)
    assert not lab.errors(window)
    if "show_video" in json.dumps(content):
        moves(window, scrolled_to(window, VIDEO))
    else:
        scrolled_to(window, ".jp-OutputArea img")
    window.keep("own_head")


def test_math_is_drawn_without_a_network(lab, window):
    cell = new_markdown_cell(r"$\mathcal L = -\log p(a \mid h)$")
    nbformat.write(new_notebook(cells=[cell], metadata=PYTHON), lab.root / "math.ipynb")
    lab.open(window, "math.ipynb")
    drawn = "return document.querySelector('mjx-container')?.getBoundingClientRect().width > 50"
    window.wait(drawn, "an equation")
    window.keep("math")


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_an_executed_notebook_is_small_and_shows_no_warning(name, executed):
    path = EXECUTED.with_name(f"{name}.ipynb")
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    assert path.stat().st_size < 3_000_000
    assert not [output for output in outputs if output.get("name") == "stderr"]
    texts = ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]
    assert not [text for text in texts if "Warning" in text or "Box(children" in text]
