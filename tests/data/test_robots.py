"""What a robot's file says reaches the robot, what is wrong in it is named, and another robot's dataset is refused."""

from dataclasses import replace

import pytest
import yaml

from vla_bench.data.layout import Layout
from vla_bench.data.parts import Part
from vla_bench.data.robots import check_robot, known_robots, read_robot, robot_from_dict, role_cameras

CONTENT = {
    "description": "an arm",
    "sources": ["a page", "a paper"],
    "rates": [10, 12.5],
    "cameras": {"head": ["top", "cam0"], "hand": ["cam1"]},
    "state": [
        {"name": "arm", "dims": ["j0", "j1"], "kind": "joint", "unit": "rad"},
        {"name": "gripper", "dims": ["g"], "kind": "gripper", "gripper": "positive_opens"},
    ],
    "action": [
        {"name": "turn", "dims": ["a", "b", "c"], "kind": "rotation", "rotation": "euler_xyz", "frame": "base",
         "reference": "delta", "unit": "rad"},
        {"name": "gripper", "dims": ["g"], "kind": "gripper", "gripper": "positive_closes"},
    ],
}  # fmt: skip


def robot(**change):
    return robot_from_dict(CONTENT | change, "mine", "file.yaml")


def test_every_entry_of_a_file_reaches_the_robot(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CONTENT))
    for found, name in (
        (robot(), "mine"),
        (read_robot(tmp_path / "own.yaml"), "own"),
        (read_robot(str(tmp_path / "own.yaml")), "own"),
    ):
        assert (found.name, found.description, found.sources) == (name, "an arm", ("a page", "a paper"))
        assert found.rates == (10.0, 12.5) and {type(rate) for rate in found.rates} == {float}
        assert found.cameras == {"head": ("top", "cam0"), "hand": ("cam1",)}
        arm = Part("arm", ("j0", "j1"), "joint", unit="rad")
        assert found.state == (arm, Part("gripper", ("g",), "gripper", gripper="positive_opens"))
        turn = {"rotation": "euler_xyz", "frame": "base", "reference": "delta", "unit": "rad"}
        assert found.action[0] == Part("turn", ("a", "b", "c"), "rotation", **turn)
        assert found.action_layout == Layout(
            ("a", "b", "c", "g"), "delta", "base", "rad", "euler_xyz", "positive_closes"
        )
        assert found.state_layout == Layout(("j0", "j1", "g"), units="rad", gripper="positive_opens")
    (tmp_path / "own.yml").write_text(yaml.safe_dump(CONTENT))
    assert read_robot(tmp_path / "own.yml").name == "own"


def test_a_state_that_is_not_known_has_no_layout():
    assert robot(state=[]).state_layout is None


WRONG = [
    ({"rate": [1]}, "file.yaml: unknown entry 'rate'; did you mean 'rates'"),
    ({"rates": ["fast"]}, "'rates'"),
    ({"description": 3}, "'description'"),
    ({"sources": "a page"}, "'sources'"),
    ({"cameras": {"head": "top"}}, "file.yaml: in 'cameras'"),
    ({"cameras": {"head": [3]}}, "'head'"),
    ({"state": [{"name": "arm", "dims": ["j"], "kind": "joint", "uint": "rad"}]}, "file.yaml: state part 0: unknown entry 'uint'; did you mean 'unit'"),
    ({"action": [CONTENT["action"][1], {"name": "arm", "kind": "joint"}]}, "file.yaml: action part 1 has no 'dims'"),
    ({"action": [{"name": "arm", "dims": "j", "kind": "joint"}]}, "'dims'"),
    ({"action": [{"name": "arm", "dims": ["j"], "kind": "jiont"}]}, "action part 0: part 'arm': unknown kind 'jiont'"),
    ({"action": [CONTENT["action"][1], CONTENT["action"][1]]}, "file.yaml: a layout names each dimension once"),
    ({"state": [CONTENT["state"][0], {**CONTENT["state"][1], "dims": ["j0"]}]}, "file.yaml: a layout names each dimension once"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_in_a_file_is_named(change, message):
    with pytest.raises(ValueError) as error:
        robot(**change)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key in CONTENT])
def test_an_entry_that_is_missing_is_named(key):
    with pytest.raises(ValueError, match=f"file.yaml has no '{key}'"):
        robot_from_dict({k: v for k, v in CONTENT.items() if k != key}, "mine", "file.yaml")


def test_what_holds_no_entries_is_refused(tmp_path):
    with pytest.raises(ValueError, match="file.yaml holds a list, expected the entries description, sources"):
        robot_from_dict([1], "mine", "file.yaml")
    with pytest.raises(FileNotFoundError, match="gone.yaml is missing; it should declare a robot"):
        read_robot(tmp_path / "gone.yaml")
    for content in (b"a: [", b"\xff\xfe\x00"):
        (tmp_path / "odd.yaml").write_bytes(content)
        with pytest.raises(ValueError, match="odd.yaml is not YAML: ") as error:
            read_robot(tmp_path / "odd.yaml")
        assert "\n" not in str(error.value)


def test_robots_that_ship_are_found_by_their_names():
    names = known_robots()
    assert names == sorted(names) and {"aloha", "bridge_widowx", "metaworld_sawyer"} <= set(names)
    assert [read_robot(name).name for name in names] == names
    with pytest.raises(
        ValueError, match="no robot 'alhoa'; did you mean 'aloha'.*or give the path of a .yaml file"
    ):
        read_robot("alhoa")


def fits(found=None, **change) -> None:
    own = robot()
    given = {"action": own.action_layout, "state": own.state_layout, "rate": 10.0} | change
    check_robot(found or own, "data/toy", **given)


def test_a_dataset_of_the_robot_fits():
    fits()
    fits(state=None)
    fits(robot(state=[]), state=Layout(("anything",)))
    fits(action=Layout(("p", "q", "r", "s")))  # other names say nothing
    fits(action=Layout(("a", "b", "c", "other")))
    fits(robot(rates=[]), rate=3.0)


@pytest.mark.parametrize(
    "rate, fitting",
    [
        (10.1, True),
        (9.9, True),
        (10.11, False),
        (9.89, False),
        (12.5, True),
        (12.62, True),
        (12.63, False),
        (11, False),
    ],
)
def test_the_rate_is_one_of_the_robots_within_one_percent(rate, fitting):
    if fitting:
        fits(rate=rate)
        return
    with pytest.raises(
        ValueError, match="^data/toy was recorded at .* Hz, the robot mine declares 10, 12.5 Hz"
    ):
        fits(rate=rate)


OTHERS = [
    ({"action": Layout(("a", "b", "c"))}, r"data/toy: the action has 3 numbers, the robot declares 4 \('a', 'b', 'c', 'g'\)"),
    ({"state": Layout(("j0", "j1"))}, "data/toy: the state has 2 numbers, the robot declares 3"),
    ({"action": Layout(("g", "a", "b", "c"))}, "data/toy: the action is in the order .*'g', 'a'.*, the robot declares .*'a', 'b'"),
    ({"state": Layout(("j1", "j0", "g"))}, "data/toy: the state is in the order"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", OTHERS, ids=lambda value: str(value)[:30])
def test_another_robots_dataset_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fits(**change)


def test_cameras_are_found_by_role_or_by_name():
    own = robot()
    assert role_cameras(own, ["hand", "head"], ["cam0", "cam1"], "toy") == ["cam1", "cam0"]
    assert role_cameras(own, ["head"], ["cam0", "top"], "toy") == ["top"]  # the first that the role names
    assert role_cameras(own, ["side", "head"], ["side", "cam0"], "toy") == ["side", "cam0"]
    with pytest.raises(ValueError, match="^toy: no camera 'haed' for the robot mine; did you mean 'head'"):
        role_cameras(own, ["hand", "haed"], ["cam0", "cam1"], "toy")
    with pytest.raises(ValueError, match="no camera 'hand'"):
        role_cameras(replace(own, cameras={"hand": ("elsewhere",)}), ["hand"], ["cam0"], "toy")
