"""The diffusion head against its equations, written a second time in numpy."""

import math

import numpy as np
import pytest
import torch

from vla_bench.models.heads.diffusion import (
    DiffusionHead,
    check_range,
    check_steps,
    count_steps,
    inference_steps,
    squared_cosine,
)


def cosine_schedule(count: int) -> np.ndarray:
    """alpha-bar of Nichol & Dhariwal, as in the reference implementation: betas first, then their product."""
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    u = np.arange(count) / count
    return np.cumprod(1 - np.minimum(1 - f(u + 1 / count) / f(u), 0.999))


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_the_schedule_is_the_equation(count):
    np.testing.assert_allclose(squared_cosine(count), cosine_schedule(count), rtol=1e-9)
    assert np.all(np.diff(squared_cosine(count)) < 0)


@pytest.mark.parametrize("name", ["diffusion", "diffusion epsilon"])
def test_the_loss_is_the_equation(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    given = kit.training_noise(head)
    total, count = 0.0, 0
    for i, (noise, k) in enumerate(zip(given["noise"].double().numpy(), given["time"].numpy())):
        b = i % kit.B  # repeats lie behind each other
        is_pad, clean = kit.IS_PAD[b].numpy(), actions[b].double().numpy()
        alpha_bar = cosine_schedule(100)[k]
        noisy = math.sqrt(alpha_bar) * np.where(is_pad[:, None], 0, clean) + math.sqrt(1 - alpha_bar) * noise
        predicted = kit.denoiser(head, noisy[None], np.array([k]), kit.row(features, b))[0]
        squares = (predicted - (noise if head.prediction == "epsilon" else clean)) ** 2
        total, count = total + squares[~is_pad].sum(), count + (~is_pad).sum() * kit.D
    assert kit.loss(head, features, actions) == pytest.approx(total / count, abs=1e-5)


def test_ten_steps_of_ddim_from_a_predicted_chunk(kit):
    head, (features, _) = kit.build("diffusion"), kit.data()
    noise, alpha_bars = kit.sampling_noise(head), cosine_schedule(100)
    x = noise.double().numpy()
    for k in range(99, -1, -10):
        clean = kit.denoiser(head, x, np.full(kit.B, k), features)
        implied = (x - np.sqrt(alpha_bars[k]) * clean) / np.sqrt(1 - alpha_bars[k])
        after = alpha_bars[k - 10] if k >= 10 else 1.0
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * implied
    np.testing.assert_allclose(head.sample(features, noise).detach(), x, atol=1e-5)


def test_ten_steps_of_ddim_from_a_predicted_noise(kit):
    head, (features, _) = kit.build("diffusion epsilon", sampler="ddim"), kit.data()
    noise, alpha_bars = kit.sampling_noise(head), cosine_schedule(100)
    x = noise.double().numpy()
    for k in range(99, -1, -10):
        predicted = kit.denoiser(head, x, np.full(kit.B, k), features)
        clean = np.clip((x - np.sqrt(1 - alpha_bars[k]) * predicted) / np.sqrt(alpha_bars[k]), -1, 1)
        implied = (x - np.sqrt(alpha_bars[k]) * clean) / np.sqrt(1 - alpha_bars[k])
        after = alpha_bars[k - 10] if k >= 10 else 1.0
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * implied
    # the first step divides by 0.0005, so float32 rounding of the noise counts there; clipping ends it
    np.testing.assert_allclose(head.sample(features, noise).detach(), x, atol=1e-5)


@pytest.fixture
def ddpm(kit) -> DiffusionHead:
    return kit.build("diffusion", sampler="ddpm", num_train_timesteps=20, clip_sample=1.0)


def test_ddpm_takes_the_posterior_of_every_step(kit, ddpm):
    (features, _), alpha_bars, noise = kit.data(), cosine_schedule(20), kit.sampling_noise(ddpm)
    x, fresh = noise[:, 0].double().numpy(), noise[:, 1:].double().numpy()
    for k in range(19, -1, -1):
        clean = np.clip(kit.denoiser(ddpm, x, np.full(kit.B, k), features), -1, 1)
        before = alpha_bars[k - 1] if k else 1.0
        alpha = alpha_bars[k] / before
        mean = np.sqrt(before) * (1 - alpha) * clean + np.sqrt(alpha) * (1 - before) * x
        x = mean / (1 - alpha_bars[k])
        if k:
            variance = (1 - alpha) * (1 - before) / (1 - alpha_bars[k])
            x = x + np.sqrt(variance) * fresh[:, 19 - k]
    np.testing.assert_allclose(ddpm.sample(features, noise).detach(), x, atol=1e-5)


def test_ddpm_draws_its_steps_one_after_the_other(kit, ddpm):
    """So that a seed gives the chunk that it gave before noise could be drawn at once."""
    draws = torch.Generator().manual_seed(11)
    every = torch.stack([torch.randn(kit.B, kit.T, kit.D, generator=draws) for _ in range(20)], dim=1)
    assert torch.equal(ddpm.draw_noise(kit.B, torch.Generator().manual_seed(11)), every)


def test_ddpm_refuses_noise_of_too_few_steps(kit, ddpm):
    with pytest.raises(ValueError, match="noise"):
        ddpm.sample(kit.data()[0], kit.sampling_noise(ddpm)[:, 1:])


def test_noise_of_another_size_names_the_repeats(kit):
    features, actions = kit.data()
    with pytest.raises(
        ValueError, match=r"noise is \[2, 4, 3\], expected \[6, 4, 3\]: repeated_diffusion_steps=2"
    ):
        kit.loss(kit.build("diffusion"), features, actions, noise=torch.randn(2, kit.T, kit.D))


def test_a_step_that_was_not_trained_is_refused(kit):
    features, actions = kit.data()
    with pytest.raises(ValueError, match=r"integer steps 0 … 99, got torch.int64 from 0 to 100"):
        kit.loss(kit.build("diffusion"), features, actions, time=torch.tensor([0, 1, 2, 3, 4, 100]))


def test_actions_beyond_the_bound_are_refused(kit):
    features, actions = kit.data()
    with pytest.raises(ValueError, match="clip_sample to at least 3"):
        kit.loss(kit.build("diffusion epsilon"), features, torch.full_like(actions, -3.0))


def test_one_batch_is_learnt(kit):
    torch.manual_seed(0)
    head, (features, actions) = (
        DiffusionHead(kit.SIZES, hidden_size=64, num_layers=2, num_heads=4),
        kit.data(),
    )
    error = lambda: (kit.sampled(head, features, 2) - actions)[~kit.IS_PAD].abs().mean().item()
    start = error()
    kit.fit(head, features, actions, 200, 3e-3, kit.IS_PAD).eval()
    assert error() < 0.05 * start


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_samples_cover_both_modes(kit, prediction):
    head = kit.two_modes(DiffusionHead, 1, 300, prediction=prediction, clip_sample=1.0)
    for head.sampler, head.steps in (("ddim", 10), ("ddim", 20), ("ddpm", 100)):
        found = kit.drawn(head)
        assert 0.55 < (found < 0).float().mean() < 0.8
        assert (found.abs() < 0.4).float().mean() < 0.08


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_steps_are_whole_numbers_from_zero_to_the_last():
    check_steps(torch.tensor([0, 99]), 100)
    for wrong in (
        torch.tensor([-1, 5]),
        torch.tensor([5, 100]),
        torch.tensor([-1, 100]),
        torch.tensor([0.0, 5.0]),
    ):
        with pytest.raises(ValueError, match=f"integer steps 0 … 99, got {wrong.dtype} from"):
            check_steps(wrong, 100)


@pytest.mark.parametrize("bound", [0.5, 1.0, 7.0])
def test_actions_may_reach_the_bound_and_a_thousandth_more(bound):
    for sign in (1, -1):
        check_range(torch.tensor([0.0, sign * (bound + 0.9e-3)]), bound)
        with pytest.raises(ValueError, match=f"held within ±{bound:g}"):
            check_range(torch.tensor([0.0, sign * (bound + 1.1e-3)]), bound)
    check_range(torch.zeros(0, 3), bound)


@pytest.mark.parametrize(
    "sampler, asked, trained, steps",
    [("ddim", None, 100, 10), ("ddim", None, 7, 7), ("ddpm", None, 100, 100), ("ddim", 100, 100, 100),
     ("ddpm", 3, 100, 3), ("ddim", 1, 1, 1)],
)  # fmt: skip
def test_so_many_steps_are_taken(sampler, asked, trained, steps):
    assert count_steps(sampler, asked, trained) == steps


@pytest.mark.parametrize(
    "trained, steps, expected",
    [(100, 10, [99, 89, 79, 69, 59, 49, 39, 29, 19, 9]), (10, 3, [9, 5, 2]), (7, 7, [6, 5, 4, 3, 2, 1, 0]), (5, 1, [4])],
)  # fmt: skip
def test_sampling_begins_with_the_last_step_and_skips_evenly(trained, steps, expected):
    assert inference_steps(trained, steps) == expected


@pytest.mark.parametrize("has", [1, 2])
def test_a_bound_holds_for_the_numbers_that_the_robot_has(kit, has):
    head, (features, actions) = kit.build("diffusion epsilon"), kit.data()
    head.valid_action_dim = has
    far = actions.clone()
    far[..., has:] = 5.0
    assert math.isfinite(kit.loss(head, features, far))
    far[0, 0, has - 1] = 5.0
    with pytest.raises(ValueError, match="clip_sample to at least 5"):
        kit.loss(head, features, far)
    far[0, 0, has - 1] = 0.0
    far[1, 3] = 5.0  # padding
    assert math.isfinite(kit.loss(head, features, far))


@torch.no_grad()
@pytest.mark.parametrize("name", ["diffusion", "diffusion epsilon"])
def test_samples_are_held_within_the_bound_on_both_sides(kit, name):
    features, once = kit.data()[0], {"num_inference_timesteps": 1}
    free = kit.build(name, clip_sample=1e9, **once)
    noise = 5 * kit.sampling_noise(free)
    reach = free.sample(features, noise)
    bound = 0.5 * float(min(reach.max(), -reach.min()))
    assert bound > 0
    held = kit.build(name, clip_sample=bound, **once).sample(features, noise)
    torch.testing.assert_close(held, reach.clamp(-bound, bound))
