"""Videos that every browser plays."""

from pathlib import Path

import numpy as np
import pytest

from vla_bench.evaluation.rollout import Recording
from vla_bench.viz.attention import attention_frames
from vla_bench.viz.video import rollout_frames, save_video

av = pytest.importorskip("av")
pytest.importorskip("mediapy")

RECORDING = Path(__file__).parents[2] / "nbs" / "viz" / "recording.npz"


@pytest.fixture(scope="module")
def recording():
    return Recording.load(RECORDING)


@pytest.fixture(params=[rollout_frames, attention_frames], ids=["plain", "with attention"])
def frames(request, recording):
    return request.param(recording)


@pytest.fixture
def video(frames, tmp_path):
    with av.open(str(save_video(tmp_path / "videos" / "one.mp4", frames))) as container:
        yield container


def test_it_is_h264_with_yuv420p(video):
    context = video.streams.video[0].codec_context
    assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_it_shows_the_frames(video, frames):
    decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    height = frames.shape[1] + frames.shape[1] % 2
    assert decoded.shape == (len(frames), height, *frames.shape[2:])
    assert np.abs(decoded.mean((1, 2, 3)) - frames.mean((1, 2, 3))).max() < 3


def test_only_the_video_is_left_in_the_folder(video, tmp_path):
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["one.mp4"]
