"""Differences of two independent rates: published examples, the equations, and coverage by exact enumeration."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom

from vla_bench.evaluation.statistics import success_interval
from vla_bench.evaluation.unpaired import (
    enumerate_rates,
    episodes_needed,
    fisher,
    fitting_rates,
    miettinen_nurminen,
    newcombe,
)


@pytest.mark.parametrize(
    "interval, successes, episodes, bounds",
    [  # Newcombe, Statistics in Medicine 17 (1998), 873-890, table II
        (miettinen_nurminen, (56, 48), (70, 80), (0.0528, 0.3382)),
        (newcombe, (56, 48), (70, 80), (0.0524, 0.3339)),
        (newcombe, (9, 3), (10, 10), (0.1705, 0.8090)),
        (newcombe, (5, 0), (56, 29), (-0.0381, 0.1926)),
    ],
)
def test_published_examples(interval, successes, episodes, bounds):
    assert interval(successes, episodes) == pytest.approx(bounds, abs=1e-4)


@pytest.mark.parametrize(
    "successes, episodes", [((7, 3), (10, 12)), ((10, 9), (10, 15)), ((0, 4), (8, 9)), ((5, 5), (5, 5))]
)
@pytest.mark.parametrize("delta", [-0.6, -0.1, 0.0, 0.3, 0.7])
def test_no_other_rates_with_that_difference_fit_better(successes, episodes, delta):
    def likely(first):
        chances = [binom.logpmf(x, n, p) for x, n, p in zip(successes, episodes, (first, first - delta))]
        return sum(chances)

    grid = np.linspace(max(0.0, delta), min(1.0, 1 + delta), 20_001)
    best = grid[np.nanargmax([likely(first) for first in grid[::20]]) * 20]
    first, second = fitting_rates(successes, episodes, delta)
    assert first - second == pytest.approx(delta) and 0 <= first <= 1 and -1e-9 <= second <= 1
    assert first == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize(
    "successes, episodes", [((7, 3), (10, 12)), ((38, 31), (40, 50)), ((1, 9), (30, 20))]
)
def test_the_bounds_lie_where_the_statistic_is_z(successes, episodes):
    (n, m), observed = episodes, successes[0] / episodes[0] - successes[1] / episodes[1]
    for bound, z in zip(miettinen_nurminen(successes, episodes), (1.959964, -1.959964)):
        p, q = fitting_rates(successes, episodes, bound)
        error = np.sqrt((p * (1 - p) / n + q * (1 - q) / m) * (n + m) / (n + m - 1))
        assert (observed - bound) / error == pytest.approx(z, abs=1e-5)


def test_newcombe_puts_two_wilson_intervals_together():
    (low_p, high_p), (low_q, high_q) = (success_interval(x, n, 0.9, "wilson") for x, n in ((12, 20), (9, 30)))
    low, high = newcombe((12, 9), (20, 30), 0.9)
    assert low == pytest.approx(0.3 - np.sqrt((0.6 - low_p) ** 2 + (high_q - 0.3) ** 2))
    assert high == pytest.approx(0.3 + np.sqrt((high_p - 0.6) ** 2 + (0.3 - low_q) ** 2))


@pytest.mark.parametrize("interval", [miettinen_nurminen, newcombe])
def test_turned_round_the_interval_is_turned_round(interval):
    low, high = interval((12, 5), (20, 15))
    assert interval((5, 12), (15, 20)) == pytest.approx((-high, -low))
    wider = interval((12, 5), (20, 15), 0.99)
    assert wider[0] < low and high < wider[1]


@pytest.mark.parametrize("interval, least", [(miettinen_nurminen, 0.93), (newcombe, 0.93)])
def test_they_cover_nearly_what_they_say(interval, least):
    sizes = (15, 20)
    known = {(x, y): interval((x, y), sizes) for x, y in product(range(16), range(21))}
    found = []
    for p, q in product((0.3, 0.6, 0.9, 0.97), repeat=2):
        holds = lambda x, y, d=p - q: known[x, y][0] - 1e-9 <= d <= known[x, y][1] + 1e-9
        found.append(enumerate_rates((p, q), sizes, holds))
    assert min(found) >= least and np.mean(found) == pytest.approx(0.96, abs=0.015)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.98])
def test_fishers_test_errs_less_often_than_it_says(rate):
    p_values = {(x, y): fisher((x, y), (8, 12)) for x, y in product(range(9), range(13))}
    for alpha in (0.05, 0.2):
        assert enumerate_rates((rate, rate), (8, 12), lambda x, y, a=alpha: p_values[x, y] <= a) <= alpha


@pytest.mark.parametrize("rates", [(0.6, 0.8), (0.5, 0.75), (0.7, 0.9)])
def test_with_as_many_episodes_as_are_needed_four_of_five_differences_are_found(rates):
    n = episodes_needed(rates)
    known = {}

    def found(x, y):
        pooled = (x + y) / (2 * n)
        error = np.sqrt(2 * pooled * (1 - pooled) / n)
        return known.setdefault((x, y), abs(x - y) / n > 1.959964 * error if error else False)

    assert enumerate_rates(rates, (n, n), found) == pytest.approx(0.8, abs=0.03)


def test_the_numbers_that_the_field_quotes():
    assert [episodes_needed(pair) for pair in ((0.97, 0.98), (0.97, 0.99), (0.65, 0.70))] == [3826, 769, 1377]
    assert (
        episodes_needed((0.8, 0.6), power=0.9)
        > episodes_needed((0.8, 0.6))
        > episodes_needed((0.8, 0.6), alpha=0.2)
    )


@pytest.mark.parametrize("interval", [miettinen_nurminen, newcombe, fisher])
def test_what_is_no_rate_is_refused(interval):
    with pytest.raises(ValueError, match="11 successes in 10 episodes is no success rate"):
        interval((3, 11), (10, 10))
    with pytest.raises(ValueError, match="two different ones between 0 and 1"):
        episodes_needed((0.5, 1.5))
