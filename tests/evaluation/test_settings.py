"""The section `evaluation` of a configuration, in every spelling that is in use."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.config import ConfigError, load_config
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.rollout import EvaluationSettings, build_benchmark, check_settings
from vla_bench.registry import BENCHMARKS

SPELLINGS = ["n_action_steps", "replan_steps", "execute_steps"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_may_use_any_spelling(spelling):
    config = load_config({"evaluation": {spelling: 3}})
    assert config.section("evaluation").into(EvaluationSettings).n_action_steps == 3


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("in_file", SPELLINGS)
def test_the_command_line_may_use_any_spelling(in_file, spelling):
    config = load_config({"evaluation": {in_file: 3}}, f"--evaluation.{spelling} 5")
    assert config.section("evaluation").into(EvaluationSettings).n_action_steps == 5
    config.require_read()


@pytest.mark.parametrize("other", SPELLINGS[1:])
def test_two_spellings_in_a_file_are_refused(other):
    with pytest.raises(ConfigError, match="same key with two values"):
        load_config({"evaluation": {"n_action_steps": 3, other: 5}})


@pytest.mark.parametrize("other", SPELLINGS[1:])
def test_two_spellings_on_the_command_line_are_refused(other):
    with pytest.raises(
        ConfigError, match=f"'evaluation.n_action_steps' and 'evaluation.{other}' are the same"
    ):
        load_config({}, f"--evaluation.n_action_steps 3 --evaluation.{other} 3")


@pytest.mark.parametrize("name", ["episodes", "num_envs", "n_action_steps", "max_steps", "batch_size"])
def test_a_count_below_one_is_refused(name):
    with pytest.raises(ValueError, match=f"evaluation.{name} must be at least 1, got 0"):
        EvaluationSettings(**{name: 0})


def test_what_is_not_said_has_these_values():
    assert asdict(EvaluationSettings()) == {
        "benchmark": "metaworld", "tasks": [], "episodes": 10, "first_seed": 50000, "num_envs": 1, "n_action_steps": 6,
        "max_steps": None, "videos_per_task": 0, "attention": False, "step_timeout_s": None,
        "batch_size": 1, "variation": None, "python": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"videos_per_task": -1}, "evaluation.videos_per_task must be at least 0, got -1"),
        ({"first_seed": -1}, "evaluation.first_seed must be at least 0, got -1"),
        ({"episodes": 1.5}, "evaluation.episodes"),
        ({"first_seed": 2**32 - 9}, "evaluation.first_seed"),
        ({"tasks": ["a", "b", "a"]}, "evaluation.tasks"),
        ({"step_timeout_s": 0}, "evaluation.step_timeout_s must be more than 0 seconds, got 0"),
        ({"step_timeout_s": True}, "evaluation.step_timeout_s must be more than 0 seconds, got True"),
        ({"step_timeout_s": "1"}, "evaluation.step_timeout_s must be more than 0 seconds, got '1'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        EvaluationSettings(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"episodes": 1, "num_envs": 1, "n_action_steps": 1, "max_steps": 1}, {"videos_per_task": 0, "first_seed": 0},
     {"first_seed": 2**32 - 10}, {"tasks": ["a", "b"]}, {"step_timeout_s": 0.001}, {"step_timeout_s": float("inf")}],
    ids=str,
)  # fmt: skip
def test_the_bounds_themselves_are_allowed(changes):
    assert asdict(EvaluationSettings(**changes)).items() >= changes.items()


@pytest.mark.parametrize(
    "settings, asked",
    [
        ({}, {"tasks": None}),
        ({"tasks": ["b", "a"]}, {"tasks": ["b", "a"]}),
        ({"max_steps": 33}, {"tasks": None, "max_steps": 33}),
    ],
)
def test_a_benchmark_is_built_for_the_cameras_and_the_image_size_of_the_policy(settings, asked, monkeypatch):
    built = []
    monkeypatch.setattr(BENCHMARKS, "build", lambda section, **more: built.append((section, more)))
    spec = PointReach().spec
    policy = PolicySpec(spec.action, spec.state, ("left", "right"), (48, 64), 6, 10.0, {}, "none", "none")
    build_benchmark(EvaluationSettings(benchmark="point", **settings), policy)
    assert built == [({"type": "point", **asked}, {"cameras": ("left", "right"), "image_size": (48, 64)})]


LIMITS = SimpleNamespace(spec=PointReach(max_steps=20).spec, tasks=PointReach().tasks)


def fitting(horizon):
    spec = LIMITS.spec
    return PolicySpec(
        spec.action, spec.state, spec.cameras, spec.image_size, horizon, spec.control_rate, {}, "none", "none"
    )


@pytest.mark.parametrize(
    "horizon, settings",
    [(6, {}), (3, {"n_action_steps": 3}), (6, {"max_steps": 20}), (6, {"tasks": ["reach-red"]})],
    ids=str,
)
def test_settings_up_to_the_limits_fit(horizon, settings):
    check_settings(fitting(horizon), LIMITS, EvaluationSettings(benchmark="point", **settings))


@pytest.mark.parametrize(
    "horizon, settings, named",
    [
        (5, {}, "n_action_steps is 6, but the policy's horizon is 5"),
        (3, {"n_action_steps": 4}, "to at most 3"),
        (6, {"max_steps": 21}, "max_steps is 21, but point was built with max_steps=20"),
        (6, {"tasks": ["reach-red", "reach-bleu"]}, "no task 'reach-bleu'; did you mean 'reach-blue'"),
    ],
    ids=str,
)
def test_settings_beyond_the_limits_are_refused(horizon, settings, named):
    with pytest.raises(ValueError, match=named):
        check_settings(fitting(horizon), LIMITS, EvaluationSettings(benchmark="point", **settings))


@pytest.mark.parametrize(
    "steps, stride, n_action_steps, fits",
    [(1, 1, 3, True), (2, 3, 3, True), (2, 3, 2, False), (2, 3, 4, False), (3, 1, 1, True), (3, 1, 2, False)],
)
def test_a_policy_that_sees_several_observations_looks_as_often_as_they_are_apart(
    steps, stride, n_action_steps, fits
):
    spec = replace(fitting(6), observation_steps=steps, observation_stride=stride)
    settings = EvaluationSettings(benchmark="point", n_action_steps=n_action_steps)
    if fits:
        check_settings(spec, LIMITS, settings)
        return
    with pytest.raises(
        ValueError, match=f"that are {stride} steps apart.*set evaluation.n_action_steps to {stride}"
    ):
        check_settings(spec, LIMITS, settings)


def test_cameras_of_different_sizes_are_refused_and_of_one_size_are_not(monkeypatch):
    built = []
    monkeypatch.setattr(BENCHMARKS, "build", lambda section, **more: built.append(more["image_size"]))
    spec = PointReach().spec
    policy = PolicySpec(spec.action, spec.state, ("left", "right"), (48, 64), 6, 10.0, {}, "none", "none")
    for sizes in (((48, 64), (48, 63)), ((48, 64), (64, 48)), ((48, 64), (32, 32))):
        with pytest.raises(ValueError, match="the policy's cameras have different sizes"):
            build_benchmark(EvaluationSettings(benchmark="point"), replace(policy, image_size=sizes))
    build_benchmark(EvaluationSettings(benchmark="point"), policy)
    assert built == [(48, 64)]


def test_a_list_of_tasks_is_each_settings_own():
    first = EvaluationSettings()
    first.tasks.append("reach-red")
    assert EvaluationSettings().tasks == []
