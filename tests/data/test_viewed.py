"""Windows, modes and statistics of a dataset as a model sees it; its actions and states count its frames."""

import numpy as np
import pytest

from vla_bench.data.action_modes import MODES, encode_actions, make_encoding
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.normalize import Normalizer
from vla_bench.data.parts import Part
from vla_bench.data.view import ModelView
from vla_bench.data.viewed import ViewedDataset, viewed_statistics

LENGTHS = (6, 1, 11)
ENDS = np.cumsum(LENGTHS)
PARTS = (Part("hand", ("x", "y", "z"), "position", unit="m"),)
HORIZONS = (1, 4, 15)  # shorter than an episode, and longer than every one


@pytest.fixture(scope="module", params=["v21", "v30"])
def root(make, tmp_path_factory, request):
    return getattr(make, request.param)(tmp_path_factory.mktemp("counting") / "arm", lengths=LENGTHS)


def end_of(row):
    return int(ENDS[np.searchsorted(ENDS, row, side="right")])


def chunk(row, horizon):
    """The rows that belong to a chunk, and which of them are padding: the last one is repeated."""
    rows = row + np.arange(horizon)
    return np.minimum(rows, end_of(row) - 1), rows >= end_of(row)


@pytest.mark.parametrize("horizon", HORIZONS)
def test_every_window_holds_the_frames_it_should(root, horizon):
    dataset = LeRobotDataset(root, horizon=horizon)
    for row in range(len(dataset)):
        rows, is_pad = chunk(row, horizon)
        sample = dataset[row]
        np.testing.assert_array_equal(sample["action"], rows[:, None] + np.arange(3))
        np.testing.assert_array_equal(sample["action_is_pad"], is_pad)
        np.testing.assert_array_equal(sample["state"], row + np.arange(3))


@pytest.mark.parametrize("episodes", [[2, 0], [1], [0, 1, 2]])
def test_windows_of_chosen_episodes_stay_in_their_episode(root, make, episodes):
    part = LeRobotDataset(root, horizon=4).select(episodes)
    begins = np.append(0, ENDS)
    expected = [row for e in episodes for row in range(begins[e], begins[e + 1])]
    for sample, row in zip((part[i] for i in range(len(part))), expected, strict=True):
        rows, is_pad = chunk(row, 4)
        np.testing.assert_array_equal(sample["action"][:, 0], rows)
        np.testing.assert_array_equal(sample["action_is_pad"], is_pad)
        assert make.level_of(sample["image"][0]) == row % 16


@pytest.mark.parametrize("history", [(0,), (-2, -1, 0), (-6, -3, 0)])
def test_history_and_future_stay_in_their_episode(root, make, history):
    future, dataset = (1, 5), LeRobotDataset(root)
    seen = ViewedDataset(dataset, ModelView(history=history), future)
    begins = np.append(0, ENDS)
    for row in range(len(dataset)):
        sample, end = seen[row], end_of(row)
        first = begins[np.searchsorted(ENDS, row, side="right")]
        before = np.maximum(row + np.array(history), first)
        np.testing.assert_array_equal(sample["state"].reshape(-1, 3)[:, 0], before)
        assert [make.level_of(image) for image in sample["image"]] == [r % 16 for r in before]
        after = np.minimum(row + np.array(future), end - 1)
        assert [make.level_of(image) for image in sample["future"]] == [r % 16 for r in after]
        np.testing.assert_array_equal(sample["future_is_pad"], row + np.array(future) >= end)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", ["min_max", "mean_std", "q99"])
def test_what_a_model_learns_is_undone_to_the_frames_in_every_mode(root, mode, horizon, scale):
    """Over the ends of episodes and padding: decode(encode(x)) = x to 1e-5."""
    dataset, encoding = LeRobotDataset(root, horizon=horizon), make_encoding(PARTS, PARTS, mode)
    statistics = viewed_statistics([dataset], encoding)
    view = ModelView({n: Normalizer(statistics[n], scale) for n in ("action", "state")}, encoding)
    seen = ViewedDataset(dataset, view)
    for row in range(len(dataset)):
        states = (row + np.arange(3.0))[None]
        back = view.physical(seen[row]["action"], states)
        assert np.abs(back - chunk(row, horizon)[0][:, None] - np.arange(3)).max() < 1e-5


def test_relative_and_delta_are_what_they_say(root):
    dataset = LeRobotDataset(root, horizon=4)
    for row in range(len(dataset)):
        rows, is_pad = chunk(row, 4)
        for mode, expected in (("relative", rows - row), ("delta", np.where(is_pad, 0, [0, 1, 1, 1]))):
            view = ModelView(encoding=make_encoding(PARTS, PARTS, mode))
            np.testing.assert_array_equal(
                ViewedDataset(dataset, view)[row]["action"], [[n] * 3 for n in expected]
            )


@pytest.fixture(scope="module")
def several(make, tmp_path_factory):
    """Three recordings of one robot with other numbers and lengths."""
    roots, rng = [], np.random.default_rng(0)
    for number, lengths in enumerate(((9, 4), (30,), (2, 2, 3))):
        values = rng.normal(size=(sum(lengths), 3)) * [1, 1e-3, 1e3] + number
        extra = {name: lambda row, v=values: v[row].tolist() for name in ("action", "observation.state")}
        roots.append(
            make.v30(tmp_path_factory.mktemp("several") / f"d{number}", lengths=lengths, extra=extra)
        )
    return [LeRobotDataset(root, horizon=3) for root in roots]


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("which", [(0,), (1, 2), (0, 1, 2)])
def test_statistics_are_numpys_on_the_concatenated_columns(several, mode, which):
    """Mean, deviation, extremes and true quantiles, of one dataset and of several together."""
    datasets = [several[i] for i in which]
    encoding = mode and make_encoding(PARTS, PARTS, mode)
    found = viewed_statistics(datasets, encoding)
    columns = {
        name: np.concatenate([d.columns[name] for d in datasets]).astype(float)
        for name in ("action", "state")
    }
    if encoding:  # then chunks count, each action once for every chunk that it is in
        samples = [d[i] for d in datasets for i in range(len(d))]
        seen = [encode_actions(encoding, s["action"], s["state"])[~s["action_is_pad"]] for s in samples]
        columns["action"] = np.concatenate(seen)
    for name, column in columns.items():
        expected = {n: getattr(column, n)(0) for n in ("min", "max", "mean", "std")}
        expected |= {"q01": np.quantile(column, 0.01, axis=0), "q99": np.quantile(column, 0.99, axis=0)}
        for key, value in expected.items():
            np.testing.assert_allclose(
                getattr(found[name], key), value, rtol=1e-9, atol=1e-9, err_msg=f"{name} {key}"
            )
        assert found[name].count == len(column)
    assert found["num_transitions"] == sum(len(d) for d in datasets)
