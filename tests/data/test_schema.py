"""Metadata that are not what they should be: one line with file and field."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from vla_bench.data import schema
from vla_bench.data.language import Turn
from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.paths import Folder
from vla_bench.data.schema import (
    LARGEST,
    Info,
    LayoutEntry,
    Part,
    Size,
    Span,
    Whole,
    one_line,
    parse,
    read_lines,
    read_metadata_columns,
    read_object,
    to_layout,
)

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


class Entry(Part):
    """What the tests of this file read."""

    count: Whole
    size: Size = 0
    name: str | None = None
    parts: list[Span] = []


@pytest.mark.parametrize(
    "content, message",
    [
        ({"count": 3, "size": 2, "name": "a", "more": 1}, None),
        ({"count": 0, "size": 10**5}, None),
        ({"count": 10**11}, None),
        ({}, "here: count is missing"),
        ({"cuont": 1}, "here: count is missing; did you mean 'cuont'"),
        ({"size": "a"}, "here: count is missing.* \\(and 1 more\\)"),
        ({"count": -1}, "here: count is -1, expected greater than or equal to 0"),
        ({"count": 10**11 + 1}, "here: count is 100000000001, expected less than or equal to 100000000000"),
        ({"count": 1, "size": 10**5 + 1}, "here: size is 100001"),
        ({"count": 1.0}, "here: count is 1.0, expected a valid integer"),
        ({"count": True}, "here: count is True, expected a valid integer"),
        ({"count": 1, "name": 3}, "here: name is 3, expected a valid string"),
        ({"count": 1, "name": "x", "size": -1, "parts": 3}, "here: size is -1.* \\(and 1 more\\)"),
        ({"count": 1, "parts": [{"start": 0, "end": 1}, {"start": 0}]}, r"here: parts\[1\].end is missing"),
        (
            {"count": 1, "parts": [{"start": 0, "end": "b"}]},
            r"here: parts\[0\].end is 'b', expected a valid integer",
        ),
        ({"count": "x" * 200}, "here: count is 'x{76}\\.\\.\\., expected"),
        ([1], r"here: the content is \[1\], expected"),
    ],
    ids=str,
)
def test_a_tree_is_read_by_its_schema(content, message):
    if message is None:
        found = parse(Entry, content, "here")
        assert found.count == content["count"] and found.size == content.get("size", 0)
        return
    with pytest.raises(DatasetError, match=f"^{message}"):
        parse(Entry, content, "here")


def test_numbers_that_are_none_are_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(DatasetError, match="timestamp is"):
            parse(Turn, {"role": "user", "timestamp": value}, "here")
    assert parse(Turn, {"role": "user", "timestamp": 0}, "here").timestamp == 0
    with pytest.raises(DatasetError, match="timestamp is -0.1"):
        parse(Turn, {"role": "user", "timestamp": -0.1}, "here")


def test_what_is_read_is_not_changed():
    with pytest.raises(ValidationError):
        parse(Entry, {"count": 1}, "here").count = 2


def test_lines_are_counted_from_1_with_the_empty_ones(tmp_path):
    folder, path = Folder(tmp_path), tmp_path / "a.jsonl"
    path.write_text('{"count": 1}\n\n  \n{"count": 2}\n')
    assert [entry.count for entry in read_lines(folder, path, Entry)] == [1, 2]
    path.write_text('{"count": 1}\n\n{"count": }\n')
    with pytest.raises(DatasetError, match="a.jsonl line 3 is not JSON"):
        read_lines(folder, path, Entry)
    path.write_text('{"count": 1}\n{"count": "a"}\n')
    with pytest.raises(DatasetError, match="a.jsonl line 2: count is 'a'"):
        read_lines(folder, path, Entry)
    path.write_text('{"count": 1, "size": 2, "count": 3}')
    with pytest.raises(DatasetError, match="'count' stands twice in one object"):
        read_object(folder, path, Entry)
    path.write_bytes(b"\xff")
    with pytest.raises(DatasetError, match="a.jsonl cannot be read"):
        read_object(folder, path, Entry)
    path.write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="a.jsonl is not JSON"):
        read_object(folder, path, Entry)
    with pytest.raises(DatasetError, match="gone.json is missing"):
        read_object(folder, tmp_path / "gone.json", Entry)


@pytest.mark.parametrize("more, fits", [(0, True), (1, False)])
def test_a_file_has_so_many_bytes_at_most(tmp_path, monkeypatch, more, fits):
    monkeypatch.setattr(schema, "LARGEST", 20)
    path = tmp_path / "a.json"
    path.write_text('{"count": 12345678}'.ljust(20 + more))
    if fits:
        assert read_object(Folder(tmp_path), path, Entry).count == 12345678
        return
    with pytest.raises(DatasetError, match="a.json has 21 bytes, expected less than 20"):
        read_object(Folder(tmp_path), path, Entry)
    assert LARGEST == 2**30


COLUMNS = {
    "number": pa.array([0, 5, 10**11]), "second": pa.array([0.0, 2.5, 1e9]), "text": pa.array(["a", "b", ""]),
    "stats/number": pa.array([1, 2, 3]),
}  # fmt: skip
BAD = {
    "number": [(pa.array([0, -1, 2]), "row 1 is -1"), (pa.array([0, None, 2]), "row 1 is None"), (pa.array([0.0, 1, 2]), "row 0 is 0.0"), (pa.array([1, 2, 10**11 + 1]), "row 2 is")],
    "second": [(pa.array([0.0, -0.1, 1]), "row 1 is -0.1"), (pa.array([0.0, float("nan"), 1]), "row 1 is nan"), (pa.array([0.0, 1, 1.1e9]), "row 2 is")],
    "text": [(pa.array([1, 2, 3]), "row 0 is 1"), (pa.array(["a", None, "b"]), "row 1 is None")],
}  # fmt: skip
KINDS = {"number": "whole", "second": "seconds", "text": "text"}


def of_table(folder, columns: dict, wanted=KINDS) -> dict:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return read_metadata_columns(Folder(folder), folder / "a.parquet", wanted)


def test_columns_of_metadata_are_read_by_their_kind(tmp_path):
    found = of_table(tmp_path, COLUMNS)
    assert found == {name: COLUMNS[name].to_pylist() for name in KINDS}
    assert of_table(tmp_path, COLUMNS, {"text": "text?", "gone": "whole?"}) == {"text": ["a", "b", ""]}
    with pytest.raises(
        DatasetError, match="a.parquet: column 'numbr' is missing; did you mean 'number'"
    ) as error:
        of_table(tmp_path, COLUMNS, {"numbr": "whole"})
    assert "stats/" not in str(error.value)


@pytest.mark.parametrize(
    "name, place", [(name, place) for name, cases in BAD.items() for place in range(len(cases))]
)
def test_a_row_of_another_kind_is_named(tmp_path, name, place):
    column, message = BAD[name][place]
    with pytest.raises(DatasetError, match=f"a.parquet: column '{name}' {message}.*, expected"):
        of_table(tmp_path, COLUMNS | {name: column})


def test_a_layout_in_a_file_is_every_field_of_it():
    entry = LayoutEntry(
        names=["a", "b"], kind="delta", frame="base", units="m", rotation="euler_xyz", gripper="unknown"
    )
    assert to_layout(entry, "here") == Layout(("a", "b"), "delta", "base", "m", "euler_xyz", "unknown")
    assert to_layout(LayoutEntry(names=["a"]), "here") == Layout(("a",))
    with pytest.raises(DatasetError, match="^here: layout kind is 'detla'"):
        to_layout(LayoutEntry(names=["a"], kind="detla"), "here")
    with pytest.raises(DatasetError, match="^here: a layout names each dimension once"):
        to_layout(LayoutEntry(names=["a", "a"]), "here")


@pytest.mark.parametrize(
    "field, good, bad",
    [("fps", (0.001, 30, 10_000), (0, 0.0009, 10_001, -1)), ("chunks_size", (1, 10**9), (0, 10**9 + 1)), ("total_frames", (0, None), (-1, 1.5))],
)  # fmt: skip
def test_numbers_of_info_json_lie_in_a_range(field, good, bad):
    plain = {"codebase_version": "v2.1", "fps": 10, "features": {}, "data_path": "a"}
    for value in good:
        assert vars(parse(Info, plain | {field: value}, "here"))[field] == value
    for value in bad:
        with pytest.raises(DatasetError, match=f"here: {field} is {value}"):
            parse(Info, plain | {field: value}, "here")
    assert parse(Info, plain, "here").chunks_size == 1000 and parse(Info, plain, "here").video_path is None


def test_a_message_of_a_library_is_cut_and_put_on_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c" and len(one_line(ValueError("x" * 500))) == 200


@pytest.mark.parametrize("which", ["data/*/*.parquet", "meta/episodes/*/*.parquet", "meta/tasks.parquet"])
def test_a_column_whose_name_is_no_text_is_one_line_with_its_file(make, tmp_path, which):
    root = make.v30(tmp_path / "arm")
    path = next(root.glob(which))
    content = path.read_bytes()
    name = max((n.encode() for n in pq.read_schema(path).names), key=len)
    path.write_bytes(content.replace(name, b"\xe4" + name[1:]))
    lines = validate(root)
    assert len(lines) == 1 and str(path) in lines[0] and "\n" not in lines[0]
