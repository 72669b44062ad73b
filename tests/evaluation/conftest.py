"""A policy that needs no training, settings of a short evaluation, and an evaluation that gets stuck."""

import json
import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate, read_episodes

HORIZON = 8


class StatePolicy:
    """Heads for a place near where the image is brightest and jitters with its seed: sees, feels, and is random."""

    fingerprint = "state-policy"

    def __init__(self, benchmark):
        spec = benchmark.spec
        self.calls = 0
        self.spec = PolicySpec(spec.action, spec.state, spec.cameras, spec.image_size, HORIZON, spec.control_rate,
                               {"action": "identity"}, "none", "none", spec.name)  # fmt: skip

    def predict(self, observation, *, seed):
        self.calls += 1
        pixels = np.asarray(observation["image"][0], np.float64).mean(axis=(0, 1)) / 255
        drive = np.resize(pixels - 0.4, self.spec.action.dim) - 0.3 * np.resize(
            observation["state"], self.spec.action.dim
        )
        jitter = np.random.default_rng([seed, len(observation["lang"])]).normal(
            size=(HORIZON, self.spec.action.dim)
        )
        return np.clip(drive + 0.5 * jitter, -1, 1)


def short_settings(**changes):
    base = EvaluationSettings(benchmark="point", episodes=6, first_seed=900, n_action_steps=4)
    return replace(base, **changes)


def evaluate_until_stuck(out, kept):
    """Run in a process of its own: says its workers' ids once `kept` episodes are on disk, and goes no further."""
    policy = StatePolicy(PointReach())
    log = Path(out, "episodes.jsonl")

    def predict(observation, *, seed, predict=policy.predict):
        if log.exists() and len(read_episodes(log)) >= kept:
            print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
            while True:
                signal.pause()  # until it is killed
        return predict(observation, seed=seed)

    policy.predict = predict
    evaluate(policy, PointReach(), short_settings(num_envs=2), out, show_progress=False)


@pytest.fixture
def state_policy():
    """The class `StatePolicy`."""
    return StatePolicy


@pytest.fixture
def settings():
    """Settings of a short evaluation on `point`, with changes by name."""
    return short_settings


@pytest.fixture
def files():
    """What lies in a folder: names and bytes, without the locks of folders beside."""

    def listed(folder):
        found = [
            path for path in Path(folder).iterdir() if path.is_file() and not path.name.endswith(".lock")
        ]
        return {path.name: path.read_bytes() for path in found}

    return listed


@pytest.fixture
def run_evaluation(state_policy, settings):
    """Evaluates a `StatePolicy` on `point` into a folder."""

    def run(out, policy=None, shard=None, **changes):
        policy = policy or state_policy(PointReach())
        return evaluate(policy, PointReach(), settings(**changes), out, shard=shard, show_progress=False)

    return run
