"""Flow heads that explore: densities, marginals in a world with exact velocities, gradients, and the chain."""

import numpy as np
import pytest
import torch
from torch import nn

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads.flow import euler, euler_times, hold_absent
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.heads.head import ActionHead, HeadSizes, gaussian_noise
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead
from vla_bench.rl.flow import NoiseNetwork, StochasticDiTFlow
from vla_bench.rl.flow_steps import STEP_SIZES, noise_levels
from vla_bench.rl.stochastic import stochastic

B, T, D, K = 3, 4, 2, 4
METHODS = ("flow_sde", "flow_cps", "flow_noise")


class KnownVelocity(ActionHead):
    """A head with the exact velocity of the world N(2, 0.5²), moved by a bias that is learned."""

    def __init__(self, steps: int = K, action_dim: int = 1):
        super().__init__(HeadSizes(hidden_size=1, action_dim=action_dim, horizon=1))
        self.steps, self.action_out, self.bias = steps, nn.Linear(1, 1), nn.Parameter(torch.zeros(()))

    def encode_context(self, features):
        return features

    def draw_noise(self, batch, generator=None, device="cpu"):
        return gaussian_noise((batch, 1, self.action_dim), generator, device)

    def velocity(self, x, time, encoded):
        t = time[:, None, None]
        slope = ((1 - t) - t * 0.25) / (t**2 * 0.25 + (1 - t) ** 2)
        return 2 - slope * (x - 2 * t) + self.bias + 0 * self.action_out(
            x[..., :1]
        ), []  # the noise reads its input


class OfKnownVelocity(StochasticDiTFlow):
    """Its form that explores; not registered."""


def seen(batch: int) -> Features:
    return Features(torch.zeros(batch, 1, 1), torch.ones(batch, 1, dtype=torch.bool))


def small(kind=FlowMatchingHead, steps=K, **more):
    torch.manual_seed(0)
    backbone = BackboneSizes(hidden_size=12, num_layers=2, vocab_size=10)
    sizes = HeadSizes(hidden_size=12, action_dim=D, horizon=T, state_dim=2, backbone=backbone, **more)
    own = {"num_heads": 2, "num_future_tokens": 2, "mlp_size": 8, "num_inference_timesteps": steps}
    own |= {"hidden_size": 16, "num_layers": 2} if kind is FlowMatchingHead else {}
    head = kind(sizes, **own)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return head


def features(mask=None, **more) -> Features:
    g = torch.Generator().manual_seed(1)
    layers = tuple(torch.randn(B, 5, 12, generator=g) for _ in range(2))
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 5])
    state = torch.randn(B, 2, generator=g)
    return Features(layers[-1], valid, layers=layers, state=state, action_mask=mask, **more)


def drawn_from(policy, read, executed=3, seed=0):
    return policy.sample(read, executed=executed, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("gaussian_steps", ["one", "all"])
def test_the_marginals_of_the_policy_are_those_that_were_measured(steps, gaussian_steps):
    policy = OfKnownVelocity(KnownVelocity(steps), gaussian_steps=gaussian_steps)
    ends = drawn_from(policy, seen(40_000), executed=1).actions.flatten()
    expected = {("one", 4): 0.368, ("one", 10): 0.436, ("all", 4): 0.413, ("all", 10): 0.463}
    assert ends.mean().item() == pytest.approx(2, abs=0.01)
    assert ends.std().item() == pytest.approx(expected[gaussian_steps, steps], rel=0.012)


@pytest.mark.parametrize("method", METHODS)
def test_the_density_of_a_step_integrates_to_one(method):
    policy = OfKnownVelocity(KnownVelocity(), method=method, gaussian_steps="one")
    before = drawn_from(policy, seen(1), executed=1).chain
    grid = torch.linspace(-4, 6, 4001)
    chain = {name: value.expand(len(grid), *value.shape[1:]) for name, value in before.items()}
    density = policy.evaluate(seen(len(grid)), chain | {"after": grid[:, None, None, None]}).log_prob.exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)


def test_the_density_of_a_step_of_two_numbers_integrates_to_one():
    policy = OfKnownVelocity(KnownVelocity(action_dim=2))
    before = drawn_from(policy, seen(1), executed=1).chain
    axis = torch.linspace(-3, 5, 201)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 1, 2)
    chain = {name: value.expand(len(grid), *value.shape[1:]) for name, value in before.items()}
    density = policy.evaluate(seen(len(grid)), chain | {"after": grid}).log_prob.exp().reshape(201, 201)
    assert torch.trapezoid(torch.trapezoid(density, axis, dim=1), axis).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", [FlowMatchingHead, LayerwiseFlowMatchingHead])
@pytest.mark.parametrize("method", METHODS)
def test_the_likelihood_is_that_of_torch_from_the_heads_own_velocity(kind, method):
    policy, read = stochastic(small(kind), method=method), features()
    drawn, head, total = drawn_from(policy, read), policy.head.eval(), 0
    for n in range(drawn.chain["step"].shape[1]):
        k, x, after = (drawn.chain[name][:, n] for name in ("step", "before", "after"))
        v = head.velocity(x, k / K, head.encode_context(read))[0]
        if method == "flow_noise":
            taken, std = torch.zeros(B), torch.full((B,), 0.08 * 2**0.5)
        else:
            taken, std = torch.tensor(STEP_SIZES[method](noise_levels(euler_times(K)), 0.5))[k].T
        mean = (
            x + v / K - taken[:, None, None] * (x - (k / K)[:, None, None] * v)
        )  # at t the noise in x is x - t v
        density = torch.distributions.Normal(mean.double(), std[:, None, None].double())
        total = total + density.log_prob(after.double())[:, :3].sum((1, 2))
    torch.testing.assert_close(drawn.log_prob.double(), total, atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [FlowMatchingHead, LayerwiseFlowMatchingHead])
def test_the_likelihood_of_a_sample_comes_back_bit_for_bit(kind, method):
    policy, read = stochastic(small(kind), method=method).train(), features()
    drawn = drawn_from(policy, read)
    assert torch.equal(policy.evaluate(read, drawn.chain).log_prob, drawn.log_prob)
    assert drawn.log_prob.unique().numel() == B


@pytest.mark.parametrize("kind", [FlowMatchingHead, LayerwiseFlowMatchingHead])
@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_counts_the_policy_is_the_heads_own_sampler(kind, method):
    policy, read = stochastic(small(kind), method=method).eval(), features()
    noise = policy.draw_noise(B, torch.Generator().manual_seed(0))
    chunk, _ = policy.draw(read, torch.zeros(B, T, D, dtype=torch.bool), noise)
    assert torch.equal(chunk, policy.head.sample(read, noise["start"]))


def test_learned_noise_of_size_zero_is_the_heads_own_sampler():
    policy, read = stochastic(small(), method="flow_noise").eval(), features()
    noise = policy.draw_noise(B, torch.Generator().manual_seed(0))
    still = noise | {"fresh": torch.zeros_like(noise["fresh"])}
    assert torch.equal(
        policy.sample(read, executed=T, noise=still).actions, policy.head.sample(read, noise["start"])
    )


def test_numbers_that_a_robot_lacks_go_to_zero_and_do_not_count():
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    policy, read = stochastic(small()), features(mask)
    drawn = drawn_from(policy, read, executed=T)
    assert drawn.actions[1, :, 1].abs().max() < 1e-6 and drawn.actions[2, :, 0].abs().max() < 1e-6
    other = torch.where(mask[:, None, None], drawn.chain["after"], 9.0)
    assert torch.equal(policy.evaluate(read, drawn.chain | {"after": other}).log_prob, drawn.log_prob)
    noise = policy.draw_noise(B, torch.Generator().manual_seed(0))
    held = lambda x, t: policy.head.eval().velocity(x, torch.full((B,), t), read)[0]
    times = euler_times(K)
    own = euler(hold_absent(held, noise["start"], mask, times), noise["start"], times)
    nowhere = torch.zeros(B, T, D, dtype=torch.bool)
    assert torch.equal(policy.draw(read, nowhere, noise)[0], own)


def test_steps_that_are_not_executed_follow_the_ode_in_every_step():
    """Otherwise their noise would move the executed ones without standing in the likelihood."""
    policy, read = stochastic(small()), features()
    drawn, head = drawn_from(policy, read, executed=1), policy.head.eval()
    k, x, after = (drawn.chain[name][:, 0] for name in ("step", "before", "after"))
    straight = x + head.velocity(x, k / K, head.encode_context(read))[0] / K
    assert torch.equal(after[:, 1:], straight[:, 1:])
    assert not torch.isclose(after[:, 0], straight[:, 0], atol=1e-4).any()


def test_a_chunk_does_not_depend_on_who_else_is_in_the_batch():
    policy, read = stochastic(small()).eval(), features()
    noise = policy.draw_noise(B, torch.Generator().manual_seed(0))
    noise["step"] = torch.tensor([[0], [2], [3]])
    whole = policy.sample(read, executed=T, noise=noise)
    alone = Features(read.hidden[1:2], read.mask[1:2], state=read.state[1:2])
    one = policy.sample(alone, executed=T, noise={name: value[1:2] for name, value in noise.items()})
    torch.testing.assert_close(one.actions, whole.actions[1:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(one.log_prob, whole.log_prob[1:2], atol=1e-4, rtol=0)


def test_a_falling_noise_level_leaves_older_samples_as_likely_as_they_were():
    policy, read = stochastic(small(), noise_level=0.7), features()
    drawn = drawn_from(policy, read)
    policy.noise_level = 0.3
    assert torch.equal(policy.evaluate(read, drawn.chain).log_prob, drawn.log_prob)
    assert drawn_from(policy, read).chain["std"].max() < 0.45 * drawn.chain["std"].max()


def test_each_sample_has_a_random_step_of_its_own():
    steps = stochastic(small()).draw_noise(4000, torch.Generator().manual_seed(0))["step"][:, 0]
    assert torch.bincount(steps, minlength=K).tolist() == pytest.approx([1000] * K, abs=100)
    last_left_out = stochastic(small(), ignore_last=True).draw_noise(500)["step"]
    assert last_left_out.unique().tolist() == [0, 1, 2]
    assert stochastic(small(), method="flow_cps").draw_noise(500)["step"].max() == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [FlowMatchingHead, LayerwiseFlowMatchingHead])
def test_a_gradient_reaches_every_weight(kind, method):
    policy, read = stochastic(small(kind), method=method), features()
    if policy.noise is not None:
        nn.init.normal_(
            policy.noise.layers[-1].weight
        )  # zeros at the start let nothing through to the layer before
    found = policy.evaluate(read, drawn_from(policy, read).chain)
    (found.log_prob.sum() + (0 if found.entropy is None else found.entropy.sum())).backward()
    silent = [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_the_policy_gradient_is_the_analytic_one():
    """One Euler step: the chunk is Gaussian with σ = a around x + v, and R = -(a - g)² has a slope in closed form."""
    policy = OfKnownVelocity(KnownVelocity(steps=1))
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = torch.tensor(weights / weights.sum(), dtype=torch.float32)
    fresh = torch.tensor(nodes, dtype=torch.float32)[:, None, None, None]
    start, step = torch.full((8, 1, 1), 0.4), torch.zeros(8, 1, dtype=torch.long)
    drawn = policy.sample(seen(8), executed=1, noise={"start": start, "step": step, "fresh": fresh})
    chunk, goal = drawn.actions.flatten(), 2.5
    (weights * -((chunk - goal) ** 2) * policy.evaluate(seen(8), drawn.chain).log_prob).sum().backward()
    mean = (weights * chunk).sum().item()
    assert policy.head.bias.grad.item() == pytest.approx(-2 * (mean - goal), abs=1e-3)
    std = (weights * (chunk - mean) ** 2).sum().sqrt().item()
    assert std == pytest.approx(0.5, abs=1e-5)  # a, since the step is the whole way


def test_entropy_is_known_where_the_noise_is_learned_and_constant_elsewhere():
    read, learned = features(), stochastic(small(), method="flow_noise")
    found = learned.evaluate(read, drawn_from(learned, read).chain).entropy
    by_hand = (
        torch.distributions.Normal(0.0, 0.08 * 2**0.5).entropy() * K * 3 * D
    )  # steps, executed actions, numbers
    torch.testing.assert_close(found, by_hand.expand(B), atol=1e-3, rtol=0)
    fixed = stochastic(small())
    assert fixed.evaluate(read, drawn_from(fixed, read).chain).entropy is None


def test_robots_with_weights_of_their_own_have_learned_noise_too():
    read = features(embodiment=torch.tensor([0, 2, 1]))
    policy = stochastic(small(num_embodiments=3), method="flow_noise")
    drawn = drawn_from(policy, read)
    assert torch.equal(policy.evaluate(read, drawn.chain).log_prob, drawn.log_prob)


def test_the_noise_network_stays_within_its_bounds():
    network = NoiseNetwork(6, 2, 0.08, 0.16)
    nn.init.normal_(network.layers[-1].weight, std=30.0)
    std = network(torch.randn(50, 4, 6))
    assert 0.08 - 1e-6 <= std.min() < 0.09 and 0.15 < std.max() <= 0.16 + 1e-6


def test_a_chunk_of_a_flow_is_not_cut():
    policy, read = stochastic(small()), features()
    drawn = drawn_from(policy, read, executed=T)
    assert policy.cut(drawn, torch.tensor([1, 2, 3])) is drawn


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "flow_ode"}, "unknown method 'flow_ode'"),
        ({"gaussian_steps": "two"}, "unknown gaussian_steps 'two'"),
        ({"noise_level": 0.0}, "noise_level=0.0 must be above 0"),
        ({"noise_level": 1.5}, "noise_level=1.5 must be above 0"),
        ({"method": "flow_noise", "min_std": 0.2}, "min_std=0.2 must be above 0 and below max_std=0.16"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stochastic(small(), **settings)


def test_a_single_step_that_may_not_be_gaussian_is_refused():
    with pytest.raises(ValueError, match="flow_cps of a head with num_inference_timesteps=1 leaves no step"):
        stochastic(small(steps=1), method="flow_cps")
