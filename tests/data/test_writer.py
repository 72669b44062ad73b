"""What is written of a recording: every file, number by number, and what a recording refuses."""

import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import LeRobotDataset, validate
from vla_bench.data.writer import (
    INDEX_FEATURES,
    PATHS,
    QUANTILES,
    VERSIONS,
    LeRobotWriter,
    check_episode,
    column_summary,
    histogram,
    image_summary,
    shard_file,
    video_key,
)

CAMERAS = {"wrist": (16, 24), "front": (32, 16)}
ACTION = Layout(("a", "b", "c"), "delta", "base", "m", "none", "positive_opens")
STATE = Layout(("x", "y"), "absolute", "world", "mm")
LENGTHS, TASKS = (4, 6, 3, 5, 2), ("open", "close", "open", "turn", "close")


def episodes():
    rng = np.random.default_rng(0)
    for length, task in zip(LENGTHS, TASKS):
        films = {name: rng.integers(0, 256, (length, *size, 3), np.uint8) for name, size in CAMERAS.items()}
        yield {
            "images": films, "task": task,
            "state": rng.normal(size=(length, 2)), "action": rng.normal(size=(length, 3)),
        }  # fmt: skip


def record(root, version, **more):
    options = {
        "fps": 12.5,
        "cameras": CAMERAS,
        "state": STATE,
        "action": ACTION,
        "episodes_per_file": 2,
    } | more
    with LeRobotWriter(root, version=version, **options) as writer:
        for episode in episodes():
            writer.add_episode(**episode)
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    told = {"robot_type": "toy", "benchmark": "desk"}
    return {v: record(tmp_path_factory.mktemp("written") / "toy", v, **told) for v in VERSIONS}


def test_the_names_are_these():
    assert VERSIONS == ("v3.0", "v2.1") and video_key("front") == "observation.images.front"
    assert list(INDEX_FEATURES.items()) == [
        ("timestamp", "float32"), ("frame_index", "int64"), ("episode_index", "int64"), ("index", "int64"), ("task_index", "int64")
    ]  # fmt: skip
    assert QUANTILES == {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def files_in(root) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_the_files_of_each_version_are_these(roots):
    common = {"meta/info.json", "meta/modality.json"}
    cameras = [video_key(name) for name in CAMERAS]
    assert files_in(roots["v2.1"]) == common | {
        "meta/episodes.jsonl", "meta/episodes_stats.jsonl", "meta/tasks.jsonl",
        *(f"data/chunk-000/episode_{i:06d}.parquet" for i in range(5)),
        *(f"videos/chunk-000/{key}/episode_{i:06d}.mp4" for i in range(5) for key in cameras),
    }  # fmt: skip
    assert files_in(roots["v3.0"]) == common | {
        "meta/stats.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet",
        *(f"data/chunk-000/file-{i:03d}.parquet" for i in range(3)),
        *(f"videos/{key}/chunk-000/file-{i:03d}.mp4" for i in range(3) for key in cameras),
    }  # fmt: skip


@pytest.mark.parametrize("number, chunk", [(0, "000"), (999, "000"), (1000, "001"), (2345, "002")])
def test_a_folder_of_version_2_holds_a_thousand_episodes(tmp_path, number, chunk):
    data, video = PATHS["v2.1"]
    path = shard_file(tmp_path, data, number)
    assert path == tmp_path / f"data/chunk-{chunk}/episode_{number:06d}.parquet" and path.parent.is_dir()
    path = shard_file(tmp_path, video, number, video_key="cam")
    assert path == tmp_path / f"videos/chunk-{chunk}/cam/episode_{number:06d}.mp4" and path.parent.is_dir()
    assert shard_file(tmp_path, PATHS["v3.0"][0], 7) == tmp_path / "data/chunk-000/file-007.parquet"


@pytest.mark.parametrize("version", VERSIONS)
def test_info_json_says_this(roots, version):
    info = json.loads((roots[version] / "meta/info.json").read_text())
    features = info.pop("features")
    ours = info.pop("vla_bench")
    own = {
        "v3.0": {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200},
        "v2.1": {"total_chunks": 1, "total_videos": 10},
    }[version]
    assert info == own | {
        "codebase_version": version, "robot_type": "toy", "total_episodes": 5, "total_frames": 20, "total_tasks": 3,
        "chunks_size": 1000, "fps": 12.5, "splits": {"train": "0:5"}, "data_path": PATHS[version][0],
        "video_path": PATHS[version][1],
    }  # fmt: skip
    assert ours["benchmark"] == "desk"
    assert Layout(**ours["action_layout"]) == ACTION and Layout(**ours["state_layout"]) == STATE
    assert list(features) == ["action", "observation.state", *map(video_key, CAMERAS), *INDEX_FEATURES]
    assert features["action"] == {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]}
    assert features["observation.state"] == {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
    assert features["task_index"] == {"dtype": "int64", "shape": [1], "names": None}
    assert features[video_key("wrist")] == {
        "dtype": "video", "shape": [16, 24, 3], "names": ["height", "width", "channels"],
        "info": {
            "video.height": 16, "video.width": 24, "video.codec": "h264", "video.pix_fmt": "yuv420p", "video.fps": 12.5,
            "video.channels": 3, "video.is_depth_map": False, "has_audio": False,
        },
    }  # fmt: skip


def test_a_whole_rate_is_a_whole_number(tmp_path):
    root = record(tmp_path / "toy", "v2.1", fps=20.0, state=None)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["fps"] == 20 and type(info["fps"]) is int and info["robot_type"] == "unknown"
    assert info["vla_bench"]["state_layout"] is None and info["vla_bench"]["benchmark"] == ""
    assert "observation.state" not in info["features"]
    assert LeRobotDataset(root, state_key=None).state_layout is None


def test_modality_json_says_this(roots):
    for root in roots.values():
        assert json.loads((root / "meta/modality.json").read_text()) == {
            "action": {n: {"start": i, "end": i + 1, "original_key": "action"} for i, n in enumerate("abc")},
            "state": {
                n: {"start": i, "end": i + 1, "original_key": "observation.state"} for i, n in enumerate("xy")
            },
            "video": {name: {"original_key": video_key(name)} for name in CAMERAS},
            "annotation": {"human.task_description": {"original_key": "task_index"}},
        }


def test_rows_are_those_that_were_recorded(roots):
    for version, root in roots.items():
        paths = sorted((root / "data").rglob("*.parquet"))
        per_file = {"v3.0": 2, "v2.1": 1}[version]
        told = list(episodes())
        for number, path in enumerate(paths):
            file = pq.ParquetFile(path)
            own = told[number * per_file : (number + 1) * per_file]
            assert file.num_row_groups == len(own)
            assert file.schema_arrow.field("action").type == pa.list_(pa.float32(), 3)
            table = file.read().to_pydict()
            first = sum(LENGTHS[: number * per_file])
            steps = [step for episode in own for step in range(len(episode["action"]))]
            assert table["frame_index"] == steps
            assert table["index"] == list(range(first, first + len(steps)))
            np.testing.assert_allclose(table["timestamp"], np.array(steps) / 12.5, atol=1e-6)
            numbers = range(number * per_file, (number + 1) * per_file)
            assert table["episode_index"] == [n for n, e in zip(numbers, own) for _ in e["action"]]
            index = {"open": 0, "close": 1, "turn": 2}
            assert table["task_index"] == [index[e["task"]] for e in own for _ in e["action"]]
            for name, key in (("action", "action"), ("observation.state", "state")):
                expected = np.concatenate([e[key] for e in own]).astype(np.float32)
                assert np.array(table[name], np.float32).tolist() == expected.tolist()


def plain(rows) -> dict:
    """The statistics of a column by numpy, from float32."""
    rows = np.asarray(rows, np.float32).astype(np.float64)
    found = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    return (
        found | {name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()} | {"count": [len(rows)]}
    )


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)


def of_images(frames) -> dict:
    """The statistics of images from all of their numbers; a quantile is the least level that so many reach."""
    values = np.concatenate([np.asarray(f).reshape(-1, 3) for f in frames]) / 255
    shaped = lambda x: np.asarray(x).reshape(3, 1, 1)
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {name: np.quantile(values, q, axis=0, method="inverted_cdf") for name, q in QUANTILES.items()}
    return {name: shaped(value) for name, value in found.items()} | {"count": [len(frames)]}


def test_statistics_of_columns_and_images_are_numpys():
    rows = np.random.default_rng(0).normal(size=(37, 2)).astype(np.float32)
    assert_same(column_summary(rows), plain(rows))
    frames = np.random.default_rng(1).integers(20, 231, (5, 4, 6, 3), np.uint8)
    frames[..., 1] //= 2
    counts = sum(histogram(frame) for frame in frames)
    assert (
        counts.shape == (3, 256) and counts[1].sum() == 120 and counts[2, 40] == (frames[..., 2] == 40).sum()
    )
    assert_same(image_summary(counts, 5), of_images(frames))


def test_statistics_of_each_episode_and_of_all_are_written(roots):
    told = list(episodes())
    lines = [
        json.loads(line) for line in (roots["v2.1"] / "meta/episodes_stats.jsonl").read_text().splitlines()
    ]
    assert [line["episode_index"] for line in lines] == [0, 1, 2, 3, 4]
    rows = pq.read_table(roots["v3.0"] / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for number, (line, row, episode) in enumerate(zip(lines, rows, told)):
        flat = lambda key, row=row, line=line: {n: row[f"stats/{key}/{n}"] for n in line["stats"][key]}
        for stats in (line["stats"].__getitem__, flat):
            assert_same(stats("action"), plain(episode["action"]))
            assert_same(stats("observation.state"), plain(episode["state"]))
            assert_same(stats("episode_index"), plain([[number]] * LENGTHS[number]))
            for name in CAMERAS:
                assert_same(stats(video_key(name)), of_images(episode["images"][name]))
    whole = json.loads((roots["v3.0"] / "meta/stats.json").read_text())
    assert_same(whole["action"], plain(np.concatenate([e["action"] for e in told])))
    assert_same(whole["timestamp"], plain(np.concatenate([np.arange(n)[:, None] / 12.5 for n in LENGTHS])))
    for name in CAMERAS:
        assert_same(whole[video_key(name)], of_images([f for e in told for f in e["images"][name]]))


def test_the_table_of_episodes_says_where_each_one_is(roots):
    rows = pq.read_table(roots["v3.0"] / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    ends, in_file = np.cumsum((0, *LENGTHS)), (0, 4, 0, 3, 0)
    for number, row in enumerate(rows):
        told = {key: value for key, value in row.items() if not key.startswith("stats/")}
        assert told == {
            "episode_index": number, "tasks": [TASKS[number]], "length": LENGTHS[number],
            "dataset_from_index": ends[number], "dataset_to_index": ends[number + 1],
            "data/chunk_index": 0, "data/file_index": number // 2,
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
            **{f"videos/{video_key(n)}/{k}": v for n in CAMERAS for k, v in {
                "chunk_index": 0, "file_index": number // 2, "from_timestamp": in_file[number] / 12.5,
                "to_timestamp": (in_file[number] + LENGTHS[number]) / 12.5}.items()},
        }  # fmt: skip


def test_tasks_are_numbered_in_the_order_of_their_first_use(roots):
    table = pq.read_table(roots["v3.0"] / "meta/tasks.parquet")
    assert table.to_pydict() == {"task_index": [0, 1, 2], "task": ["open", "close", "turn"]}
    told = json.loads(table.schema.metadata[b"pandas"])
    assert told["index_columns"] == ["task"] and [c["name"] for c in told["columns"]] == [
        "task_index",
        "task",
    ]
    lines = (roots["v2.1"] / "meta/tasks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"task_index": i, "task": task} for i, task in enumerate(("open", "close", "turn"))
    ]
    lines = (roots["v2.1"] / "meta/episodes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"episode_index": i, "tasks": [task], "length": length}
        for i, (task, length) in enumerate(zip(TASKS, LENGTHS))
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_is_sound_and_comes_back(roots, version):
    assert validate(roots[version], every_frame=True) == []
    dataset = LeRobotDataset(roots[version])
    assert (dataset.benchmark, dataset.cameras) == ("desk", ("wrist", "front"))
    assert (dataset.action_layout, dataset.state_layout) == (ACTION, STATE)
    recorded = [{n: e["images"][n][t] for n in CAMERAS} for e in episodes() for t in range(len(e["action"]))]
    for row in (0, 5, 13, 19):
        for image, name in zip(dataset[row]["image"], CAMERAS):
            assert np.abs(np.asarray(image).astype(int) - recorded[row][name]).mean() < 60


def test_videos_are_coded_as_it_is_said(roots):
    for path in roots["v3.0"].rglob("*.mp4"):
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            frames = list(video.decode(stream))
            assert (stream.codec_context.name, stream.pix_fmt, float(stream.average_rate)) == (
                "h264",
                "yuv420p",
                12.5,
            )
            assert all(frame.key_frame for frame in frames[::2])


def test_a_finer_quality_needs_more_bytes(tmp_path):
    size = {}
    for crf in (0, 18, 40):
        root = record(tmp_path / str(crf), "v3.0", crf=crf)
        size[crf] = sum(path.stat().st_size for path in root.rglob("*.mp4"))
    assert size[0] > 1.2 * size[18] > 1.2 * 1.2 * size[40]


def episode(**change) -> dict:
    films = {name: np.zeros((2, *size, 3), np.uint8) for name, size in CAMERAS.items()}
    return {"images": films, "state": np.zeros((2, 2)), "action": np.zeros((2, 3)), "task": "open", **change}


def broken(shape, value=np.nan) -> np.ndarray:
    found = np.zeros(shape)
    found[-1, -1] = value
    return found


FILMS = episode()["images"]
WRONG = [
    ({"task": " "}, "needs an instruction and at least one step"),
    ({"action": np.zeros((0, 3)), "state": np.zeros((0, 2))}, "needs an instruction and at least one step"),
    ({"images": {"wrist": FILMS["wrist"]}}, r"images of \['wrist'\], expected \['front', 'wrist'\]"),
    ({"images": {**FILMS, "wrist": FILMS["wrist"][:1]}}, "2 actions but {'wrist': 1, 'front': 2} images"),
    ({"action": np.zeros((2, 4))}, r"action is \[2, 4\], expected \[2, 3\]"),
    ({"state": np.zeros((3, 2))}, r"observation.state is \[3, 2\], expected \[2, 2\]"),
    ({"action": broken((2, 3))}, "action holds values that are not finite"),
    ({"state": broken((2, 2), np.inf)}, "observation.state holds values that are not finite"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=lambda value: str(value)[:30])
def test_an_episode_that_does_not_fit_is_refused(change, message):
    given = episode(**change)
    vectors = {"action": (ACTION, given["action"]), "observation.state": (STATE, given["state"])}
    with pytest.raises(ValueError, match=f"^episode 3: {message}"):
        check_episode("episode 3", given["images"], CAMERAS, vectors, given["task"])


def test_an_episode_that_fits_becomes_float32():
    given = episode()
    found = check_episode("e", given["images"], CAMERAS, {"action": (ACTION, given["action"])}, "open")
    assert {name: array.dtype for name, array in found.items()} == {"action": np.float32}


def test_a_recording_that_fails_leaves_no_dataset_and_no_video(tmp_path):
    """Nothing that looks whole: info.json is written last, and a video appears under its name when it is closed."""
    with (
        pytest.raises(ValueError, match="episode 1: needs an instruction"),
        LeRobotWriter(tmp_path / "toy", fps=10, cameras=CAMERAS, state=STATE, action=ACTION) as writer,
    ):
        writer.add_episode(**episode())
        parquet = writer.shard.parquet
        writer.add_episode(**episode(task=""))
    assert not (tmp_path / "toy/meta/info.json").exists() and not list((tmp_path / "toy").rglob("*.mp4"))
    assert not parquet.is_open


def test_a_recording_without_episodes_is_refused(tmp_path):
    options = {"fps": 10, "cameras": CAMERAS, "state": STATE, "action": ACTION}
    with (
        pytest.raises(ValueError, match="toy: no episode was added"),
        LeRobotWriter(tmp_path / "toy", **options),
    ):
        pass
    with pytest.raises(FileExistsError, match="is not empty; choose another folder"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full/a").touch()
        LeRobotWriter(tmp_path / "full", **options)
    (tmp_path / "empty").mkdir()
    assert LeRobotWriter(tmp_path / "empty", **options).root == tmp_path / "empty"
    with pytest.raises(ValueError, match="at least one camera"):
        LeRobotWriter(tmp_path / "none", **options | {"cameras": {}})
    with pytest.raises(ValueError, match="unknown version 'v3'; did you mean 'v3.0'"):
        LeRobotWriter(tmp_path / "none", **options, version="v3")
    assert not (tmp_path / "none").exists()
