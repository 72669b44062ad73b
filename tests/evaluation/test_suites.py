"""The mean over tasks with unequal numbers of episodes: what its interval is, and that it covers."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from vla_bench.evaluation.statistics import success_interval
from vla_bench.evaluation.suites import SUITE_INTERVALS, mean_interval


@pytest.mark.parametrize("successes", [0, 1, 13, 20])
def test_of_one_task_it_is_the_exact_interval(successes):
    for confidence in (0.95, 0.8):
        found = mean_interval([(successes, 20)], confidence, draws=200_000)
        assert found == pytest.approx(success_interval(successes, 20, confidence), abs=3e-3)


@pytest.mark.parametrize("episodes", [(4, 8, 12), (3, 15)])
def test_it_covers_whatever_the_rates_are(episodes):
    bounds = {
        outcome: mean_interval(list(zip(outcome, episodes)), draws=1000)
        for outcome in product(*(range(n + 1) for n in episodes))
    }
    for rates in ((0.5, 0.7, 0.9), (0.95, 0.95, 0.95), (0.99, 0.5, 0.99), (1.0, 0.9, 0.98), (0.1, 0.05, 0.3)):
        rates = rates[: len(episodes)]
        kept = sum(
            np.prod([binom.pmf(k, n, p) for k, n, p in zip(outcome, episodes, rates)])
            for outcome, (low, high) in bounds.items()
            if low <= np.mean(rates) <= high
        )
        assert kept >= 0.95


def test_the_bootstrap_draws_episodes_within_each_task():
    counts = [(8, 10), (30, 50)]
    low, high = mean_interval(counts, method="bootstrap", draws=100_000)
    # the exact distribution of the mean of two resampled rates
    places, chances = [], []
    for a, b in product(range(11), range(51)):
        places.append((a / 10 + b / 50) / 2)
        chances.append(binom.pmf(a, 10, 0.8) * binom.pmf(b, 50, 0.6))
    order = np.argsort(places)
    below = np.cumsum(np.array(chances)[order])
    exact = [np.array(places)[order][np.searchsorted(below, q)] for q in (0.025, 0.975)]
    assert [low, high] == pytest.approx(exact, abs=0.011)


def test_the_bootstrap_is_blind_where_everything_succeeded():
    assert mean_interval([(10, 10), (5, 5)], method="bootstrap") == (1.0, 1.0)
    low, high = mean_interval([(10, 10), (5, 5)])
    assert 0.5 < low < 0.8 and high == 1.0
    low, high = mean_interval([(0, 10), (0, 5)])
    assert low == 0.0 and 0.2 < high < 0.5


@pytest.mark.parametrize("method", SUITE_INTERVALS)
def test_weights_are_those_of_the_tasks(method):
    counts = [(9, 10), (2, 10)]
    heavy = mean_interval(counts, method=method, weights=[3, 1])
    assert heavy[0] > mean_interval(counts, method=method)[0]
    assert heavy == pytest.approx(mean_interval(counts, method=method, weights=[0.75, 0.25]))


def test_the_same_seed_gives_the_same_bounds():
    assert mean_interval([(3, 5), (7, 9)]) == mean_interval([(3, 5), (7, 9)])
    assert mean_interval([(3, 5), (7, 9)]) != mean_interval([(3, 5), (7, 9)], seed=1)


def test_what_is_no_rate_and_no_method_is_refused():
    with pytest.raises(ValueError, match="6 successes in 5 episodes"):
        mean_interval([(3, 5), (6, 5)])
    with pytest.raises(ValueError, match="no interval 'meld' of a suite; did you mean 'melded'"):
        mean_interval([(3, 5)], method="meld")
