"""π0's and π0.5's head on its own. Parity with the whole model's figure is in frameworks/test_pi0.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads import action_expert
from vla_bench.models.heads.action_expert import ActionExpertHead, summed_times, time_embedding
from vla_bench.models.heads.flow import euler_times, sample_time_pi0
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.layers.expert import ExpertLayer

B, L, T, D, S, DEPTH = 2, 7, 5, 3, 4, 2
BACKBONE = BackboneSizes(16, DEPTH, 64, num_key_value_heads=2, head_dim=6, rope_theta=100.0)
SIZES = HeadSizes(hidden_size=16, action_dim=D, horizon=T, state_dim=S, backbone=BACKBONE)
SMALL = {"hidden_size": 8, "intermediate_size": 16, "num_heads": 4}
MASK = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
IS_PAD = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
both = pytest.mark.parametrize("adaptive", [False, True], ids=["pi0", "pi05"])


def build(adaptive: bool, sizes: HeadSizes = SIZES, **own) -> ActionExpertHead:
    """A head whose gates are open."""
    torch.manual_seed(0)
    head = ActionExpertHead(sizes, **SMALL | own, adaptive_norm=adaptive)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


@pytest.fixture
def features() -> Features:
    torch.manual_seed(1)
    cache = tuple((torch.randn(B, 2, L, 6), torch.randn(B, 2, L, 6)) for _ in range(DEPTH))
    hidden, state = torch.randn(B, L, 16), torch.randn(B, S)
    return Features(hidden, MASK, cache=cache, next_position=torch.tensor([7, 4]), state=state)


@pytest.fixture
def actions() -> torch.Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))


NOISE = torch.randn(B, T, D, generator=torch.Generator().manual_seed(3))
TIME = torch.tensor([0.25, 0.8])


def test_the_time_embedding_is_openpis():
    times = torch.tensor([0.001, 0.3, 0.5, 1.0])
    periods = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, 16)
    angle = 2 * math.pi * times.double().numpy()[:, None] / periods
    np.testing.assert_allclose(
        time_embedding(times, 32), np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=1e-7
    )


@both
def test_the_loss_is_its_equation(features, actions, adaptive):
    head = build(adaptive)
    noisy = torch.stack([t * n + (1 - t) * a for t, n, a in zip(TIME, NOISE, actions)])
    token = head.state_token(features.state, B)
    predicted, _ = head.velocity(noisy, TIME, head.prefix_cache(features), token)
    expected = ((predicted - (NOISE - actions)) ** 2)[~IS_PAD].mean()
    loss = head.loss(features, actions, IS_PAD, NOISE, TIME)["action_loss"]
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@both
def test_repeats_are_draws_on_one_observation(features, actions, adaptive):
    head, twice = build(adaptive), build(adaptive, repeated_diffusion_steps=2)
    noise, time = torch.cat([NOISE, NOISE.flip(0)]), torch.cat([TIME, TIME.flip(0)])
    parts = [
        head.loss(features, actions, IS_PAD, noise[i : i + B], time[i : i + B])["action_loss"].item()
        for i in (0, B)
    ]
    found = twice.loss(features, actions, IS_PAD, noise, time)["action_loss"].item()
    assert found == pytest.approx(np.mean(parts), abs=1e-5)


@both
def test_the_sampler_follows_the_velocity_from_one_to_zero(features, adaptive):
    head, x = build(adaptive), NOISE
    prefix, token = head.prefix_cache(features), head.state_token(features.state, B)
    with torch.no_grad():
        time, dt = torch.tensor(1.0), torch.tensor(-0.1)
        while time >= -dt / 2:  # openpi's loop
            x = x + dt * head.velocity(x, time.expand(B), prefix, token)[0]
            time = time + dt
        torch.testing.assert_close(head.sample(features, NOISE), x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 10, 50, 999])
def test_the_times_are_added_up_in_float32_as_openpi_does(steps):
    time, dt, expected = torch.tensor(1.0), torch.tensor(-1.0 / steps), []
    while time >= -dt / 2:
        expected.append(time.item())
        time = time + dt
    assert summed_times(steps) == [*expected, 0.0]


@torch.no_grad()
def test_times_that_are_computed_would_be_noticed(features, monkeypatch):
    head = build(False)
    found = head.sample(features, NOISE)
    monkeypatch.setattr(action_expert, "summed_times", lambda steps: euler_times(steps, 1.0, 0.0))
    assert (head.sample(features, NOISE) - found).abs().max() > 5e-6


@both
def test_the_state_is_run_once_and_the_actions_in_every_step(features, adaptive):
    head, lengths = build(adaptive), []
    for layer in head.layers:
        assert isinstance(layer, ExpertLayer)
        layer.register_forward_hook(lambda module, given, _: lengths.append(given[0].shape[1]))
    head.sample(features, NOISE)
    assert lengths == [1] * DEPTH * (not adaptive) + [T] * DEPTH * 10


@both
def test_masked_keys_and_values_are_not_read(features, adaptive):
    head = build(adaptive)
    loud = tuple(
        tuple(kv.masked_fill(~MASK[:, None, :, None], 50.0) for kv in layer) for layer in features.cache
    )
    found = head.sample(replace(features, cache=loud), NOISE)
    torch.testing.assert_close(found, head.sample(features, NOISE), atol=1e-5, rtol=0)


@both
def test_padded_actions_do_not_count(features, actions, adaptive):
    """At t = 1 the noisy chunk holds nothing of the actions."""
    head, ones = build(adaptive), torch.ones(B)
    beyond = torch.where(IS_PAD[..., None], 50.0, actions)
    losses = [head.loss(features, a, IS_PAD, NOISE, ones)["action_loss"].item() for a in (actions, beyond)]
    assert losses[0] == losses[1]


@both
def test_gradients_reach_every_parameter(features, actions, adaptive):
    head = build(adaptive)
    head.loss(features, actions, IS_PAD)["action_loss"].backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@both
def test_attention_is_over_valid_tokens_and_sums_to_one(features, adaptive):
    head = build(adaptive)
    with torch.no_grad():
        looks = head.attention(features, NOISE)
    assert head.offers_attention and looks.shape == (B, L)
    torch.testing.assert_close(looks.sum(1), torch.ones(B), atol=1e-5, rtol=0)
    assert not looks[~MASK].any() and (looks[MASK] > 0).all()


@both
def test_arguments_stay_as_they_were(features, actions, adaptive):
    head, arguments = build(adaptive), (NOISE, TIME, actions, features.state, *features.cache[0])
    kept = [x.clone() for x in arguments]
    head.sample(features, NOISE)
    head.loss(features, actions, IS_PAD, NOISE, TIME)
    assert all(torch.equal(a, b) for a, b in zip(kept, arguments))


def test_only_pi0_reads_the_state(features):
    other = replace(features, state=features.state + 1)
    pi0, pi05 = build(False), build(True)
    assert not torch.allclose(pi0.sample(other, NOISE), pi0.sample(features, NOISE))
    assert torch.equal(pi05.sample(replace(features, state=None), NOISE), pi05.sample(features, NOISE))


def test_the_norm_is_declared_per_head():
    assert not ActionExpertHead.adaptive_norm
    assert build(True).adaptive_norm and not build(False).adaptive_norm


@pytest.mark.parametrize(
    "adaptive, names",
    [
        (False, ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]),
        (True, ["time_mlp_in", "time_mlp_out"]),
    ],
    ids=["pi0", "pi05"],
)
def test_layers_keep_openpis_names_in_their_order(adaptive, names):
    """An optimizer's state is stored by index."""
    found = [name for name, _ in build(adaptive).named_children()]
    assert found == ["layers", "norm", "action_in_proj", "action_out_proj", *names]


@pytest.mark.parametrize("backbone", [None, BackboneSizes(16, 2, 64)], ids=["none", "no plain cache"])
def test_a_backbone_without_a_cache_is_refused_with_a_choice(backbone):
    with pytest.raises(ValueError, match="choose one that has"):
        build(False, replace(SIZES, backbone=backbone))


def test_features_without_a_cache_are_refused_with_a_choice(features):
    with pytest.raises(ValueError, match="features.cache is None.*PaliGemma"):
        build(False).sample(replace(features, cache=None))


def test_a_cache_of_another_backbone_is_named(features):
    short = replace(features, cache=features.cache[:1])
    with pytest.raises(ValueError, match=r"\(1, 2, 6\), the expert was built for \(2, 2, 6\)"):
        build(False).sample(short)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"num_heads": 3}, "a multiple of the backbone's 2 key-value heads"),
        ({"hidden_size": 7}, "hidden_size=7 must be even"),
        ({"num_inference_timesteps": 0}, "num_inference_timesteps=0 must be at least 1"),
        ({"repeated_diffusion_steps": 0}, "repeated_diffusion_steps=0 must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_named(own, message):
    with pytest.raises(ValueError, match=message):
        build(False, **own)


def test_wrong_noise_time_and_state_are_named(features, actions):
    head = build(False)
    with pytest.raises(ValueError, match=r"noise is \[1, 5, 3\], expected \[2, 5, 3\]"):
        head.sample(features, NOISE[:1])
    with pytest.raises(ValueError, match=r"time is \[1\], expected \[2\]"):
        head.loss(features, actions, IS_PAD, NOISE, TIME[:1])
    with pytest.raises(ValueError, match="a state of 4 numbers per sample, got none"):
        head.sample(replace(features, state=None))


def test_training_times_are_beta_and_run_towards_noise():
    torch.manual_seed(3)
    times = sample_time_pi0(50000)
    assert times.dtype == torch.float32 and 0.001 <= times.min() and times.max() <= 1.0
    assert stats.kstest((times.double() - 0.001) / 0.999, stats.beta(1.5, 1).cdf).pvalue > 1e-3
    assert stats.kstest(times.double(), stats.beta(1.0, 1.5).cdf).pvalue < 1e-12, "the other way round"
