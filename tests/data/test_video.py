"""The right frame, whatever the encoder did and at whatever rate the video runs."""

from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from vla_bench.data import video as video_module
from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.video import MAX_OPEN, VideoError, VideoReader, open_video, reader, write_video
from vla_bench.data.video_times import index_times, packet_times

QUIET = {"x265-params": "log-level=none"}
OPEN = {"g": "12", "x264-params": "open-gop=1:bframes=4:b-pyramid=normal"}


@pytest.mark.parametrize(
    ("codec", "options", "count"),
    [
        ("libx265", QUIET, 300),
        ("libx265", {"g": "3", **QUIET}, 161),
        ("libx264", {}, 300),
        ("libx264", OPEN, 161),
        ("libx264", {"bf": "0", "g": "2"}, 60),
        ("libx264", {"x264-params": "intra-refresh=1:keyint=20"}, 120),
    ],
    ids=str,
)
def test_every_frame_is_exact_in_any_order(make, tmp_path, codec, options, count):
    encoder = lambda path, frames, fps: make.encode(path, frames, fps, codec, options)
    root = make.v21(tmp_path / "ds", lengths=(count,), encoder=encoder)
    dataset = LeRobotDataset(root)
    for i in np.random.default_rng(0).permutation(count):
        assert make.level_of(dataset[int(i)]["image"][0]) == i % 16
    assert validate(root) == []


CONTAINERS = {
    "a.mkv": {},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.ts": {},
    "no_edit_list.mp4": {"container": {"use_editlist": "0"}},
    "negative_offsets.mp4": {"container": {"movflags": "negative_cts_offsets"}},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc_no_edit_list.mp4": {"codec": "libx265", "options": QUIET, "container": {"use_editlist": "0"}},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_with_and_without_a_table_of_frames_are_read_alike(make, tmp_path, name):
    how = {"codec": "libx264", **CONTAINERS[name]}
    make.encode(tmp_path / name, [make.level(i) for i in range(120)], 30, **how)
    video = VideoReader(tmp_path / name)
    found = {
        i: int(round(float(video.read(i).mean()) / 16)) % 16
        for i in np.random.default_rng(0).permutation(120)
    }
    assert video.frame_count == 120 and all(level == i % 16 for i, level in found.items())


@pytest.mark.parametrize(
    ("rate", "lengths"),
    [
        (Fraction(30000, 1001), (60,) * 30),
        (30.2, (60,) * 6),
        (29.9, (100,) * 6),
        (30, (7, 100, 1, 33)),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_video_at_nearly_the_rate_of_its_rows_shows_the_right_frames(
    make, tmp_path, version, rate, lengths
):
    root = {"v21": make.v21, "v30": make.v30}[version](tmp_path / "ds", lengths=lengths, rate=float(rate))
    dataset = LeRobotDataset(root)
    assert all(make.level_of(dataset[i]["image"][0]) == i % 16 for i in range(0, len(dataset), 13))
    assert validate(root) == []


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_where_rows_and_frames_part_it_is_an_error_and_never_another_frame(make, tmp_path, version):
    """At 30.2 Hz they are half a frame apart after 75 frames."""
    root = {"v21": make.v21, "v30": make.v30}[version](tmp_path / "ds", lengths=(200,), rate=30.2)
    dataset, refused = LeRobotDataset(root), 0
    for i in range(200):
        try:
            assert make.level_of(dataset[i]["image"][0]) == i % 16
        except DatasetError as error:
            assert "after the first one, its row says" in str(error)
            refused += 1
    assert 200 - 77 <= refused <= 200 - 75
    assert len(validate(root)) == 1


@pytest.mark.parametrize("rate", [25, 31, 60, 15])
def test_a_video_of_another_rate_is_refused(make, tmp_path, rate):
    root = make.v21(tmp_path / "ds", rate=rate)
    with pytest.raises(DatasetError, match=f"plays at {rate} Hz, info.json says 30 Hz"):
        LeRobotDataset(root)[3]
    assert "plays at" in validate(root)[0]


def test_frames_at_irregular_times_are_found_by_the_times_of_their_rows(make, tmp_path):
    """A recording whose camera was late now and then, with rows that say so."""
    ticks = np.array([0, 3, 6, 10, 12, 16, 18, 21])  # of 90 Hz, for a camera of 30 Hz

    def irregular(path, frames, fps):
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=90)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 90)
            for frame, tick in zip(frames, ticks, strict=True):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = int(tick), Fraction(1, 90)
                container.mux(stream.encode(picture))
            container.mux(stream.encode())

    root = make.v21(tmp_path / "ds", lengths=(8,), encoder=irregular)
    path = next(root.rglob("*.parquet"))
    table = pq.read_table(path)
    table = table.set_column(0, "timestamp", [(ticks / 90).astype(np.float32)])
    pq.write_table(table, path)
    dataset = LeRobotDataset(root)
    assert [make.level_of(dataset[i]["image"][0]) for i in (5, 0, 7, 3, 1)] == [5, 0, 7, 3, 1]


@pytest.mark.parametrize("shift", [1, -1, 3])
def test_an_episode_that_begins_some_frames_off_is_found(make, tmp_path, shift):
    key = f"videos/{make.TOP}/from_timestamp"

    def change(rows):
        rows[1][key] += shift / 30
        return rows

    lines = validate(make.v30(tmp_path / "ds", lengths=(6, 5, 7), change=change))
    assert any("episode 1" in line for line in lines)


def test_a_beginning_off_in_a_file_of_its_last_episode_is_found_by_the_length(make, tmp_path):
    def change(rows):
        rows[-1][f"videos/{make.TOP}/from_timestamp"] += 1 / 30
        rows[-1][f"videos/{make.TOP}/to_timestamp"] += 1 / 30
        return rows

    assert validate(make.v30(tmp_path / "ds", change=change))


@pytest.mark.parametrize("extra", [1, 20, -1])
def test_a_video_of_another_length_is_found(make, tmp_path, extra):
    encoder = lambda path, frames, fps: make.encode(path, (frames + frames * 4)[: len(frames) + extra], fps)
    for version in (make.v21, make.v30):
        lines = validate(version(tmp_path / version.__name__, encoder=encoder))
        assert lines and all(".mp4" in line for line in lines)


def test_a_grey_video_is_refused_though_it_is_declared_as_rgb(make, tmp_path):

    def grey(path, frames, fps):
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx265", rate=30, options=QUIET)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "gray"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame[..., 0].copy(), format="gray")))
            container.mux(stream.encode())

    with pytest.raises(DatasetError, match="has the pixel format gray"):
        LeRobotDataset(make.v21(tmp_path / "ds", encoder=grey))[0]


def test_beginnings_computed_at_another_rate_than_the_videos_are_an_error_and_never_another_frame(
    make, tmp_path
):
    """Merged from metadata alone: each episode begins where it would at 30 Hz, the video runs at 29.97."""
    lengths = (60,) * 30

    def change(rows):
        for row in rows:
            row[f"videos/{make.TOP}/from_timestamp"] = row["episode_index"] * 2.0
            row[f"videos/{make.TOP}/to_timestamp"] = row["episode_index"] * 2.0 + 2
        return rows

    root = make.v30(tmp_path / "ds", lengths=lengths, rate=30000 / 1001, change=change)
    dataset, refused = LeRobotDataset(root), 0
    for i in range(0, len(dataset), 31):
        try:
            assert make.level_of(dataset[i]["image"][0]) == i % 16
        except DatasetError as error:
            assert "frames belong to the episodes before it" in str(error)
            refused += 1
    assert refused > 20 and len(validate(root)) > 10


def test_frames_of_no_episode_are_left_alone_by_the_dataset_and_told_by_validate(make, tmp_path):
    """An episode was taken out of the metadata, its frames are still in the video."""
    root = make.v30(tmp_path / "ds", lengths=(6, 5, 4), change=lambda rows: [rows[0], rows[2]])
    dataset = LeRobotDataset(root)
    assert [make.level_of(dataset[i]["image"][0]) for i in range(10)] == [0, 1, 2, 3, 4, 5, 11, 12, 13, 14]
    assert any("leaves 5 frames before it" in line for line in validate(root))


def film(count: int, height=32, width=48) -> np.ndarray:
    return np.stack([np.full((height, width, 3), 16 * (i % 16), np.uint8) for i in range(count)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A video of 40 frames at 12.5 Hz, whose grey levels tell their numbers modulo 16."""
    path = tmp_path_factory.mktemp("video") / "plain.mp4"
    write_video(path, film(40), fps=12.5)
    return path


def number(frame: np.ndarray) -> int:
    return int(round(float(frame.mean()) / 16)) % 16


def test_a_reader_knows_size_rate_and_times(plain):
    video = VideoReader(plain)
    assert (video.height, video.width, video.frame_count, video.pix_fmt) == (32, 48, 40, "yuv420p")
    assert video.fps == pytest.approx(12.5) and video.path == plain
    np.testing.assert_allclose(video.times, np.arange(40) / 12.5, atol=1e-9)
    frame = video.read(7)
    assert frame.shape == (32, 48, 3) and frame.dtype == np.uint8 and number(frame) == 7
    for index in (-1, 40):
        with pytest.raises(IndexError, match=f"plain.mp4: no frame {index}, it has 40"):
            video.read(index)


def test_a_video_of_one_frame_has_the_rate_that_it_declares(tmp_path):
    write_video(tmp_path / "one.mp4", film(1), fps=12.5)
    video = VideoReader(tmp_path / "one.mp4")
    assert video.fps == 12.5 and video.times.tolist() == [0] and number(video.read(0)) == 0


@pytest.mark.parametrize("start", [8.0, 7.0, 9.0])
def test_a_row_is_located_from_the_episodes_beginning(plain, start):
    """An episode of ten frames that begins with frame `start`; all in seconds of 12.5 Hz."""
    video, begin = VideoReader(plain), start / 12.5
    for frame in (0, 4, 9):
        assert video.locate(begin, 10, frame, frame / 12.5, 12.5) == int(start) + frame
        assert video.locate(begin, 10, frame, frame / 12.5, 12.5, (int(start), 40)) == int(start) + frame
        assert number(video.read_at(begin, 10, frame, frame / 12.5, 12.5)) == (int(start) + frame) % 16


@pytest.mark.parametrize("off, found", [(0.45, 8), (-0.45, 8), (0.55, 9), (-0.55, 7)])
def test_the_beginning_is_the_frame_within_half_a_step(plain, off, found):
    assert VideoReader(plain).locate((8 + off) / 12.5, 3, 0, 0.0, 12.5) == found


@pytest.mark.parametrize("off, fits", [(0.49, True), (-0.49, True), (0.51, False), (-0.51, False)])
def test_a_row_shows_its_frame_within_half_a_step(plain, off, fits):
    call = lambda: VideoReader(plain).locate(0.0, 10, 4, (4 + off) / 12.5, 12.5)
    if fits:
        assert call() == 4
        return
    with pytest.raises(
        VideoError,
        match=f"frame 4 from 0.000 s on is shown 0.320 s after the first one, its row says {(4 + off) / 12.5:.3f} s",
    ):
        call()


@pytest.mark.parametrize("fps, fits", [(12.62, True), (12.38, True), (12.63, False), (12.37, False)])
def test_the_rate_fits_within_one_percent(plain, fps, fits):
    if fits:
        assert VideoReader(plain).locate(0.0, 3, 0, 0.0, fps) == 0
        return
    with pytest.raises(VideoError, match=f"plays at 12.5 Hz, info.json says {fps:g} Hz"):
        VideoReader(plain).locate(0.0, 3, 0, 0.0, fps)


def test_an_episode_of_one_frame_has_no_rate(plain):
    assert VideoReader(plain).locate(0.08, 1, 0, 0.0, 11.0) == 1


@pytest.mark.parametrize(
    "start, length, counted, message",
    [
        (40.0, 1, None, "no frame is shown at 40.000 s, where the episode begins"),
        (3.2, 1, None, "no frame is shown at 3.200 s"),
        (0.8, 31, None, "30 frames from 0.800 s on, expected 31"),
        (0.8, 5, (9, 40), "at 0.800 s, where the episode begins, frame 10 is shown, but 9 frames belong"),
        (0.8, 5, (11, 40), "frame 10 is shown, but 11 frames belong"),
    ],
)
def test_an_episode_that_is_not_there_is_told(plain, start, length, counted, message):
    with pytest.raises(VideoError, match=message):
        VideoReader(plain).locate(start, length, 0, 0.0, 12.5, counted)


def test_frames_are_counted_only_where_all_of_the_video_is_known(plain):
    assert VideoReader(plain).locate(0.8, 30, 0, 0.0, 12.5, (9, 41)) == 10


@pytest.mark.parametrize("lookahead", [0, 1, 8, 100])
def test_decoding_on_gives_the_same_frames_as_seeking(plain, lookahead):
    video = VideoReader(plain)
    for index in (0, 1, 3, 20, 21, 29, 30, 5, 39, 38):
        assert number(video.read(index, lookahead)) == index % 16


def test_readers_are_kept_by_file_and_the_least_used_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "_OPEN", OrderedDict())
    monkeypatch.setattr(video_module, "MAX_OPEN", 2)
    closed, checked = [], []
    monkeypatch.setattr(VideoReader, "close", lambda self: closed.append(self.path.name))
    paths = [tmp_path / f"{name}.mp4" for name in "abc"]
    for path in paths:
        write_video(path, film(2), fps=10)
    check = lambda path: checked.append(path.name) or path
    first, second = reader(paths[0], check), reader(str(paths[1]), check)
    assert reader(paths[0], check) is first and closed == [] and checked == ["a.mp4", "b.mp4"]
    reader(paths[2], check)
    assert closed == ["b.mp4"] and reader(paths[0]) is first and reader(paths[1]) is not second
    assert closed == ["b.mp4", "c.mp4"] and MAX_OPEN == 64


def test_a_reader_of_another_process_is_left_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "_OPEN", OrderedDict())
    monkeypatch.setattr(video_module, "MAX_OPEN", 1)
    closed = []
    monkeypatch.setattr(VideoReader, "close", lambda self: closed.append(self.path.name))
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", film(2), fps=10)
    first = reader(tmp_path / "a.mp4")
    monkeypatch.setattr(video_module.os, "getpid", lambda: -1)
    assert reader(tmp_path / "a.mp4") is not first
    reader(tmp_path / "b.mp4")
    assert closed == ["a.mp4"] and len(video_module._OPEN) == 1


@pytest.mark.parametrize(
    "size, message", [((31, 48), "even height and width, got 31 x 48"), ((32, 47), "got 32 x 47")]
)
def test_odd_sizes_are_refused(tmp_path, size, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", np.zeros((1, *size, 3), np.uint8), fps=10)
    with pytest.raises(ValueError, match="a.mp4: a video needs at least one frame"):
        write_video(tmp_path / "a.mp4", [], fps=10)
    assert list(tmp_path.iterdir()) == []


def test_a_frame_of_another_kind_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.mp4"
    for wrong in (film(1, 32, 46)[0], film(1)[0].astype(np.int16), film(1)[0][..., 0]):
        with pytest.raises(ValueError, match=r"a.mp4: frame 2 is .*, expected uint8 \[32, 48, 3\]"):
            with open_video(path, height=32, width=48, fps=10) as video:
                video.write(film(1)[0])
                video.write(film(1)[0][:, ::-1])
                assert video.count == 2 and video.path == path
                video.write(wrong)
        assert not path.exists()


@pytest.mark.parametrize("fps", [10, 12.5, 30000 / 1001])
@pytest.mark.parametrize("gop", [1, 5])
def test_rate_and_key_frames_are_those_that_are_asked_for(tmp_path, fps, gop):
    write_video(tmp_path / "a.mp4", film(1).repeat(11, 0), fps=fps, gop=gop)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-6)
        frames = list(file.decode(stream))
        assert [i for i, frame in enumerate(frames) if frame.key_frame] == list(range(0, 11, gop))
        assert all(int(frame.pict_type) in (1, 2) for frame in frames)  # I or P, no B


def test_a_finer_quality_is_nearer_to_what_was_given(tmp_path):
    noise, error = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), np.uint8), {}
    noise = np.repeat(np.repeat(noise[:, ::8, ::8], 8, 1), 8, 2)
    for crf in (0, 18, 45):
        write_video(tmp_path / f"{crf}.mp4", noise, fps=10, crf=crf)
        error[crf] = np.abs(VideoReader(tmp_path / f"{crf}.mp4").read(1).astype(int) - noise[1]).mean()
    assert error[0] < error[18] < error[45] / 2


@pytest.mark.parametrize("options, table", [({"bf": "0"}, True), ({"bf": "3", "b_strategy": "0"}, False)])
def test_times_come_from_the_table_where_frames_are_in_order(make, tmp_path, options, table):
    make.encode(tmp_path / "a.mp4", list(film(20)), 10, "libx264", options)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        from_table = index_times(stream)
        from_packets = packet_times(file, stream)
    assert (from_table is not None) == table
    step = from_packets[1] - from_packets[0]
    assert (
        (np.diff(from_packets) == step).all() and len(from_packets) == 20 and from_packets.dtype == np.int64
    )
    assert not table or from_table.tolist() == from_packets.tolist()


def stream(times, discarded=(), frames=None, b_frames=False) -> SimpleNamespace:
    entries = [SimpleNamespace(timestamp=t, is_discard=i in discarded) for i, t in enumerate(times)]
    codec = SimpleNamespace(has_b_frames=b_frames)
    return SimpleNamespace(
        index_entries=entries, frames=len(times) if frames is None else frames, codec_context=codec
    )


def test_a_table_that_cannot_be_relied_on_is_not():
    assert index_times(stream([0, 2, 5])).tolist() == [0, 2, 5] and index_times(stream([7])).tolist() == [7]
    for odd in (
        stream([]),
        stream([0, 2, 2]),
        stream([0, 3, 2]),
        stream([0, 2], (1,)),
        stream([0, 2], frames=3),
    ):
        assert index_times(odd) is None
    assert (
        index_times(stream([0, 2], frames=0)) is None and index_times(stream([0, 2], b_frames=True)) is None
    )


def test_packets_that_are_not_shown_are_no_frames():
    packets = [
        SimpleNamespace(pts=p, is_discard=d)
        for p, d in ((4, False), (None, False), (2, False), (9, True), (4, False))
    ]
    found = packet_times(SimpleNamespace(demux=lambda stream: packets), "stream")
    assert found.tolist() == [2, 4] and found.dtype == np.int64


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux says how much memory is used")
@pytest.mark.parametrize("options", [{"bf": "0"}, {}])  # times from the table, and from the packets
def test_reading_at_random_does_not_take_more_and_more_memory(tmp_path, options):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "2", **options})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(100):
            image = np.full((32, 32, 3), 2 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())

    def own_kib():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])

    video, order = VideoReader(tmp_path / "a.mp4"), np.random.default_rng(0).integers(0, 100, 5000)
    for index in order[:1000]:
        video.read(int(index))
    before = own_kib()
    for index in order[1000:]:
        video.read(int(index))
    assert own_kib() - before < 400  # 200 bytes for each frame that is left behind would be 800


def test_an_avi_whose_frames_are_reordered_is_refused(make, tmp_path):
    """AVI keeps no times, so that frames would come in the order in which they are stored."""
    frames, options = [make.level(i) for i in range(12)], {"bf": "3", "g": "12"}
    make.encode(tmp_path / "reordered.avi", frames, 30, options=options)
    with pytest.raises(VideoError, match="another order than they are shown, and an AVI file does not"):
        VideoReader(tmp_path / "reordered.avi")
    make.encode(tmp_path / "plain.avi", frames, 30, options={"bf": "0"})
    video = VideoReader(tmp_path / "plain.avi")
    assert [round(float(video.read(i).mean()) / 16) for i in (7, 0, 11, 3)] == [7, 0, 11, 3]


def test_a_reader_that_is_closed_closes_its_file(plain):
    video, closed = VideoReader(plain), []
    container = video._container
    video._container = SimpleNamespace(close=lambda: (closed.append(True), container.close()))
    video.close()
    assert closed == [True]
