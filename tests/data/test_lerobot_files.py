"""Where an episode lies, from metadata without symmetry: numbers out of order, folders of three, beginnings not at 0."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data.lerobot_files import DatasetFiles, check_once, read_files
from vla_bench.data.paths import DatasetError, Folder

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
NUMBERS = {"dtype": "float32", "shape": [2], "names": None}
FEATURES = {
    "action": NUMBERS,
    WRIST: {"dtype": "video", "shape": [8, 6, 3], "names": ["height", "width", "channels"]},
    FRONT: {"dtype": "video", "shape": [4, 6, 3], "names": ["height", "width", "channels"]},
}
TASKS = {7: "lift", 0: "push", 3: "turn"}  # neither in order nor without gaps


def write_info(root, version, data, video, **more):
    (root / "meta").mkdir()
    content = {
        "codebase_version": version, "fps": 12.5, "features": FEATURES, "data_path": data, "video_path": video, **more,
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(content))


@pytest.fixture
def second(tmp_path):
    """A dataset of version 2.1 with episodes 4, 2, 9 in folders of three."""
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    write_info(tmp_path, "v2.1", data, video, chunks_size=3)
    lines = [{"episode_index": index, "length": length} for index, length in ((4, 11), (2, 5), (9, 8))]
    (tmp_path / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [{"task_index": index, "task": text} for index, text in TASKS.items()]
    (tmp_path / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tasks))
    return read_files(tmp_path)


def test_a_folder_holds_as_many_episodes_as_the_metadata_say(second):
    places = {e.index: e.data.relative_to(second.root).as_posix() for e in second.episodes}
    assert places == {
        4: "data/chunk-001/episode_000004.parquet",
        2: "data/chunk-000/episode_000002.parquet",
        9: "data/chunk-003/episode_000009.parquet",
    }


def test_each_episode_has_a_video_of_its_own_per_camera(second):
    episode = next(e for e in second.episodes if e.index == 9)
    videos = {
        key: (path.relative_to(second.root).as_posix(), begin)
        for key, (path, begin) in episode.videos.items()
    }
    assert videos == {key: (f"videos/chunk-003/{key}/episode_000009.mp4", 0.0) for key in (WRIST, FRONT)}
    assert episode.counted == {WRIST: (0, 8), FRONT: (0, 8)} and episode.length == 8


def test_cameras_stand_in_the_order_of_the_metadata(second):
    assert second.cameras() == [WRIST, FRONT] and second.info.fps == 12.5


def episode_row(index, length, data, **videos):
    """A row of the episodes of v3.0: data is (chunk, file); videos are (chunk, file, begin, end)."""
    row = {"episode_index": index, "length": length, "data/chunk_index": data[0], "data/file_index": data[1]}
    for name, (chunk, file, begin, end) in videos.items():
        key = f"videos/observation.images.{name}"
        row |= {f"{key}/chunk_index": chunk, f"{key}/file_index": file}
        row |= {f"{key}/from_timestamp": begin, f"{key}/to_timestamp": end}
    return row


@pytest.fixture
def third(tmp_path):
    """A dataset of version 3.0 whose cameras are cut into files in different places; rows and files out of order."""
    data = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    write_info(tmp_path, "v3.0", data, "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    rows = {
        "chunk-001/file-000": [episode_row(2, 8, (1, 4), front=(0, 1, 0.4, 1.04), wrist=(0, 0, 1.6, 2.24))],
        "chunk-000/file-001": [
            episode_row(1, 5, (0, 3), front=(0, 1, 0.0, 0.4), wrist=(0, 0, 1.2, 1.6)),
            episode_row(0, 15, (0, 2), front=(0, 0, 0.0, 1.2), wrist=(0, 0, 0.0, 1.2)),
        ],
    }
    for name, some in rows.items():
        path = tmp_path / f"meta/episodes/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(some), path)
    tasks = [{"task_index": index, "task": text} for index, text in TASKS.items()]
    pq.write_table(pa.Table.from_pylist(tasks), tmp_path / "meta/tasks.parquet")
    return read_files(tmp_path)


def test_episodes_come_in_the_order_of_their_numbers(third):
    assert [(e.index, e.length) for e in third.episodes] == [(0, 15), (1, 5), (2, 8)]


def test_each_episode_has_its_own_file_of_rows(third):
    files = [e.data.relative_to(third.root / "data").as_posix() for e in third.episodes]
    assert files == ["chunk-000/file-002.parquet", "chunk-000/file-003.parquet", "chunk-001/file-004.parquet"]


@pytest.mark.parametrize(
    "camera, places",
    [
        (FRONT, [("file-000.mp4", 0.0, 1.2), ("file-001.mp4", 0.0, 0.4), ("file-001.mp4", 0.4, 1.04)]),
        (WRIST, [("file-000.mp4", 0.0, 1.2), ("file-000.mp4", 1.2, 1.6), ("file-000.mp4", 1.6, 2.24)]),
    ],
)
def test_each_camera_has_its_own_file_and_second(third, camera, places):
    assert [
        (e.videos[camera][0].name, e.videos[camera][1], e.video_ends[camera]) for e in third.episodes
    ] == places
    assert all(camera in e.videos[camera][0].parts for e in third.episodes)


@pytest.mark.parametrize(
    "camera, counted", [(FRONT, [(0, 15), (0, 13), (5, 13)]), (WRIST, [(0, 28), (15, 28), (20, 28)])]
)
def test_frames_before_an_episode_are_those_of_its_own_video(third, camera, counted):
    assert [e.counted[camera] for e in third.episodes] == counted


@pytest.mark.parametrize("which", ["second", "third"])
def test_tasks_are_found_by_their_index(which, request):
    assert request.getfixturevalue(which).tasks == TASKS


def test_what_is_remembered_between_calls_is_neither_printed_nor_compared(second):
    second.shapes["a"] = (1, 2, 3)
    second.folder.check(second.root / "meta/info.json")
    assert second.folder.inside and "inside" not in repr(second.folder) and "shapes" not in repr(second)
    assert hash(second.folder) != hash(Folder(second.root)) and second.folder != Folder(second.root)
    with pytest.raises(TypeError):
        DatasetFiles(second.root, "v2.1", second.info, [], {}, second.modality, second.folder)


def test_a_number_that_stands_twice_is_named():
    check_once([], "here")
    check_once([3, 1, 2], "here")
    with pytest.raises(DatasetError, match="^here 1 stands twice$"):
        check_once(iter([3, 1, 2, 1]), "here")


def test_cameras_are_the_videos_and_images_in_their_order(second):
    assert second.cameras() == [WRIST, FRONT] and second.features is second.info.features


@pytest.mark.parametrize("name", ["episodes", "tasks"])
def test_an_episode_or_task_that_stands_twice_is_named(tmp_path, second, name):
    file = tmp_path / f"meta/{name}.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[1] + "\n")
    number = {"episodes": "episode_index 2", "tasks": "task_index 0"}[name]
    with pytest.raises(DatasetError, match=f"{name}.*{number} stands twice"):
        read_files(tmp_path)


def test_what_is_no_dataset_is_told(tmp_path, second):
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        read_files(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match="data: no meta/info.json: not a LeRobot dataset, or a recording"
    ):
        (tmp_path / "data").mkdir()
        read_files(tmp_path / "data")
    info = tmp_path / "meta/info.json"
    clean = info.read_text()
    for version, near in (("v2.2", "did you mean 'v2.1'"), ("v1.6", "choices: v2.0")):
        info.write_text(clean.replace("v2.1", version))
        with pytest.raises(DatasetError, match=f"codebase_version '{version}' is not known.*{near}"):
            read_files(tmp_path)
    info.write_text(clean)
    (tmp_path / "meta/episodes.jsonl").write_text("")
    with pytest.raises(DatasetError, match="meta: episodes.jsonl lists no episode"):
        read_files(tmp_path)


def test_names_of_gr00t_are_read_where_there_are_any(tmp_path, second):
    assert second.modality.video is None and second.version == "v2.1" and second.info.fps == 12.5
    (tmp_path / "meta/modality.json").write_text(json.dumps({"video": {"eye": {"original_key": FRONT}}}))
    assert read_files(tmp_path).modality.video["eye"].original_key == FRONT


def test_links_are_followed_only_when_told(tmp_path, second):
    assert second.folder.follow_links is False
    assert read_files(tmp_path, follow_links=True).folder.follow_links is True


def test_a_video_without_a_path_is_named(tmp_path, second):
    info = tmp_path / "meta/info.json"
    content = json.loads(info.read_text())
    del content["video_path"]
    info.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=f"video_path is missing; '{WRIST}' is a video"):
        read_files(tmp_path)
    content["features"] = {"action": NUMBERS}
    info.write_text(json.dumps(content))
    assert read_files(tmp_path).episodes[0].videos == {}
