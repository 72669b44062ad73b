"""Evidence that holds at any moment: under every rule of stopping that was tried, and what it costs."""

import numpy as np
import pytest

from vla_bench.evaluation.anytime import (
    BETS,
    anytime_interval,
    ever_rejects,
    log_e_value,
    log_e_value_of_rounds,
)
from vla_bench.evaluation.paired import PairedCounts, mcnemar, pairs_needed, tango_interval


@pytest.mark.parametrize("counts", [(5, 3, 1, 2), (0, 9, 4, 3), (8, 0, 0, 1)])
@pytest.mark.parametrize("difference", [-0.4, 0.0, 0.25])
def test_the_evidence_is_the_mean_wealth_of_the_bets(counts, difference):
    both, only_a, only_b, neither = counts
    wealth = []
    for bet in BETS:
        bet = bet / (1 + difference) if bet > 0 else bet / (1 - difference)
        coin = 1.0
        for x in [1] * only_a + [-1] * only_b + [0] * (both + neither):
            coin *= 1 + bet * (x - difference)
            assert coin > 0
        wealth.append(coin)
    assert log_e_value(PairedCounts(*counts), difference) == pytest.approx(np.log(np.mean(wealth)))


@pytest.mark.parametrize("truth, discordant", [(0.0, 0.4), (0.0, 0.05), (0.2, 0.5), (-0.3, 0.3), (0.6, 0.7)])
def test_a_pair_does_not_change_the_evidence_against_the_truth_on_the_average(truth, discordant):
    only_a, only_b = (discordant + truth) / 2, (discordant - truth) / 2
    for both, b, c in ((0, 0, 0), (4, 2, 1), (3, 0, 6), (20, 9, 9)):
        e = lambda *counts: np.exp(log_e_value(PairedCounts(*counts, 0), truth))
        after = only_a * e(both, b + 1, c) + only_b * e(both, b, c + 1)
        after += (1 - discordant) * e(both + 1, b, c)
        assert after == pytest.approx(e(both, b, c))


def course(only_a, only_b, studies, pairs, seed):
    draws = np.random.default_rng(seed).random((studies, pairs))
    won, lost = draws < only_a, (draws >= only_a) & (draws < only_a + only_b)
    return won.cumsum(1), lost.cumsum(1)


def log_e(b, c):
    """Of "equally good", for arrays of counts."""
    distinct, where = np.unique(np.stack([b.ravel(), c.ravel()], 1), axis=0, return_inverse=True)
    values = np.array([log_e_value(PairedCounts(0, int(i), int(j), 0)) for i, j in distinct])
    return values[where.ravel()].reshape(b.shape)


RULES = {
    "at the best moment": lambda e, b, c: e.argmax(1),
    "when one leads by five": lambda e, b, c: (np.abs(b - c) >= 5).argmax(1) - ~(np.abs(b - c) >= 5).any(1),
    "when the p-value is small": lambda e, b, c: _small_p(b, c),
    "after a look every ten, if promising": lambda e, b, c: _promising(e),
    "at a fixed number": lambda e, b, c: np.full(len(b), 59),
    "at the last one": lambda e, b, c: np.full(len(b), b.shape[1] - 1),
}


def _small_p(b, c):
    known = {}
    small = np.zeros(b.shape, bool)
    for i, j in np.unique(np.stack([b.ravel(), c.ravel()], 1), axis=0):
        known[i, j] = mcnemar(int(i), int(j)) <= 0.05
    for place in np.ndindex(b.shape):
        small[place] = known[b[place], c[place]]
    return np.where(small.any(1), small.argmax(1), b.shape[1] - 1)


def _promising(e):
    looks = np.zeros(e.shape, bool)
    looks[:, 9::10] = e[:, 9::10] > np.log(5)
    return np.where(looks.any(1), looks.argmax(1), e.shape[1] - 1)


@pytest.fixture(scope="module")
def equal():
    """Courses of two policies that are equally good."""
    b, c = course(0.25, 0.25, 2000, 150, seed=0)
    return log_e(b, c), b, c


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_of_stopping_finds_a_difference_oftener_than_in_five_per_cent(rule, equal):
    e, b, c = equal
    stopped = e[np.arange(len(e)), RULES[rule](e, b, c)]
    assert (stopped >= np.log(20)).mean() <= 0.05
    if rule != "at the best moment":  # of which no mean is promised
        assert np.exp(stopped).mean() < 1.6  # heavy tails; 1 in expectation


@pytest.mark.parametrize("discordant", [0.1, 0.5, 1.0])
def test_of_all_courses_fewer_than_five_per_cent_are_ever_above_twenty(discordant):
    found = ever_rejects(300, discordant / 2, discordant / 2)
    assert (np.diff(found) >= 0).all() and found[0] == 0 and found[-1] <= 0.05
    stricter = ever_rejects(150, discordant / 2, discordant / 2, alpha=0.01)
    assert stricter[-1] <= 0.01


def test_the_sum_over_courses_is_what_studies_show(equal):
    e, b, c = equal
    assert (e.max(1) >= np.log(20)).mean() == pytest.approx(ever_rejects(150, 0.25, 0.25)[-1], abs=0.01)


@pytest.mark.parametrize("truth, discordant", [(0.15, 0.45), (0.0, 0.2), (-0.3, 0.4)])
def test_the_interval_holds_the_truth_at_all_moments(truth, discordant):
    b, c = course((discordant + truth) / 2, (discordant - truth) / 2, 500, 100, seed=1)
    n = np.arange(1, 101)
    states = np.stack([b, c, np.broadcast_to(n, b.shape)], 2).reshape(-1, 3)
    distinct, where = np.unique(states, axis=0, return_inverse=True)
    against = np.array(
        [log_e_value(PairedCounts(0, int(i), int(j), int(m - i - j)), truth) for i, j, m in distinct]
    )
    lost = against[where.ravel()].reshape(b.shape) > np.log(20)
    assert lost.any(1).mean() <= 0.05


def test_the_interval_ends_where_the_evidence_is_twenty():
    counts = PairedCounts(20, 14, 5, 11)
    low, high = anytime_interval(counts)
    assert [log_e_value(counts, d) for d in (low, high)] == pytest.approx([np.log(20)] * 2, abs=1e-5)
    fixed = tango_interval(counts)
    assert low < fixed[0] < counts.difference < fixed[1] < high
    wide = anytime_interval(counts, 0.99)
    assert wide[0] < low and high < wide[1]


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0)])
def test_of_no_or_one_pair_little_is_known(counts):
    low, high = anytime_interval(PairedCounts(*counts))
    assert low < -0.85 and high > 0.85


def test_its_price_for_fifteen_points_is_two_thirds_more_episodes():
    fixed = pairs_needed(0.15, 0.45)
    reached = np.searchsorted(ever_rejects(350, 0.30, 0.15), 0.8)
    assert reached / fixed == pytest.approx(1.65, abs=0.03)


@pytest.mark.parametrize("rounds", [[], [3], [1, -2, 4], [0, 0, 5, -1]], ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 10])
def test_a_round_does_not_change_the_evidence_on_the_average_of_its_two_sides(rounds, size):
    e = lambda *more: np.exp(log_e_value_of_rounds([*rounds, *more]))
    assert (e(size) + e(-size)) / 2 == pytest.approx(e())


def test_single_pairs_are_rounds_of_one():
    course = [1, 0, 1, -1, 1, 1, 0, 1]
    assert log_e_value_of_rounds(course) == pytest.approx(log_e_value(PairedCounts(2, 5, 1, 0)))


def test_episodes_that_all_end_alike_are_one_toss_each_round():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        leads = 5 * rng.choice([1, -1], 40)
        found += max(log_e_value_of_rounds(leads[: n + 1]) for n in range(3, 40, 3)) >= np.log(20)
    assert found / 400 <= 0.05
