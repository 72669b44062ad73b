"""A policy that sees several observations is given those of its own episode, oldest first."""

from types import SimpleNamespace

import numpy as np

from vla_bench.evaluation.rollout import EpisodeSpec, EvaluationSettings, Rollout


class Remembering:
    """Writes down what it is shown."""

    fingerprint = "none"
    spec = SimpleNamespace(
        observation_steps=3, observation_stride=2, horizon=2, action=SimpleNamespace(dim=1), cameras=("top",)
    )

    def __init__(self):
        self.shown = []

    def predict(self, observation, *, seed):
        self.shown.append((observation["image"], list(observation["state"]), observation.get("image_mask")))
        return np.zeros((2, 1))


def test_each_prediction_sees_the_last_observations_of_its_episode():
    policy, settings = Remembering(), EvaluationSettings(n_action_steps=2)
    for name in ("first", "second"):
        rollout = Rollout(policy, EpisodeSpec("reach", 0, 7, False), settings, max_steps=20)
        for look in range(4):
            rollout.predict_actions({"image": [f"{name} {look}"], "state": [look], "lang": "reach"})
    looks = [0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]
    for (images, states, mask), (name, expected) in zip(
        policy.shown, [(name, look) for name in ("first", "second") for look in looks]
    ):
        assert images == [f"{name} {look}" for look in expected]
        assert states == expected
        there = 3 if mask is None else int(np.sum(mask))
        assert there == min(3, expected[-1] + 1)
