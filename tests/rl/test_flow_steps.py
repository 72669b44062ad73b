"""Gaussian denoising steps: their formulas as published, and their marginals where the velocity is known exactly."""

import math

import numpy as np
import pytest
import torch

from vla_bench.models.heads.action_expert import summed_times
from vla_bench.models.heads.flow import euler, euler_times
from vla_bench.rl.flow_steps import (
    STEP_SIZES,
    cps_sizes,
    noise_estimate,
    noise_levels,
    sde_sizes,
    step_mean,
    walk,
)

A = 0.5
# mean squared deviations of N(2, 0.5²) at the end, from the recursion of moments in float64
MEASURED = {
    "ode": {4: 0.341, 5: 0.369, 10: 0.431, 100: 0.493},
    "flow_sde": {4: 0.413, 5: 0.428, 10: 0.463, 100: 0.499},
}
MEASURED |= {"flow_cps": {4: 0.325, 5: 0.349, 10: 0.400, 100: 0.453}}
UP, DOWN = lambda steps: euler_times(steps), summed_times  # GR00T's time and π0's


def exact(times):
    """The velocity of the world N(2, 0.5²) in the time of a head."""
    upwards = times[-1] > times[0]

    def velocity(x, t):
        level = 1 - t if upwards else t
        slope = (level - (1 - level) * 0.25) / ((1 - level) ** 2 * 0.25 + level**2)
        u = -2 + slope * (x - 2 * (1 - level))
        return (-u if upwards else u), None

    return velocity


def sizes_of(method, times):
    return (
        STEP_SIZES[method](noise_levels(times), A)
        if method in STEP_SIZES
        else [(0.0, 0.0)] * (len(times) - 1)
    )


def chains(method, times, count, seed=0):
    """The ends of `count` walks with noise in every step, in slices that need little memory."""
    g, steps, ends = torch.Generator().manual_seed(seed), len(times) - 1, []
    for _ in range(10):
        x = torch.randn(count // 10, 1, 1, generator=g)
        fresh = torch.randn(count // 10, steps, 1, 1, generator=g)
        every = torch.arange(steps).expand(count // 10, -1)
        everywhere = torch.ones_like(x, dtype=torch.bool)
        ends.append(
            walk(exact(times), x, times, sizes_of(method, times), every, fresh, everywhere)[:, -1, 0, 0]
        )
    return torch.cat(ends)


def moments(method, steps, only=None):
    """Mean and deviation at the end by the recursion of moments, written without the code under test."""
    mean, variance = 0.0, 1.0
    for k in range(steps):
        t, d = 1 - k / steps, 1 / steps
        slope = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t * t)
        offset = -2 - slope * 2 * (1 - t)  # u = slope x + offset
        w0, w1, std = 1 - (t - d), t - d, 0.0
        if method == "flow_sde" and only in (None, k):
            s = A * math.sqrt(t / (1 - ((1 - 1 / steps) if k == 0 else t)))
            w1, std = t - d - s * s * d / (2 * t), math.sqrt(d) * s
        if method == "flow_cps" and only in (None, k):
            w1, std = (t - d) * math.cos(math.pi * A / 2), (t - d) * math.sin(math.pi * A / 2)
        # x0 = x - t u and x1 = x + (1 - t) u, both linear in x
        factor = w0 * (1 - t * slope) + w1 * (1 + (1 - t) * slope)
        mean = factor * mean + (-w0 * t + w1 * (1 - t)) * offset
        variance = factor**2 * variance + std**2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("times", [UP(4), DOWN(4)], ids=["noise at 0", "noise at 1"])
@pytest.mark.parametrize("method", ["flow_sde", "flow_cps"])
def test_a_step_is_the_published_mixture_of_the_two_estimates(method, times):
    """w0 x0 + w1 x1 with the weights of π-RL, in double precision."""
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, generator=g).double(), torch.randn(2, 3, generator=g).double()
    levels, rate = noise_levels(times), (len(times) - 1) / (times[-1] - times[0])
    u = -v if rate > 0 else v
    for k, (taken, std) in enumerate(sizes_of(method, times)):
        t, d = 1 - k / 4, 1 / 4
        x0, x1 = x - t * u, x + (1 - t) * u
        if method == "flow_sde":
            s = A * math.sqrt(t / (1 - (0.75 if k == 0 else t)))
            w1, expected = t - d - s * s * d / (2 * t), math.sqrt(d) * s
        else:
            w1, expected = (t - d) * math.cos(math.pi * A / 2), (t - d) * math.sin(math.pi * A / 2)
        torch.testing.assert_close(
            step_mean(x, v, rate, levels[k], taken), (1 - (t - d)) * x0 + w1 * x1, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(noise_estimate(x, v, levels[k], rate), x1, atol=1e-6, rtol=0)
        assert std == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("times", [UP, DOWN], ids=["noise at 0", "noise at 1"])
@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("steps", [4, 5, 10])
def test_few_steps_shrink_the_spread_as_it_was_measured(method, steps, times):
    ends = chains(method, times(steps), 40_000)
    assert ends.mean().item() == pytest.approx(2, abs=0.01)
    assert ends.std().item() == pytest.approx(MEASURED[method][steps], rel=0.012)
    assert moments(method, steps) == pytest.approx((2, MEASURED[method][steps]), abs=6e-4)


@pytest.mark.parametrize("method", ["ode", "flow_sde"])
def test_a_hundred_steps_give_the_deviation_of_the_recursion(method):
    ends, (mean, std) = chains(method, UP(100), 20_000), moments(method, 100)
    assert mean == pytest.approx(2) and std == pytest.approx(MEASURED[method][100], abs=6e-4)
    assert ends.mean().item() == pytest.approx(2, abs=0.012)
    assert ends.std().item() == pytest.approx(std, rel=0.015)


def test_the_sde_is_within_one_percent_of_the_data_at_a_hundred_steps_and_the_ode_at_two_hundred():
    assert moments("flow_sde", 100)[1] == pytest.approx(0.5, rel=0.01)
    assert moments("ode", 200)[1] == pytest.approx(0.5, rel=0.01)
    assert moments("ode", 100)[1] == pytest.approx(0.5, rel=0.015)


def test_one_random_step_is_a_mixture_of_one_step_each():
    g, count = torch.Generator().manual_seed(0), 40_000
    x, fresh = torch.randn(count, 1, 1, generator=g), torch.randn(count, 1, 1, 1, generator=g)
    step, times = torch.randint(4, (count, 1), generator=g), UP(4)
    path = walk(
        exact(times), x, times, sizes_of("flow_sde", times), step, fresh, torch.ones_like(x, dtype=torch.bool)
    )
    for k in range(4):
        own = path[step[:, 0] == k, -1, 0, 0]
        assert own.std().item() == pytest.approx(moments("flow_sde", 4, only=k)[1], rel=0.02)
        assert 0.35 <= moments("flow_sde", 4, only=k)[1] <= 0.385


def test_the_first_step_takes_the_next_grid_point_in_its_denominator():
    sizes = sde_sizes([1.0, 0.75, 0.5, 0.25, 0.0], A)
    assert sizes[0][1] == pytest.approx(math.sqrt(0.25) * A * math.sqrt(1 / 0.25))
    assert sizes[1][1] == pytest.approx(math.sqrt(0.25) * A * math.sqrt(0.75 / 0.25))
    assert all(np.isfinite(sizes).ravel())


def test_flow_cps_keeps_the_power_of_the_noise():
    """cos² + sin²: what is left of the old noise and the fresh one weigh as much as the ODE's."""
    for (taken, std), below in zip(cps_sizes([1.0, 0.6, 0.3, 0.0], 0.7), (0.6, 0.3, 0.0)):
        assert (below - taken) ** 2 + std**2 == pytest.approx(below**2)


def test_without_noise_the_walk_is_eulers_bit_for_bit():
    times, x = UP(5), torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    fresh, step = torch.randn(3, 1, 2, 2), torch.tensor([[0], [2], [4]])
    path = walk(
        exact(times),
        x,
        times,
        sizes_of("flow_sde", times),
        step,
        fresh,
        torch.zeros_like(x, dtype=torch.bool),
    )
    assert torch.equal(path[:, -1], euler(lambda x, t: exact(times)(x, t)[0], x, times))
    assert path.shape == (3, 6, 2, 2)


def test_noise_enters_the_chosen_step_alone():
    times, x = UP(4), torch.zeros(2, 1, 1)
    fresh, step = torch.ones(2, 1, 1, 1), torch.tensor([[1], [3]])
    still = lambda x, t: (torch.zeros_like(x), None)
    path = walk(still, x, times, [(0.0, 0.1), (0.0, 0.2), (0.0, 0.3), (0.0, 0.4)], step, fresh, x == 0)
    torch.testing.assert_close(path[..., 0, 0], torch.tensor([[0, 0, 0.2, 0.2, 0.2], [0, 0, 0, 0, 0.4]]))
