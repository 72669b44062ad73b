"""Clipping, divergences and the value loss by hand-computed cases."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from vla_bench.rl.objective import clipped_gain, kl_k3, policy_loss, value_loss

OLD = torch.tensor([-40.0, -3.0, -0.5, -7.0])


def at(*ratios):
    """Log-probabilities with these ratios to OLD, with gradient."""
    return (OLD[: len(ratios)] + torch.tensor(ratios).log()).requires_grad_()


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.28, 1.0, 1.28, None),  # on the edge
        (1.3, 1.0, 1.28, 0.0),
        (0.1, 1.0, 0.1, 0.1),  # a good chunk that became unlikely is pulled back
        (0.7, -1.0, -0.8, 0.0),
        (0.9, -1.0, -0.9, -0.9),
        (2.0, -1.0, -2.0, -2.0),  # a bad chunk that became likely is pushed back
        (3.5, -1.0, -3.0, 0.0),  # but not beyond the dual clip
        (3.5, -0.5, -1.5, 0.0),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_one_chunk_by_hand(ratio, advantage, gain, slope):
    log_prob = at(ratio)
    found = policy_loss(log_prob, OLD[:1], torch.tensor([advantage]))
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-gain, abs=1e-5)
    if slope is not None:  # of the gain in the log-probability
        assert log_prob.grad.item() == pytest.approx(-slope, abs=1e-5)


def test_the_bounds_are_settings():
    ratio, good, bad = torch.tensor([0.5, 1.5, 9.0]), torch.ones(3), -torch.ones(3)
    wide = {"clip_low": 0.4, "clip_high": 0.6, "dual_clip": 5.0}
    assert clipped_gain(ratio, good, **wide).tolist() == pytest.approx([0.5, 1.5, 1.6])
    assert clipped_gain(ratio, bad, **wide).tolist() == pytest.approx([-0.6, -1.5, -5.0])
    assert clipped_gain(ratio, bad, dual_clip=None).tolist() == pytest.approx([-0.8, -1.5, -9.0])


def test_the_mean_is_over_what_counts():
    counts = torch.tensor([True, False, True, False])
    log_prob = at(1.0, 1.2, 0.9, 1.1)
    found = policy_loss(log_prob, OLD, torch.tensor([1.0, 50.0, -1.0, 50.0]), counts)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-(1.0 - 0.9) / 2, abs=1e-5)
    assert log_prob.grad[[1, 3]].tolist() == [0, 0]
    assert found.ratio == pytest.approx((1 + 0.9) / 2, abs=1e-5)


def test_a_batch_in_which_nothing_counts_moves_nothing():
    log_prob = at(1.0, 1.2, 0.9, 1.1)
    found = policy_loss(log_prob, OLD, torch.ones(4), torch.zeros(4, dtype=torch.bool))
    found.loss.backward()
    assert found.loss.item() == 0 and log_prob.grad.abs().sum() == 0


def test_what_is_watched_is_the_share_of_clipped_chunks_and_the_distance():
    found = policy_loss(at(1.0, 1.5, 0.5, 1.1), OLD, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert found.clip_fraction == 0.25
    by_hand = (
        sum(r - 1 - math.log(r) for r in (1.0, 1.5, 0.5, 1.1)) / 4
    )  # KL(old ‖ new), from the old one's actions
    assert found.kl == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("which", ["log_prob", "old_log_prob", "advantages"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_anything_but_float32_is_refused_by_name(which, dtype):
    given = {"log_prob": at(1.0), "old_log_prob": OLD[:1], "advantages": torch.ones(1)}
    given[which] = given[which].to(dtype)
    with pytest.raises(ValueError, match=f"^{which} is {dtype}, expected float32"):
        policy_loss(**given)


def test_at_the_first_update_the_gradient_is_the_policy_gradient():
    """Of a softmax policy it is p (R - E[R]), in closed form; each action once, weighted by its probability."""
    logits = torch.tensor([0.5, -1.0, 0.3, 1.2], requires_grad=True)
    reward, log_p = torch.tensor([1.0, 0.0, 1.0, 0.2]), logits.log_softmax(0)
    p = log_p.detach().exp()
    policy_loss(log_p, log_p.detach(), 4 * p * (reward - 0.4)).loss.backward()  # any baseline
    torch.testing.assert_close(-logits.grad, p * (reward - (p * reward).sum()), atol=1e-6, rtol=0)


def test_k3_is_the_divergence_in_the_mean_over_all_actions():
    first, second = Categorical(torch.tensor([0.2, 0.3, 0.5])), Categorical(torch.tensor([0.4, 0.4, 0.2]))
    log_p, log_q = first.logits, second.logits
    forwards = (first.probs * kl_k3(log_p, log_q)).sum()
    assert forwards.item() == pytest.approx(kl_divergence(first, second).item(), abs=1e-6)
    backwards = (second.probs * kl_k3(log_p, log_q, of="second")).sum()
    assert backwards.item() == pytest.approx(kl_divergence(second, first).item(), abs=1e-6)


def test_k3_is_never_negative_and_zero_for_the_same_policy():
    difference = torch.linspace(-3, 3, 601)
    assert kl_k3(torch.zeros(601), difference).min() >= 0
    assert kl_k3(OLD, OLD).tolist() == [0] * 4
    assert kl_k3(torch.zeros(1), torch.tensor([1e-3])).item() == pytest.approx(5e-7, rel=1e-2)


def test_the_gradient_of_k3_pulls_towards_the_reference():
    log_prob = torch.tensor([-1.0, -1.0], requires_grad=True)
    kl_k3(log_prob, torch.tensor([-2.0, -0.5])).sum().backward()
    assert log_prob.grad[0] > 0 > log_prob.grad[1]
    assert log_prob.grad.tolist() == pytest.approx([1 - math.exp(-1), 1 - math.exp(0.5)], abs=1e-5)


def test_a_divergence_is_of_one_of_the_two():
    with pytest.raises(ValueError, match="of='both' must be 'first' or 'second'"):
        kl_k3(OLD, OLD, of="both")


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, -0.9),  # within the clip
        (0.7, 0.0, 1.0, 0.5 * 0.8**2, 0.0),  # held at 0.2
        (-0.7, 0.0, 1.0, 0.5 * 1.7**2, -1.7),  # it moved the wrong way, and is pulled back
        (1.5, 0.0, 1.0, 0.5 * 0.8**2, 0.0),
        (0.0, 0.0, 20.0, 10 * (20 - 5), -10.0),  # linear beyond 10
    ],
)
def test_the_value_loss_by_hand(value, old, target, loss, slope):
    given = torch.tensor([value], requires_grad=True)
    found = value_loss(given, torch.tensor([old]), torch.tensor([target]))
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert given.grad.item() == pytest.approx(slope, abs=1e-5)


def test_the_value_loss_without_its_clip_is_hubers():
    value, target = torch.tensor([0.9, 15.0]), torch.zeros(2)
    found = value_loss(value, torch.zeros(2), target, clip=None, delta=3.0)
    assert found.item() == pytest.approx((0.5 * 0.81 + 3 * (15 - 1.5)) / 2, rel=1e-5)
    only = value_loss(value, torch.zeros(2), target, torch.tensor([True, False]), clip=None)
    assert only.item() == pytest.approx(0.5 * 0.81, rel=1e-5)
