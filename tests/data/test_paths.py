"""Every path stays inside the dataset, and nothing is waited for."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.paths import Folder, check_template, path_in

FILES = {
    "numbers": "data/chunk-000/episode_000001.parquet",
    "video": "videos/chunk-000/observation.images.top/episode_000001.mp4",
    "tasks": "meta/tasks.jsonl",
    "episodes": "meta/episodes.jsonl",
    "info": "meta/info.json",
}


@pytest.fixture(autouse=True)
def no_hang():
    """An alarm ends a test that waits for a pipe."""

    def stop(*_):
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)


def read_all(root, **settings):
    dataset = LeRobotDataset(root, **settings)
    return [dataset[i]["image"][0].getpixel((0, 0)) for i in range(len(dataset))]


def edit_info(root, **changes):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | changes))


@pytest.mark.parametrize("name", FILES)
def test_a_named_pipe_is_refused_by_name(make, tmp_path, name):
    path = make.v21(tmp_path / "ds") / FILES[name]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DatasetError, match=f"{path} is a named pipe, expected a file"):
        read_all(tmp_path / "ds")
    assert any("named pipe" in line for line in validate(tmp_path / "ds"))


@pytest.mark.parametrize("name", FILES)
def test_links_out_of_the_dataset_are_followed_only_when_told(make, tmp_path, name):
    expected = read_all(make.v21(tmp_path / "other"))
    path = make.v21(tmp_path / "ds") / FILES[name]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=f"{path} is a link out of the dataset; follow_links=True"):
        read_all(tmp_path / "ds")
    assert any("link out of the dataset" in line for line in validate(tmp_path / "ds"))
    assert read_all(tmp_path / "ds", follow_links=True) == expected
    assert validate(tmp_path / "ds", follow_links=True) == []


@pytest.mark.parametrize("name", ["data", "videos", "meta"])
def test_a_folder_that_is_a_link_out_of_the_dataset_is_refused(make, tmp_path, name):
    root = make.v21(tmp_path / "ds")
    shutil.move(root / name, tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="is a link out of the dataset"):
        read_all(root)
    assert len(read_all(root, follow_links=True)) == 11


def test_a_link_inside_the_dataset_and_a_linked_dataset_are_read(make, tmp_path):
    path = make.v21(tmp_path / "ds") / FILES["numbers"]
    path.rename(path.with_name("kept.parquet"))
    path.symlink_to("kept.parquet")
    (tmp_path / "name").symlink_to("ds")
    assert len(read_all(tmp_path / "name")) == 11


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template",
    [
        "../ds/data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "data/../../ds/{episode_index}",
        "/etc/passwd",
        "{episode_chunk:0999999999d}",
        "{episode_chunk:0>999999999}",
        "{episode_index.__class__}",
        "{episode_index!r}",
        "{0}",
        "{",
        "",
        "a\0b",
        "{episode_index:{episode_index}d}",
    ],
    ids=repr,
)
def test_templates_that_lead_elsewhere_or_never_end_are_refused(make, tmp_path, key, template):
    root = make.v21(tmp_path / "ds")
    edit_info(root, **{key: template})
    with pytest.raises(DatasetError, match="info.json|cannot be read"):
        read_all(root)
    assert validate(root)


def test_a_camera_may_not_be_called_like_a_way_out(make, tmp_path):
    root = make.v21(tmp_path / "ds")
    info = json.loads((root / "meta/info.json").read_text())
    edit_info(root, features=info["features"] | {"../../../secret": make.camera()})
    with pytest.raises(DatasetError, match="not inside the dataset"):
        LeRobotDataset(root)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd", "images/../../outside.png", ""])
def test_an_image_named_by_a_row_lies_inside_the_dataset(make, tmp_path, path):
    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra[make.TOP] = lambda i: {"bytes": None, "path": path}
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    (tmp_path / "outside.png").write_bytes(make.png(make.level(0))["bytes"])
    with pytest.raises(DatasetError, match="not inside the dataset"):
        LeRobotDataset(root)[0]


def test_an_image_named_by_a_row_is_read(make, tmp_path):
    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra[make.TOP] = lambda i: {"bytes": None, "path": f"images/{i}.png"}
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    (root / "images").mkdir()
    for i in range(11):
        (root / f"images/{i}.png").write_bytes(make.png(make.level(i))["bytes"])
    dataset = LeRobotDataset(root)
    assert [make.level_of(dataset[i]["image"][0]) for i in (7, 0, 10)] == [7, 0, 10]
    (root / "images/7.png").unlink()
    os.mkfifo(root / "images/7.png")
    with pytest.raises(DatasetError, match="named pipe"):
        LeRobotDataset(root)[7]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fps",), 10**400),
        (("fps",), 1e-320),
        (("chunks_size",), 10**30),
        (("features", "action", "shape"), [10**12]),
        (("features", "observation.images.top", "shape"), [10**12, 10**12, 3]),
    ],
    ids=str,
)
def test_huge_numbers_are_refused_before_anything_is_made_of_them(make, tmp_path, place, value):
    root = make.v21(tmp_path / "ds")
    info = json.loads((root / "meta/info.json").read_text())
    *above, last = place
    holder = info
    for key in above:
        holder = holder[key]
    holder[last] = value
    edit_info(root, **info)
    with pytest.raises(DatasetError, match="meta/info.json"):
        read_all(root)


@pytest.mark.parametrize("length", [10**12, 10**8, -1, 5.5, "5", None, True])
def test_lengths_that_cannot_be_are_refused(make, tmp_path, length):
    root = make.v21(tmp_path / "ds")
    (root / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "length": length}) + "\n")
    with pytest.raises(DatasetError, match="episodes.jsonl line 1: length|has 6 rows, its metadata say"):
        read_all(root)


def test_an_image_that_unpacks_to_more_than_it_declares_is_not_unpacked(make, tmp_path):
    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    bomb = make.png(np.zeros((9000, 9000), np.uint8))
    extra[make.TOP] = lambda i: bomb if i == 3 else make.png(make.level(i))
    root = make.v21(tmp_path / "ds", features=features, extra=extra)
    with pytest.raises(
        DatasetError, match=r"frame 3 of observation.images.top is \[9000, 9000\], info.json says"
    ):
        read_all(root)
    assert pq.read_table(root / FILES["numbers"]).num_rows == 5


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile ../other.mp4\n", "#EXTM3U\n#EXTINF:1,\n../other.mp4\n"]
)
def test_a_video_that_is_a_playlist_of_other_files_is_refused(make, tmp_path, text):
    path = make.v21(tmp_path / "ds") / FILES["video"]
    shutil.copy(path, path.parents[1] / "other.mp4")
    path.write_text(text)
    with pytest.raises(DatasetError, match="episode_000001.mp4: cannot be opened as a video"):
        read_all(tmp_path / "ds")


def test_metadata_of_a_size_that_cannot_be_are_not_read(make, tmp_path):
    root = make.v21(tmp_path / "ds")
    with (root / "meta/tasks.jsonl").open("r+b") as file:
        file.truncate(1 << 40)  # a file with a hole, which takes no room on the disk
    with pytest.raises(DatasetError, match="tasks.jsonl has 1099511627776 bytes"):
        read_all(root)


FIELDS = {"chunk_index": int, "video_key": str}


@pytest.mark.parametrize(
    "template", ["", "a/b", "a/{chunk_index}", "a/{chunk_index:03d}", "{chunk_index:3d}/{video_key}", "{{x}}", "{chunk_index:d}", "{chunk_index:09d}"]
)  # fmt: skip
def test_plain_templates_are_taken(template):
    check_template(template, FIELDS, "here")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{chunk}", "no field 'chunk'; did you mean 'chunk_index'"),
        ("{}", "no field ''"),
        ("{chunk_index.real}", "no field 'chunk_index.real'"),
        ("{chunk_index!r}", "is no format for chunk_index"),
        ("{chunk_index:010d}", "'010d' is no format for chunk_index, expected 03d"),
        ("{chunk_index:x}", "'x' is no format"),
        ("{video_key:03d}", "'03d' is no format for video_key"),
        ("{video_key!s}", "is no format for video_key"),
        ("{video_key:{chunk_index}}", "is no format for video_key"),
        ("{chunk_index", "expected '}'"),
    ],
)
def test_templates_that_are_more_than_plain_are_refused(template, message):
    with pytest.raises(DatasetError) as error:
        check_template(template, FIELDS, "here")
    assert str(error.value).startswith("here is ") and message in str(error.value)


@pytest.mark.parametrize("text", ["a", "a/b.png", "a..b", "..a/b", "a/...", "./a"])
def test_paths_below_the_folder_are_taken(text):
    assert path_in(Path("ds"), text, "here") == Path("ds") / text


@pytest.mark.parametrize("text", ["", "/a", "..", "../a", "a/../b", "a/..", "a\0b"])
def test_paths_that_lead_elsewhere_are_refused(text):
    with pytest.raises(DatasetError, match="^here leads to .*, which is not inside the dataset"):
        path_in(Path("ds"), text, "here")


def test_a_folder_checks_what_it_is_given(tmp_path):
    root, out = tmp_path / "ds", tmp_path / "ds_elsewhere"
    for folder in (root / "a", out):
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
    (root / "linked").symlink_to(out)
    (root / "a/own").symlink_to(root / "a/x")
    (root / "a/away").symlink_to(out / "x")
    for follow in (False, True):
        folder = Folder(root, follow)
        for name in ("a/x", "a/own"):
            assert folder.check(root / name) == root / name
        for name in ("a/away", "linked/x"):
            if follow:
                assert folder.check(root / name) == root / name
                continue
            with pytest.raises(DatasetError, match=f"{name} is a link out of the dataset; follow_links=True"):
                folder.check(root / name)
        for name, message in (
            ("a", "is a folder, expected a file"),
            ("a/gone", "is missing"),
            ("a/x/y", "cannot be read"),
        ):
            with pytest.raises(DatasetError, match=f"{root / name} {message}"):
                folder.check(root / name)
        assert folder.inside[str(root / "a")] and not folder.inside[str(root / "linked")]
