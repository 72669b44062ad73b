"""Which numbers of which columns make an action, as writers of datasets really say it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data.columns import as_array, find_spans, flat_names, read_columns, vector_width
from vla_bench.data.language import read_language
from vla_bench.data.layout import Layout
from vla_bench.data.lerobot import LeRobotDataset, validate
from vla_bench.data.lerobot_files import read_files
from vla_bench.data.paths import DatasetError
from vla_bench.data.schema import Feature, open_table, read_metadata_columns


@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "gripper"],
        [["a", "b", "gripper"]],
        [["a", "b"], ["gripper"]],
        {"motors": ["a", "b", "gripper"]},
        {"arm": ["a", "b"], "hand": "gripper"},
        {"a": 0, "b": 1, "gripper": 2},
        {"gripper": 2, "a": 0, "b": 1},
        {"motors": [["a", "b"], ["gripper"]]},
    ],
    ids=str,
)
def test_names_in_every_form_that_writers_use(make, tmp_path, names):
    root = make.v21(tmp_path / "ds", features=make.PLAIN | {"action": make.vector(3, names)})
    assert LeRobotDataset(root).action_layout.names == ("a", "b", "gripper")
    assert validate(root) == []


@pytest.mark.parametrize(
    "names", [None, [], ["state"], ["a", "a", "b"], {"a": 0, "b": 7}, {}, [[], []]], ids=str
)
def test_names_that_name_nothing_are_numbered(make, tmp_path, names):
    root = make.v21(tmp_path / "ds", features=make.PLAIN | {"action": make.vector(3, names)})
    assert LeRobotDataset(root).action_layout.names == ("dim_0", "dim_1", "dim_2")


@pytest.mark.parametrize("shape", [[2, 7], [1, 3], [3, 1, 1]], ids=str)
def test_columns_of_several_axes_are_refused_by_their_shape(make, tmp_path, shape):
    feature = {"dtype": "float32", "shape": shape, "names": None}
    root = make.v21(tmp_path / "ds", features=make.PLAIN | {"action": feature})
    with pytest.raises(
        DatasetError, match=r"info.json: feature 'action' has shape \[.*\]: vectors of one axis are read"
    ):
        LeRobotDataset(root)


@pytest.mark.parametrize("role", ["action", "state"])
@pytest.mark.parametrize(("start", "end"), [(2, 5), (0, 4), (3, 3), (2, 1), (5, 6), (0, 10**9)])
def test_a_span_beyond_its_column_names_entry_and_width(make, tmp_path, role, start, end):
    root = make.v21(
        tmp_path / "ds",
        modality={role: {"arm": {"start": 0, "end": 2}, "hand": {"start": start, "end": end}}},
    )
    column = {"action": "action", "state": "observation.state"}[role]
    message = rf"modality.json: 'hand' is \[{start}:{end}\] of '{column}', which has 3 numbers"
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)
    assert len(validate(root)) == 1 and "modality.json" in validate(root)[0]


def test_a_span_may_reach_the_last_number(make, tmp_path):
    root = make.v21(
        tmp_path / "ds", modality={"action": {"hand": {"start": 2, "end": 3}, "arm": {"start": 0, "end": 2}}}
    )
    dataset = LeRobotDataset(root)
    assert dataset.action_layout.names == ("hand", "arm_0", "arm_1")
    assert dataset[4]["action"].tolist() == [[6.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    "change", [{"end": 10**12}, {"start": -1}, {"end": "3"}, {"start": None}, {"end": 2.5}], ids=str
)
def test_a_span_that_is_no_span_names_the_field(make, tmp_path, change):
    root = make.v21(tmp_path / "ds", modality={"action": {"hand": {"start": 0, "end": 3} | change}})
    (field,) = change
    with pytest.raises(DatasetError, match=rf"modality.json: action.hand.{field} is"):
        LeRobotDataset(root)


ERRORS = [
    pa.ArrowInvalid("broken\nbytes"),
    OSError("broken\nbytes"),
    pa.ArrowNotImplementedError("broken bytes"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("reader", ["columns", "metadata", "language"])
def test_whatever_a_library_raises_is_one_line_that_names_the_file(
    make, tmp_path, monkeypatch, reader, error
):
    files = read_files(make.v30(tmp_path / "ds"))
    path = files.episodes[0].data
    if reader == "language":
        info = tmp_path / "ds/meta/info.json"
        content = json.loads(info.read_text())
        content["features"]["said"] = {"dtype": "language", "shape": [1], "names": None}
        info.write_text(json.dumps(content))
        table = pq.read_table(path)
        pq.write_table(table.append_column("said", pa.nulls(len(table), pa.list_(pa.string()))), path)
        files = read_files(tmp_path / "ds")
    read = {
        "columns": lambda: read_columns(files.folder, path, ["action"]),
        "metadata": lambda: read_metadata_columns(files.folder, path, {"index": "whole"}),
        "language": lambda: read_language(files, files.episodes[0]),
    }[reader]
    assert read() is not None

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(pq.ParquetFile, "read", broken)
    with pytest.raises(DatasetError, match="file-000.parquet is damaged: broken bytes$"):
        read()


@pytest.mark.parametrize(
    "error", [*ERRORS, PermissionError(13, "no")], ids=lambda error: type(error).__name__
)
def test_a_file_that_cannot_be_opened_is_named(make, tmp_path, monkeypatch, error):
    files = read_files(make.v21(tmp_path / "ds"))

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(pq, "ParquetFile", broken)
    with pytest.raises(DatasetError, match="episode_000000.parquet cannot be read as parquet: "):
        open_table(files.folder, files.episodes[0].data)


def test_columns_are_read_in_the_order_that_is_asked_for(make, tmp_path):
    files = read_files(make.v21(tmp_path / "ds"))
    found = read_columns(files.folder, files.episodes[1].data, ["index", "action"])
    assert list(found) == ["index", "action"] and found["index"].tolist() == [[row] for row in range(6, 11)]
    assert found["action"][2].tolist() == [8, 9, 10]
    with pytest.raises(DatasetError, match="no column 'acton'; did you mean 'action'"):
        read_columns(files.folder, files.episodes[1].data, ["index", "acton"])


def test_a_column_that_stands_twice_is_named(make, tmp_path):
    files = read_files(make.v21(tmp_path / "ds"))
    path = files.episodes[0].data
    table = pq.read_table(path)
    pq.write_table(table.append_column("index", table["index"]), path)
    with pytest.raises(DatasetError, match="column 'index' stands 2 times"):
        read_columns(files.folder, path, ["index"])
    assert read_columns(files.folder, path, ["action"])["action"].shape == (6, 3)


KINDS = {
    "numbers": (pa.array([1.5, 2.5, 3.5]), [[1.5], [2.5], [3.5]]),
    "whole": (pa.array([1, 2, 3]), [[1], [2], [3]]),
    "truths": (pa.array([True, False, True]), [[True], [False], [True]]),
    "fixed": (pa.array([[1.0, 2], [3, 4]], pa.list_(pa.float32(), 2)), [[1, 2], [3, 4]]),
    "lists": (pa.array([[1, 2, 3], [4, 5, 6]]), [[1, 2, 3], [4, 5, 6]]),
    "large": (pa.array([[1, 2], [4, 5]], pa.large_list(pa.int64())), [[1, 2], [4, 5]]),
    "a slice": (pa.array([[9, 9], [1, 2], [4, 5]]).slice(1), [[1, 2], [4, 5]]),
    "none": (pa.array([], pa.list_(pa.float32())), []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_every_form_become_rows(kind):
    column, expected = KINDS[kind]
    for given in (column, pa.chunked_array([column])):
        assert as_array(given, "here").tolist() == expected


NO_NUMBERS = {
    "empty rows": (pa.array([1, None, 3, None]), "here has 2 empty rows, the first is row 1"),
    "ragged": (
        pa.array([[1, 2], [3], [4, 5]]),
        r"here holds vectors of lengths \[1, 2\]; expected one length",
    ),
    "an empty list": (pa.array([[1], []]), r"here holds vectors of lengths \[0, 1\]"),
    "texts": (pa.array(["a"]), "here holds string, expected numbers or lists of numbers"),
    "lists of texts": (pa.array([["a"]]), "here holds list<.*string>, expected numbers"),
    "a hole in a list": (pa.array([[1.0, None]], pa.list_(pa.float64(), 2)), None),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_is_no_row_of_numbers_is_named(kind):
    column, message = NO_NUMBERS[kind]
    if message is None:
        assert (
            str(as_array(column, "here").tolist()) == "[[1.0, nan]]"
        )  # found by the check of finite numbers
        return
    with pytest.raises(DatasetError, match=message):
        as_array(column, "here")


def spans_of(make, tmp_path, modality, key="action", role="action", **feature):
    features = make.PLAIN | {"other": make.vector(2, ["p", "q"])} | feature
    extra = {"action": make.counting(3), "observation.state": make.counting(3), "other": make.counting(2)}
    return find_spans(
        read_files(make.v21(tmp_path / "ds", features=features, extra=extra, modality=modality)), role, key
    )


def test_spans_are_assembled_in_the_order_of_their_entries(make, tmp_path):
    entries = {
        "hand": {"start": 2, "end": 3, "absolute": True},
        "pair": {"start": 0, "end": 2, "original_key": "other", "absolute": True},
        "again": {"start": 1, "end": 3, "absolute": True},
    }
    found = spans_of(make, tmp_path, {"action": entries})
    assert found.parts == (("action", 2, 3), ("other", 0, 2), ("action", 1, 3))
    assert found.layout == Layout(
        ("hand", "pair_0", "pair_1", "again_0", "again_1"), "absolute", gripper="unknown", rotation="unknown"
    )
    assert found.widths == {"action": 3, "other": 2} and found.columns() == ["action", "other"]
    columns = {"action": np.array([[1.0, 2, 3]]), "other": np.array([[8.0, 9]])}
    assert (
        found.assemble(columns).tolist() == [[3, 8, 9, 2, 3]] and found.assemble(columns).dtype == np.float32
    )


@pytest.mark.parametrize(
    "told, kind", [((True, True), "absolute"), ((False, False), "delta"), ((True, False), "unknown"), ((None, None), "unknown"), ((True, None), "unknown")]
)  # fmt: skip
def test_the_kind_is_what_all_entries_say(make, tmp_path, told, kind):
    entries = {f"p{i}": {"start": i, "end": i + 1, "absolute": value} for i, value in enumerate(told)}
    assert spans_of(make, tmp_path, {"action": entries}).layout.kind == kind


def test_without_names_of_gr00t_a_column_is_taken_whole(make, tmp_path):
    found = spans_of(make, tmp_path, {"state": {"a": {"start": 0, "end": 1}}}, key="other")
    assert found.parts == (("other", 0, 2),) and found.widths == {"other": 2}
    assert found.layout == Layout(("p", "q"), "unknown", gripper="unknown")


def test_two_numbers_of_one_name_are_refused(make, tmp_path):
    entries = {"a_0": {"start": 0, "end": 1}, "a": {"start": 1, "end": 3}}
    with pytest.raises(DatasetError, match="modality.json: two numbers are called 'a_0'"):
        spans_of(make, tmp_path, {"action": entries})


VECTORS = [
    ({"dtype": "float32", "shape": [4]}, 4),
    ({"dtype": "float64", "shape": []}, 1),
    ({"dtype": "int64", "shape": [1]}, 1),
    *(({"dtype": kind, "shape": [1]}, f"is of dtype {kind}, expected numbers") for kind in ("video", "image", "string", "language")),
    ({"dtype": "float32"}, "shape is missing"),
    ({"dtype": "float32", "shape": [2, 3]}, r"has shape \[2, 3\]: vectors of one axis"),
    ({"dtype": "float32", "shape": [0]}, r"has shape \[0\]"),
]  # fmt: skip


@pytest.mark.parametrize("feature, expected", VECTORS, ids=str)
def test_so_many_numbers_has_a_feature(feature, expected):
    files = SimpleNamespace(features={"v": Feature(**feature)}, root=Path("ds"))
    if isinstance(expected, int):
        assert vector_width(files, "v", "here") == expected
        return
    with pytest.raises(DatasetError, match=f"ds/meta/info.json: feature 'v'.*{expected}"):
        vector_width(files, "v", "here")


def test_a_feature_that_is_none_is_named_with_the_nearest_vector():
    features = {"states": Feature(dtype="video"), "state": Feature(dtype="float32", shape=[2])}
    with pytest.raises(DatasetError, match="^here: no feature 'stats'; did you mean 'state'") as error:
        vector_width(SimpleNamespace(features=features, root=Path("ds")), "stats", "here")
    assert "states" not in str(error.value)


def test_a_layout_of_our_own_has_as_many_names_as_the_column(make, tmp_path):
    ours = {"vla_bench": {"action_layout": {"names": ["a", "b"], "kind": "delta"}}}
    with pytest.raises(DatasetError, match="vla_bench.action_layout names 2 numbers, 'action' has 3"):
        LeRobotDataset(make.v21(tmp_path / "ds", info=ours))
    names = {"names": ["a", "b", "c"], "kind": "delta", "gripper": "positive_opens"}
    entries = {"action": {"x": {"start": 0, "end": 1}}}
    root = make.v21(tmp_path / "own", info={"vla_bench": {"action_layout": names}}, modality=entries)
    assert LeRobotDataset(root).action_layout == Layout(("a", "b", "c"), "delta", gripper="positive_opens")


@pytest.mark.parametrize("depth, expected", [(4, ["a"]), (5, ["a"]), (6, [])])
def test_names_are_looked_for_so_deep(depth, expected):
    names: object = "a"
    for _ in range(depth - 1):
        names = [names]
    assert flat_names(names) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"b": 2, "a": 1, "g": 3}, ("a", "b", "g")),
        ({"a": 0.0, "b": 1.0, "g": 2.0}, ("dim_0", "dim_1", "dim_2")),
        ({"motors": {"b": 1, "a": 0, "g": 2}}, ("a", "b", "g")),
        ({"a": 0, "b": 0, "g": 1}, ("dim_0", "dim_1", "dim_2")),
    ],
)
@pytest.mark.parametrize("key", ["action", "observation.state"])
def test_places_may_begin_at_one_and_must_be_whole(make, tmp_path, names, expected, key):
    root = make.v30(tmp_path / "arm", features=make.PLAIN | {key: make.vector(3, names)})
    dataset = LeRobotDataset(root)
    assert {"action": dataset.action_layout, "observation.state": dataset.state_layout}[key].names == expected
