"""A policy that does not fit is refused before the first episode, with what to change."""

from dataclasses import replace

import pytest

from vla_bench.benchmarks.metaworld import MetaWorld
from vla_bench.evaluation.rollout import evaluate

TASKS = ["drawer-open-v3"]


def with_part(spec, name, value):
    """The specification with one field replaced; a dictionary changes a part of that field."""
    return replace(spec, **{name: replace(vars(spec)[name], **value) if isinstance(value, dict) else value})


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("cameras", ("gripperPOV",), r"build the benchmark with cameras=\['gripperPOV'\]"),
        ("image_size", (224, 224), r"build the benchmark with image_size=\(224, 224\)"),
        ("control_rate", 10.0, "acts at 10 Hz, the benchmark runs at 80 Hz"),
        ("action", {"gripper": "positive_opens"}, "action gripper is 'positive_opens', expected 'positive_closes'"),
        ("action", {"names": ("dx", "dy", "dz")}, "action has 3 dimensions"),
        ("state", {"frame": "base"}, "state frame is 'base', expected 'world'"),
        ("horizon", 3, "set evaluation.n_action_steps to at most 3"),
    ],
)  # fmt: skip
def test_a_policy_that_does_not_fit_is_refused(name, value, named, tmp_path, state_policy, settings):
    benchmark = MetaWorld(tasks=TASKS)
    policy = state_policy(benchmark)
    policy.spec = with_part(policy.spec, name, value)
    with pytest.raises(ValueError, match=named):
        evaluate(policy, benchmark, settings(benchmark="metaworld"), tmp_path / "out", show_progress=False)
    assert policy.calls == 0 and not (tmp_path / "out").exists()


def test_a_camera_that_the_simulator_lacks_is_refused_with_the_nearest(tmp_path, state_policy, settings):
    policy = state_policy(MetaWorld(tasks=TASKS))
    policy.spec = replace(policy.spec, cameras=("corner22",))
    asked = settings(benchmark="metaworld", tasks=TASKS)
    with pytest.raises(ValueError, match="no camera 'corner22'; did you mean 'corner2'"):
        evaluate(policy, None, asked, tmp_path, show_progress=False)
