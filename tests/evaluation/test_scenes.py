"""Scenes with one thing changed: each arm differs from the benign one in its scenes alone."""

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation import scenes
from vla_bench.evaluation.rollout import read_episodes
from vla_bench.evaluation.scenes import scene_robustness


def test_a_changed_arm_draws_the_noise_of_the_benign_one(state_policy, settings, tmp_path, monkeypatch):
    built = []

    def unchanged(asked, spec):
        built.append(asked.variation)
        return PointReach()

    monkeypatch.setattr(scenes, "build_benchmark", unchanged)
    policy, arms = state_policy(PointReach()), ["light", "start"]
    rows = scene_robustness(policy, settings(), tmp_path, variations=arms, show_progress=False)
    actions = {
        row["arm"]: [each["actions"] for each in read_episodes(tmp_path / row["arm"] / "episodes.jsonl")]
        for row in rows
    }
    assert built == [None, "light", "start"] and list(actions) == ["official", "benign", "light", "start"]
    assert actions["light"] == actions["start"] == actions["benign"] != actions["official"]
    assert [row["flipped"] for row in rows if row["arm"] in arms] == [0, 0]


def test_a_benchmark_that_cannot_be_varied_is_refused_before_the_first_episode(
    state_policy, settings, tmp_path
):
    with pytest.raises(ValueError, match="takes no argument 'variation'"):
        scene_robustness(state_policy(PointReach()), settings(), tmp_path, show_progress=False)
    assert not list(tmp_path.iterdir())
