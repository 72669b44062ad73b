"""A Gaussian around a regressed chunk, against torch.distributions, integrals and gradients in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vla_bench.models.features import Features
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.models.heads.transformer import TransformerHead
from vla_bench.rl.gaussian import bounded_std, gaussian_entropy, gaussian_log_prob, raw_of_std
from vla_bench.rl.stochastic import stochastic

MEAN = 0.3


def constant(action_dim: int, **settings):
    """A policy whose head always answers 0.3, and features of any number of samples."""
    head = MLPHead(HeadSizes(hidden_size=1, action_dim=action_dim, horizon=1), num_layers=1)
    nn.init.zeros_(head.layers[0].weight)
    nn.init.constant_(head.layers[0].bias, MEAN)
    policy = stochastic(head, **settings)
    seen = lambda n: Features(torch.zeros(n, 1, 1), torch.ones(n, 1, dtype=torch.bool), num_extra=1)
    return policy, seen


def chain(chunk: torch.Tensor) -> dict[str, torch.Tensor]:  # [B, 1, D]
    batch, _, dims = chunk.shape
    executed, real = torch.ones(batch, dtype=torch.long), torch.ones(batch, dims, dtype=torch.bool)
    return {"chunk": chunk, "executed": executed, "real": real}


@pytest.mark.parametrize("std", [0.03, 0.1, 0.4])
def test_the_density_of_one_number_integrates_to_one(std):
    policy, seen = constant(1, std=std)
    a = torch.linspace(MEAN - 8 * std, MEAN + 8 * std, 2001)
    density = policy.evaluate(seen(len(a)), chain(a[:, None, None])).log_prob.exp()
    assert torch.trapezoid(density, a).item() == pytest.approx(1, abs=1e-4)


def test_the_density_of_two_numbers_integrates_to_one():
    policy, seen = constant(2, std=0.1)
    with torch.no_grad():
        policy.raw_std[1] = raw_of_std(0.25, 0.02, 0.5)
    a, b = torch.linspace(-0.5, 1.1, 161), torch.linspace(-1.6, 2.2, 181)
    grid = torch.stack(torch.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 1, 2)
    density = policy.evaluate(seen(len(grid)), chain(grid)).log_prob.exp().reshape(161, 181)
    assert torch.trapezoid(torch.trapezoid(density, b, dim=1), a).item() == pytest.approx(1, abs=1e-3)


def test_log_density_and_entropy_are_those_of_torch():
    g = torch.Generator().manual_seed(0)
    x, mean, std = (
        torch.randn(50, generator=g),
        torch.randn(50, generator=g),
        torch.rand(50, generator=g) + 0.02,
    )
    theirs = torch.distributions.Normal(mean.double(), std.double())
    torch.testing.assert_close(
        gaussian_log_prob(x, mean, std).double(), theirs.log_prob(x.double()), atol=1e-3, rtol=1e-5
    )
    torch.testing.assert_close(gaussian_entropy(std).double(), theirs.entropy(), atol=1e-6, rtol=0)


def test_the_standard_deviation_stays_within_its_bounds():
    raw = torch.linspace(-30, 30, 1001)
    std = bounded_std(raw, 0.02, 0.5)
    assert 0.02 - 1e-6 <= std.min() and std.max() <= 0.5 + 1e-6
    assert (std.diff() >= 0).all()


def test_the_learned_noise_of_pi_rl_is_the_same_formula():
    """exp of half of lo + (hi - lo)(tanh + 1)/2, where lo and hi are logarithms of variances."""
    raw, lo, hi = torch.linspace(-2, 2, 9), math.log(0.08**2), math.log(0.16**2)
    theirs = (0.5 * (lo + (hi - lo) * (raw.tanh() + 1) / 2)).exp()
    torch.testing.assert_close(bounded_std(raw, 0.08, 0.16), theirs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("std", [0.02, 0.5, 0.0, 0.7])
def test_a_start_on_or_beyond_a_bound_is_refused(std):
    with pytest.raises(ValueError, match=f"std={std} must lie between min_std=0.02 and max_std=0.5"):
        constant(1, std=std)


def test_samples_have_the_mean_of_the_head_and_the_learned_deviation():
    policy, seen = constant(1, std=0.2)
    drawn = policy.sample(seen(40_000), executed=1, generator=torch.Generator().manual_seed(0)).actions
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.003)
    assert drawn.std().item() == pytest.approx(0.2, rel=0.01)


def test_the_policy_gradient_is_the_analytic_one():
    """R = -(a - g)²: E[R] = -(μ - g)² - σ², by quadrature with Gauss-Hermite nodes, which is exact for polynomials."""
    policy, seen = constant(1, std=0.2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    a = torch.tensor(MEAN + 0.2 * nodes, dtype=torch.float32)
    weights = torch.tensor(weights / weights.sum(), dtype=torch.float32)
    goal, log_prob = 0.8, policy.evaluate(seen(8), chain(a[:, None, None])).log_prob
    (weights * -((a - goal) ** 2) * log_prob).sum().backward()
    assert policy.head.layers[0].bias.grad.item() == pytest.approx(-2 * (MEAN - goal), abs=1e-4)
    raw = policy.raw_std.detach().clone().requires_grad_()
    (-(bounded_std(raw, 0.02, 0.5) ** 2)).sum().backward()
    assert policy.raw_std.grad.item() == pytest.approx(raw.grad.item(), abs=1e-5)


def test_a_deviation_that_is_not_learned_stays():
    policy, seen = constant(1, std=0.2, learn_std=False)
    policy.evaluate(seen(2), chain(torch.zeros(2, 1, 1))).log_prob.sum().backward()
    assert policy.raw_std.grad is None and policy.head.layers[0].bias.grad is not None


@pytest.mark.parametrize("kind", [MLPHead, TransformerHead])
def test_a_model_in_half_precision_has_a_likelihood_in_float32(kind):
    torch.manual_seed(0)
    policy = stochastic(kind(HeadSizes(hidden_size=8, action_dim=2, horizon=3)).bfloat16())
    seen = Features(torch.randn(2, 5, 8).bfloat16(), torch.ones(2, 5, dtype=torch.bool), num_extra=3)
    drawn = policy.sample(seen, executed=3, generator=torch.Generator().manual_seed(0))
    found = policy.evaluate(seen, drawn.chain)
    assert {drawn.actions.dtype, drawn.log_prob.dtype, found.log_prob.dtype, found.entropy.dtype} == {
        torch.float32
    }
    assert torch.equal(found.log_prob, drawn.log_prob)
    each = torch.distributions.Normal(policy.head.sample(seen).double(), policy.std.double()).log_prob(
        drawn.actions.double()
    )
    torch.testing.assert_close(drawn.log_prob.double(), each.sum((1, 2)), atol=1e-4, rtol=0)
