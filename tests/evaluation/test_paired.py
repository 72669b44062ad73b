"""Two policies on the same episodes: the test, the interval, and what they promise, by exact enumeration."""

import math
from itertools import product

import numpy as np
import pytest

from vla_bench.evaluation.paired import (
    PairedCounts,
    count_pairs,
    enumerate_pairs,
    holm,
    mcnemar,
    mcnemar_power,
    pair_records,
    paired_rows,
    pairs_needed,
    tango_interval,
)


def test_counts_are_of_the_four_kinds_of_outcome():
    outcomes = [(1, 1)] * 4 + [(1, 0)] * 3 + [(0, 1)] * 2 + [(0, 0)]
    counts = count_pairs(outcomes)
    assert (
        counts == PairedCounts(4, 3, 2, 1) and counts.pairs == 10 and counts.difference == pytest.approx(0.1)
    )


@pytest.mark.parametrize("b, c", [*product(range(7), range(7))][::5])
def test_mcnemar_adds_up_all_outcomes_that_are_as_uneven(b, c):
    m = b + c
    uneven = sum(math.comb(m, k) for k in range(m + 1) if abs(2 * k - m) >= abs(b - c)) / 2**m
    assert mcnemar(b, c) == pytest.approx(uneven)


@pytest.mark.parametrize("pairs", [10, 25, 40])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_mcnemar_errs_no_oftener_than_it_says(pairs, alpha):
    for discordant in (0.02, 0.1, 0.3, 0.5, 0.8, 1.0):
        error = enumerate_pairs(pairs, discordant / 2, discordant / 2, lambda b, c: mcnemar(b, c) <= alpha)
        assert error <= alpha + 1e-12


def test_no_discordant_pair_is_no_evidence():
    assert mcnemar(0, 0) == 1.0 and tango_interval(PairedCounts(5, 0, 0, 5)) == pytest.approx(
        (-0.2775, 0.2775), abs=1e-4
    )


def score(counts, delta):
    """Tango's statistic, with the most likely nuisance parameter found by search."""
    n, b, c = counts.pairs, counts.only_a, counts.only_b
    q = np.linspace(max(0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 400_001)
    likely = b * np.log(q + delta) + c * np.log(q) + (n - b - c) * np.log1p(-2 * q - delta)
    best = q[np.argmax(likely)]
    return (b - c - n * delta) / np.sqrt(n * (2 * best + delta * (1 - delta)))


@pytest.mark.parametrize(
    "counts", [PairedCounts(30, 12, 3, 5), PairedCounts(2, 5, 4, 9), PairedCounts(43, 0, 1, 6)]
)
@pytest.mark.parametrize("confidence, z", [(0.95, 1.959964), (0.8, 1.281552)])
def test_tangos_bounds_lie_where_his_statistic_is_z(counts, confidence, z):
    low, high = tango_interval(counts, confidence)
    assert low < counts.difference < high
    assert [score(counts, low), score(counts, high)] == pytest.approx([z, -z], abs=2e-3)


@pytest.mark.parametrize("pairs, least", [(20, 0.92), (50, 0.94)])
def test_tango_covers_nearly_what_it_says_at_every_difference(pairs, least):
    known = {}

    def bounds(b, c):
        if (b, c) not in known:
            known[b, c] = tango_interval(PairedCounts(0, b, c, pairs - b - c))
        return known[b, c]

    found = []
    for discordant, difference in product((0.1, 0.3, 0.5), (0.0, 0.05, 0.1)):
        a, b = (discordant + difference) / 2, (discordant - difference) / 2
        holds = lambda i, j, d=difference: bounds(i, j)[0] <= d <= bounds(i, j)[1]
        found.append(enumerate_pairs(pairs, a, b, holds))
    assert min(found) >= least and np.mean(found) == pytest.approx(0.955, abs=0.015)


def test_power_is_the_sum_over_all_outcomes():
    rejected = lambda b, c: mcnemar(b, c) <= 0.05
    assert mcnemar_power(30, 0.3, 0.08) == pytest.approx(enumerate_pairs(30, 0.3, 0.08, rejected))


@pytest.mark.parametrize("difference, discordant", [(0.15, 0.45), (0.3, 0.35), (0.1, 0.1)])
def test_no_fewer_pairs_would_do(difference, discordant):
    only_a, only_b = (discordant + difference) / 2, (discordant - difference) / 2
    needed = pairs_needed(difference, discordant)
    assert mcnemar_power(needed, only_a, only_b) >= 0.8
    assert max(mcnemar_power(n, only_a, only_b) for n in range(2, needed)) < 0.8


def test_holm_is_the_procedure_step_by_step():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, alpha = rng.random(6) ** 3, 0.1
        rejected, order = set(), np.argsort(values)
        for step, i in enumerate(order):
            if values[i] > alpha / (6 - step):
                break
            rejected.add(int(i))
        assert {i for i, p in enumerate(holm(list(values))) if p <= alpha} == rejected


def episodes(task, outcomes, seed=100, **more):
    return [
        {"task": task, "episode": i, "seed": seed + i, "success": s, **more} for i, s in enumerate(outcomes)
    ]


def test_episodes_are_paired_by_task_and_number_in_any_order():
    a = episodes("push", [1, 0, 1]) + episodes("lift", [0, 0])
    b = list(reversed(episodes("push", [0, 0, 1]) + episodes("lift", [1])))
    rows = {row["task"]: row for row in paired_rows(pair_records(a, b))}
    kinds = ("both", "only_a", "only_b", "neither")
    assert {task: tuple(row[k] for k in kinds) for task, row in rows.items()} == {
        "push": (1, 1, 0, 1),
        "lift": (0, 0, 1, 0),
        "all": (1, 1, 1, 1),
    }


def test_other_scenes_are_no_pairs():
    with pytest.raises(ValueError, match="episode 0 of 'push' is the scene of seed 100 here and of 7 there"):
        pair_records(episodes("push", [1]), episodes("push", [1], seed=7))


def test_an_episode_without_an_outcome_is_in_no_pair():
    a, b = episodes("push", [1, 1]), episodes("push", [0, 0])
    b[0]["error"] = "it hung"
    assert [ours["episode"] for ours, _ in pair_records(a, b)] == [1]
    assert [ours["episode"] for ours, _ in pair_records(b, a)] == [1]


def test_without_pairs_there_are_no_rows():
    assert paired_rows([]) == []
    with pytest.raises(ValueError, match="without a pair"):
        tango_interval(PairedCounts(0, 0, 0, 0))
    with pytest.raises(ValueError, match="0 < difference <= discordant"):
        pairs_needed(0.3, 0.2)
