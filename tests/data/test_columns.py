"""Which numbers of which columns make an action, as writers of datasets really say it."""

import pytest

from vla_bench.data.lerobot import LeRobotDataset, validate
from vla_bench.data.paths import DatasetError


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
