"""What a policy's specification says of it: each field, changed alone, is another policy, and comes back from JSON."""

import json
from dataclasses import fields, replace

import pytest

from vla_bench.data.layout import (
    Layout,
    PolicySpec,
    image_sizes,
    layout_differences,
    spec_from_dict,
    spec_to_dict,
)

ACTION = Layout(("a", "b"), "delta", "base", "1.0 = 1 cm", "euler_xyz", "positive_opens")
STATE = Layout(("x", "y", "z"), "absolute", "world", "m", "axis_angle", "positive_closes")
SPEC = PolicySpec(
    ACTION,
    STATE,
    ("left", "right"),
    (48, 64),
    4,
    12.5,
    {"action": "q99", "state": "min_max"},
    "ours",
    "hash",
    "tape",
)
LAYOUT = {
    "names": ("b", "c"), "kind": "unknown", "frame": "end_effector", "units": "mm", "rotation": "rotation_6d",
    "gripper": "none",
}  # fmt: skip
CHANGED = {
    "state": None,
    "cameras": ("right", "left"),
    "image_size": (64, 48),
    "horizon": 5,
    "control_rate": 12.50001,
    "normalization": {"action": "q99", "state": "mean_std"},
    "dataset": "theirs",
    "statistics_hash": "other",
    "benchmark": "point",
    "encoding": {"kind": "delta"},
    "image_transforms": ({"type": "Resize"},),
    "observation_steps": 2,
    "observation_stride": 3,
    "prompt": "do {lang}",
    "widths": (7, 8),
}
VARIANTS = {name: replace(SPEC, **{name: value}) for name, value in CHANGED.items()}
VARIANTS |= {
    f"action.{name}": replace(SPEC, action=replace(ACTION, **{name: value})) for name, value in LAYOUT.items()
}
VARIANTS |= {
    f"state.{name}": replace(
        SPEC, state=replace(STATE, **{name: ("x", "y", "w") if name == "names" else value})
    )
    for name, value in LAYOUT.items()
}


def test_every_field_is_among_those_changed():
    assert {name.split(".")[0] for name in VARIANTS} == {field.name for field in fields(PolicySpec)}
    assert LAYOUT.keys() == {field.name for field in fields(Layout)}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_field_alone_is_another_hash(name):
    assert VARIANTS[name].hash != SPEC.hash and len(SPEC.hash) == 16


def test_all_hashes_differ_from_each_other():
    assert len({spec.hash for spec in VARIANTS.values()}) == len(VARIANTS)


def test_the_hash_stays_what_it_was():
    """A checkpoint that is on somebody's disk keeps its identity."""
    assert SPEC.hash == "f81df2590bfbe8ca"


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_as_json_comes_back(name):
    spec = VARIANTS[name]
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@pytest.mark.parametrize("name", VARIANTS)
def test_each_field_that_was_edited_in_the_file_is_found(name):
    content = spec_to_dict(VARIANTS[name]) | {"hash": SPEC.hash}
    with pytest.raises(
        ValueError, match="policy.json: the hash is .* but the fields give .*: the file was edited"
    ):
        spec_from_dict(content)


@pytest.mark.parametrize("name", ["action", "cameras", "horizon", "statistics_hash", "benchmark"])
def test_a_field_that_is_missing_is_named(name):
    content = spec_to_dict(SPEC)
    del content[name]
    with pytest.raises(ValueError, match=f"run/policy.json: these fields are missing or unknown: {name}$"):
        spec_from_dict(content, "run/policy.json")


def test_a_field_that_is_unknown_is_named():
    with pytest.raises(ValueError, match="missing or unknown: colour$"):
        spec_from_dict(spec_to_dict(SPEC) | {"colour": 1})


COMPARED = ("names", "kind", "frame", "rotation", "gripper")


@pytest.mark.parametrize("name", COMPARED)
def test_each_field_that_is_compared_is_named_alone(name):
    value = {"kind": "absolute"}.get(name, LAYOUT[name])
    (line,) = layout_differences(replace(ACTION, **{name: value}), ACTION, "state")
    assert line == f"state {name} is {value!r}, expected {vars(ACTION)[name]!r}"


def test_units_are_for_a_reader():
    assert layout_differences(replace(ACTION, units="cm"), ACTION) == []


@pytest.mark.parametrize("name", ["kind", "frame", "rotation", "gripper"])
def test_what_is_unknown_on_either_side_fits(name):
    unknown = replace(ACTION, **{name: "unknown"})
    assert layout_differences(unknown, ACTION) == layout_differences(ACTION, unknown) == []


def test_other_dimensions_are_all_that_is_said():
    (line,) = layout_differences(replace(ACTION, names=("a", "b", "c"), frame="world"), ACTION)
    assert line == "action has 3 dimensions ('a', 'b', 'c'), expected 2 ('a', 'b')"


def test_images_have_one_size_or_one_for_each_camera():
    assert image_sizes(SPEC) == [(48, 64), (48, 64)]
    assert image_sizes(replace(SPEC, image_size=((48, 64), (32, 32)))) == [(48, 64), (32, 32)]
