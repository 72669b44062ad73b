"""The comparison that stops by itself: what it promises, by enumeration and in ten thousand studies."""

from itertools import product

import numpy as np
import pytest

from vla_bench.config import ConfigError
from vla_bench.evaluation.paired import mcnemar_power, pairs_needed
from vla_bench.evaluation.sequential import (
    SequentialPlan,
    SequentialTest,
    decide,
    fair_step,
    shown_difference,
    simulate,
)


def crossing(plan, disagree):
    """The exact probability that two equal policies are told apart, given where they disagree."""
    test = SequentialTest(plan)
    for d in disagree:
        test.update([int(d)])
    return test.spent[0]


@pytest.mark.parametrize("disagree", ["1111111111", "1101011110", "0000111111", "1111100001"])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_of_all_courses_as_many_reach_a_bound_as_is_booked(disagree, alpha):
    plan, pattern = SequentialPlan(len(disagree), alpha=alpha), [c == "1" for c in disagree]
    reached = 0
    for signs in product((1, -1), repeat=sum(pattern)):
        test, steps = SequentialTest(plan), iter(signs)
        reached += any(test.update([next(steps) if d else 0])[0] for d in pattern)
    assert reached / 2 ** sum(pattern) == pytest.approx(crossing(plan, pattern))
    assert crossing(plan, pattern) <= alpha


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("max_pairs", [1, 7, 60, 300])
def test_the_type_one_error_is_within_alpha_wherever_they_disagree(share, max_pairs):
    disagree = np.random.default_rng(max_pairs).random((20, max_pairs)) < share
    test = SequentialTest(SequentialPlan(max_pairs), 20)
    for t in range(max_pairs):
        test.update(disagree[:, t].astype(int))
        assert (test.spent <= 0.05 * (t + 1) / max_pairs + 1e-9).all()
        assert test.walk.sum(1) + test.spent == pytest.approx(np.ones(20))
    if max_pairs == 300:  # what is not spent by then is as little as counts allow
        assert (test.spent > 0.03).all()


def test_many_studies_at_once_are_as_each_alone():
    outcomes = np.random.default_rng(3).integers(-1, 2, (8, 50))
    test, plan = SequentialTest(SequentialPlan(50), 8), SequentialPlan(50)
    alone = [SequentialTest(plan) for _ in range(8)]
    for t in range(50):
        found = test.update(outcomes[:, t])
        assert found.tolist() == [each.update([o])[0] for each, o in zip(alone, outcomes[:, t])]
        assert test.bound.tolist() == [each.bound[0] for each in alone]
        assert test.chance() == pytest.approx([each.chance()[0] for each in alone])


def test_a_step_keeps_the_mean_square_growing_by_one():
    walk = np.zeros((1, 12))
    walk[0, :2] = 0.4, 0.6
    for step in range(1, 8):
        walk = fair_step(walk)
        assert walk.sum() == pytest.approx(1) and (walk * np.arange(12) ** 2).sum() == pytest.approx(
            0.6 + step
        )


@pytest.mark.parametrize("discordant", [0.25, 0.45, 0.6])
def test_equal_policies_are_told_apart_in_at_most_five_per_cent(discordant):
    study = simulate(
        SequentialPlan(round(1.2 * pairs_needed(0.15, discordant))), discordant / 2, discordant / 2
    )
    assert len(study.better) == 10_000 and (study.better != 0).mean() <= 0.05
    assert (study.better == 1).mean() == pytest.approx((study.better == -1).mean(), abs=0.01)


@pytest.mark.parametrize("discordant", [0.25, 0.45, 0.6])
def test_it_finds_fifteen_points_as_often_as_the_fixed_number_with_a_quarter_fewer(discordant):
    only_a, only_b = discordant / 2 + 0.075, discordant / 2 - 0.075
    fixed = pairs_needed(0.15, discordant)
    study = simulate(SequentialPlan(round(1.2 * fixed)), only_a, only_b)
    assert (study.better == 1).mean() >= mcnemar_power(fixed, only_a, only_b)
    assert study.pairs.mean() <= 0.75 * fixed


@pytest.mark.parametrize("discordant", [0.35, 0.45, 0.6])
def test_thirty_points_need_half_of_the_episodes(discordant):
    fixed = pairs_needed(0.15, discordant)
    study = simulate(SequentialPlan(round(1.2 * fixed)), discordant / 2 + 0.15, discordant / 2 - 0.15)
    assert (study.better == 1).mean() > 0.99 and study.pairs.mean() <= 0.5 * fixed


def test_without_giving_up_the_error_is_still_within_alpha():
    study = simulate(SequentialPlan(150, give_up=0.0), 0.2, 0.2)
    assert (study.better != 0).mean() <= 0.053  # of 10,000 studies; 5% and a standard error and a half
    assert study.pairs[study.better == 0].min() == 150


def test_a_plan_that_is_too_small_for_the_difference_does_not_give_up_at_once():
    _, test = decide(SequentialPlan(40), [1, 0, -1, 0, 1, 0, 1, 0, -1, 0, 1, 0])
    assert test.pairs == 12 and test.chance()[0] > 0.35


@pytest.mark.parametrize("max_pairs, discordant", [(60, 0.3), (199, 0.45), (500, 0.2)])
def test_the_difference_that_a_plan_is_said_to_show_is_found_in_four_of_five(max_pairs, discordant):
    plan = SequentialPlan(max_pairs)
    gap = shown_difference(plan, discordant) / 2
    study = simulate(plan, discordant / 2 + gap, discordant / 2 - gap, studies=2000)
    assert (study.better == 1).mean() == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    "course, decision",
    [
        ([1] * 40, "a"),
        ([-1] * 40, "b"),
        ([1, -1] * 20, "gave up"),
        ([0] * 12, "no difference"),
        ([1, 0], "open"),
    ],
)
def test_every_decision_is_reached(course, decision):
    plan = SequentialPlan(
        12 if decision == "no difference" else 40, give_up=0 if decision == "no difference" else 0.35
    )
    assert decide(plan, course)[0] == decision


def test_what_comes_after_the_decision_is_not_looked_at():
    decision, test = decide(SequentialPlan(40), [1] * 20 + [-1] * 20)
    assert decision == "a" and test.pairs < 20


@pytest.mark.parametrize(
    "wrong",
    [{"max_pairs": 0}, {"max_pairs": 1.5}, {"alpha": 0.0}, {"alpha": 1.0}, {"give_up": 1.0}],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        SequentialPlan(**{"max_pairs": 10, **wrong})


def test_no_pair_beyond_the_plan():
    test = SequentialTest(SequentialPlan(1))
    test.update([0])
    with pytest.raises(ValueError, match="at most 1 pairs"):
        test.update([1])


@pytest.mark.parametrize(
    "sums", [[1, 2, 0, 2, 1, 2, 2], [4, 4, 4, 4, 4, 4, 4], [3, 1, 0, 0, 2, 4, 1]], ids=str
)
def test_of_all_courses_of_rounds_as_many_reach_a_bound_as_is_booked(sums):
    plan, reached = SequentialPlan(4 * len(sums)), 0
    for signs in product((1, -1), repeat=len(sums)):
        test = SequentialTest(plan)
        reached += any(test.update([sign * size], 4)[0] for sign, size in zip(signs, sums))
    whole = SequentialTest(plan)
    for size in sums:
        whole.update([size], 4)
    assert reached / 2 ** len(sums) == pytest.approx(whole.spent[0]) and whole.spent[0] <= 0.05
    assert whole.walk.sum() + whole.spent[0] == pytest.approx(1)


@pytest.mark.parametrize("tasks", [2, 4, 10])
@pytest.mark.parametrize("alike", [False, True])
def test_equal_policies_are_told_apart_in_at_most_five_per_cent_however_a_round_hangs_together(tasks, alike):
    study = simulate(SequentialPlan(200), 0.2, 0.2, tasks=tasks, alike=alike)
    assert (study.better != 0).mean() <= 0.05 and (study.pairs % tasks == 0).all()


@pytest.mark.parametrize("tasks", [2, 4])
def test_rounds_of_independent_episodes_still_save_a_quarter_at_the_same_power(tasks):
    fixed = pairs_needed(0.15, 0.45)
    study = simulate(SequentialPlan(200), 0.30, 0.15, tasks=tasks)
    assert (study.better == 1).mean() >= 0.8 and study.pairs.mean() <= 0.75 * fixed


def test_no_round_beyond_the_plan():
    test = SequentialTest(SequentialPlan(7))
    test.update([2], 4)
    with pytest.raises(ValueError, match="at most 7 pairs"):
        test.update([1], 4)
