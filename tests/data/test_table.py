"""All numbers of the episodes, and a damaged one named where it is."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data import table
from vla_bench.data.lerobot import DatasetError, LeRobotDataset, validate
from vla_bench.data.lerobot_files import Episode, read_files
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


@pytest.mark.parametrize("frame", [10, 12, 14])
@pytest.mark.parametrize("horizon", [1, 3, 9])
def test_a_chunk_is_clamped_to_its_episode(frame, horizon):
    rows, is_pad = table.window(frame, 15, horizon)
    assert rows.tolist() == [min(frame + step, 14) for step in range(horizon)]
    assert is_pad.tolist() == [frame + step > 14 for step in range(horizon)]


@pytest.mark.parametrize(
    "numbers, expected",
    [([], {}), ([4], {4: (0, 1)}), ([4, 4, 2, 2, 2, 9], {4: (0, 2), 2: (2, 5), 9: (5, 6)}), ([0, 1], {0: (0, 1), 1: (1, 2)})],
)  # fmt: skip
def test_runs_of_episodes_in_a_file(numbers, expected):
    assert table.runs("a.parquet", np.array(numbers, int)) == expected


def test_an_episode_that_stands_in_two_places_is_named():
    with pytest.raises(DatasetError, match="a.parquet: the rows of episode 2 do not stand together"):
        table.runs("a.parquet", np.array([4, 2, 4, 2, 2, 2, 7, 2]))


@pytest.mark.parametrize(
    "length, where, message",
    [
        (3, (2, 5), None),
        (0, None, "episode 1 holds no frames; take it out of the metadata"),
        (0, (2, 2), "episode 1 holds no frames"),
        (3, None, "episode 1 has 0 rows, its metadata say 3"),
        (3, (2, 6), "episode 1 has 4 rows, its metadata say 3"),
    ],
)
def test_the_rows_of_an_episode_are_as_many_as_it_says(length, where, message):
    episode = Episode(1, length, "a.parquet", {})
    if message is None:
        assert table.check_episode_rows(episode, where) == where
        return
    with pytest.raises(DatasetError, match=f"^a.parquet: {message}"):
        table.check_episode_rows(episode, where)


@pytest.mark.parametrize("count", [31, 32, 40])
def test_many_files_are_read_like_few(make, tmp_path, count):
    lengths = [1 + episode % 3 for episode in range(count)]
    features = {"action": make.vector(1)}
    root = make.v21(tmp_path / "ds", lengths=lengths, features=features, extra={"action": make.counting(1)})
    found = read_table(read_files(root), "action", None)
    assert found.columns["action"][:, 0].tolist() == list(range(sum(lengths)))
    assert found.columns["episode_index"].tolist() == np.repeat(np.arange(count), lengths).tolist()
    assert found.first_rows == dict.fromkeys(range(count), 0) and found.state_layout is None
    assert set(found.columns) == {"action", "timestamp", "frame_index", "episode_index", "task_index"}


def test_a_sample_is_located_in_any_order_of_episodes(make, tmp_path):
    files = read_files(make.v21(tmp_path / "ds", lengths=(3, 1, 4)))
    chosen = table.choose_episodes(files, [2, 0])
    assert chosen.starts.tolist() == [0, 4, 7] and chosen.rows.tolist() == [4, 5, 6, 7, 0, 1, 2]
    assert [(e.index, frame, row) for e, frame, row in map(chosen.locate, range(7))] == [
        (2, 0, 4), (2, 1, 5), (2, 2, 6), (2, 3, 7), (0, 0, 0), (0, 1, 1), (0, 2, 2)
    ]  # fmt: skip
    whole = table.choose_episodes(files, None)
    assert whole.starts.tolist() == [0, 3, 4, 8] and whole.rows.tolist() == list(range(8))
    none = table.choose_episodes(files, [])
    assert none.starts.tolist() == [0] and none.rows.tolist() == [] and none.episodes == []
    with pytest.raises(DatasetError, match="ds: no episode 3; it has 3"):
        table.choose_episodes(files, [0, 3])
    assert [e.index for e in table.only(files, [2, 0]).episodes] == [0, 2] and table.only(
        files, None
    ) is files
    with pytest.raises(DatasetError, match="no episode 7"):
        table.only(files, [7])


def test_columns_of_another_width_than_declared_are_named(make, tmp_path):
    features = make.PLAIN | {"action": make.vector(2)}
    with pytest.raises(
        DatasetError, match="episode_000000.parquet: 'action' has 3 numbers per row, info.json says 2"
    ):
        LeRobotDataset(make.v21(tmp_path / "ds", features=features))


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


@pytest.mark.parametrize("key", ["action", "observation.state"])
@pytest.mark.parametrize("value", [1e39, -1e308])
@pytest.mark.parametrize("write", ["v21", "v30"])
def test_a_number_that_float32_cannot_hold_is_named(make, tmp_path, key, value, write):
    extra = {name: make.counting(3) for name in ("action", "observation.state")}
    extra[key] = lambda row: [0.0, value if row == 7 else 1.0, 2.0]
    root = getattr(make, write)(tmp_path / "arm", extra=extra)
    found = re.escape(f"episode 1 frame 1: {key}[1] is {value}")
    with pytest.raises(DatasetError, match=found):
        LeRobotDataset(root)
    assert re.search(found, validate(root)[0])


@pytest.mark.parametrize("episodes", [[], (), np.array([], int)])
def test_no_episodes_at_all_is_an_error(make, tmp_path, episodes):
    root = make.v21(tmp_path / "arm")
    with pytest.raises(DatasetError, match="no episodes are asked for"):
        LeRobotDataset(root, episodes=episodes)
    assert "no episodes are asked for" in validate(root, episodes=episodes)[0]
