"""A recording as a model sees it: each sample against numbers made by hand, at the ends of episodes too."""

import numpy as np
import pytest

from vla_bench.data.action_modes import encode_actions, encode_state, make_encoding
from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.normalize import Normalizer, compute_statistics
from vla_bench.data.parts import Part
from vla_bench.data.view import ModelView, Widths
from vla_bench.data.viewed import ViewedDataset, viewed_statistics
from vla_bench.data.windows import window_rows
from vla_bench.data.writer import LeRobotWriter

NAMES = ("x", "y", "r0", "r1", "r2")
PARTS = (Part("place", NAMES[:2], "position"), Part("turn", NAMES[2:], "rotation", rotation="axis_angle"))
ENCODING = make_encoding(PARTS, PARTS, {"place": "delta", "turn": "relative"}, "rotation_6d")
LENGTHS = (5, 1, 7)
HISTORY = (-3, -1, 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three episodes of 12.5 Hz, one of a single frame, two cameras; the numbers of frames are in the red channel."""
    root, rng, number = tmp_path_factory.mktemp("seen") / "toy", np.random.default_rng(0), 0
    layout = Layout(NAMES)
    cameras = {"left": (16, 16), "right": (16, 16)}
    with LeRobotWriter(
        root, fps=12.5, cameras=cameras, state=layout, action=layout, benchmark="desk", crf=0
    ) as writer:
        for length in LENGTHS:
            films = {}
            for camera, name in enumerate(cameras):
                levels = 10 * np.arange(number, number + length) + 100 * camera
                films[name] = np.tile(levels[:, None, None, None].astype(np.uint8), (1, 16, 16, 3))
            state, action = rng.normal(size=(2, length, 5))
            writer.add_episode(images=films, state=state, action=action, task=f"task {number}")
            number += length
    return LeRobotDataset(root, horizon=3)


def level(image) -> int:
    """The frame and camera that an image was recorded as."""
    return round(float(np.asarray(image).mean()) / 10)


def view_of(dataset, **change) -> ModelView:
    statistics = viewed_statistics([dataset], ENCODING)
    scales = {name: Normalizer(statistics[name], "min_max") for name in ("action", "state")}
    return ModelView(
        **{"normalizers": scales, "encoding": ENCODING, "history": HISTORY, "prompt": "do {lang}", **change}
    )


def bounds(row: int) -> tuple[int, int]:
    ends = np.cumsum((0, *LENGTHS))
    episode = int(np.searchsorted(ends, row, side="right")) - 1
    return int(ends[episode]), int(ends[episode + 1])


@pytest.mark.parametrize("row", range(sum(LENGTHS)))
def test_a_sample_is_what_its_definition_says(dataset, row):
    own = view_of(dataset)
    seen = ViewedDataset(dataset, own, future=(1, 3))
    sample, columns = seen[row], dataset.columns
    rows, is_pad = window_rows(row, *bounds(row), HISTORY)
    states = columns["state"][rows]
    expected = np.concatenate(
        [own.normalizers["state"].normalize(encode_state(ENCODING, each)) for each in states]
    )
    np.testing.assert_allclose(sample["state"], expected, atol=1e-6)
    begin, end = bounds(row)
    chunk = columns["action"][np.minimum(row + np.arange(3), end - 1)]
    expected = own.normalizers["action"].normalize(encode_actions(ENCODING, chunk, columns["state"][row]))
    np.testing.assert_allclose(sample["action"], expected, atol=1e-6)
    assert sample["action_is_pad"].tolist() == [row + step >= end for step in range(3)]
    assert [level(image) for image in sample["image"]] == [*rows, *(rows + 10)]
    assert ("image_mask" in sample) == is_pad.any()
    assert not is_pad.any() or sample["image_mask"].tolist() == [*~is_pad, *~is_pad]
    later, beyond = window_rows(row, begin, end, (1, 3))
    assert [level(image) for image in sample["future"]] == [*later, *(later + 10)]
    assert sample["future_is_pad"].tolist() == [*beyond, *beyond]
    assert sample["lang"] == f"do task {begin}" and sample["dataset"] == "toy"


def test_without_history_or_future_there_is_one_image_per_camera(dataset):
    sample = ViewedDataset(dataset, ModelView())[3]
    assert [level(image) for image in sample["image"]] == [3, 13]
    assert not {"image_mask", "future", "future_is_pad", "action_mask"} & set(sample)
    np.testing.assert_array_equal(sample["state"], dataset.columns["state"][3])
    np.testing.assert_array_equal(
        sample["action"], dataset.columns["action"][3:5].tolist() + [dataset.columns["action"][4].tolist()]
    )


def test_a_wider_model_pads_behind_what_the_robot_has(dataset):
    seen = ViewedDataset(dataset, view_of(dataset, widths=Widths(12, 30, 8)))
    assert seen.dims == (8, 24) and seen.action_dim == 8  # before padding
    sample = seen[12]
    assert sample["action"].shape == (3, 12) and (sample["action"][:, 8:] == 0).all()
    assert sample["action_mask"].tolist() == [True] * 8 + [False] * 4
    assert sample["state"].shape == (30,) and len(sample["image"]) == 8


def test_what_a_dataset_is_stays_as_it_was(dataset):
    seen = ViewedDataset(dataset.select([2, 0]), ModelView(history=(-1, 0)))
    assert (seen.name, seen.horizon, seen.cameras, seen.episodes) == ("toy", 3, ("left", "right"), [2, 0])
    assert seen.starts.tolist() == [0, 7, 12] and len(seen) == 12
    assert seen.action_layout == seen.state_layout == Layout(NAMES) and seen.dims == (5, 10)
    other = seen.with_view(ModelView(prompt="p {lang}"))
    assert (other.view.prompt, other.future, other.dataset) == ("p {lang}", (), seen.dataset)
    assert ViewedDataset(dataset, ModelView(), [2]).with_view(ModelView()).future == (2,)
    with pytest.raises(ValueError, match="toy is scaled already"):
        ViewedDataset(dataset.with_normalizers({"action": None}), ModelView())


def test_statistics_of_several_recordings_are_those_of_all_rows(dataset):
    parts = [dataset.select([0]), dataset.select([2])]
    for encoding in (None, ENCODING):
        found = viewed_statistics(parts, encoding)
        assert (found["num_transitions"], found["num_trajectories"]) == (12, 2)
        states = [part.columns["state"] for part in parts]
        expected = compute_statistics(
            [encode_state(ENCODING, each) for each in states] if encoding else states
        )
        np.testing.assert_allclose(found["state"].mean, expected.mean, atol=1e-12)
        np.testing.assert_allclose(found["state"].q99, expected.q99, atol=1e-12)
    plain = viewed_statistics(parts, None)
    expected = compute_statistics([part.columns["action"] for part in parts])
    np.testing.assert_array_equal(plain["action"].std, expected.std)
    seen = []
    for row in [*range(5), *range(6, 13)]:
        end = bounds(row)[1]
        chunk = dataset.columns["action"][row : min(row + 3, end)]
        seen.append(encode_actions(ENCODING, chunk, dataset.columns["state"][row]))
    np.testing.assert_allclose(found["action"].max, np.concatenate(seen).max(0), atol=1e-12)
    assert found["action"].count == sum(map(len, seen))


def test_without_a_state_there_are_no_statistics_of_one(dataset):
    blind = LeRobotDataset(dataset.root, horizon=3, state_key=None)
    assert viewed_statistics([blind], None)["state"] is None
    plain = make_encoding(PARTS, (), rotation="rotation_6d")
    assert viewed_statistics([blind], plain)["state"] is None
    seen = ViewedDataset(blind, ModelView(encoding=plain, history=(-1, 0)))
    assert seen.dims == (8, 0) and "state" not in seen[3] and len(seen[3]["image"]) == 4
