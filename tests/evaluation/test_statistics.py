"""Success rates with their intervals."""

import numpy as np
import pytest

from vla_bench.evaluation.statistics import success_rate, summarize, wilson_interval


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


HUNG = {"success": False, "steps": 7, "error": "the simulator did not answer"}


def outcomes(*successes):
    return [{"success": success, "steps": 10} for success in successes]


@pytest.mark.parametrize(
    "records, rate, episodes, errors",
    [
        (outcomes(True, False, True, True), 0.75, 4, None),
        ([*outcomes(True, False, True, True), HUNG], 0.75, 4, 1),
        ([HUNG, *outcomes(True), HUNG], 1.0, 1, 2),
        ([HUNG | {"success": True}, *outcomes(False)], 0.0, 1, 1),
        ([HUNG, HUNG], None, 0, 2),
    ],
)
def test_an_error_is_counted_beside_the_rate_and_not_in_it(records, rate, episodes, errors):
    found = success_rate(records)
    assert (found["success_rate"], found["episodes"], found.get("errors")) == (rate, episodes, errors)


def test_the_interval_is_that_of_the_episodes_with_an_outcome():
    assert success_rate([*outcomes(True, False), HUNG])["confidence_interval"] == list(wilson_interval(1, 2))
    assert success_rate([HUNG])["confidence_interval"] == [0.0, 1.0]


def test_a_task_without_any_outcome_is_not_in_the_mean_over_tasks():
    tasks = {"a": outcomes(True), "b": outcomes(True, False), "c": [HUNG]}
    found = summarize({"task": task, **record} for task, records in tasks.items() for record in records)
    assert found["mean_over_tasks"] == 0.75 and found["success_rate"] == 2 / 3 and found["errors"] == 1


def test_the_mean_length_is_that_of_the_successes():
    records = [
        {"success": True, "steps": 10},
        {"success": True, "steps": 25},
        {"success": False, "steps": 300},
    ]
    assert success_rate(records)["mean_steps"] == 17.5
    assert success_rate(records[2:])["mean_steps"] is None


@pytest.mark.parametrize(
    "confidence, low, high", [(0.95, 0.2366, 0.7634), (0.8, 0.3122, 0.6878), (0.5, 0.3957, 0.6043)]
)
def test_an_interval_has_the_confidence_that_was_asked_for(confidence, low, high):
    assert wilson_interval(5, 10, confidence) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("successes, episodes", [(-1, 3), (4, 3), (0, 0), (1, 0), (-1, -1), (0, -1)])
def test_what_is_no_rate_is_refused(successes, episodes):
    with pytest.raises(ValueError, match=f"{successes} successes in {episodes} episodes is no success rate"):
        wilson_interval(successes, episodes)
    assert wilson_interval(0, 1) == pytest.approx((0.0, 0.7935), abs=1e-4)
    assert wilson_interval(1, 1) == pytest.approx((0.2065, 1.0), abs=1e-4)


def test_without_any_episode_there_is_no_summary():
    for summed in (success_rate, summarize):
        with pytest.raises(ValueError, match="0 successes in 0 episodes"):
            summed([])


@pytest.mark.parametrize("lost", [1, 2])
def test_of_errors_alone_nothing_is_known(lost):
    found = summarize([HUNG | {"task": "a"}] * lost)
    rate = {
        "success_rate": None,
        "confidence_interval": [0.0, 1.0],
        "successes": 0,
        "episodes": 0,
        "mean_steps": None,
    }
    assert found == rate | {
        "errors": lost,
        "mean_over_tasks": None,
        "per_task": {"a": rate | {"errors": lost}},
    }


def test_tasks_keep_the_order_in_which_they_come():
    records = [{"task": task, "success": True, "steps": 1} for task in ("z", "a", "z", "m")]
    assert list(summarize(records)["per_task"]) == ["z", "a", "m"]
