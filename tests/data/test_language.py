"""What was said at each frame: the right frame of the right episode, and a turn that cannot be is named."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data.language import Turn, read_language
from vla_bench.data.lerobot_files import read_files
from vla_bench.data.paths import DatasetError

LENGTHS = (3, 2, 4)
FULL = {
    "role": "assistant", "content": "ok", "style": "memory", "timestamp": 0.5, "camera": "top",
    "tool_calls": [{"name": "stop"}],
}  # fmt: skip


def said(row: int) -> list | None:
    """Nothing at every third frame, then one turn, then two."""
    turns = [{"role": "user", "content": f"row {row}"}, {"role": "assistant", "content": None}]
    return None if row % 3 == 0 else turns[: row % 3]


@pytest.fixture
def spoken(make, tmp_path):
    """`spoken(values)`: a dataset of version 3.0 whose columns of language hold these, three episodes in one file."""

    def written(**columns):
        root = make.v30(tmp_path / "ds", lengths=LENGTHS)
        info = json.loads((root / "meta/info.json").read_text())
        info["features"] |= {name: {"dtype": "language", "shape": [1], "names": None} for name in columns}
        (root / "meta/info.json").write_text(json.dumps(info))
        path = root / "data/chunk-000/file-000.parquet"
        table = pq.read_table(path)
        for name, values in columns.items():
            if values is not None:
                table = table.append_column(name, pa.array(values))
        pq.write_table(table, path)
        return read_files(root)

    return written


def test_turns_are_those_of_the_frames_of_an_episode(spoken):
    files = spoken(
        events=[said(row) for row in range(9)],
        all=[[{"role": "user", "content": f"all {row}"}] for row in range(9)],
    )
    first = 0
    for episode in files.episodes:
        found = read_language(files, episode)
        assert list(found) == ["events", "all"]
        for frame in range(episode.length):
            row = first + frame
            expected = [{k: v for k, v in turn.items()} for turn in said(row) or []]
            assert [{"role": t.role, "content": t.content} for t in found["events"][frame]] == expected
            assert [t.content for t in found["all"][frame]] == [f"all {row}"]
        assert len(found["events"]) == len(found["all"]) == episode.length
        first += episode.length


def test_every_field_of_a_turn_is_read(spoken):
    files = spoken(events=[[FULL]] * 9)
    assert read_language(files, files.episodes[1])["events"] == [[Turn(**FULL)]] * 2
    plain = Turn(role="user")
    assert (plain.content, plain.style, plain.timestamp, plain.camera, plain.tool_calls) == (None,) * 5


def test_a_dataset_without_language_says_nothing(make, tmp_path):
    files = read_files(make.v30(tmp_path / "ds"))
    assert read_language(files, files.episodes[0]) == {}


def test_a_column_that_is_declared_and_not_there_is_named(spoken):
    files = spoken(events=None)
    with pytest.raises(DatasetError, match="file-000.parquet: no column 'events', which info.json declares"):
        read_language(files, files.episodes[0])


WRONG = [
    ({"content": "a"}, r"\[1\]\[0\].role is missing$"),
    ({"role": 3, "content": "a"}, r"\[1\]\[0\].role is 3, expected a valid string"),
    ({"role": "user", "content": 3}, r"\[1\]\[0\].content is 3"),
    ({"role": "user", "timestamp": -1.0}, r"\[1\]\[0\].timestamp is -1.0"),
    ({"role": "user", "camera": 1}, r"\[1\]\[0\].camera is 1"),
]


@pytest.mark.parametrize("turn, message", WRONG, ids=str)
def test_a_turn_that_cannot_be_is_named_by_episode_column_and_frame(spoken, turn, message):
    files = spoken(events=[[turn] if row == 4 else None for row in range(9)])
    assert read_language(files, files.episodes[0])["events"] == [[], [], []]
    with pytest.raises(DatasetError, match=f"file-000.parquet: episode 1, column 'events': {message}"):
        read_language(files, files.episodes[1])
