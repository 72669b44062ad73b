"""Parts of a vector: each field that cannot be is refused alone, and the whole layout follows from the parts."""

import pytest

from vla_bench.data.layout import Layout
from vla_bench.data.parts import KINDS, REFERENCES, SIGNS, Part, part_slices, parts_layout
from vla_bench.data.rotations import ROTATIONS

PLACE = Part("place", ("x", "y", "z"), "position", unit="m", frame="base", reference="delta")
TURN = Part(
    "turn", ("a", "b", "c"), "rotation", unit="rad", frame="base", rotation="euler_xyz", reference="delta"
)
HAND = Part("hand", ("hand",), "gripper", gripper="positive_opens")
BASE = Part("base", ("v", "w"), "velocity", unit="m/s", frame="body", reference="delta")


def test_the_choices_are_these():
    assert KINDS == ("position", "rotation", "joint", "angle", "gripper", "velocity", "other")
    assert REFERENCES == ("absolute", "delta")
    assert SIGNS == ("positive_opens", "positive_closes", "unknown")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("rotation", "gripper")])
def test_a_plain_part_of_any_kind(kind):
    part = Part("p", ["a", "b"], kind)
    assert part.dims == ("a", "b") and (part.unit, part.frame, part.reference) == (
        "unknown",
        "unknown",
        "absolute",
    )


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_has_the_numbers_of_its_form(name):
    dims = tuple(map(str, range(ROTATIONS[name])))
    assert Part("r", dims, "rotation", rotation=name).rotation == name
    for wrong in (dims[:-1], (*dims, "more")):
        with pytest.raises(ValueError, match=f"part 'r' has {len(wrong)} dims, but {name} has {len(dims)}"):
            Part("r", wrong, "rotation", rotation=name)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_gripper_has_a_sign(sign):
    assert Part("g", ("g",), "gripper", gripper=sign).gripper == sign


REFUSED = [
    ({"kind": "positon"}, "unknown kind 'positon'; did you mean 'position'"),
    ({"reference": "relative"}, "unknown reference 'relative'"),
    ({"dims": ()}, "has no dims"),
    ({"rotation": "euler_xyz"}, "rotation is 'euler_xyz', which a part of kind 'joint' cannot have"),
    ({"gripper": "unknown"}, "gripper is 'unknown', which a part of kind 'joint' cannot have"),
    ({"kind": "rotation"}, "rotation is 'none', which a part of kind 'rotation' cannot have"),
    ({"kind": "rotation", "rotation": "euler"}, "rotation is 'euler'"),
    ({"kind": "rotation", "rotation": "euler_xyz", "gripper": "unknown"}, "gripper is 'unknown'"),
    ({"kind": "gripper"}, "gripper is 'none', which a part of kind 'gripper' cannot have"),
    ({"kind": "gripper", "gripper": "unknown", "rotation": "euler_xyz"}, "rotation is 'euler_xyz'"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        Part(**{"name": "p", "dims": ("a", "b", "c"), "kind": "joint", **change})
    assert str(error.value).startswith("part 'p'") and message in str(error.value)


def test_slices_lie_one_behind_the_other():
    assert part_slices([HAND, TURN, PLACE]) == {
        "hand": slice(0, 1),
        "turn": slice(1, 4),
        "place": slice(4, 7),
    }
    assert part_slices([]) == {}
    with pytest.raises(ValueError, match="two parts are named 'hand'"):
        part_slices([HAND, PLACE, HAND])


def test_the_layout_of_all_parts_together():
    assert parts_layout([HAND, TURN, PLACE]) == Layout(
        ("hand", "a", "b", "c", "x", "y", "z"),
        kind="delta", frame="base", units="rad, m", rotation="euler_xyz", gripper="positive_opens",
    )  # fmt: skip


OTHER = Part("more", ("m",), "other", unit="V", frame="world")
LAYOUTS = [
    ([HAND], {"kind": "absolute", "frame": "unknown", "units": "unknown", "rotation": "none"}),
    ([PLACE], {"kind": "delta", "frame": "base", "units": "m", "rotation": "none", "gripper": "none"}),
    ([PLACE, BASE], {"kind": "delta", "frame": "unknown", "units": "m, m/s"}),
    ([PLACE, OTHER], {"kind": "delta", "frame": "base", "units": "m, V"}),
    ([PLACE, Part("j", ("j",), "joint")], {"kind": "unknown", "frame": "base", "units": "m"}),
    ([HAND, Part("left", ("l",), "gripper", gripper="positive_closes")], {"gripper": "unknown"}),
    ([HAND, Part("left", ("l",), "gripper", gripper="positive_opens")], {"gripper": "positive_opens"}),
    ([TURN, Part("q", tuple("defg"), "rotation", rotation="quaternion_xyzw")], {"rotation": "unknown"}),
    (
        [PLACE, Part("far", ("far",), "position", unit="m", reference="delta")],
        {"units": "m", "frame": "base"},
    ),
]


@pytest.mark.parametrize("parts, expected", LAYOUTS)
def test_what_all_parts_share_is_said_of_the_whole(parts, expected):
    found = vars(parts_layout(parts))
    assert {key: found[key] for key in expected} == expected


def test_a_number_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="names each dimension once"):
        parts_layout([PLACE, Part("again", ("x",), "position")])
