"""Metadata that are not what they should be: one line with file and field."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=repr)
def test_json_lines_end_at_a_line_feed_only(make, tmp_path, separator):
    text = f"put the cup{separator}on the plate"
    root = make.v21(tmp_path / "ds")
    line = json.dumps({"task_index": 0, "task": text}, ensure_ascii=separator < " ") + "\n"
    (root / "meta/tasks.jsonl").write_text(line, encoding="utf-8")
    assert LeRobotDataset(root)[0]["lang"] == text


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"], ids=repr)
def test_the_last_line_counts_with_and_without_its_end(make, tmp_path, end):
    root = make.v21(tmp_path / "ds")
    text = (root / "meta/episodes.jsonl").read_text().rstrip("\n")
    (root / "meta/episodes.jsonl").write_bytes(
        text.replace("\n", end.strip("\n") + "\n").encode() + end.encode()
    )
    assert LeRobotDataset(root).episodes == [0, 1]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("episodes.jsonl", {"length": None}, "episodes.jsonl line 2: length is None"),
        ("episodes.jsonl", {"episode_index": -1}, "episodes.jsonl line 2: episode_index is -1"),
        ("episodes.jsonl", {"episode_index": 0}, "episode_index 0 stands twice"),
        ("tasks.jsonl", {"task": 3}, "tasks.jsonl line 2: task is 3"),
        ("tasks.jsonl", {"task_index": True}, "tasks.jsonl line 2: task_index is True"),
        ("tasks.jsonl", {"task_index": 0}, "tasks.jsonl: task_index 0 stands twice"),
    ],
)
def test_a_line_with_a_wrong_value_is_named(make, tmp_path, file, change, message):
    root = make.v21(tmp_path / "ds", tasks=("do it", "undo it"))
    first, second = (root / "meta" / file).read_text().splitlines()
    (root / "meta" / file).write_text(f"{first}\n{json.dumps(json.loads(second) | change)}\n")
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)
    assert len(validate(root)) == 1


@pytest.mark.parametrize("key", ["codebase_version", "fps", "features", "data_path"])
def test_a_key_that_is_missing_or_misspelled_is_named(make, tmp_path, key):
    root = make.v21(tmp_path / "ds")
    info = json.loads((root / "meta/info.json").read_text())
    info[key + "s"] = info.pop(key)
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=f"info.json: {key} is missing; did you mean '{key}s'"):
        LeRobotDataset(root)


def test_the_same_name_twice_in_one_object_is_an_error(make, tmp_path):
    root = make.v21(tmp_path / "ds")
    text = (root / "meta/info.json").read_text()
    (root / "meta/info.json").write_text(text.replace('"fps": 30', '"fps": 30, "fps": 10'))
    with pytest.raises(DatasetError, match="info.json is not JSON: 'fps' stands twice in one object"):
        LeRobotDataset(root)


KEY = "videos/observation.images.top/from_timestamp"
DAMAGE = {
    "null": (lambda rows: [rows[0], rows[1] | {KEY: None}], f"column '{KEY}' row 1 is None"),
    "nan": (lambda rows: [rows[0], rows[1] | {KEY: float("nan")}], f"column '{KEY}' row 1 is nan"),
    "negative": (lambda rows: [rows[0], rows[1] | {KEY: -1.0}], f"column '{KEY}' row 1 is -1.0"),
    "no column": (
        lambda rows: [{k: v for k, v in r.items() if k != KEY} for r in rows],
        f"column '{KEY}' is missing",
    ),
    "a text": (lambda rows: [r | {KEY: "0.1"} for r in rows], f"column '{KEY}' row 0 is '0.1'"),
    "twice": (lambda rows: [*rows, rows[1]], "episode_index 1 stands twice"),
    "no length": (
        lambda rows: [{k: v for k, v in r.items() if k != "length"} for r in rows],
        "column 'length' is missing",
    ),
    "a huge file number": (
        lambda rows: [r | {"data/file_index": 10**15} for r in rows],
        "'data/file_index' row 0 is 1",
    ),
    "fractions": (lambda rows: [r | {"length": 5.5} for r in rows], "column 'length' row 0 is 5.5"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_incomplete_metadata_of_v3_are_named(make, tmp_path, kind):
    change, message = DAMAGE[kind]
    root = make.v30(tmp_path / "ds", change=change)
    with pytest.raises(DatasetError) as error:
        LeRobotDataset(root)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert validate(root) == [str(error.value)]


@pytest.mark.parametrize("name", ["task", "__index_level_0__"])
def test_tasks_under_either_name_of_pandas_are_read(make, tmp_path, name):
    root = make.v30(tmp_path / "ds")
    pq.write_table(pa.table({"task_index": [0], name: ["do it now"]}), root / "meta/tasks.parquet")
    assert LeRobotDataset(root)[0]["lang"] == "do it now"


def test_version_3_1_with_columns_of_language_is_read(make, tmp_path):
    turns = lambda i: [{"role": "assistant", "content": f"step {i}", "style": "subtask", "timestamp": i / 30}]
    features = make.PLAIN | {"language_persistent": {"dtype": "language", "shape": [1], "names": None}}
    features["language_events"] = {"dtype": "language"}
    extra = {"action": make.counting(3), "observation.state": make.counting(3)}
    extra |= {"language_persistent": turns, "language_events": lambda i: []}
    root = make.v30(tmp_path / "ds", features=features, extra=extra, info={"codebase_version": "v3.1"})
    assert validate(root) == []
    dataset = LeRobotDataset(root)
    assert make.level_of(dataset[9]["image"][0]) == 9 and np.allclose(dataset[9]["action"][0], [9, 10, 11])
