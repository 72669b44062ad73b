"""Frames are copied out of a video bit for bit, whatever its codec and the order of its packets."""

from itertools import combinations

import av
import numpy as np
import pytest

from vla_bench.data.paths import DatasetError
from vla_bench.data.video import VideoReader
from vla_bench.data.video_copy import Clip, copy_runs, cut_of, find_cut, plan_files, read_packets, runs_of

COUNT, FPS = 20, 30
QUIET = "log-level=none"
CODECS = {
    "b_frames": ("libx264", {"bf": "3", "x264-params": "b-adapt=0"}),
    "open_groups": ("libx264", {"g": "6", "bf": "3", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "short_groups": ("libx264", {"g": "2", "bf": "0"}),
    "hevc": ("libx265", {"x265-params": f"{QUIET}:keyint=6:min-keyint=6"}),
    "av1": ("libsvtav1", {"g": "5", "preset": "12"}),
}


def frames(seed: int = 0) -> list[np.ndarray]:
    """Noise that moves, so that no two frames are alike and every frame refers to others."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    return [np.roll(base, 5 * i, axis=1) // 2 + np.uint8(i * 6) for i in range(COUNT)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make):
    """One video per codec."""
    av.logging.set_level(av.logging.PANIC)
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, options) in CODECS.items():
        make.encode(folder / f"{name}.mp4", frames(), FPS, codec, options)
    return folder


def pixels(path, slack: float = 1e-6) -> np.ndarray:
    """Every frame; their times are checked on the way."""
    reader = VideoReader(path)
    assert np.allclose(reader.times, np.arange(reader.frame_count) / FPS, atol=slack)
    return np.stack([reader.read(i) for i in range(reader.frame_count)])


def backwards(path) -> np.ndarray:
    reader = VideoReader(path)
    return np.stack([reader.read(i) for i in reversed(range(reader.frame_count))])[::-1]


@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_has_the_frames_of_the_whole(codec, videos, tmp_path):
    path, hows = videos / f"{codec}.mp4", set()
    expected = pixels(path)
    spans = [span for span in combinations(range(COUNT + 1), 2) if sum(span) % 5 == 0]
    for first, end in spans:
        how, [(begin, behind)] = copy_runs(tmp_path / "cut.mp4", [[Clip(path, first, end)]])
        assert (begin, behind) == pytest.approx((0, (end - first) / FPS))
        assert (pixels(tmp_path / "cut.mp4") == expected[first:end]).all(), (first, end, how)
        hows.add(how)
    assert {"cut at key frames", "cut, with hidden frames"} <= hows


@pytest.mark.parametrize("codec", CODECS)
def test_a_cut_can_be_cut_again(codec, videos, tmp_path):
    path = videos / f"{codec}.mp4"
    copy_runs(tmp_path / "once.mp4", [[Clip(path, 3, 17)]])
    copy_runs(tmp_path / "twice.mp4", [[Clip(tmp_path / "once.mp4", 2, 9)]])
    assert (pixels(tmp_path / "twice.mp4") == pixels(path)[5:12]).all()
    assert (backwards(tmp_path / "twice.mp4") == pixels(path)[5:12]).all()


@pytest.mark.parametrize("codec", CODECS)
def test_videos_of_one_encoder_share_a_file(codec, videos, tmp_path, make):
    name, options = CODECS[codec]
    make.encode(tmp_path / "other.mp4", frames(1), FPS, name, options)
    clips = [Clip(videos / f"{codec}.mp4", 0, COUNT), Clip(tmp_path / "other.mp4", 0, COUNT)]
    [runs] = plan_files(clips, 1 << 30)
    how, times = copy_runs(tmp_path / "joined.mp4", runs)
    assert how == "cut at key frames"
    assert np.allclose(times, [(0, COUNT / FPS), (COUNT / FPS, 2 * COUNT / FPS)])
    expected = np.concatenate([pixels(clip.path) for clip in clips])
    assert (pixels(tmp_path / "joined.mp4") == expected).all()
    assert (backwards(tmp_path / "joined.mp4") == expected).all()


@pytest.mark.parametrize("codec", ["open_groups", "hevc"])
def test_what_begins_with_an_open_group_never_follows_another_video(codec, videos):
    path = videos / f"{codec}.mp4"
    video = read_packets(path)
    opened = [int(np.searchsorted(video.shown, pts)) for pts in video.pts[video.key & ~video.alone]]
    assert opened, "the encoder made no open group"
    for first in opened:
        assert len(plan_files([Clip(path, 0, 2), Clip(path, first, COUNT)], 1 << 30)) == 2


def test_an_idr_frame_may_follow(videos):
    path = videos / "short_groups.mp4"
    assert len(plan_files([Clip(path, 0, 3), Clip(path, 8, 12)], 1 << 30)) == 1


def test_hidden_frames_stay_in_a_file_of_their_own(videos):
    path = videos / "short_groups.mp4"
    assert len(plan_files([Clip(path, 0, 3), Clip(path, 9, 12)], 1 << 30)) == 2
    b_frames = videos / "b_frames.mp4"
    end = next(e for e in range(1, COUNT) if find_cut(Clip(b_frames, 0, e)).behind)
    assert len(plan_files([Clip(b_frames, 0, end), Clip(b_frames, 0, COUNT)], 1 << 30)) == 2


def test_other_settings_make_another_file(videos):
    clips = [Clip(videos / f"{name}.mp4", 0, COUNT) for name in ("b_frames", "short_groups", "av1")]
    assert len(plan_files(clips, 1 << 30)) == 3


def test_a_file_is_no_larger_than_told(videos):
    clip = Clip(videos / "av1.mp4", 0, COUNT)
    size = cut_of([clip]).size
    assert [len(plan_files([clip, clip, clip], limit)) for limit in (size, 2 * size, 3 * size)] == [3, 2, 1]


def test_clips_that_follow_each_other_are_one_run(videos):
    path, other = videos / "av1.mp4", videos / "hevc.mp4"
    clips = [Clip(path, 0, 2), Clip(path, 2, 5), Clip(path, 6, 7), Clip(other, 7, 8)]
    assert runs_of(clips) == [clips[:2], clips[2:3], clips[3:]]


def test_a_whole_file_is_copied_byte_for_byte(videos, tmp_path):
    path = videos / "hevc.mp4"
    how, _ = copy_runs(tmp_path / "new.mp4", [[Clip(path, 0, 7), Clip(path, 7, COUNT)]])
    assert how == "copied whole" and (tmp_path / "new.mp4").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rate", [29.97, 50])
def test_times_are_those_of_the_video(rate, tmp_path, make):
    make.encode(tmp_path / "v.mp4", frames(), rate, *CODECS["b_frames"])
    _, times = copy_runs(
        tmp_path / "new.mp4", [[Clip(tmp_path / "v.mp4", 2, 5), Clip(tmp_path / "v.mp4", 5, 9)]]
    )
    assert np.allclose(times, np.array([(0, 3), (3, 7)]) / rate, atol=1e-5)
    assert np.allclose(VideoReader(tmp_path / "new.mp4").times, np.arange(7) / rate, atol=1e-5)


def test_another_container_becomes_mp4(tmp_path, make):
    make.encode(tmp_path / "v.mkv", frames(), FPS, "libx264", {"bf": "0"})
    for first, end in [(0, COUNT), (3, 11)]:
        copy_runs(tmp_path / "new.mp4", [[Clip(tmp_path / "v.mkv", first, end)]])
        expected = pixels(tmp_path / "v.mkv", 0.001)[first:end]  # Matroska counts milliseconds
        assert (pixels(tmp_path / "new.mp4", 0.001) == expected).all()


def test_depth_is_copied_as_it_is(tmp_path):
    with av.open(str(tmp_path / "depth.mp4"), "w") as container:
        options = {"x265-params": f"{QUIET}:lossless=1"}
        stream = container.add_stream("libx265", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "gray12le"
        for i in range(8):
            image = av.VideoFrame.from_ndarray(np.full((64, 64), 500 * i, np.uint16), format="gray16le")
            container.mux(stream.encode(image.reformat(format="gray12le")))
        container.mux(stream.encode())
    levels = lambda path: [f.to_ndarray().flat[0] for f in av.open(str(path)).decode(video=0)]
    copy_runs(tmp_path / "cut.mp4", [[Clip(tmp_path / "depth.mp4", 3, 7)]])
    assert levels(tmp_path / "cut.mp4") == levels(tmp_path / "depth.mp4")[3:7]


@pytest.mark.parametrize(
    "content, message",
    [(None, "v.mp4 cannot be read: No such file"), (b"no video", "v.mp4 cannot be read as a video")],
    ids=["missing", "no video"],
)
def test_what_is_no_video_is_named(content, message, tmp_path):
    if content:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read_packets(tmp_path / "v.mp4")


def test_frames_that_are_not_there_are_named(videos):
    with pytest.raises(DatasetError, match=r"av1.mp4: no frames 18 to 20, it has 20"):
        find_cut(Clip(videos / "av1.mp4", 18, 21))


def test_a_codec_that_mp4_does_not_hold_is_named(tmp_path, make):
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("rawvideo", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in frames()[:3]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame[:32, :32].copy(), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(DatasetError, match="v.mkv: rawvideo cannot be kept in MP4"):
        copy_runs(tmp_path / "new.mp4", [[Clip(tmp_path / "v.mkv", 0, 3)]])
