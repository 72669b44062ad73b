"""Success rates with their intervals."""

import numpy as np
import pytest
from scipy.stats import binom

from vla_bench.evaluation.statistics import (
    INTERVALS,
    coverage,
    success_interval,
    success_rate,
    summarize,
    wilson_interval,
)


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
    assert summarize(RECORDS)["per_task"]["a"]["confidence_interval"] == list(success_interval(2, 3))


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
    assert success_rate([*outcomes(True, False), HUNG])["confidence_interval"] == list(success_interval(1, 2))
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
        "interval_method": "clopper_pearson",
        "mean_over_tasks": None,
        "per_task": {"a": rate | {"errors": lost}},
    }


def test_tasks_keep_the_order_in_which_they_come():
    records = [{"task": task, "success": True, "steps": 1} for task in ("z", "a", "z", "m")]
    assert list(summarize(records)["per_task"]) == ["z", "a", "m"]


@pytest.mark.parametrize(
    "method, low, high",
    [("clopper_pearson", 0.8308, 0.9939), ("mid_p", 0.8445, 0.9915), ("wilson", 0.8350, 0.9862)],
)
def test_thirty_eight_of_forty(method, low, high):
    assert success_interval(38, 40, method=method) == pytest.approx((low, high), abs=1e-4)


def test_the_exact_interval_is_the_default():
    assert success_interval(38, 40) == success_interval(38, 40, 0.95, "clopper_pearson")
    assert summarize(RECORDS)["confidence_interval"] == list(success_interval(2, 4))
    assert summarize(RECORDS)["interval_method"] == "clopper_pearson"


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("episodes", [1, 5, 20, 50])
def test_the_exact_interval_covers_at_every_rate(episodes, confidence):
    rates = np.concatenate([np.linspace(0, 1, 301), 1 - np.logspace(-6, -2, 50)])
    assert coverage(rates, episodes, "clopper_pearson", confidence).min() >= confidence - 1e-12


@pytest.mark.parametrize(
    "rate, episodes, wilson, exact",
    [(0.92, 50, 0.9407, 0.9679), (0.98, 50, 0.9216, 0.9822), (0.99, 50, 0.9106, 0.9862)]
    + [(0.95, 20, 0.925, None), (0.99, 40, 0.939, None), (0.99, 100, 0.921, None)],
)
def test_what_wilson_covers_is_what_others_found(rate, episodes, wilson, exact):
    assert coverage([rate], episodes, "wilson") == pytest.approx(
        [wilson], abs=1e-3 if exact is None else 1e-4
    )
    if exact is not None:
        assert coverage([rate], episodes) == pytest.approx([exact], abs=1e-4)


def test_coverage_adds_up_the_outcomes_whose_interval_holds_the_truth():
    # of two episodes: 0 gives [0, .842], 1 gives [.013, .987], 2 gives [.158, 1]
    p = np.array([0.001, 0.5, 0.9, 0.995])
    held = np.array([(1 - p[0]) ** 2, 1.0, 1 - (1 - p[2]) ** 2, p[3] ** 2])
    assert coverage(p, 2) == pytest.approx(held)


def test_mid_p_lies_within_the_exact_interval_and_covers_on_the_average():
    for successes in range(1, 20):
        low, high = success_interval(successes, 20)
        inner = success_interval(successes, 20, method="mid_p")
        assert low < inner[0] < inner[1] < high
    found = coverage(np.linspace(0.005, 0.995, 199), 20, "mid_p")
    exact = coverage(np.linspace(0.005, 0.995, 199), 20)
    assert 0.95 < found.mean() < exact.mean() - 0.01 and found.min() < 0.95 <= exact.min()


def test_mid_p_counts_what_was_observed_half():
    low, high = success_interval(7, 12, 0.9, "mid_p")
    assert binom.sf(7, 12, low) + binom.pmf(7, 12, low) / 2 == pytest.approx(0.05)
    assert binom.cdf(6, 12, high) + binom.pmf(7, 12, high) / 2 == pytest.approx(0.05)


@pytest.mark.parametrize("method", INTERVALS)
def test_no_success_and_no_failure_reach_the_ends(method):
    assert success_interval(0, 9, method=method)[0] == 0 and success_interval(9, 9, method=method)[1] == 1
    low, high = success_interval(3, 9, method=method)
    assert success_interval(6, 9, method=method) == pytest.approx((1 - high, 1 - low))


def test_an_unknown_interval_is_refused():
    with pytest.raises(ValueError, match="there is no interval 'clopper'"):
        success_interval(1, 2, method="clopper")
