"""Windows of frames: rows and masks by value, at both ends of an episode that begins anywhere."""

import numpy as np
import pytest
from PIL import Image

from vla_bench.data.windows import History, history_offsets, join_history, window_rows


@pytest.mark.parametrize("frame", range(10, 15))
@pytest.mark.parametrize("offsets", [(0,), (-2, -1, 0), (-3, 0), (0, 1, 2), (1, 4), (-9, 9)])
def test_rows_outside_of_the_episode_are_its_ends_and_padding(frame, offsets):
    begin, end = 10, 15
    rows, is_pad = window_rows(frame, begin, end, offsets)
    assert rows.tolist() == [min(max(frame + offset, 10), 14) for offset in offsets]
    assert is_pad.tolist() == [not 10 <= frame + offset <= 14 for offset in offsets]


@pytest.mark.parametrize("frame", [9, 15, -1])
def test_a_frame_of_another_episode_is_refused(frame):
    with pytest.raises(IndexError, match=f"frame {frame} is outside its episode, 10..14"):
        window_rows(frame, 10, 15, (0,))


@pytest.mark.parametrize(
    "steps, stride, expected",
    [(1, 1, (0,)), (1, 5, (0,)), (2, 1, (-1, 0)), (3, 2, (-4, -2, 0)), (4, 3, (-9, -6, -3, 0))],
)
def test_offsets_reach_back_by_the_stride(steps, stride, expected):
    assert history_offsets(steps, stride) == expected
    assert stride != 1 or history_offsets(steps) == expected


@pytest.mark.parametrize("steps, stride", [(0, 1), (1, 0), (-1, 2), (2, -1)])
def test_less_than_one_step_is_refused(steps, stride):
    with pytest.raises(ValueError, match=f"observation_steps={steps} and observation_stride={stride}"):
        history_offsets(steps, stride)
    with pytest.raises(ValueError, match="must be at least 1"):
        History(steps, stride)


def moment(number: int, cameras: int = 2) -> dict:
    images = [Image.new("RGB", (2, 2), (number, camera, 0)) for camera in range(cameras)]
    return {"image": images, "lang": f"task {number}", "state": np.float32([number, -number])}


def seen(observation: dict) -> list[tuple[int, int]]:
    """Which moment and camera each image is of."""
    return [image.getpixel((0, 0))[:2] for image in observation["image"]]


@pytest.mark.parametrize("steps, stride", [(1, 1), (2, 1), (3, 2), (2, 3)])
def test_a_history_gives_what_a_recording_would(steps, stride):
    history = History(steps, stride)
    for _ in range(2):  # the second one begins anew
        for now in range(7):
            found = history.add(moment(now))
            moments = [now - stride * back for back in range(steps - 1, -1, -1)]
            there = [max(number, 0) for number in moments]
            assert seen(found) == [(number, camera) for camera in (0, 1) for number in there]
            assert found["state"].tolist() == [value for number in there for value in (number, -number)]
            assert found["lang"] == f"task {now}"
            if min(moments) < 0:
                assert found["image_mask"].tolist() == [number >= 0 for number in moments] * 2
            else:
                assert "image_mask" not in found
        history.clear()
    assert len(history.seen) == 0 and history.seen.maxlen == stride * (steps - 1) + 1


def test_moments_join_by_camera_and_then_by_time():
    moments = [moment(1, 3), moment(5, 3)]
    found = join_history(moments, np.array([True, False]))
    assert seen(found) == [(1, 0), (5, 0), (1, 1), (5, 1), (1, 2), (5, 2)]
    assert found["image_mask"].tolist() == [False, True] * 3
    assert found["state"].tolist() == [1, -1, 5, -5] and set(found) == {"image", "image_mask", "state"}
    assert set(join_history(moments, np.array([False, False]))) == {"image", "state"}


def test_without_a_state_none_is_joined():
    moments = [{"image": moment(n)["image"], "state": None} for n in (0, 1)]
    assert set(join_history(moments, np.array([False, False]))) == {"image"}
    assert "state" not in join_history([{"image": m["image"]} for m in moments], np.array([False, False]))


def test_a_history_prints_its_settings_alone():
    history = History(2, 3)
    history.add(moment(0))
    assert repr(history) == "History(steps=2, stride=3)"
