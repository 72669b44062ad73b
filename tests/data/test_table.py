"""All numbers of the episodes, and a damaged one named where it is."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data import table
from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.lerobot_files import read_files
from vla_bench.data.table import read_table

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("version", ["v21", "v30"])
@pytest.mark.parametrize("field", ["action", "observation.state"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, None])
def test_a_number_that_is_none_is_named_by_file_episode_and_field(make, tmp_path, version, field, value):
    damaged = lambda i: [1.0, value, 3.0] if i in (7, 9) else [float(i), 2.0, 3.0]
    extra = {"action": make.counting(3), "observation.state": make.counting(3)} | {field: damaged}
    root = {"v21": make.v21, "v30": make.v30}[version](tmp_path / "ds", extra=extra)
    file = {"v21": "episode_000001.parquet", "v30": "file-000.parquet"}[version]
    with pytest.raises(DatasetError) as error:
        LeRobotDataset(root)
    assert f"{file}: episode 1 frame 1: {field}[1] is" in str(error.value)
    assert validate(root) == [str(error.value)]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_time_stamp_that_is_none_is_named(make, tmp_path, value):
    root = make.v21(tmp_path / "ds")
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "timestamp", [np.array([0, value, 0, 0, 0], np.float32)]), path)
    with pytest.raises(DatasetError, match="episode 1 frame 1: timestamp"):
        LeRobotDataset(root)


def test_a_state_that_is_not_read_may_hold_anything(make, tmp_path):
    root = make.v21(
        tmp_path / "ds", extra={"action": make.counting(3), "observation.state": lambda i: [NAN] * 3}
    )
    assert len(LeRobotDataset(root, state_key=None)) == 11
    assert validate(root, state_key=None) == []


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_an_episode_of_no_frames_is_named_and_the_others_are_read_without_it(make, tmp_path, version):
    root = {"v21": make.v21, "v30": make.v30}[version](tmp_path / "ds", lengths=(6, 0, 5))
    assert "episode 1 holds no frames" in validate(root)[0] and len(validate(root)) == 1
    with pytest.raises(DatasetError, match="episode 1 holds no frames"):
        LeRobotDataset(root)
    assert len(LeRobotDataset(root, episodes=[0, 2])) == 11


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_part_is_read_when_only_that_part_is_on_the_disk(make, tmp_path, version):
    """In v3.0 the episodes share a file here; the metadata of the others name files that are gone."""
    if version == "v21":
        root = make.v21(tmp_path / "ds", lengths=(6, 5, 4))
        for path in [*root.rglob("episode_000001.*"), *root.rglob("episode_000000.*")]:
            path.unlink()
    else:
        gone = lambda rows: [r | ({"data/file_index": 7} if r["episode_index"] < 2 else {}) for r in rows]
        root = make.v30(tmp_path / "ds", lengths=(6, 5, 4), change=gone)
    dataset = LeRobotDataset(root, episodes=[2])
    assert (len(dataset), dataset.episodes) == (4, [2])
    assert [make.level_of(dataset[i]["image"][0]) for i in range(4)] == [11, 12, 13, 14]
    assert dataset.statistics()["action"].min.tolist() == [11, 12, 13]
    with pytest.raises(DatasetError, match="no episode 0"):
        dataset.select([0])
    with pytest.raises(DatasetError, match="is missing; it holds episode 0"):
        LeRobotDataset(root)


def test_a_part_keeps_the_order_that_is_asked_for(make, tmp_path):
    dataset = LeRobotDataset(make.v30(tmp_path / "ds", lengths=(6, 5, 4)), episodes=[2, 0])
    assert [int(dataset[i]["action"][0, 0]) for i in range(len(dataset))] == [
        11,
        12,
        13,
        14,
        0,
        1,
        2,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize("kind", ["text", "nested", "ragged", "struct", "binary"])
def test_a_column_of_another_type_is_named(make, tmp_path, kind):
    values = {
        "text": ["x"] * 5,
        "nested": [[[1.0]] * 3] * 5,
        "ragged": [[1.0] * 3] * 4 + [[1.0]],
        "struct": [{"x": 1.0}] * 5,
        "binary": [b"abc"] * 5,
    }[kind]
    root = make.v21(tmp_path / "ds")
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", pa.array(values)), path)
    with pytest.raises(DatasetError, match=f"{path}: column 'action'"):
        LeRobotDataset(root)
    assert len(validate(root)) == 1


@pytest.mark.parametrize("name", ["frame_index", "episode_index", "task_index"])
def test_counters_are_whole_numbers(make, tmp_path, name):
    root = make.v21(tmp_path / "ds")
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    column = np.asarray(table[name]).astype(np.float64)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, [column]), path)
    with pytest.raises(DatasetError, match=f"episode_000001.parquet: '{name}' holds float64, expected whole"):
        LeRobotDataset(root)


def test_files_are_read_once_however_many_episodes_they_hold(make, tmp_path, monkeypatch):
    read, real = [], table.read_columns
    monkeypatch.setattr(table, "read_columns", lambda *a: read.append(a[1]) or real(*a))
    LeRobotDataset(make.v30(tmp_path / "ds", lengths=(3,) * 40))
    assert len(read) == 1


def test_rows_of_v3_are_found_by_their_episode_wherever_they_stand_in_the_file(make, tmp_path):
    root = make.v30(tmp_path / "ds", lengths=(6, 5, 4))
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(11), table.slice(0, 11)]), path)
    files = read_files(root)
    found = read_table(files, "action", None)
    assert found.columns["action"][:, 0].tolist() == list(range(15))
    assert found.first_rows == {0: 4, 1: 10, 2: 0}
    twice = replace(files, episodes=[files.episodes[0], replace(files.episodes[1], length=6)])
    with pytest.raises(DatasetError, match="episode 1 has 5 rows, its metadata say 6"):
        read_table(twice, "action", None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"total_frames": 12}, "total_frames is 12, the metadata list 11"),
        ({"total_episodes": 1}, "total_episodes is 1, the metadata list 2"),
        ({"total_tasks": 4}, "total_tasks is 4, the metadata list 1"),
    ],
)
def test_counts_that_do_not_fit_are_found(make, tmp_path, change, expected):
    root = make.v21(tmp_path / "ds")
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | change))
    assert [line.split("info.json: ")[1] for line in validate(root)] == [expected]


def test_a_damaged_file_among_many_is_named(make, tmp_path):
    root = make.v21(tmp_path / "ds", lengths=(2,) * 40)
    (root / "data/chunk-000/episode_000033.parquet").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="episode_000033.parquet cannot be read as parquet"):
        LeRobotDataset(root)


def rewrite(path, change):
    rows = pq.read_table(path)
    pq.write_table(change(rows), path)


def many(make, tmp_path):
    return make.v21(tmp_path / "ds", lengths=(3,) * 40, extra={"action": make.counting(3)})


def test_many_files_are_read_together_as_each_is_by_itself(make, tmp_path, monkeypatch):
    root = many(make, tmp_path)
    together = read_table(read_files(root), "action", None)
    monkeypatch.setattr(table, "_read_joined", lambda *a: None)
    apart = read_table(read_files(root), "action", None)
    assert together.columns.keys() == apart.columns.keys() and together.first_rows == apart.first_rows
    assert all((together.columns[name] == apart.columns[name]).all() for name in apart.columns)


def test_one_file_of_many_may_have_other_types(make, tmp_path):
    root = many(make, tmp_path)
    whole = read_table(read_files(root), "action", None).columns
    path = root / "data/chunk-000/episode_000037.parquet"
    wide = lambda rows: rows.set_column(
        rows.column_names.index("task_index"), "task_index", rows["task_index"].cast("int32")
    )
    rewrite(path, wide)
    found = read_table(read_files(root), "action", None).columns
    assert all((found[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop_columns("action"), "episode_000037.parquet: no column 'action'"),
        (
            lambda rows: rows.set_column(
                rows.column_names.index("action"),
                "action",
                pa.array([[1.0], [1.0, 2.0], [3.0]], pa.list_(pa.float32())),
            ),
            "episode_000037.parquet: column 'action' holds vectors of lengths [1, 2]",
        ),
        (lambda rows: rows.slice(1), "episode_000037.parquet: episode 37 has 2 rows, its metadata say 3"),
    ],
    ids=["lacks a column", "ragged", "shorter"],
)
def test_one_of_many_files_that_is_damaged_is_named(make, tmp_path, change, message):
    root = many(make, tmp_path)
    rewrite(root / "data/chunk-000/episode_000037.parquet", change)
    with pytest.raises(DatasetError) as error:
        read_table(read_files(root), "action", None)
    assert message in str(error.value)
