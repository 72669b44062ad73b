"""Actions that are decided already: in the training of every flow head, and when a chunk is sampled behind them."""

from dataclasses import replace

import pytest
import torch

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads.action_expert import ActionExpertHead, summed_times
from vla_bench.models.heads.flow import euler_times
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead, LayerwiseFlowMatchingInference
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead
from vla_bench.registry import HEADS

B, L, T, D, S, H, R = 3, 7, 5, 3, 4, 16, 2
BACKBONE = BackboneSizes(H, 2, 64, num_key_value_heads=2, head_dim=6, rope_theta=100.0)
SIZES = HeadSizes(hidden_size=H, action_dim=D, horizon=T, state_dim=S, backbone=BACKBONE)
DIT = {"num_heads": 2, "dropout": 0.0, "repeated_diffusion_steps": R, "num_future_tokens": 2}
EXPERT = {"hidden_size": 8, "intermediate_size": 16, "num_heads": 4, "repeated_diffusion_steps": R}
CASES = {
    "FlowMatching": (FlowMatchingHead, DIT | {"hidden_size": 8, "num_layers": 3}),
    "LayerwiseFlowMatching": (LayerwiseFlowMatchingHead, DIT | {"hidden_size": 8, "output_layer": True}),
    "PI0": (ActionExpertHead, EXPERT),
    "PI05": (ActionExpertHead, EXPERT | {"adaptive_norm": True}),
}
CLEAN = {"FlowMatching": 1.0, "LayerwiseFlowMatching": 1.0, "PI0": 0.0, "PI05": 0.0}
INFERENCE = {
    "FlowMatching": FlowMatchingInferenceHead,
    "LayerwiseFlowMatching": LayerwiseFlowMatchingInference,
}
each = pytest.mark.parametrize("name", CASES)


def build(name: str, cls: type | None = None, **change):
    """A head with weights of ordinary size, the same ones each time."""
    torch.manual_seed(0)
    own, arguments = CASES[name]
    head = (cls or own)(SIZES, **arguments | change)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return head


@pytest.fixture
def features() -> Features:
    torch.manual_seed(1)
    cache = tuple((torch.randn(B, 2, L, 6), torch.randn(B, 2, L, 6)) for _ in range(2))
    layers = tuple(torch.randn(B, L, H) for _ in range(2))
    mask = torch.arange(L) >= torch.tensor([[0], [3], [1]])
    places = torch.tensor([7, 4, 6])
    return Features(
        layers[-1], mask, layers=layers, cache=cache, next_position=places, state=torch.randn(B, S)
    )


ACTIONS, NOISE = torch.randn(2, R * B, T, D, generator=torch.Generator().manual_seed(2)).unbind()
ACTIONS = ACTIONS[:B]
TIME = torch.rand(R * B, generator=torch.Generator().manual_seed(3))
IS_PAD = torch.arange(T) >= torch.tensor([[5], [4], [3]])
DELAYS = torch.tensor([0, 1, 2, 3, 2, 1])
PREFIX = torch.arange(T) < DELAYS[:, None]


def velocity(head, name: str, features: Features, noisy, time):
    """The head's velocity for R draws of B observations."""
    if name.startswith("PI"):
        prefix = head.prefix_cache(features).repeated(R)
        return head.velocity(noisy, time, prefix, head.state_token(features.state.repeat(R, 1), len(noisy)))[
            0
        ]
    return head.velocity(noisy, time, head.encode_context(features))[0]


@each
def test_one_time_for_all_positions_is_one_time(features, name):
    head = build(name, rtc_max_delay=3)
    first = velocity(head, name, features, NOISE, TIME)
    same = velocity(head, name, features, NOISE, TIME[:, None].expand(-1, T))
    # a matrix product of more rows rounds its sums in another order
    assert torch.allclose(first, same, rtol=0, atol=1e-5 * first.abs().max().item())


@each
def test_each_position_has_its_own_time(features, name):
    """Each position reads the others, so a change reaches all of them; that of its own time most of all."""
    head, times = build(name, rtc_max_delay=3), TIME[:, None].repeat(1, T)
    first = velocity(head, name, features, NOISE, times)
    for place in range(T):
        changed = times.clone()
        changed[:, place] = 1 - changed[:, place]
        moved = (velocity(head, name, features, NOISE, changed) - first).abs().mean((0, 2))
        assert moved[place] > 1e-3 and (moved.argmax() == place or place == T - 1)


@each
def test_without_a_delay_nothing_changes(features, name):
    torch.manual_seed(5)
    before = build(name).loss(features, ACTIONS, IS_PAD)["action_loss"]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    after = build(name, rtc_max_delay=0).loss(features, ACTIONS, IS_PAD)["action_loss"]
    assert torch.equal(before, after) and torch.equal(state, torch.get_rng_state())


def delayed(name: str) -> torch.Tensor:  # [R·B, T]
    return torch.where(PREFIX, CLEAN[name], TIME[:, None])


@each
def test_the_loss_is_the_mean_over_what_is_behind_the_prefix(features, name):
    head = build(name, rtc_max_delay=3)
    actions, t = ACTIONS.repeat(R, 1, 1), delayed(name)[..., None]
    ends = (NOISE, actions) if CLEAN[name] else (actions, NOISE)
    noisy = (1 - t) * ends[0] + t * ends[1]
    assert torch.equal(noisy[PREFIX], actions[PREFIX])
    error = ((velocity(head, name, features, noisy, delayed(name)) - (ends[1] - ends[0])) ** 2).detach()
    counts = ~PREFIX & ~IS_PAD.repeat(R, 1)
    expected = sum(float(error[i, j].sum()) for i, j in counts.nonzero()) / (int(counts.sum()) * D)
    found = head.loss(features, ACTIONS, IS_PAD, NOISE, delayed(name))["action_loss"]
    assert found.item() == pytest.approx(expected, rel=1e-5)


@each
def test_the_prefix_teaches_nothing_and_its_noise_is_not_read(features, name):
    head, noise = build(name, rtc_max_delay=3), NOISE.clone().requires_grad_()
    head.loss(features, ACTIONS, IS_PAD, noise, delayed(name))["action_loss"].backward()
    assert not noise.grad[PREFIX].any() and noise.grad[~PREFIX].any(-1).all()
    last = "action_out_proj" if name.startswith("PI") else "action_out"
    seen = []
    decode = head.get_submodule(last)
    decode.register_full_backward_hook(lambda module, given, got: seen.append(got[0]))
    head.loss(features, ACTIONS, IS_PAD, NOISE, delayed(name))["action_loss"].backward()
    assert not seen[0][PREFIX].any() and seen[0][~PREFIX & ~IS_PAD.repeat(R, 1)].any()


@each
def test_delays_are_drawn_from_zero_to_the_largest(features, name, monkeypatch):
    head, seen = build(name, rtc_max_delay=2), []
    original = head.velocity
    monkeypatch.setattr(head, "velocity", lambda x, t, *rest: seen.append(t) or original(x, t, *rest))
    for _ in range(40):
        head.loss(features, ACTIONS, torch.zeros_like(IS_PAD))
    delays = (torch.cat(seen) == CLEAN[name]).sum(1)
    assert torch.equal(delays.unique(), torch.tensor([0, 1, 2])) and delays.bincount().min() > 50


@each
def test_delays_that_are_given_are_those_of_the_loss(features, name):
    """Drawn ahead by the head, the loss is the one of the times with a clean prefix, and draws no delay of its own."""
    head, noise = build(name, rtc_max_delay=3), NOISE
    torch.manual_seed(4)
    delay = head.draw_delays(IS_PAD)
    left = (~IS_PAD.repeat(R, 1)).sum(1)
    assert delay.shape == (R * B,) and (delay < left).all() and delay.unique().numel() > 1
    prefix = torch.arange(T) < delay[:, None]
    time = torch.where(prefix, CLEAN[name], TIME[:, None])
    expected = head.loss(features, ACTIONS, IS_PAD, noise, time)["action_loss"]
    state = torch.get_rng_state()
    found = head.loss(replace(features, delay=delay), ACTIONS, IS_PAD, noise, TIME)["action_loss"]
    assert torch.equal(found, expected) and torch.equal(state, torch.get_rng_state())
    assert build(name).draw_delays(IS_PAD) is None


@each
def test_a_chunk_is_sampled_behind_what_is_decided(features, name):
    head, decided = build(name, rtc_max_delay=3).eval(), ACTIONS[:, :2]
    noise = NOISE[:B]
    with torch.no_grad():
        found = head.sample(features, noise, prefix=decided)
        assert torch.equal(found[:, :2], decided)
        plain = head.sample(features, noise)
        assert torch.equal(head.sample(features, noise, prefix=decided[:, :0]), plain)
        assert not torch.allclose(found[:, 2:], plain[:, 2:], atol=1e-4)
        times = summed_times(head.steps) if name.startswith("PI") else euler_times(head.steps)
        x, context = noise, head.encode_context(features)
        for now, after in zip(times, times[1:]):
            x = torch.cat([decided, x[:, 2:]], dim=1)
            time = torch.tensor([CLEAN[name]] * 2 + [now] * (T - 2)).expand(B, -1)
            x = x + (after - now) * head.velocity(x, time, context)[0]
    assert torch.allclose(found[:, 2:], x[:, 2:], atol=1e-4)


@pytest.mark.parametrize("name", INFERENCE)
def test_the_inference_head_samples_the_same_behind_it(features, name):
    head, other = build(name, rtc_max_delay=3).eval(), build(name, INFERENCE[name], rtc_max_delay=3).eval()
    with torch.no_grad():
        found = [h.sample(features, NOISE[:B], prefix=ACTIONS[:, :3]) for h in (head, other)]
    assert torch.allclose(*found, atol=1e-6)


@each
def test_numbers_that_a_robot_lacks_stay_out(features, name):
    head = build(name, rtc_max_delay=2).eval()
    mask = torch.tensor([[True, True, False]] * B)
    with torch.no_grad():
        found = head.sample(replace(features, action_mask=mask), NOISE[:B], prefix=ACTIONS[:, :1])
    assert found[:, 1:, 2].abs().max() < 1e-5 and found[:, 1:, :2].abs().min() > 0


@each
def test_more_than_the_largest_delay_is_refused(features, name):
    head = build(name, rtc_max_delay=2)
    with pytest.raises(ValueError, match="prefix holds 3 actions, but .* delays up to rtc_max_delay=2"):
        head.sample(features, NOISE[:B], prefix=ACTIONS[:, :3])
    with pytest.raises(ValueError, match="prefix holds 1 actions, but .* rtc_max_delay=0"):
        build(name).sample(features, NOISE[:B], prefix=ACTIONS[:, :1])
    with pytest.raises(ValueError, match=r"prefix is \[3, 2, 2\], expected \[3, 2, 3\]"):
        head.sample(features, NOISE[:B], prefix=ACTIONS[:, :2, :2])
    with pytest.raises(ValueError, match=r"time is \[6, 5\], expected \[6\]"):
        build(name).loss(features, ACTIONS, IS_PAD, NOISE, delayed(name))


@each
@pytest.mark.parametrize("delay", [-1, T, 1.0, True])
def test_a_largest_delay_leaves_something_to_predict(name, delay):
    with pytest.raises(ValueError, match=f"rtc_max_delay={delay} must be a whole number from 0 to {T - 1}"):
        build(name, rtc_max_delay=delay)


def test_every_flow_head_has_it():
    named = {name for name in HEADS.names() if "Flow" in name or "Expert" in name}
    assert named >= {"FlowMatching", "LayerwiseFlowMatching", "ActionExpert"}
    assert all(
        HEADS.get(name)(SIZES, num_heads=2, rtc_max_delay=1).rtc_max_delay == 1
        for name in named
        if "Flow" not in name
    )
