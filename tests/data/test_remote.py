"""A dataset at a URL: the same samples, few files at a time, and one line when the connection is lost."""

import http.server
import threading
from functools import partial

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from torch.utils.data import DataLoader

from vla_bench.data.lerobot import DatasetError, LeRobotDataset
from vla_bench.data.remote import RemoteFolder
from vla_bench.data.streaming import stream_order

LENGTHS = (4, 6, 3, 5, 4, 6, 5, 3)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `cut` names a file whose connection breaks in the middle, and how often."""

    cut: dict[str, int] = {}
    asked: list[str] = []

    def log_message(self, *args):
        pass

    def copyfile(self, source, output):
        name = self.path.rpartition("/")[2]
        self.asked.append(name)
        if self.cut.get(name, 0) > 0:
            self.cut[name] -= 1
            output.write(source.read(500))
            output.flush()
            self.connection.close()
        else:
            super().copyfile(source, output)


@pytest.fixture
def served(make, tmp_path):
    """A dataset of eight episodes in files of their own, behind http; its URL and its folder."""
    root = make.v21(tmp_path / "there", lengths=LENGTHS)
    Handler.cut, Handler.asked = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/there", root
    server.shutdown()
    thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("vla_bench.data.remote.time.sleep", lambda seconds: None)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"image"}:
        assert np.array_equal(ours[key], theirs[key])
    for a, b in zip(ours["image"], theirs["image"], strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("version", ["v21", "v30"])
@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_the_samples_are_those_of_the_folder(make, tmp_path, version, scheme):
    root = {"v21": make.v21, "v30": make.v30}[version](tmp_path / "there", lengths=LENGTHS)
    url = f"file://{root}"
    if scheme == "memory":
        bucket = MemoryFileSystem()
        bucket.put(str(root), "/there", recursive=True)
        url = "memory://there"
    here, there = LeRobotDataset(root), LeRobotDataset(url, cache=tmp_path / "cache")
    assert (len(here), here.name) == (len(there), there.name)
    for index in np.random.default_rng(0).permutation(len(here))[:12]:
        assert_equal(here[int(index)], there[int(index)])


def test_two_workers_read_a_stream_over_http_in_its_order(served, tmp_path):
    url, root = served
    here, there = LeRobotDataset(root), LeRobotDataset(url, cache=tmp_path / "cache")
    order = stream_order(there, buffer_size=9, seed=0)
    rows = [order.row_at(position) for position in range(len(order))]
    loader = DataLoader(there, batch_size=None, sampler=rows, num_workers=2, collate_fn=lambda sample: sample)
    for row, sample in zip(rows, loader, strict=True):
        assert_equal(sample, here[row])
    held = [path for path in there.root.rglob("*.mp4")]
    assert 0 < len(held) <= there.files.folder.keep < len(LENGTHS)


def test_a_connection_that_breaks_is_tried_again(served, tmp_path):
    url, root = served
    there = LeRobotDataset(url, cache=tmp_path / "cache")
    Handler.cut = {"episode_000002.mp4": 2}
    first = sum(LENGTHS[:2])
    assert_equal(there[first], LeRobotDataset(root)[first])
    assert Handler.asked.count("episode_000002.mp4") == 3


def test_a_connection_that_is_lost_is_one_line_naming_the_file(served, tmp_path):
    url, _ = served
    there = LeRobotDataset(url, cache=tmp_path / "cache")
    Handler.cut = {"episode_000002.mp4": 99}
    with pytest.raises(DatasetError) as error:
        there[sum(LENGTHS[:2])]
    line = str(error.value)
    assert "episode_000002.mp4 could not be fetched, tried 3 times" in line and url in line
    assert "\n" not in line and not list(there.root.rglob("*episode_000002*.mp4*tmp"))
    assert there[0]["lang"]  # the others are still read


def test_a_file_that_is_not_there_is_named_and_not_asked_for_again(served, tmp_path):
    url, root = served
    there = LeRobotDataset(url, cache=tmp_path / "cache")
    next(root.rglob("*000002.mp4")).unlink()
    with pytest.raises(DatasetError, match=r"http://.*episode_000002.mp4 is missing"):
        there[sum(LENGTHS[:2])]


def test_a_file_that_came_short_does_not_count(tmp_path, monkeypatch):
    bucket = MemoryFileSystem()
    bucket.pipe("/short/videos/a.mp4", b"0123456789")
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {"size": 11})
    folder = RemoteFolder("memory://short", tmp_path / "cache")
    with pytest.raises(DatasetError, match="10 bytes came, expected 11"):
        folder.check(folder.root / "videos/a.mp4")
    assert not (folder.root / "videos/a.mp4").exists()


def test_a_file_is_fetched_once_for_many_readers(tmp_path):
    MemoryFileSystem().pipe("/once/videos/a.mp4", b"0123456789")
    folder = RemoteFolder("memory://once", tmp_path / "cache")
    path = folder.root / "videos/a.mp4"
    threads = [threading.Thread(target=folder.check, args=(path,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (folder.fetched, path.read_bytes()) == (1, b"0123456789")


def test_links_and_paths_of_a_url_stay_inside_the_cache(tmp_path):
    folder = RemoteFolder("memory://once", tmp_path / "cache")
    with pytest.raises(ValueError):
        folder.check(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="not inside the dataset"):
        folder.download("../elsewhere")
