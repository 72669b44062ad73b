"""Success rates with their intervals."""

import numpy as np
import pytest

from vla_bench.evaluation.statistics import summarize, wilson_interval


@pytest.mark.parametrize("episodes", [1, 10, 40, 500])
def test_wilson_bounds_solve_their_equation(episodes):
    z = 1.959963984540054
    for successes in {0, 1, episodes // 2, episodes}:
        for bound in wilson_interval(successes, episodes):
            # the true rate at which the observed one lies exactly z standard errors away
            error = z * np.sqrt(bound * (1 - bound) / episodes)
            assert abs(successes / episodes - bound) == pytest.approx(error, abs=1e-7)


RECORDS = [
    {"task": task, "success": success, "steps": 5}
    for task, success in (("a", True), ("a", True), ("a", False), ("b", False))
]


def test_summary_pools_episodes():
    assert summarize(RECORDS)["success_rate"] == 0.5


def test_summary_averages_tasks():
    assert summarize(RECORDS)["mean_over_tasks"] == pytest.approx(1 / 3)


def test_summary_gives_each_task_its_interval():
    assert summarize(RECORDS)["per_task"]["a"]["confidence_interval"] == list(wilson_interval(2, 3))
