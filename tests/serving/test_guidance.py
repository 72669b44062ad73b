"""Guidance against the published Kinetix equations, written out here with finite differences in the VJP's place."""

import numpy as np
import pytest
import torch

from vla_bench.models.heads.flow import euler, euler_times
from vla_bench.serving.guidance import guidance_gain, guided, ramped
from vla_bench.serving.real_time import prefix_weights

T, D, STEPS, BETA = 6, 2, 5, 5.0
rng = np.random.default_rng(0)
MIX, NOISE, OLD = rng.normal(size=(T * D, T * D)) / 3, rng.normal(size=(T, D)), rng.normal(size=(T, D))
WEIGHTS = prefix_weights(T, 2, 2)


def field(x, time):  # numpy, [T, D]
    return (np.tanh(MIX @ x.ravel()) - time * x.ravel()).reshape(T, D)


def velocity(x, time):  # the same, torch, [1, T, D]
    return (torch.tanh(x.reshape(1, -1) @ torch.from_numpy(MIX).T) - time * x.reshape(1, -1)).reshape(1, T, D)


def kinetix():
    x, step = NOISE.copy(), 1e-6
    for k in range(STEPS):
        t = k / STEPS
        end = lambda z, t=t: z + (1 - t) * field(z, t)
        columns = []
        for unit in np.eye(T * D).reshape(-1, T, D):
            columns.append(((end(x + step * unit) - end(x - step * unit)) / (2 * step)).ravel())
        jacobian = np.stack(columns, axis=1)
        error = (OLD - end(x)) * WEIGHTS[:, None]
        pull = (jacobian.T @ error.ravel()).reshape(T, D)
        r2 = (t**2 + (1 - t) ** 2) / (1 - t) ** 2
        gain = BETA if t == 0 else min((1 - t) / t * r2, BETA)
        x = x + (field(x, t) + gain * pull) / STEPS
    return x


@pytest.mark.parametrize("down", [False, True])
def test_a_guided_chunk_is_that_of_the_published_equations(down):
    times = euler_times(STEPS, 1.0, 0.0) if down else euler_times(STEPS)
    flow = (lambda x, t: -velocity(x, 1 - t)) if down else velocity
    old, weights, noise = (torch.from_numpy(each) for each in (OLD[None], WEIGHTS, NOISE[None]))
    with torch.no_grad():
        found = euler(guided(flow, old, weights, times, BETA), noise, times)
    np.testing.assert_allclose(found[0].numpy(), kinetix(), atol=1e-7)


def test_the_gain_by_hand():
    assert [guidance_gain(t, 5.0) for t in (0.0, 0.2, 0.5)] == [5.0, pytest.approx(4.25), pytest.approx(2.0)]
    assert guidance_gain(0.8, 5.0) == pytest.approx(0.25 * 0.68 / 0.04)


def test_a_row_is_led_by_its_own_old_chunk_alone():
    old, noise = torch.from_numpy(np.stack([OLD, -OLD])), torch.from_numpy(np.stack([NOISE, NOISE]))
    flow = lambda x, t: torch.cat([velocity(row[None], t) for row in x])
    times, weights = euler_times(STEPS), torch.from_numpy(WEIGHTS)
    both = euler(guided(flow, old, weights, times), noise, times)
    for row in range(2):
        one = euler(guided(flow, old[row : row + 1], weights, times), noise[row : row + 1], times)
        torch.testing.assert_close(both[row : row + 1], one)


def test_the_ramp_keeps_what_is_frozen():
    times, noise, old = euler_times(STEPS), torch.from_numpy(NOISE[None]), torch.from_numpy(OLD[None])
    found = euler(ramped(velocity, noise, old, torch.from_numpy(WEIGHTS), times), noise, times)
    np.testing.assert_allclose(found[0, :2].numpy(), OLD[:2], atol=1e-12)
