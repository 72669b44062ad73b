"""Attempts are pure functions of their seeds, and what has no outcome has no reward."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.rollout import EvaluationSettings
from vla_bench.rl.batch import by_group
from vla_bench.rl.collect import Asked, Collector, SamplingPolicy
from vla_bench.rl.stochastic import stochastic
from vla_bench.serving.policy import Policy

LLAVA = Path(__file__).parents[1] / "fixtures/version_0_1/runs/llava"
SETTINGS = EvaluationSettings("point", n_action_steps=2, max_steps=13)
ASKED = [
    Asked(task, seed, 10 * seed + n, seed)
    for seed in (3, 4)
    for task in ("reach-red", "reach-blue")
    for n in (0, 1)
]


@pytest.fixture
def player():
    """`player(batch_size)`: a tiny policy that draws."""

    def build(batch_size=1, keep_features=True):
        policy = Policy.from_pretrained(LLAVA, batch_size=batch_size)
        return SamplingPolicy(policy, stochastic(policy.framework.action_model, std=0.3), 2, keep_features)

    return build


@pytest.fixture
def odd_point(monkeypatch):
    """The module of benchmarks that misbehave."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # worker processes get this path, too
    return importlib.import_module("odd_point")


def play(player, benchmark, asked=ASKED, **changes):
    with Collector(benchmark, replace(SETTINGS, **changes)) as collector:
        return collector.play(player, asked)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.task, one.seed, one.group, one.steps, one.reward) == (
            other.task, other.seed, other.group, other.steps, other.reward
        )  # fmt: skip
        for a, b in zip(one.decisions, other.decisions, strict=True):
            assert np.array_equal(a.actions, b.actions)
            assert torch.equal(a.drawn.log_prob, b.drawn.log_prob)
            assert all(torch.equal(a.drawn.chain[name], b.drawn.chain[name]) for name in b.drawn.chain)


def test_two_simulators_play_what_one_plays(player):
    assert_same(
        play(player(), PointReach(max_steps=13)), play(player(), PointReach(max_steps=13), num_envs=2)
    )


def test_a_batch_changes_nothing_that_a_decision_depends_on(player):
    """Two in a batch are the same two in another batch: here each row meets a different neighbour."""
    in_order = play(player(2), PointReach(max_steps=13), num_envs=2, batch_size=2)
    alone = play(player(2), PointReach(max_steps=13), batch_size=2)
    assert_same(in_order, alone)


def test_success_that_is_no_number_has_no_reward_and_leaves_its_group(player, odd_point):
    found = play(player(), odd_point.OddPoint("not a number", seed=3))
    odd = [episode for episode in found if episode.seed == 3]
    assert [episode.reward for episode in odd] == [None] * 4
    assert all(episode.error == "success is nan, neither true nor false" for episode in odd)
    assert [len(group) for group in by_group(found).values()] == [0, 4]


def test_one_that_dies_once_is_played_again_as_if_nothing_was(player, odd_point, tmp_path):
    asked = [each for each in ASKED if each.task == "reach-red"]
    found = play(player(), odd_point.OddPoint("dies", 3, tmp_path, times=1), asked, step_timeout_s=30.0)
    assert [episode.trials for episode in found] == [2, 1, 1, 1]
    assert_same(found, play(player(), PointReach(max_steps=13), asked))


def test_a_simulator_that_dies_in_both_trials_leaves_the_batch(player, odd_point, tmp_path):
    asked = [ASKED[0], ASKED[4]]
    found = play(player(), odd_point.OddPoint("dies", 3, tmp_path), asked, step_timeout_s=30.0)
    assert [episode.reward for episode in found] == [None, 0.0]
    assert found[0].error.startswith("the simulator was killed by signal 9")
    assert [len(group) for group in by_group(found).values()] == [0, 1]
