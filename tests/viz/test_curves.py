"""The figure of a run has the panels whose numbers were measured, with these numbers."""

import json

import matplotlib.pyplot as plt
import pytest

from vla_bench.viz.curves import plot_curves

ROW = {"loss": 1.0, "grad_norm": 1.0, "learning_rate/base": 1e-3, "data_s": 0.1, "step_s": 1.0}
SUCCESS = {"eval/success_rate": 0.5, "eval/success_low": 0.2, "eval/success_high": 0.8}
LANGUAGE = {"eval/language_loss": 1.0, "eval/answer_accuracy": 0.5}


def figure(tmp_path, **more):
    rows = [{"step": step, **ROW, "samples_per_s": 8.0, **more} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plot_curves(tmp_path)
    plt.close(found)
    return {ax.get_title().partition(" (")[0]: ax for ax in found.axes if ax.get_title()}


FOUR = ["learning", "learning rate", "gradient norm", "ms per step"]
MEMORY = "most memory so far, GiB"


@pytest.mark.parametrize(
    "more, panels",
    [
        ({}, []),
        ({"memory_gib": 2.5}, [MEMORY]),
        ({"gpu_memory_gib": 40.0}, [MEMORY]),
        (SUCCESS, ["success, % of episodes"]),
        (
            {"memory_gib": 2.5, **SUCCESS, **LANGUAGE},
            [MEMORY, "success, % of episodes", "held-out conversations"],
        ),
    ],
    ids=["nothing", "memory", "of a GPU", "success", "all"],
)
def test_a_panel_is_there_when_its_numbers_are(tmp_path, more, panels):
    assert list(figure(tmp_path, **more)) == [*FOUR, *panels]


def test_memory_is_drawn_as_it_was_measured_from_zero_on(tmp_path):
    panel = figure(tmp_path, memory_gib=2.5, gpu_memory_gib=40.25)[MEMORY]
    drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
    assert drawn == {"process, 2.5 GiB": [2.5] * 3, "GPU, 40.2 GiB": [40.25] * 3}
    assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 40.25


def test_more_than_four_panels_stand_in_rows_of_three(tmp_path):
    few = figure(tmp_path)["learning"].get_subplotspec().get_gridspec()
    many = figure(tmp_path, memory_gib=2.5)["learning"].get_subplotspec().get_gridspec()
    assert (few.nrows, few.ncols, many.nrows, many.ncols) == (1, 4, 2, 3)
