"""Schedules of chunks, by cases that were computed by hand."""

import numpy as np
import pytest

from vla_bench.config import ConfigError
from vla_bench.serving.chunking import ExecuteFirst, Scheduled, adaptive_ensemble, temporal_ensemble


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_k_of_a_chunk_are_carried_out_before_the_next_look(steps):
    looks = []
    robot = Scheduled(lambda now: looks.append(now) or now + np.arange(4.0)[:, None], ExecuteFirst(steps))
    assert [robot.act(now)[0] for now in range(8)] == list(range(8))
    assert looks == list(range(0, 8, steps))


def test_the_oldest_chunk_has_the_largest_share():
    ensemble = temporal_ensemble(np.log(2))  # weights 1, 1/2, 1/4
    for chunk in ([7.0, 0.0, 7.0], [14.0, 0.0], [28.0]):
        ensemble.add(np.array(chunk)[:, None])
        action = ensemble.take()[0]
    assert action == pytest.approx((4 * 7 + 2 * 0 + 1 * 28) / 7)


def test_a_plan_in_the_other_direction_counts_less():
    ensemble = adaptive_ensemble(alpha=np.log(2) / 2, most=2)  # agreement 1 against -1: twice the weight
    for value in (-3.0, 3.0):
        ensemble.add(np.full((2, 1), value))
    assert ensemble.take()[0] == pytest.approx((2 * 3 - 3) / 3, abs=1e-5)


def test_more_actions_than_a_chunk_has_are_refused():
    with pytest.raises(ConfigError, match="n_action_steps must be at most the horizon, 4"):
        ExecuteFirst(5).add(np.zeros((4, 1)))
