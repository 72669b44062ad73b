"""The right frame, whatever the encoder did and at whatever rate the video runs."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.video import VideoReader

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
