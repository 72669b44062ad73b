"""The diffusion head against its equations, written a second time in numpy."""

import math

import numpy as np
import pytest
import torch

from vla_bench.models.heads.diffusion import DiffusionHead, squared_cosine


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
