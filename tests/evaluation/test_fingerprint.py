"""An evaluation is continued only if nothing has changed that decides an episode: each field, changed alone."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from vla_bench.benchmarks.benchmark import BenchmarkSpec
from vla_bench.data.layout import Layout
from vla_bench.evaluation.rollout import (
    EvaluationSettings,
    fingerprint,
    fingerprint_differences,
    with_current_keys,
)

ACTION = Layout(("a", "b"), "delta", "base", "1.0 = 1 cm", "euler_xyz", "positive_opens")
STATE = Layout(("x", "y", "z"), "absolute", "world", "m", "axis_angle", "positive_closes")
SPEC = BenchmarkSpec(
    "tape", ("left", "right"), (48, 64), ACTION, STATE, 12.5, 30, "as told", {"tape": "1", "mujoco": "3"}
)
SETTINGS = EvaluationSettings(benchmark="tape", n_action_steps=3, max_steps=20, first_seed=9)


def identity(policy="weights", spec=SPEC, settings=SETTINGS):
    return fingerprint(SimpleNamespace(fingerprint=policy), SimpleNamespace(spec=spec), settings)


def with_layout(name, **change):
    return replace(SPEC, **{name: replace(vars(SPEC)[name], **change)})


LAYOUT = {
    "kind": "unknown",
    "frame": "end_effector",
    "units": "mm",
    "rotation": "rotation_6d",
    "gripper": "none",
}
CHANGED = {
    "name": replace(SPEC, name="other"),
    "cameras": replace(SPEC, cameras=("right", "left")),
    "image_size": replace(SPEC, image_size=(64, 48)),
    "control_rate": replace(SPEC, control_rate=12.6),
    "max_steps": replace(SPEC, max_steps=31),
    "protocol": replace(SPEC, protocol="as told twice"),
    "version.tape": replace(SPEC, version={"tape": "1.1", "mujoco": "3"}),
    "version.mujoco": replace(SPEC, version={"tape": "1"}),
    "state": replace(SPEC, state=None),
    **{f"action.{key}": with_layout("action", **{key: value}) for key, value in LAYOUT.items()},
    **{
        f"state.{key}": with_layout("state", **{key: value})
        for key, value in (LAYOUT | {"kind": "delta"}).items()
    },
    "action.names": with_layout("action", names=("b", "a")),
    "state.names": with_layout("state", names=("x", "y", "w")),
}


def test_every_field_of_a_benchmark_is_among_those_changed_below():
    assert {name.split(".")[0] for name in CHANGED} == {field.name for field in fields(BenchmarkSpec)}
    for layout in ("action", "state"):
        assert {f"{layout}.{field.name}" for field in fields(Layout)} <= set(CHANGED)


@pytest.mark.parametrize("name", CHANGED)
def test_each_field_of_the_benchmark_alone_is_another_evaluation(name):
    (line,) = fingerprint_differences(identity(spec=CHANGED[name]), identity())
    assert line.startswith(f"benchmark.{name} is ")


def test_a_difference_says_what_is_now_and_what_was():
    ours, theirs = identity(spec=CHANGED["control_rate"]), identity()
    assert fingerprint_differences(ours, theirs) == ["benchmark.control_rate is 12.6 now and was 12.5"]


def test_other_weights_alone_are_another_evaluation():
    assert fingerprint_differences(identity("new"), identity()) == ["policy is 'new' now and was 'weights'"]


@pytest.mark.parametrize("change", [{"n_action_steps": 4}, {"max_steps": 21}, {"first_seed": 10}], ids=str)
def test_each_setting_that_decides_an_episode_is_in_the_fingerprint(change):
    ((name, value),) = change.items()
    lines = fingerprint_differences(identity(settings=replace(SETTINGS, **change)), identity())
    assert lines == [f"protocol.{name} is {value} now and was {vars(SETTINGS)[name]}"]


@pytest.mark.parametrize(
    "change",
    [{"tasks": ["a"]}, {"episodes": 3}, {"num_envs": 5}, {"videos_per_task": 2}, {"attention": True},
     {"step_timeout_s": 3.0}, {"benchmark": "Tape"}],
    ids=str,
)  # fmt: skip
def test_no_other_setting_is_in_the_fingerprint(change):
    assert identity(settings=replace(SETTINGS, **change)) == identity()


def test_only_a_batch_of_more_than_one_is_in_the_fingerprint():
    assert identity(settings=replace(SETTINGS, batch_size=1)) == identity()
    lines = fingerprint_differences(identity(settings=replace(SETTINGS, batch_size=4)), identity())
    assert lines == ["protocol.batch_size is 4 now and was None"]


def test_the_benchmarks_limit_and_the_same_limit_asked_for_are_one_evaluation():
    assert identity(settings=replace(SETTINGS, max_steps=None)) == identity(
        settings=replace(SETTINGS, max_steps=30)
    )


def test_the_fingerprint_holds_these_values():
    found = identity()
    assert found["protocol"] == {"n_action_steps": 3, "max_steps": 20, "first_seed": 9}
    assert found["policy"] == "weights" and found["benchmark"]["image_size"] == [48, 64]
    assert found["benchmark"]["state"]["rotation"] == "axis_angle"


def test_a_key_on_one_side_only_is_a_difference():
    assert fingerprint_differences({"a": 1}, {}) == ["a is 1 now and was None"]
    assert fingerprint_differences({}, {"b": {"c": 2}}) == ["b is None now and was {'c': 2}"]


def test_the_old_name_of_a_protocol_key_is_read_as_the_new_one():
    old = {"policy": "p", "protocol": {"execute_steps": 3, "first_seed": 9}}
    assert with_current_keys(old) == {"policy": "p", "protocol": {"n_action_steps": 3, "first_seed": 9}}
    assert with_current_keys({"policy": "p"}) == {"policy": "p"}
