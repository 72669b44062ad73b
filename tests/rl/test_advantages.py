"""Advantages by hand-computed cases, and against sums written out."""

import numpy as np
import pytest
import torch

from vla_bench.rl.advantages import LeftOut, gae, group_advantages, normalised, rewards_that_count

NAN, INF = float("nan"), float("inf")


def groups(*sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def test_nan_infinity_and_stopped_simulators_are_left_out_and_counted():
    rewards = torch.tensor([1.0, NAN, -INF, 0.0, NAN, 1.0])
    failed = torch.tensor([False, False, False, False, True, True])
    counts, left_out = rewards_that_count(rewards, failed)
    assert counts.tolist() == [True, False, False, True, False, False]
    assert left_out == LeftOut(not_finite=2, failed=2) and left_out.total == 4


def test_a_reward_that_is_no_number_never_reaches_an_advantage():
    rewards = torch.tensor([1.0, 0.0, NAN, 0.0, 1.0, INF])
    counts, _ = rewards_that_count(rewards)
    advantages, used = group_advantages(rewards, groups(3, 3), counts)
    assert advantages.isfinite().all() and used.tolist() == counts.tolist()
    with pytest.raises(ValueError, match="leave such episodes out with rewards_that_count first"):
        group_advantages(rewards, groups(3, 3))


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 1, 0, 0, 0, 1, 0, 0, 0])
    advantages, used = group_advantages(rewards, groups(4, 5))
    first, second = np.array([1.0, 1, 0, 0]), np.array([0.0, 1, 0, 0, 0])
    by_hand = [(r - r.mean()) / (r.std(ddof=1) + 1e-6) for r in (first, second)]
    np.testing.assert_allclose(advantages.numpy(), np.concatenate(by_hand), atol=1e-6)
    assert used.all() and advantages.dtype == torch.float32


@pytest.mark.parametrize(("successes", "used"), [(0, False), (1, True), (5, True), (9, True), (10, False)])
def test_groups_outside_the_range_are_left_out_and_its_ends_are_within(successes, used):
    rewards = torch.tensor([1.0] * successes + [0.0] * (10 - successes))
    advantages, found = group_advantages(rewards, groups(10))
    assert found.tolist() == [used] * 10
    assert bool(advantages.any()) == used


def test_the_range_is_a_setting():
    rewards = torch.tensor([1.0] * 9 + [0.0])
    assert not group_advantages(rewards, groups(10), high=0.8)[1].any()
    assert group_advantages(torch.ones(3), groups(3), high=1.0)[0].tolist() == [0, 0, 0]


def test_the_order_and_the_names_of_groups_do_not_matter():
    rewards, g = torch.rand(12, generator=torch.Generator().manual_seed(0)), groups(4, 4, 4)
    plain = group_advantages(rewards, g, low=0, high=1)[0]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mixed = group_advantages(rewards[order], torch.tensor([70, 3, 12])[g][order], low=0, high=1)[0]
    torch.testing.assert_close(mixed, plain[order])


def test_a_group_that_lost_all_but_one_episode_teaches_nothing():
    counts = torch.tensor([True, False, False, True, True])
    advantages, used = group_advantages(torch.tensor([0.5, 1, 0, 1, 0]), groups(3, 2), counts)
    assert used.tolist() == [False, False, False, True, True]
    assert advantages[:3].tolist() == [0, 0, 0]


def test_gae_is_the_sum_of_discounted_surprises():
    g = torch.Generator().manual_seed(0)
    rewards, values, after = (torch.randn(7, 3, generator=g) for _ in range(3))
    ended = torch.zeros(7, 3, dtype=torch.bool)
    ended[2, 0] = ended[4, 0] = ended[6, 1] = True
    terminated = ended.clone()
    terminated[4, 0] = False
    advantages, returns = gae(rewards, values, after, terminated, ended, gamma=0.9, lam=0.7)
    for e in range(3):
        for s in range(7):
            total, weight = 0.0, 1.0
            for l in range(s, 7):
                future = 0.0 if terminated[l, e] else 0.9 * after[l, e].item()
                total += weight * (rewards[l, e].item() + future - values[l, e].item())
                weight *= 0.9 * 0.7
                if ended[l, e]:
                    break
            assert advantages[s, e].item() == pytest.approx(total, abs=1e-5)
    torch.testing.assert_close(returns, advantages + values)


def test_what_terminated_has_no_future_and_what_was_cut_off_has_one():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    over, on = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    assert gae(zero, zero, one, over, over)[0].item() == 0
    assert gae(zero, zero, one, on, over)[0].item() == pytest.approx(0.99)


def test_advantages_do_not_flow_into_the_episode_before():
    rewards = torch.tensor([[0.0], [0.0], [0.0], [100.0]])
    ended = torch.tensor([[False], [True], [False], [True]])
    advantages, _ = gae(rewards, torch.zeros(4, 1), torch.zeros(4, 1), ended, ended)
    assert advantages[:2].tolist() == [[0], [0]] and advantages[2].item() == pytest.approx(0.99 * 0.95 * 100)


def test_terminated_and_not_ended_is_refused():
    over, on = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="`ended` must be true wherever `terminated` is"):
        gae(*[torch.zeros(1, 1)] * 3, over, on)


def test_normalised_advantages_have_mean_0_and_deviation_1_over_what_counts():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = torch.arange(50) % 3 > 0
    found = normalised(values, counts)
    assert found.dtype == torch.float32 and found[~counts].tolist() == [0] * 17
    assert found[counts].mean().item() == pytest.approx(0, abs=1e-6)
    assert found[counts].std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0]])
def test_advantages_that_are_all_alike_are_zero(values):
    assert normalised(torch.tensor(values)).tolist() == [0] * len(values)
