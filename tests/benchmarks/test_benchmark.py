"""Which policies a benchmark refuses: each field of the contract, changed alone."""

from dataclasses import replace

import numpy as np
import pytest

from vla_bench.benchmarks.benchmark import BenchmarkSpec, check_action, check_policy, policy_differences
from vla_bench.data.layout import Layout, PolicySpec

ACTION = Layout(("a", "b"), "delta", "base", "1.0 = 1 cm", "euler_xyz", "positive_opens")
STATE = Layout(("x", "y", "z"), "absolute", "world", "m", "axis_angle", "positive_closes")
BENCHMARK = BenchmarkSpec(
    "tape", ("left", "right"), (48, 64), ACTION, STATE, 12.5, 30, "as told", {"tape": "1"}
)
POLICY = PolicySpec(ACTION, STATE, ("left", "right"), (48, 64), 4, 12.5, {"action": "identity"}, "d", "h")


def with_layout(name, **change):
    return replace(POLICY, **{name: replace(vars(POLICY)[name], **change)})


MEANING = {"kind": "absolute", "frame": "end_effector", "rotation": "rotation_6d", "gripper": "none"}
CHANGED = {
    "cameras": replace(POLICY, cameras=("right", "left")),
    "cameras: one less": replace(POLICY, cameras=("left",)),
    "image size": replace(POLICY, image_size=(64, 48)),
    "control rate": replace(POLICY, control_rate=12.52),
    "control rate: slower": replace(POLICY, control_rate=12.48),
    "action names": with_layout("action", names=("b", "a")),
    "action has 3 dimensions": with_layout("action", names=("a", "b", "c")),
    "state names": with_layout("state", names=("x", "z", "y")),
    "state has 2 dimensions": with_layout("state", names=("x", "y")),
    **{f"action {key}": with_layout("action", **{key: value}) for key, value in MEANING.items()},
    **{
        f"state {key}": with_layout("state", **{key: value})
        for key, value in (MEANING | {"kind": "delta"}).items()
    },
}


@pytest.mark.parametrize("name", CHANGED)
def test_each_field_of_the_contract_alone_is_refused(name):
    (line,) = policy_differences(CHANGED[name], BENCHMARK)
    assert line.startswith(name.split(":")[0])
    with pytest.raises(ValueError, match="this policy does not fit tape:\n  "):
        check_policy(CHANGED[name], BENCHMARK)


def test_all_differences_are_listed_at_once():
    wrong = replace(
        CHANGED["action frame"], cameras=("left",), image_size=(1, 1), state=CHANGED["state kind"].state
    )
    assert [line.split(" is ")[0].split(":")[0] for line in policy_differences(wrong, BENCHMARK)] == [
        "cameras",
        "image size",
        "action frame",
        "state kind",
    ]


FITTING = {
    "itself": POLICY,
    "no state": replace(POLICY, state=None),
    "a rate that differs by rounding": replace(POLICY, control_rate=12.5 * 1.0005),
    "other words for the units": with_layout("action", units="cm"),
    "an unknown frame": with_layout("action", frame="unknown"),
    "an unknown kind of state": with_layout("state", kind="unknown"),
    "another horizon": replace(POLICY, horizon=9),
}


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_is_let_in(name):
    assert policy_differences(FITTING[name], BENCHMARK) == []
    check_policy(FITTING[name], BENCHMARK)


def test_a_policy_that_reads_a_state_needs_one():
    (line,) = policy_differences(POLICY, replace(BENCHMARK, state=None))
    assert line.startswith("state: the policy reads proprioception")
    assert policy_differences(replace(POLICY, state=None), replace(BENCHMARK, state=None)) == []


def test_an_action_is_handed_on_as_float64():
    checked = check_action([1, 2.5], 2)
    assert checked.dtype == np.float64 and checked.tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "action", [[1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]], 1.0, [np.nan, 0.0], [0.0, -np.inf]], ids=str
)
def test_an_action_that_is_no_finite_vector_of_the_size_is_refused(action):
    with pytest.raises(ValueError, match="an action"):
        check_action(action, 2)
