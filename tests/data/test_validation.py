"""Each line that a check gives: what is just within is silent, what is just beyond is told with its place."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data import validation
from vla_bench.data.lerobot_files import Episode, read_files
from vla_bench.data.schema import Modality
from vla_bench.data.validation import (
    check_counts,
    check_file,
    check_images,
    check_places,
    check_rows,
    check_statistics,
    check_video_rows,
    rgb_cameras,
    validate,
    video_rate,
    write_checksums,
)


def files(**info):
    """Two episodes of 4 and 3 frames, three tasks out of order."""
    told = {"total_episodes": 2, "total_frames": 7, "total_tasks": 3, "fps": 12.5} | info
    episodes = [Episode(5, 4, Path("a.parquet"), {}), Episode(2, 3, Path("b.parquet"), {})]
    return SimpleNamespace(
        root="ds", episodes=episodes, tasks={7: "a", 0: "b", 3: " "}, info=SimpleNamespace(**told),
        modality=Modality(), cameras=lambda: ["cam"],
    )  # fmt: skip


@pytest.mark.parametrize("name, found", [("episodes", 2), ("frames", 7), ("tasks", 3)])
def test_a_count_that_differs_is_told(name, found):
    assert list(check_counts(files())) == []
    assert list(check_counts(files(**{f"total_{name}": None}))) == []
    for count in (found - 1, found + 1, 0):
        line = f"ds/meta/info.json: total_{name} is {count}, the metadata list {found}"
        assert list(check_counts(files(**{f"total_{name}": count}))) == [line]


def test_a_camera_of_gr00t_that_is_none_is_told():
    given = files()
    given.modality = Modality.model_validate(
        {"video": {"a": {"original_key": "cam"}, "b": {"original_key": "cma"}, "c": {}}}
    )
    assert list(check_counts(given)) == ["ds/meta/modality.json: video 'b' is 'cma', which is no camera"]


def test_rows_of_the_dataset_follow_each_other():
    given = files()
    first, second = given.episodes
    assert list(check_places(given)) == []
    given.episodes = [replace(first, rows=(0, 4)), replace(second, rows=(4, 7))]
    assert list(check_places(given)) == []
    for rows in ((4, 8), (3, 7), (5, 8)):
        given.episodes[1] = replace(second, rows=rows)
        line = f"ds/meta/episodes: episode 2 has the rows {list(rows)} of the dataset, expected [4, 7]"
        assert list(check_places(given)) == [line]


def rows(**change) -> dict[str, np.ndarray]:
    plain = {
        "frame_index": np.arange(4),
        "timestamp": np.arange(4) / 12.5,
        "task_index": np.array([7, 7, 0, 0]),
    }
    return plain | change


def lines_of(**change) -> list[str]:
    given = files()
    return list(check_rows(given, given.episodes[0], rows(**change)))


STEPS = np.arange(4) / 12.5
HALF = 0.5 / 12.5


def test_sound_rows_have_no_line():
    assert lines_of() == [] == lines_of(timestamp=STEPS + 0.99 * HALF)
    assert lines_of(timestamp=STEPS - 0.99 * HALF) == [] == lines_of(timestamp=STEPS + [0, 0, 0, 0.99 * HALF])


@pytest.mark.parametrize("change", [[1, 2, 3, 4], [0, 1, 1, 3], [0, 2, 1, 3]])
def test_frames_count_from_0(change):
    assert lines_of(frame_index=np.array(change)) == ["a.parquet: episode 5: frame_index does not count 0..3"]


@pytest.mark.parametrize("begin", [1.01 * HALF, -1.01 * HALF, 12.0])
def test_time_begins_at_0(begin):
    assert lines_of(timestamp=STEPS + begin) == [
        f"a.parquet: episode 5: time stamps begin at {begin:.3g} s, expected 0"
    ]


@pytest.mark.parametrize("place", [1, 3])
@pytest.mark.parametrize("off", [1.01 * HALF, -1.01 * HALF])
def test_time_runs_at_the_rate(place, off):
    stamps = STEPS.copy()
    stamps[place] += off
    line = f"a.parquet: episode 5: time stamps do not run at 12.5 Hz, they are off by up to {abs(off):.3g} s"
    assert lines_of(timestamp=stamps) == [line]


@pytest.mark.parametrize("task", [3, 4])
def test_a_task_has_an_instruction(task):
    lines = lines_of(task_index=np.array([7, task, task, 0]))
    assert lines == [f"a.parquet: episode 5: task_index {task} names no instruction"]


@pytest.fixture
def written(make, tmp_path):
    return make.v30(tmp_path / "ds", lengths=(6, 5, 4))


def of_file(root, change=lambda table: table, first=0, known=None) -> list[str]:
    given = read_files(root)
    path = given.episodes[0].data
    pq.write_table(change(pq.read_table(path)), path)
    lines = check_file(given, path, given.episodes if known is None else given.episodes[:known], first)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_the_columns_of_a_file_are_those_that_are_declared(written):
    assert of_file(written) == []
    assert of_file(written, lambda t: t.append_column("__index_level_0__", t["index"])) == []
    assert of_file(written, lambda t: t.append_column("more", t["index"])) == [
        "column 'more', which info.json does not declare"
    ]
    assert of_file(written, lambda t: t.drop_columns(["more", "timestamp"])) == [
        "no column 'timestamp', which info.json declares"
    ]


def test_rows_and_the_counter_of_a_file_are_compared(written):
    assert of_file(written, known=2) == ["holds 15 rows, its episodes 11"]
    assert of_file(written, first=3) == ["index does not count 3..17"]
    assert of_file(written, lambda t: t.slice(0, 14)) == ["holds 14 rows, its episodes 15"]


def test_a_counter_that_is_none_is_one_line(written):
    (line,) = of_file(
        written, lambda t: t.set_column(t.schema.get_field_index("index"), "index", pa.array(["a"] * 15))
    )
    assert "column 'index' holds string, expected numbers" in line
    assert of_file(written, lambda t: t.drop_columns(["index"])) == [
        "no column 'index', which info.json declares"
    ]


def of_video(make, root, change=lambda given: given) -> list[str]:
    given = read_files(root)
    key, path = make.TOP, given.episodes[0].videos[make.TOP][0]
    members = [(episode, np.arange(episode.length) / 30) for episode in change(given.episodes)]
    return [line.removeprefix(f"{path}: ") for line in check_video_rows(given, key, path, members)]


def test_a_video_is_tiled_by_its_episodes(make, written):
    assert of_video(make, written) == []
    (line,) = of_video(make, written, lambda episodes: episodes[:2])
    assert line == "holds 15 frames, its episodes end at frame 11"
    (line,) = of_video(make, written, lambda episodes: [episodes[0], episodes[2]])
    assert line == "episode 2 begins at frame 11 and leaves 5 frames before it"
    assert of_video(make, written, lambda episodes: episodes[::-1]) == []


def shifted(episode, frames: float, key: str):
    """An episode that begins so many frames later in its video, as the metadata have it."""
    path, start = episode.videos[key]
    return replace(episode, videos={key: (path, start + frames / 30)}, counted={}, video_ends={})


def test_episodes_that_share_frames_are_told(make, written):
    lines = of_video(make, written, lambda e: [e[0], shifted(e[1], -2, make.TOP), e[2]])
    assert lines == [
        "episode 1 begins at frame 4 and shares frames with the one before it",
        "episode 2 begins at frame 11 and leaves 2 frames before it",
    ]


@pytest.mark.parametrize("off, told", [(0.7, False), (-0.7, False), (0.8, True), (-0.8, True)])
def test_the_end_of_an_episode_in_its_video_is_compared(make, written, off, told):
    def change(episodes):
        last = episodes[1]
        return [
            episodes[0],
            replace(last, video_ends={make.TOP: last.video_ends[make.TOP] + off / 30}),
            episodes[2],
        ]

    expected = f"episode 1 lasts {(5 + off) / 30:.3f} s by its metadata, and has 5 frames"
    assert of_video(make, written, change) == ([expected] if told else [])


def test_a_video_that_cannot_be_opened_is_told_with_its_first_episode(make, written):
    path = read_files(written).episodes[0].videos[make.TOP][0]
    path.write_bytes(b"nothing")
    (line,) = of_video(make, written, lambda episodes: episodes[1:])
    assert "cannot be opened as a video" in line and line.endswith("; it holds episode 1")
    path.unlink()
    (line,) = of_video(make, written)
    assert "is missing; it holds episode 0" in line


def test_time_stamps_that_part_from_the_video_are_told_with_their_episode(make, written):
    lines = of_video(make, written, lambda e: [e[0], shifted(e[1], 9, make.TOP), e[2]])
    assert len(lines) == 1 and lines[0].endswith(f": episode 1 of {make.TOP}")


def test_the_rate_between_the_ends_of_an_episode():
    video = SimpleNamespace(times=np.array([0, 1.0, 1.5, 2.0, 9]))
    assert video_rate(video, (1, 4, 0), 30) == 2.0 and video_rate(video, (0, 2, 0), 30) == 1.0
    assert video_rate(video, (2, 3, 0), 30) == 30


@pytest.mark.parametrize("every_frame, frames", [(False, [0, 5]), (True, [0, 1, 2, 3, 4, 5])])
def test_the_ends_of_an_episode_are_decoded_or_all_of_it(written, monkeypatch, every_frame, frames):
    given, asked = read_files(written), []

    def read(files, episode, key, frame, *, seconds, first_row):
        asked.append((episode.index, key, frame, round(seconds * 30, 6), first_row))

    monkeypatch.setattr(validation, "read_image", read)
    stamps = 5.0 + np.arange(6) / 30
    assert list(check_images(given, given.episodes[0], ["a", "b"], stamps, 7, every_frame)) == []
    assert asked == [(0, key, frame, frame, 7) for key in ("a", "b") for frame in frames]


def test_of_a_camera_the_first_image_that_cannot_be_read_is_told(written, monkeypatch):
    given = read_files(written)

    def read(files, episode, key, frame, **_):
        if key == "a" and frame > 1:
            raise validation.DatasetError(f"{key} {frame}")

    monkeypatch.setattr(validation, "read_image", read)
    assert list(check_images(given, given.episodes[0], ["a", "b"], np.zeros(6), 0, True)) == ["a 2"]


@pytest.mark.parametrize("name", ["stats.json", "episodes_stats.jsonl"])
def test_statistics_that_are_no_json_are_told(tmp_path, name):
    (tmp_path / "meta").mkdir()
    path = tmp_path / "meta" / name
    assert list(check_statistics(tmp_path)) == []
    for content, sound in (
        (b"{}", True),
        (b'{"a": 1}\n', True),
        (b"{", False),
        (b"\xff", False),
        (b"[" * 100000, False),
    ):
        path.write_bytes(content)
        lines = list(check_statistics(tmp_path))
        assert len(lines) == (not sound) and all(line.startswith(f"{path} is not JSON: ") for line in lines)
    path.write_bytes(b"{}\n{}\n")
    assert (list(check_statistics(tmp_path)) == []) == name.endswith("l")


def test_checksums_are_compared_and_what_differs_is_told(written):
    assert write_checksums(written) == written / "manifest.json" and validate(written) == []
    info = written / "meta/info.json"
    info.write_text(info.read_text() + " ")
    (line,) = validate(written)
    assert line.startswith(f"{written}: ") and "meta/info.json" in line
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_checksums(written / "gone")


KINDS = {"rgb": {}, "depth": {"info": {"is_depth_map": True}}}


@pytest.mark.parametrize(
    "cameras, expected",
    [(["rgb"], None), (["rgb", "depth"], ["cam0"]), (["depth", "rgb", "rgb"], ["cam1", "cam2"]), (["depth"], None), (["depth", "depth"], None), (["rgb", "rgb"], None)],
)  # fmt: skip
def test_cameras_of_rgb_where_there_are_others_too(make, tmp_path, cameras, expected):
    features = {"action": make.vector(3)} | {
        f"cam{i}": make.camera(**KINDS[kind]) for i, kind in enumerate(cameras)
    }
    root = make.v21(tmp_path / "ds", features=features, extra={"action": make.counting(3)})
    assert rgb_cameras(read_files(root)) == expected
    assert (validate(root) == []) == ("rgb" in cameras)


def test_what_is_validated_is_what_would_be_trained_on(make, tmp_path):
    features = make.PLAIN | {"other": make.vector(2)}
    extra = {
        "action": make.counting(3),
        "observation.state": make.counting(3),
        "other": lambda row: [1.0, float("nan")],
    }
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    assert validate(root) == [] == validate(root, state_key=None)
    for keys in ({"action_key": "other"}, {"state_key": "other"}):
        (line,) = validate(root, **keys)
        assert "episode 0 frame 0: other[1] is nan" in line
    (line,) = validate(root, cameras=["tpo"])
    assert "no camera 'tpo'" in line
    (line,) = validate(root, state_key="gone")
    assert "no feature 'gone'" in line
    assert validate(tmp_path / "gone") == [f"{tmp_path / 'gone'}: no such folder"]


@pytest.mark.parametrize("named", [False, True])
def test_the_state_is_read_where_there_is_one(make, tmp_path, named):
    """It holds a number that is none: what training would read is what is told."""
    entries = {"state": {"a": {"start": 0, "end": 1, "original_key": "numbers"}}} if named else None
    features = {"action": make.vector(3), "numbers": make.vector(1), make.TOP: make.camera()}
    extra = {"action": make.counting(3), "numbers": lambda row: [float("nan")]}
    root = make.v21(tmp_path / "ds", features=features, extra=extra, modality=entries)
    assert len(validate(root)) == named


def test_every_frame_finds_what_the_ends_do_not_tell(make, tmp_path):
    """The images stand in the parquet file; one in the middle is no image."""
    features = {
        "action": make.vector(3),
        "observation.state": make.vector(3),
        "cam": make.camera((4, 6, 3), dtype="image"),
    }
    image = make.png(np.zeros((4, 6, 3), np.uint8))
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra["cam"] = lambda row: {"bytes": b"no", "path": None} if row == 8 else image
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    assert validate(root) == []
    (line,) = validate(root, every_frame=True)
    assert "episode 1 frame 2 of cam" in line


def test_a_line_is_told_once(make, tmp_path):
    root = make.v21(tmp_path / "ds")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"total_frames": 3, "total_episodes": 9}))
    lines = validate(root)
    assert len(lines) == 2 == len(set(lines))
