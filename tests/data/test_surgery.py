"""Datasets are edited without a loss: every row, instruction and frame is where it belongs, and no source is touched."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data import edited_dataset
from vla_bench.data.edited_dataset import write_edited
from vla_bench.data.episode_plan import open_source, pieces_of
from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.lerobot_files import read_files
from vla_bench.data.paths import DatasetError
from vla_bench.data.surgery import (
    by_fractions,
    delete_episodes,
    main,
    merge_datasets,
    rewrite_instructions,
    split_dataset,
    trim_idle,
)
from vla_bench.data.validation import validate, write_checksums
from vla_bench.data.writer import LeRobotWriter

TOP, WRIST = "observation.images.top", "observation.images.wrist"
LENGTHS, FPS = (7, 4, 9), 30
ENDS = np.cumsum((0, *LENGTHS))
TASKS = ("nobody does this", "put it down", "pick it up")
QUIET = "log-level=none"
CODECS = {
    "h264": ("libx264", {"bf": "3", "x264-params": "b-adapt=0"}),
    "open groups": ("libx264", {"g": "4", "bf": "2", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "hevc": ("libx265", {"x265-params": f"{QUIET}:keyint=5:min-keyint=5"}),
    "av1": ("libsvtav1", {"g": "2", "preset": "12"}),
}
COUNTERS = ("episode_index", "index", "task_index")


def numbered(i: int, height: int, width: int) -> np.ndarray:
    """An image with its number in it, over a pattern that makes B-frames worth while."""
    image = np.add.outer(np.arange(height) * 3, np.arange(width) * 5 + 11 * i) % 90
    image[: height // 2] = i * 12 % 256
    return np.repeat(image[..., None], 3, axis=2).astype(np.uint8)


def features(make) -> dict:
    cameras = {TOP: make.camera((48, 64, 3)), WRIST: make.camera((32, 80, 3))}
    more = {"reward": make.vector(1, dtype="float64"), "operator": make.vector(1, dtype="string")}
    more |= {
        "force": {"dtype": "float32", "shape": [2, 2], "names": None},
        "grasped": make.vector(1, dtype="bool"),
        "secret": make.vector(1, dtype="binary"),
    }
    said = {"language_events": {"dtype": "language", "shape": [1], "names": None}}
    return {"action": make.vector(3), "observation.state": make.vector(2)} | cameras | more | said


def columns(make) -> dict:
    said = lambda i: (
        [{"role": "user", "content": f"frame {i}?", "timestamp": i % 5 / 10}] if i % 3 == 0 else None
    )
    found = {"action": make.counting(3), "observation.state": make.counting(2), "reward": lambda i: i / 7}
    found |= {"operator": lambda i: f"Ada {i}", "force": lambda i: [[i / 3, 1.0], [2.0, i / 9]]}
    found |= {"grasped": lambda i: i % 2 == 0, "language_events": said, "secret": lambda i: f"{i:x}".encode()}
    return found | {"task_index": lambda i: 2 if i < ENDS[1] else 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make):
    """Makes a dataset of three episodes once: by version and codec."""
    av.logging.set_level(av.logging.PANIC)
    known: dict[tuple, Path] = {}

    def get(version: str = "v30", codec: str = "h264") -> Path:
        if (version, codec) not in known:
            root = tmp_path_factory.mktemp("data") / "source"
            encoder = lambda path, frames, fps: make.encode(path, frames, fps, *CODECS[codec])
            given = {"lengths": LENGTHS, "features": features(make), "extra": columns(make), "tasks": TASKS}
            {"v21": make.v21, "v30": make.v30}[version](root, **given, image=numbered, encoder=encoder)
            known[version, codec] = root
        return known[version, codec]

    return get


def table_of(root: Path) -> pa.Table:
    files = read_files(root)
    paths = list(dict.fromkeys(episode.data for episode in files.episodes))
    return pa.concat_tables([pq.read_table(path) for path in paths])


def rows(root: Path) -> list[dict]:
    """Every row but what counts in the dataset, with its instruction, and every frame of every camera."""
    files, found = read_files(root), []
    data = LeRobotDataset(root, cameras=[TOP, WRIST])
    for row in table_of(root).to_pylist():
        found.append(
            {k: v for k, v in row.items() if k not in COUNTERS} | {"said": files.tasks[row["task_index"]]}
        )
    for i, row in enumerate(found):
        row["images"] = [np.asarray(image).tobytes() for image in data[i]["image"]]
    return found


def episodes(root: Path, *numbers: int) -> list[dict]:
    """The rows of some episodes of the source."""
    found = rows(root)
    return [row for e in numbers for row in found[ENDS[e] : ENDS[e + 1]]]


def digest(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


@pytest.fixture(params=["v21", "v30"])
def version(request):
    return request.param


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


# Sources as they are


def test_the_source_validates(dataset, version, codec):
    assert validate(dataset(version, codec)) == []


# Conversion


def test_there_and_back_again_is_the_same(dataset, version, codec, tmp_path):
    root = dataset(version, codec)
    there, back = ("3.0", "2.1") if version == "v21" else ("2.1", "3.0")
    write_edited(pieces_of(open_source(root)), tmp_path / "there", there)
    write_edited(pieces_of(open_source(tmp_path / "there")), tmp_path / "back", back)
    expected = rows(root)
    for name in ("there", "back"):
        assert validate(tmp_path / name, every_frame=True) == []
        assert rows(tmp_path / name) == expected
        assert read_files(tmp_path / name).tasks == read_files(root).tasks
        assert table_of(tmp_path / name).equals(table_of(root))
    assert read_files(tmp_path / "there").version == f"v{there}"


def test_nothing_is_lost_of_info_json(dataset, tmp_path):
    root = dataset("v21")
    write_edited(pieces_of(open_source(root)), tmp_path / "new", "3.0")
    old, new = (json.loads((r / "meta/info.json").read_text()) for r in (root, tmp_path / "new"))
    assert new["features"] == old["features"] and new["fps"] == FPS
    assert new["total_frames"] == sum(LENGTHS) and new["total_episodes"] == 3 and new["total_tasks"] == 3


def test_videos_of_episodes_are_put_together(dataset, tmp_path):
    report = write_edited(pieces_of(open_source(dataset("v21"))), tmp_path / "new", "3.0")
    assert len(list((tmp_path / "new/videos").rglob("*.mp4"))) == 2
    assert report.videos == {"cut at key frames": 2}


def test_a_conversion_to_the_same_version_copies_videos_byte_for_byte(dataset, version, tmp_path):
    root = dataset(version)
    report = write_edited(pieces_of(open_source(root)), tmp_path / "new")
    assert set(report.videos) == {"copied whole"}
    kept = {k: v for k, v in digest(root).items() if k.endswith(".mp4")}
    assert {k: v for k, v in digest(tmp_path / "new").items() if k.endswith(".mp4")} == kept


# Deletion


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 2]], ids=str)
def test_deleting_leaves_the_others_as_they_are(gone, dataset, version, codec, tmp_path):
    root = dataset(version, codec)
    write_edited(delete_episodes(open_source(root), gone), tmp_path / "new")
    assert validate(tmp_path / "new") == []
    assert rows(tmp_path / "new") == episodes(root, *(e for e in range(3) if e not in gone))


def written(root: Path, numbers: list[int]) -> Path:
    """Episodes by the package's own writer."""
    names = Layout(("x", "y"))
    with LeRobotWriter(root, fps=10, cameras={"top": (32, 48)}, state=names, action=names) as writer:
        for e in numbers:
            values = np.random.default_rng(e).normal(size=(5 + e, 2)).astype(np.float32)
            images = {"top": np.stack([np.full((32, 48, 3), 40 * e + i, np.uint8) for i in range(5 + e)])}
            task = ("lift", "drop")[e % 2]
            writer.add_episode(images=images, state=values, action=2 * values, task=task)
    return root


def test_deleting_is_as_if_it_had_never_been_written(tmp_path):
    whole, expected = written(tmp_path / "whole", [0, 1, 2, 3]), written(tmp_path / "expected", [0, 2, 3])
    write_edited(delete_episodes(open_source(whole), [1]), tmp_path / "new")
    new = tmp_path / "new"
    assert table_of(new).equals(table_of(expected))
    for name in ("info", "modality"):
        assert json.loads((new / f"meta/{name}.json").read_text()) == json.loads(
            (expected / f"meta/{name}.json").read_text()
        )
    table = lambda r: pq.read_table(r / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for ours, theirs in zip(table(new), table(expected), strict=True):
        place = lambda row: {k: v for k, v in row.items() if not k.startswith("videos/")}
        assert place(ours) == place(theirs)
    stats = [json.loads((r / "meta/stats.json").read_text()) for r in (new, expected)]
    image = [stat.pop("observation.images.top") for stat in stats]
    assert stats[0] == stats[1]
    for name in ("mean", "std", "min", "max", "count"):
        assert np.allclose(image[0][name], image[1][name], atol=1e-12)
    assert pq.read_table(new / "meta/tasks.parquet").equals(pq.read_table(expected / "meta/tasks.parquet"))


def test_an_instruction_goes_with_its_last_row(dataset, tmp_path):
    root = dataset("v30")
    write_edited(delete_episodes(open_source(root), [0]), tmp_path / "new")
    assert read_files(tmp_path / "new").tasks == {0: "nobody does this", 1: "put it down"}


def test_what_deletes_everything_is_refused(dataset, tmp_path):
    with pytest.raises(DatasetError, match="no episode would be left"):
        write_edited(delete_episodes(open_source(dataset()), [0, 1, 2]), tmp_path / "new")
    assert not list(tmp_path.iterdir())


# Split and merge


def test_split_and_merged_is_the_same(dataset, version, codec, tmp_path):
    root = dataset(version, codec)
    split_dataset(open_source(root), tmp_path / "parts", {"a": [0], "b": [1, 2]})
    parts = [open_source(tmp_path / "parts" / name) for name in "ab"]
    write_edited(merge_datasets(parts), tmp_path / "merged")
    assert [validate(tmp_path / name) for name in ("parts/a", "parts/b", "merged")] == [[], [], []]
    assert rows(tmp_path / "merged") == rows(root)


def test_both_versions_and_two_codecs_are_merged(dataset, tmp_path):
    sources = [open_source(dataset("v21", "av1")), open_source(dataset("v30", "hevc"))]
    for version in ("2.1", "3.0"):
        write_edited(merge_datasets(sources), tmp_path / version, version)
        assert validate(tmp_path / version) == []
        assert rows(tmp_path / version) == rows(dataset("v21", "av1")) + rows(dataset("v30", "hevc"))
    assert len(list((tmp_path / "3.0/videos").rglob("*.mp4"))) == 4


def test_instructions_are_joined_by_their_text(make, tmp_path):
    one = make.v21(tmp_path / "one", tasks=("a", "b"), extra=columns_of_tasks(make, [0, 1]))
    two = make.v30(tmp_path / "two", tasks=("c", "a"), extra=columns_of_tasks(make, [1, 0]))
    write_edited(merge_datasets([open_source(one), open_source(two)]), tmp_path / "new")
    assert read_files(tmp_path / "new").tasks == {0: "a", 1: "b", 2: "c"}
    data = LeRobotDataset(tmp_path / "new")
    assert [data[int(i)]["lang"] for i in data.starts[:-1]] == ["a", "b", "a", "c"]


def columns_of_tasks(make, tasks: list[int]) -> dict:
    given = {"action": make.counting(3), "observation.state": make.counting(3)}
    return given | {"task_index": lambda i: tasks[0] if i < 6 else tasks[1]}


OTHERS = {
    "fps": (lambda make: {"fps": 15}, "fps is 15, in"),
    "robot": (lambda make: {"info": {"robot_type": "panda"}}, "robot_type is 'panda', in"),
    "shape": (
        lambda make: {"features": make.PLAIN | {"action": make.vector(2)}, "extra": {"action": make.counting(2), "observation.state": make.counting(3)}},
        r"feature 'action' has shape \[2\], in",
    ),
    "names": (
        lambda make: {"features": make.PLAIN | {"action": make.vector(3, ["x", "y", "z"])}},
        r"feature 'action' has names \['x', 'y', 'z'\], in",
    ),
    "size": (lambda make: {"features": make.PLAIN | {make.TOP: make.camera((32, 64, 3))}}, "'observation.images.top' has shape"),
    "camera": (lambda make: {"features": make.PLAIN | {"observation.images.side": make.camera()}}, "feature 'observation.images.side', which"),
    "missing": (
        lambda make: {"features": {"action": make.vector(3), make.TOP: make.camera()}, "extra": {"action": make.counting(3)}},
        "no feature 'observation.state', which",
    ),
    "modality": (lambda make: {"modality": {"action": {"x": {"start": 0, "end": 3}}}}, "modality.json says other things"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_sources_that_differ_are_refused(what, make, tmp_path):
    given, message = OTHERS[what]
    one, two = make.v30(tmp_path / "one"), make.v21(tmp_path / "two", **given(make))
    with pytest.raises(DatasetError, match=message) as told:
        write_edited(merge_datasets([open_source(one), open_source(two)]), tmp_path / "new")
    assert str(two) in str(told.value) and "\n" not in str(told.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_the_same_under_other_names_is_merged(make, tmp_path):
    plain = {
        make.TOP: make.camera(names=("height", "width", "channel")),
        "action": make.vector(3, {"motors": ["a", "b", "c"]}),
    }
    one = make.v30(tmp_path / "one", features=make.PLAIN | plain)
    other = {
        make.TOP: make.camera((3, 48, 64), ("channels", "height", "width")),
        "action": make.vector(3, ["a", "b", "c"]),
    }
    two = make.v21(tmp_path / "two", features=make.PLAIN | other)
    write_edited(merge_datasets([open_source(one), open_source(two)]), tmp_path / "new")
    assert validate(tmp_path / "new") == []


def test_numbers_are_not_rounded(make, tmp_path):
    one, two = make.v21(tmp_path / "one"), make.v21(tmp_path / "two")
    path = one / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("action")
    pq.write_table(table.set_column(place, "action", table["action"].cast(pa.list_(pa.float32()))), path)
    with pytest.raises(DatasetError, match="column 'action' holds double, in the rows before it float"):
        write_edited(merge_datasets([open_source(one), open_source(two)]), tmp_path / "new")


@pytest.mark.parametrize("shares, seed", [((0.5, 0.5), None), ((0.9, 0.1), 3), ((0.34, 0.33, 0.33), 0)])
def test_fractions_give_every_episode_once(shares, seed):
    parts = by_fractions(29, {str(i): share for i, share in enumerate(shares)}, seed)
    assert sorted(sum(parts.values(), [])) == list(range(29))
    assert [len(part) for part in parts.values()] == pytest.approx([29 * share for share in shares], abs=1)
    assert (sum(parts.values(), []) == list(range(29))) == (seed is None)


# Trimming


@pytest.mark.parametrize("span", [(2, 9), (0, 8), (3, 4)], ids=str)
def test_the_frames_of_a_window_are_those_of_the_rows(span, dataset, version, codec, tmp_path):
    """The first episode as it is, the third cut, for every codec and both ways to number frames."""
    root, (start, end) = dataset(version, codec), span
    source = open_source(root)
    first, third = pieces_of(source, [0, 2])
    write_edited([replace(third, start=start, end=end), first], tmp_path / "new")
    assert validate(tmp_path / "new", every_frame=True) == []
    found, old = rows(tmp_path / "new"), rows(root)
    count = end - start
    assert found[count:] == old[: LENGTHS[0]]
    ours = ("timestamp", "frame_index", "language_events")
    plain = lambda row: {k: v for k, v in row.items() if k not in ours}
    assert [plain(row) for row in found[:count]] == [
        plain(row) for row in old[ENDS[2] + start : ENDS[2] + end]
    ]
    assert [row["frame_index"] for row in found[:count]] == list(range(count))
    assert [row["timestamp"] for row in found[:count]] == [row["timestamp"] for row in old[ENDS[2] :][:count]]


def test_what_is_said_moves_with_the_beginning(dataset, tmp_path):
    source = open_source(dataset())
    write_edited([replace(pieces_of(source, [2])[0], start=3)], tmp_path / "new")
    old = [row["language_events"] for row in episodes(dataset(), 2)][3:]
    new = [row["language_events"] for row in rows(tmp_path / "new")]
    assert [bool(turns) for turns in new] == [bool(turns) for turns in old] and any(new)
    for before, after in zip(old, new):
        for a, b in zip(before or [], after or []):
            assert b["content"] == a["content"] and b["timestamp"] == pytest.approx(
                max(0, a["timestamp"] - 0.1)
            )


def resting(make, root: Path, spans: list[tuple[int, int, int]], state: bool) -> Path:
    """Episodes that rest, move and rest, so many frames each, the states or the changes known."""
    moves = np.concatenate([np.repeat([0.0, 1.0, 0.0], span) for span in spans])
    places = np.cumsum(moves)
    given = {"action": lambda i: [float(moves[i])] * 2}
    known = {"action": make.vector(2), make.TOP: make.camera()}
    if state:
        given["observation.state"], known["observation.state"] = (
            (lambda i: [float(places[i])] * 2),
            make.vector(2),
        )
    info = {"vla_bench": {"action_layout": {"names": ["dx", "dy"], "kind": "delta"}}}
    return make.v30(root, lengths=tuple(map(sum, spans)), fps=10, features=known, extra=given, info=info)


def test_rests_at_both_ends_are_trimmed(make, tmp_path):
    root = resting(make, tmp_path / "source", [(20, 8, 15), (4, 8, 3), (0, 12, 30)], state=True)
    pieces, notes = trim_idle(open_source(root), margin=0.3)
    # the state changes at frame 20 for the first time, so 19 is the last at rest, and three before it are left
    assert [(p.start, p.end) for p in pieces] == [(16, 31), (0, 15), (0, 15)]
    assert notes == ["trimmed: 2 of 3 episodes, 55 frames less"]
    write_edited(pieces, tmp_path / "new")
    assert validate(tmp_path / "new") == []
    data = LeRobotDataset(tmp_path / "new")
    levels = [make.level_of(data[i]["image"][0]) for i in range(15)]
    assert levels == [i % 16 for i in range(16, 31)]


def test_without_a_state_changes_are_looked_at(make, tmp_path):
    root = resting(make, tmp_path / "source", [(20, 8, 15)], state=False)
    [piece], _ = trim_idle(open_source(root), margin=0)
    assert (piece.start, piece.end) == (19, 28)


def test_an_episode_that_never_moves_is_kept_and_named(make, tmp_path):
    root = resting(make, tmp_path / "source", [(0, 10, 0), (20, 0, 0)], state=True)
    pieces, notes = trim_idle(open_source(root))
    assert [p.whole for p in pieces] == [True, True]
    assert notes[1] == "nothing moves in episodes 1, which are as they were"


# Instructions and names


def test_instructions_of_some_episodes_are_rewritten(dataset, tmp_path):
    pieces = rewrite_instructions(open_source(dataset()), {"put it down": "drop it"}, [2])
    write_edited(pieces, tmp_path / "new")
    data = LeRobotDataset(tmp_path / "new")
    assert [data[int(i)]["lang"] for i in data.starts[:-1]] == ["pick it up", "put it down", "drop it"]
    assert validate(tmp_path / "new") == []


def test_two_instructions_may_become_one(dataset, tmp_path):
    pieces = rewrite_instructions(open_source(dataset()), {"put it down": "move it", "pick it up": "move it"})
    write_edited(pieces, tmp_path / "new")
    assert read_files(tmp_path / "new").tasks == {0: "nobody does this", 1: "move it"}


def test_columns_of_instructions_are_numbered_with_them(make, tmp_path):
    extra = columns_of_tasks(make, [2, 0]) | {"annotation.human.valid": lambda i: 2 if i % 2 else 1}
    features = make.PLAIN | {"annotation.human.valid": make.vector(1, dtype="int64")}
    modality = {"annotation": {"human.valid": {}, "human.task": {"original_key": "task_index"}}}
    root = make.v21(
        tmp_path / "one", tasks=("a", "b", "c"), extra=extra, features=features, modality=modality
    )
    write_edited(delete_episodes(open_source(root), [1]), tmp_path / "new")
    texts, table = read_files(tmp_path / "new").tasks, table_of(tmp_path / "new").to_pydict()
    assert [texts[n] for n in table["annotation.human.valid"]] == ["b", "c"] * 3
    assert {texts[n] for n in table["task_index"]} == {"c"} and sorted(texts) == [0, 1]


def test_a_renamed_camera_is_renamed_everywhere(make, tmp_path):
    for version, write in (("v21", make.v21), ("v30", make.v30)):
        root = write(tmp_path / version)
        (root / "meta/modality.json").write_text(
            json.dumps(
                {"video": {"top": {"original_key": make.TOP}}, "action": {"x": {"start": 0, "end": 3}}}
            )
        )
        names = {make.TOP: "observation.images.front", "action": "command"}
        write_edited(pieces_of(open_source(root, names)), tmp_path / f"new {version}")
        data = LeRobotDataset(tmp_path / f"new {version}")
        assert (
            data.cameras == ("front",)
            and (data.columns["action"] == LeRobotDataset(root).columns["action"]).all()
        )
        assert validate(tmp_path / f"new {version}") == []
        texts = [p.read_text() for p in (tmp_path / f"new {version}/meta").glob("*.json*")]
        assert not any("images.top" in text for text in texts)


# What nobody here knows


def test_types_of_columns_stay(dataset, version, tmp_path):
    root = dataset(version)
    write_edited(delete_episodes(open_source(root), [1]), tmp_path / "new")
    assert table_of(tmp_path / "new").schema.equals(table_of(root).schema)


def test_a_column_that_nothing_declares_stays(make, tmp_path):
    root = make.v30(
        tmp_path / "one",
        extra={"action": make.counting(3), "observation.state": make.counting(3), "odd": lambda i: {"a": i}},
    )
    write_edited(delete_episodes(open_source(root), [0]), tmp_path / "new")
    assert table_of(tmp_path / "new")["odd"].to_pylist() == [{"a": i} for i in range(6, 11)]


def test_what_metadata_say_of_an_episode_stays(make, tmp_path):
    root = make.v21(tmp_path / "one", lengths=(4, 3, 5))
    path = root / "meta/episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps(line | {"success": i == 2, "file": f"t{i}"}) + "\n" for i, line in enumerate(lines)
        )
    )
    write_edited(delete_episodes(open_source(root), [0]), tmp_path / "v3", "3.0")
    write_edited(delete_episodes(open_source(tmp_path / "v3"), [0]), tmp_path / "v2", "2.1")
    table = pq.read_table(tmp_path / "v3/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [(row["success"], row["file"]) for row in table] == [(False, "t1"), (True, "t2")]
    [line] = map(json.loads, (tmp_path / "v2/meta/episodes.jsonl").read_text().splitlines())
    assert line == {"episode_index": 0, "tasks": ["do it"], "length": 5, "success": True, "file": "t2"}


def test_other_files_go_along_and_stale_statistics_do_not(make, tmp_path):
    root = make.v30(tmp_path / "one")
    (root / "README.md").write_text("about it")
    (root / "meta/robot.yaml").write_text("arm: left")
    (root / "meta/relative_stats.json").write_text("{}")
    report = write_edited(delete_episodes(open_source(root), [0]), tmp_path / "new")
    assert (tmp_path / "new/README.md").read_text() == "about it"
    assert (tmp_path / "new/meta/robot.yaml").exists() and not (
        tmp_path / "new/meta/relative_stats.json"
    ).exists()
    assert report.notes == [f"left out: {root / 'meta/relative_stats.json'}"]


def test_stored_images_stay_bit_for_bit(make, tmp_path):
    image = lambda i: make.png(make.level(i))
    features = make.PLAIN | {make.TOP: make.camera(dtype="image")}
    root = make.v21(
        tmp_path / "one",
        features=features,
        extra={"action": make.counting(3), "observation.state": make.counting(3), make.TOP: image},
    )
    (root / "images").mkdir()
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    stored = [row["bytes"] for row in table[make.TOP].to_pylist()]
    for i, content in enumerate(stored):
        (root / f"images/{i}.png").write_bytes(content)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    named = pa.array([{"bytes": None, "path": f"images/{i}.png"} for i in range(5)], kind)
    pq.write_table(table.set_column(table.column_names.index(make.TOP), make.TOP, named), path)
    write_edited(delete_episodes(open_source(root), [0]), tmp_path / "new", "3.0")
    assert [row["bytes"] for row in table_of(tmp_path / "new")[make.TOP].to_pylist()] == stored
    assert validate(tmp_path / "new") == []


# Statistics


def test_statistics_are_those_of_the_rows(dataset, tmp_path):
    pieces = pieces_of(open_source(dataset()), [2, 0])
    write_edited([replace(pieces[0], start=2), pieces[1]], tmp_path / "new", "3.0")
    values = np.array(table_of(tmp_path / "new")["action"].to_pylist())
    stats = json.loads((tmp_path / "new/meta/stats.json").read_text())
    expected = {"mean": values.mean(0), "std": values.std(0), "min": values.min(0), "max": values.max(0)}
    expected |= {"q01": np.quantile(values, 0.01, 0), "q99": np.quantile(values, 0.99, 0), "count": [14]}
    for name, value in expected.items():
        assert np.allclose(stats["action"][name], value, atol=1e-12), name
    assert {"reward", "force", "grasped", "index"} <= stats.keys() and "operator" not in stats
    row = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()[0]
    assert np.allclose(row["stats/action/mean"], values[:7].mean(0)) and row["stats/force/max"] == [
        [np.float32(19 / 3), 1],
        [2, np.float32(19 / 9)],
    ]


def test_image_statistics_are_copied_where_the_frames_are_the_same(tmp_path):
    source = open_source(written(tmp_path / "one", [0, 1]))
    a, b = pieces_of(source)
    report = write_edited([b, replace(a, end=3)], tmp_path / "new")
    first, second = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    old = pq.read_table(tmp_path / "one/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key = "stats/observation.images.top/mean"
    assert first[key] == old[1][key] and report.decoded == 1
    assert np.allclose(second[key], 1 / 255, atol=2 / 255) and second[
        "stats/observation.images.top/count"
    ] == [3]


def test_a_dataset_of_version_2_0_gets_the_statistics_that_it_lacks(make, tmp_path):
    root = make.v21(tmp_path / "one", info={"codebase_version": "v2.0"})
    report = write_edited(pieces_of(open_source(root)), tmp_path / "new")
    assert report.version == "v2.1" and report.decoded == 2 and validate(tmp_path / "new") == []
    lines = [
        json.loads(line) for line in (tmp_path / "new/meta/episodes_stats.jsonl").read_text().splitlines()
    ]
    for line, (first, end) in zip(lines, ((0, 6), (6, 11)), strict=True):
        mean = np.mean([make.level(i).mean() for i in range(first, end)]) / 255
        assert np.allclose(line["stats"][make.TOP]["mean"], mean, atol=0.01)
        assert np.allclose(line["stats"]["action"]["max"], [end - 1, end, end + 1])


# Whole or not at all


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError("the disk is gone")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("step", ["write_rows", "copy_runs", "write_metadata"])
def test_an_interrupted_edit_leaves_nothing(step, error, dataset, tmp_path, monkeypatch):
    calls, original = [], getattr(edited_dataset, step)

    def failing(*args):
        calls.append(original(*args))
        if len(calls) == (2 if step == "copy_runs" else 1):
            raise error
        return calls[-1]

    monkeypatch.setattr(edited_dataset, step, failing)
    before = digest(dataset("v21"))
    with pytest.raises(type(error)):
        write_edited(pieces_of(open_source(dataset("v21"))), tmp_path / "new", "3.0")
    assert calls and not list(tmp_path.iterdir())
    assert digest(dataset("v21")) == before


def test_no_source_is_touched(dataset, version, codec, tmp_path):
    root = dataset(version, codec)
    before = digest(root)
    split_dataset(open_source(root), tmp_path / "parts", {"a": [2, 0], "b": [1]})
    assert digest(root) == before


def test_an_empty_folder_is_taken_and_another_is_not(dataset, tmp_path):
    pieces = pieces_of(open_source(dataset()), [1])
    (tmp_path / "new").mkdir()
    write_edited(pieces, tmp_path / "new")
    before = digest(tmp_path / "new")
    with pytest.raises(FileExistsError, match="new is not empty; choose another folder"):
        write_edited(pieces, tmp_path / "new")
    assert digest(tmp_path / "new") == before


def test_a_folder_within_the_source_is_refused(dataset):
    root = dataset()
    with pytest.raises(ValueError, match="is inside of .* which is only read"):
        write_edited(pieces_of(open_source(root)), root / "data" / "new")


def test_a_damaged_video_is_named(make, tmp_path):
    root = make.v30(tmp_path / "one")
    [path] = root.rglob("*.mp4")
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(DatasetError, match="file-000.mp4"):
        write_edited(pieces_of(open_source(root)), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_row_without_an_instruction_is_named(make, tmp_path):
    root = make.v30(tmp_path / "one", extra=columns_of_tasks(make, [0, 7]))
    with pytest.raises(DatasetError, match="file-000.parquet: episode 1: task_index 7 names no instruction"):
        write_edited(pieces_of(open_source(root)), tmp_path / "new")


def test_a_source_that_differs_from_its_checksums_is_refused(make, tmp_path):
    root = make.v30(tmp_path / "one")
    write_checksums(root)
    write_edited(pieces_of(open_source(root)), tmp_path / "new")
    assert (tmp_path / "new/manifest.json").exists() and validate(tmp_path / "new") == []
    path = root / "data/chunk-000/file-000.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="file-000.parquet has other content than when it was saved"):
        open_source(root)


# The program


def test_the_report_says_how_videos_were_copied(dataset, tmp_path, capsys):
    root = dataset("v30", "av1")
    main(["delete", str(root), str(tmp_path / "new"), "--episodes", "1"])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'new'}: LeRobot v3.0, 2 episodes, 16 frames, 3 instructions",
        "  2 videos cut at key frames",
        "  2 videos cut, with hidden frames",
        "  no video was encoded again",
        "  statistics of images computed anew: 4, one per episode and camera",
    ]


MISTAKES = {
    "episodes": (["delete", "SOURCE", "new", "--episodes", "9"], "no episode 9; it has 3"),
    "version": (["convert", "SOURCE", "new", "--version", "3"], "unknown version '3'; did you mean 'v3"),
    "both": (
        ["rewrite", "SOURCE", "new", "--new", "x"],
        "rewrite needs --file, or --new with --old or --episodes",
    ),
    "old": (
        ["rewrite", "SOURCE", "new", "--old", "put it dwon", "--new", "x"],
        "did you mean 'put it down'?",
    ),
    "empty": (["rewrite", "SOURCE", "new", "--old", "put it down", "--new", " "], "would become empty"),
    "form": (
        ["rename", "SOURCE", "new", "--features", "action"],
        "--features: 'action' is not of the form name=value",
    ),
    "twice": (["split", "SOURCE", "new", "--episodes", "a=0", "a=1"], "--episodes: 'a=1' stands twice"),
    "share": (["split", "SOURCE", "new", "--fractions", "a=x", "b=1"], "--fractions: 'x' is no number"),
    "folder": (["split", "SOURCE", "new", "--episodes", "../a=0"], "'../a' cannot be the name of a folder"),
    "target": (["merge", "SOURCE", "SOURCE"], "is not empty; choose another folder"),
    "feature": (
        ["remove", "SOURCE", "new", "--features", "actoin"],
        "no feature 'actoin' to remove; did you mean 'action'?",
    ),
    "counter": (["remove", "SOURCE", "new", "--features", "index"], "no feature 'index' to remove"),
    "margin": (["trim", "SOURCE", "new", "--margin", "-1"], "expected a positive time and one from 0 on"),
}


@pytest.mark.parametrize("words, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(words, message, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([str(dataset()) if word == "SOURCE" else word for word in words])
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1 and message in told
    assert not list(tmp_path.iterdir())


# Features that are left out


def test_removed_features_leave_no_trace(make, dataset, version, tmp_path):
    root = dataset(version)
    gone = [WRIST, "force", "language_events", "secret", "observation.state"]
    report = write_edited(pieces_of(open_source(root, removed=gone)), tmp_path / "new")
    assert validate(tmp_path / "new", state_key=None) == []
    old, new = table_of(root), table_of(tmp_path / "new")
    assert new.equals(old.select([name for name in old.column_names if name not in gone]))
    assert (
        sum(report.videos.values())
        == len(list((tmp_path / "new").rglob("*.mp4")))
        == (3 if version == "v21" else 1)
    )
    texts = [p.read_text() for p in (tmp_path / "new/meta").glob("*.json*")]
    assert not any(name in text for name in gone for text in texts)
    data = LeRobotDataset(tmp_path / "new", state_key=None)
    assert (
        data.cameras == ("top",) and np.asarray(data[8]["image"][0]).tobytes() == rows(root)[8]["images"][0]
    )


def test_what_modality_says_of_a_removed_feature_goes_with_it(tmp_path):
    root = written(tmp_path / "one", [0, 1])
    write_edited(pieces_of(open_source(root, removed=["observation.state"])), tmp_path / "new")
    modality = json.loads((tmp_path / "new/meta/modality.json").read_text())
    assert "state" not in modality and modality["action"].keys() == {"x", "y"}
    info = json.loads((tmp_path / "new/meta/info.json").read_text())
    assert info["vla_bench"]["state_layout"] is None and info["vla_bench"]["action_layout"]["names"] == [
        "x",
        "y",
    ]


def test_after_a_feature_is_removed_two_sources_may_fit(make, tmp_path):
    one = make.v30(tmp_path / "one")
    two = make.v21(tmp_path / "two", features=make.PLAIN | {"observation.images.side": make.camera()})
    sources = [open_source(one), open_source(two, removed=["observation.images.side"])]
    write_edited(merge_datasets(sources), tmp_path / "new")
    assert validate(tmp_path / "new") == [] and len(LeRobotDataset(tmp_path / "new")) == 22
