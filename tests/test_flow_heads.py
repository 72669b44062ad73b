"""The flow heads against the equations, written a second time in numpy, and the work of their inference twins, counted."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads import flow_matching
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead, LayerwiseFlowMatchingInference
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.layers.attention import Attention
from vla_bench.models.layers.dit import VLSelfAttention
from vla_bench.models.layers.embodiment import CategorySpecificLinear
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead
from vla_bench.registry import HEADS, RegistryError

T, D, S, H, L, E, B = 4, 3, 2, 12, 5, 3, 2
SHAPES = {"input_size": H, "action_dim": D, "horizon": T, "state_dim": S}
LAYERS = BackboneSizes(hidden_size=H, num_layers=4, vocab_size=10)
SMALL = {"num_heads": 2, "dropout": 0.0, "repeated_diffusion_steps": 3, "num_inference_timesteps": 5}
LAST = SHAPES | SMALL | {"hidden_size": 8, "num_layers": 3, "num_future_tokens": 2}
EACH = SHAPES | SMALL | {"backbone": LAYERS, "mlp_size": 10, "num_future_tokens": 2}
ALL_LOOK = EACH | {"interleave_self_attention": False, "state_token": False, "num_future_tokens": 0}

HEADS_UNDER_TEST = {
    "last": (FlowMatchingHead, LAST),
    "last, one block": (FlowMatchingHead, LAST | {"num_layers": 1, "num_future_tokens": 0, "state_dim": 0}),
    "last, robots": (FlowMatchingHead, LAST | {"num_embodiments": E, "mlp_size": 6, "output_size": 10}),
    "last, refined": (FlowMatchingHead, LAST | {"num_vl_layers": 2, "num_vl_heads": 3, "max_positions": 9}),
    "each": (LayerwiseFlowMatchingHead, EACH),
    "each, narrow": (LayerwiseFlowMatchingHead, EACH | {"hidden_size": 8, "output_layer": True}),
    "each, all look": (LayerwiseFlowMatchingHead, ALL_LOOK | {"max_positions": 7}),
    "each, two robots": (LayerwiseFlowMatchingHead, EACH | {"num_embodiments": E, "num_layers": 3}),
}
TWINS = {
    FlowMatchingHead: FlowMatchingInferenceHead,
    LayerwiseFlowMatchingHead: LayerwiseFlowMatchingInference,
}
every_head = pytest.mark.parametrize("which", HEADS_UNDER_TEST)


def ordinary(head):
    """Weights of ordinary size: those of a fresh head leave much that is wrong too small to see."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return head


def build(which: str, **change):
    cls, arguments = HEADS_UNDER_TEST[which]
    torch.manual_seed(0)
    return ordinary(cls(**arguments | change))


def observation(head, seed: int = 1, mask=None) -> tuple[Features, torch.Tensor | None]:
    """Features of two samples, the second padded, and their state."""
    torch.manual_seed(seed)
    if mask is None:
        mask = torch.tensor([[True] * L, [False, True, True, False, True]])
    layers = tuple(torch.randn(B, L, H) for _ in range(4))
    robot = torch.tensor([2, 0]) if head.robots > 1 else None
    features = Features(layers[-1], mask, layers=layers, embodiment=robot)
    return features, torch.randn(B, S) if head.state_dim else None


# --- the equations in numpy, one sample at a time ---------------------------------------------------------------------


def linear(w, name: str, x, robot=None):
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    if weight.ndim == 3:  # one matrix per robot, stored the other way round
        return np.einsum("ni,io->no", x, weight[robot]) + bias[robot]
    return np.einsum("ni,oi->no", x, weight) + bias


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(w, name: str, x, activation, robot=None):
    return linear(w, f"{name}.2", activation(linear(w, f"{name}.0", x, robot)), robot)


def standardise(x, eps: float):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def layer_norm(w, name: str, x):
    return standardise(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w, name: str, x, context, heads: int):
    """softmax(q kᵀ / √d) v over a context that holds valid tokens alone."""
    q, k, v = (
        linear(w, f"{name}.to_q", x),
        linear(w, f"{name}.to_k", context),
        linear(w, f"{name}.to_v", context),
    )
    size, out = q.shape[1] // heads, np.zeros_like(q)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(q)):
            weights = np.exp(k[:, part] @ q[i, part] / np.sqrt(size))
            out[i, part] = weights @ v[:, part] / weights.sum()
    return linear(w, f"{name}.to_out", out)


def feed(w, name: str, x):
    return linear(w, f"{name}.3", gelu(linear(w, f"{name}.0", x)))


def refined(w, hidden, heads: int, depth: int):
    """GR00T N1.5's vlln and vl_self_attention, on the valid tokens alone."""
    x = layer_norm(w, "vl.norm", hidden)
    for i in range(depth):
        name = f"vl.blocks.{i}"
        y = layer_norm(w, f"{name}.norm1", x)
        x = x + attend(w, f"{name}.attention", y, y, heads)
        x = x + feed(w, f"{name}.feed_forward", layer_norm(w, f"{name}.norm2", x))
    return x


def contexts_of(w, cls, arguments, sample) -> list:
    """What each block looks at: None is itself."""
    depth = arguments.get("num_layers", 4)
    if cls is FlowMatchingHead:
        hidden = sample["layers"][-1]
        if arguments.get("num_vl_layers"):
            hidden = refined(w, hidden, arguments["num_vl_heads"], arguments["num_vl_layers"])
        return [hidden if i % 2 == 0 else None for i in range(depth)]
    layers = sample["layers"][-depth:]
    if arguments.get("hidden_size", H) != H:
        even = [i for i in range(depth) if i % 2 == 0 or not arguments.get("interleave_self_attention", True)]
        layers = [
            linear(w, f"project.{i}.1", layer_norm(w, f"project.{i}.0", h)) if i in even else None
            for i, h in enumerate(layers)
        ]
    if arguments.get("interleave_self_attention", True):
        return [h if i % 2 == 0 else None for i, h in enumerate(layers)]
    return list(layers)


def velocity(w, cls, arguments, sample, x, t: float):
    """v(x_t, t | o) for one sample: x [T, D]."""
    width, robot = w["positions"].shape[1], sample["robot"]
    bucket = min(int(np.floor(np.float32(t) * np.float32(1000))), 999)
    angles = bucket * 10000.0 ** (-np.arange(128) / 127)
    waves = np.concatenate([np.cos(angles), np.sin(angles)])[None]
    time = mlp(w, "dit.time.layers", waves, silu)
    angles = bucket * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    beside = np.tile(np.concatenate([np.sin(angles), np.cos(angles)]), (T, 1))
    embedded = linear(w, "action_in", x, robot)
    actions = mlp(w, "action_time", np.concatenate([embedded, beside], 1), silu, robot) + w["positions"][:T]
    tokens = [actions]
    if arguments.get("num_future_tokens"):
        tokens.insert(0, w["future_tokens"])
    if arguments["state_dim"] and arguments.get("state_token", True):
        tokens.insert(0, mlp(w, "state_encoder", sample["state"][None], relu, robot))
    z = np.concatenate(tokens)
    for i, context in enumerate(contexts_of(w, cls, arguments, sample)):
        name = f"dit.blocks.{i}"
        scale, shift = np.split(linear(w, f"{name}.adapt", silu(time)), 2, axis=1)
        y = standardise(z, 1e-5) * (1 + scale) + shift
        z = z + attend(w, f"{name}.attention", y, y if context is None else context, arguments["num_heads"])
        z = z + feed(w, f"{name}.feed_forward", standardise(z, 1e-5))
    if "dit.out.weight" in w:
        shift, scale = np.split(linear(w, "dit.out_adapt", silu(time)), 2, axis=1)
        z = linear(w, "dit.out", standardise(z, 1e-6) * (1 + scale) + shift)
    return mlp(w, "action_out", z[-T:], relu, robot)


def in_numpy(head, features, state):
    """The weights and the samples as float64 arrays; padding is not even handed over."""
    weights = {n: p.detach().double().numpy() for n, p in head.state_dict().items()}
    samples = []
    for b in range(B):
        valid = features.mask[b]
        samples.append(
            {
                "layers": [h[b, valid].double().numpy() for h in features.layers],
                "state": None if state is None else state[b].double().numpy(),
                "robot": None if features.embodiment is None else int(features.embodiment[b]),
            }
        )
    return weights, samples


@every_head
def test_the_loss_equals_the_equations(which):
    head = build(which)
    features, state = observation(head)
    weights, samples = in_numpy(head, features, state)
    actions, is_pad = torch.randn(B, T, D), torch.tensor([[False] * T, [False, False, True, True]])
    noise, time = torch.randn(3 * B, T, D), torch.tensor([0.0, 0.13, 0.5, 0.77, 0.9985, 0.31])
    squares = []
    for row in range(3 * B):  # the draws lie behind each other
        a, n, t = actions[row % B].double().numpy(), noise[row].double().numpy(), float(time[row])
        v = velocity(weights, *HEADS_UNDER_TEST[which], samples[row % B], (1 - t) * n + t * a, t)
        squares += [(v[i] - (a - n)[i]) ** 2 for i in range(T) if not is_pad[row % B, i]]
    loss = head.loss(features, actions, is_pad, state, noise=noise, time=time)["action_loss"]
    assert float(loss.detach()) == pytest.approx(np.mean(squares), rel=1e-5)


@every_head
@pytest.mark.parametrize("twin", [False, True], ids=["head", "twin"])
def test_the_sampler_equals_the_equations(which, twin):
    head = build(which)
    if twin:
        cls, arguments = HEADS_UNDER_TEST[which]
        served = TWINS[cls](**arguments)
        served.load_state_dict(head.state_dict(), strict=True)
        head = served
    features, state = observation(head)
    weights, samples = in_numpy(head, features, state)
    noise = torch.randn(B, T, D)
    kept = noise.clone()
    with torch.no_grad():
        found = head.sample(features, state, noise=noise)
    assert torch.equal(noise, kept), "the caller's noise was changed"
    for b in range(B):
        x = noise[b].double().numpy()
        for k in range(5):
            x = x + velocity(weights, *HEADS_UNDER_TEST[which], samples[b], x, k / 5) / 5
        np.testing.assert_allclose(found[b].numpy(), x, atol=1e-5, rtol=1e-5)


def test_an_embodiment_specific_linear_layer_is_a_matrix_per_robot():
    torch.manual_seed(0)
    layer, x, robot = CategorySpecificLinear(4, 3, robots=5), torch.randn(6, 2, 4), torch.tensor([4, 0, 4])
    found = layer(x, robot).detach().double().numpy()  # two draws of three samples
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    for row in range(6):
        e = int(robot[row % 3])
        np.testing.assert_allclose(found[row], x[row].double().numpy() @ w[e] + b[e], atol=1e-6)
    layer(x, robot).sum().backward()
    assert [bool(g.any()) for g in layer.weight.grad] == [True, False, False, False, True]


def test_self_attention_on_the_backbone_equals_the_equations():
    torch.manual_seed(0)
    refiner = ordinary(VLSelfAttention(H, 3, 2, 0.0))
    weights = {f"vl.{n}": p.detach().double().numpy() for n, p in refiner.state_dict().items()}
    hidden, mask = torch.randn(B, L, H), torch.tensor([[True] * L, [False, True, True, False, True]])
    found = refiner(hidden, mask).detach()
    for b in range(B):
        expected = refined(weights, hidden[b, mask[b]].double().numpy(), 3, 2)
        np.testing.assert_allclose(found[b, mask[b]].numpy(), expected, atol=1e-5)


# --- promises of every head -------------------------------------------------------------------------------------------


@every_head
def test_padding_changes_nothing_and_a_valid_token_does(which):
    head = build(which)
    features, state = observation(head)
    noise = torch.randn(B, T, D)
    before = head.sample(features, state, noise=noise)

    def with_token(b, i):
        layers = [h.clone() for h in features.layers]
        for h in layers:
            h[b, i] = 30.0
        return replace(features, hidden=layers[-1], layers=tuple(layers))

    torch.testing.assert_close(head.sample(with_token(1, 0), state, noise=noise), before, atol=1e-5, rtol=0)
    changed = head.sample(with_token(1, 2), state, noise=noise)
    assert (changed[1] - before[1]).abs().max() > 1e-3
    torch.testing.assert_close(changed[0], before[0], atol=1e-5, rtol=0)
    looks = head.attention(features, state, noise=noise).detach()
    torch.testing.assert_close(looks.sum(1), torch.ones(B))
    assert float(looks[~features.mask].abs().sum()) == 0.0


@every_head
def test_alone_or_in_a_batch_the_same_actions(which):
    head = build(which)
    features, state = observation(head)
    noise = torch.randn(B, T, D)
    together = head.sample(features, state, noise=noise)
    for b in range(B):
        valid = features.mask[b]
        layers = tuple(h[b : b + 1, valid] for h in features.layers)
        robot = None if features.embodiment is None else features.embodiment[b : b + 1]
        one = Features(
            layers[-1], torch.ones(1, int(valid.sum()), dtype=torch.bool), layers=layers, embodiment=robot
        )
        alone = head.sample(one, None if state is None else state[b : b + 1], noise=noise[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=1e-5)


@every_head
def test_a_gradient_reaches_every_parameter(which):
    head = build(which)
    features, state = observation(head)
    if features.embodiment is not None:
        features = replace(features, embodiment=torch.tensor([1, 2]))
    pad = torch.zeros(B, T, dtype=torch.bool)
    head.loss(features, torch.randn(B, T, D), pad, state)["action_loss"].backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    own = [p.grad for n, p in head.named_parameters() if n.startswith(("state_encoder", "action_"))]
    if features.embodiment is not None:
        assert all([bool(g.any()) for g in grad] == [False, True, True] for grad in own)


@every_head
def test_several_draws_cost_the_backbones_states_once(which):
    head = build(which)
    features, state = observation(head)
    rows = []
    for block, cross in zip(head.dit.blocks, head.dit.crosses):
        if cross:
            block.attention.to_k.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    head.loss(features, torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.bool), state)
    assert rows == [B] * sum(head.dit.crosses)  # not 3 · B


@every_head
def test_padded_dimensions_and_steps_stay_out_of_the_loss(which):
    head = build(which)
    features, state = observation(head)
    noise, time = torch.randn(3 * B, T, D), torch.zeros(3 * B)
    actions, is_pad = torch.randn(B, T, D), torch.tensor([[False] * T, [False, True, True, True]])
    head.valid_action_dim = 2
    other = actions.clone()
    other[..., 2], other[1, 1:] = 40.0, 40.0
    losses = [
        head.loss(features, a, is_pad, state, noise=noise, time=time)["action_loss"] for a in (actions, other)
    ]
    torch.testing.assert_close(*losses)


def test_blocks_to_shard_are_run_as_modules_in_training():
    # What FSDP gathers or a checkpointing wrapper saves happens around forward; a loop that goes past it loses both.
    for which, count in (("last, refined", 5), ("each, narrow", 4)):
        head, calls = build(which), []
        features, state = observation(head)
        for module in head.modules():
            if type(module) in head.layer_classes():
                module.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        head.loss(features, torch.randn(B, T, D), torch.zeros(B, T, dtype=torch.bool), state)
        assert len(calls) == count


def test_dropout_sits_behind_the_projection_and_not_on_the_weights():
    torch.manual_seed(0)
    attention = Attention(8, 2, dropout=0.5)
    x = torch.randn(1, 200, 8)
    out = attention(x, x)[0]
    expected = attention.eval()(x, x)[0] / 0.5
    kept = out != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(out[kept], expected[kept])


def test_one_robot_means_ordinary_layers_under_the_old_names():
    head = FlowMatchingHead(**LAST)
    linears = {n for n, m in head.named_modules() if type(m) is torch.nn.Linear}
    assert {"action_in", "action_time.0", "action_time.2", "state_encoder.0", "action_out.2"} <= linears
    assert head.positions.shape == (T, 8) and head.vl is None
    names = [n for n, _ in head.named_parameters() if not n.startswith("dit.")]
    assert names == [
        "future_tokens",
        "positions",
        *(f"{m}.{p}" for m in ("state_encoder.0", "state_encoder.2") for p in ("weight", "bias")),
        "action_in.weight",
        "action_in.bias",
        *(f"{m}.{i}.{p}" for m in ("action_time", "action_out") for i in (0, 2) for p in ("weight", "bias")),
    ]


def test_sizes_of_public_checkpoints_can_be_written_down():
    shapes = {
        n: tuple(p.shape)
        for n, p in FlowMatchingHead(
            **SHAPES,
            hidden_size=16,
            num_heads=2,
            num_layers=2,
            mlp_size=10,
            output_size=20,
            max_positions=64,
            num_embodiments=4,
        ).named_parameters()
    }
    assert shapes["positions"] == (64, 16) and shapes["dit.out.weight"] == (20, 16)
    assert shapes["state_encoder.0.weight"] == (4, S, 10) and shapes["state_encoder.2.weight"] == (4, 10, 16)
    assert shapes["action_out.0.weight"] == (4, 20, 10) and shapes["action_out.2.weight"] == (4, 10, D)
    layerwise = LayerwiseFlowMatchingHead(
        **SHAPES | {"input_size": 128}, backbone=replace(LAYERS, hidden_size=128)
    )
    shapes = {n: tuple(p.shape) for n, p in layerwise.named_parameters()}
    assert len(layerwise.dit.blocks) == 4 and layerwise.dit.blocks[0].attention.heads == 2
    assert shapes["state_encoder.0.weight"] == (1024, S) and shapes["action_out.0.weight"] == (1024, 128)
    assert not any(n.startswith(("project", "dit.out")) for n in shapes)


# --- the twins --------------------------------------------------------------------------------------------------------


def pair(which: str, **change):
    head = build(which, **change)
    cls, arguments = HEADS_UNDER_TEST[which]
    twin = TWINS[cls](**arguments | change)
    twin.load_state_dict(head.state_dict(), strict=True)
    return head.eval(), twin.eval()


def counted(head, features, state, noise) -> tuple[dict[str, int], int]:
    """How often each linear layer is called, and floating-point operations, for one chunk."""
    calls, hooks = {}, []
    for name, module in head.named_modules():
        if isinstance(module, torch.nn.Linear | CategorySpecificLinear):
            hooks.append(
                module.register_forward_hook(lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1}))
            )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head.sample(features, state, noise=noise)
    for hook in hooks:
        hook.remove()
    return calls, counter.get_total_flops()


@every_head
def test_the_twin_gives_the_same_actions_for_any_batch(which):
    head, twin = pair(which, num_inference_timesteps=7)
    for batch, mask in ((1, torch.ones(B, L, dtype=torch.bool)), (2, None)):
        features, state = observation(head, seed=batch, mask=mask)
        noise = torch.randn(B, T, D)
        with torch.no_grad():
            found, expected = (h.sample(features, state, noise=noise) for h in (twin, head))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            seeded = [
                h.sample(features, state, generator=torch.Generator().manual_seed(3)) for h in (twin, head)
            ]
            torch.testing.assert_close(*seeded, atol=1e-5, rtol=1e-5)
            looks = [h.attention(features, state, noise=noise) for h in (twin, head)]
            torch.testing.assert_close(*looks)
    assert expected.abs().max() > 0.1


@every_head
def test_the_twin_computes_once_what_does_not_change(which):
    steps = 7
    head, twin = pair(which, num_inference_timesteps=steps)
    features, state = observation(head)
    noise = torch.randn(B, T, D)
    (naive, slow), (once, fast) = (counted(h, features, state, noise) for h in (head, twin))
    assert naive.keys() == once.keys() and fast < slow
    for i, cross in enumerate(head.dit.crosses):
        for part in ("to_k", "to_v"):
            name = f"dit.blocks.{i}.attention.{part}"
            assert naive[name] == steps and once[name] == (1 if cross else steps), name
        assert naive[f"dit.blocks.{i}.adapt"] == steps and once[f"dit.blocks.{i}.adapt"] == 1
    for name, calls in once.items():
        if name.startswith(("state_encoder", "dit.time", "vl.", "project")):
            assert calls == 1, name
    # the naive head is no straw man: it, too, prepares the backbone's states once per observation
    assert all(calls == 1 for name, calls in naive.items() if name.startswith(("vl.", "project")))


def test_operations_at_the_size_of_gr00t():
    shapes = {"input_size": 2048, "action_dim": 7, "horizon": 16, "state_dim": 8, "num_layers": 2}
    with torch.device("meta"):
        features = Features(torch.empty(1, 600, 2048), torch.ones(1, 600, dtype=torch.bool))
        found = [
            counted(
                cls(**shapes, num_inference_timesteps=10), features, torch.empty(1, 8), torch.empty(1, 16, 7)
            )[1]
            for cls in (FlowMatchingHead, FlowMatchingInferenceHead)
        ]
    projections = 2 * 2 * 600 * 2048 * 768  # keys and values of one block
    assert found[0] - found[1] >= 9 * projections
    assert found[0] / found[1] > 2.5


def test_a_twin_follows_its_weights():
    # Nothing is kept between two calls, so nothing can be stale.
    head, twin = pair("last")
    features, state = observation(head)
    noise = torch.randn(B, T, D)
    with torch.no_grad():
        before = twin.sample(features, state, noise=noise)
        for h in (head, twin):
            for parameter in h.parameters():
                parameter.mul_(0.9)
        after = twin.sample(features, state, noise=noise)
        torch.testing.assert_close(after, head.sample(features, state, noise=noise), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3
    again = pickle.loads(pickle.dumps(copy.deepcopy(twin)))
    torch.testing.assert_close(again.sample(features, state, noise=noise), after)


def test_a_blind_observation_gives_no_nan():
    mask = torch.tensor([[True] * L, [False] * L])
    for which in HEADS_UNDER_TEST:
        head, twin = pair(which)
        features, state = observation(head, mask=mask)
        noise = torch.randn(B, T, D)
        with torch.no_grad():
            found = twin.sample(features, state, noise=noise)
            assert found.isfinite().all()
            torch.testing.assert_close(found, head.sample(features, state, noise=noise), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["last, robots", "each, narrow"])
@pytest.mark.parametrize("twin", [False, True], ids=["head", "twin"])
def test_the_sampler_is_one_graph_and_compiles(which, twin, monkeypatch):
    compiled = []

    def eager(function, **options):
        compiled.append(options)
        return torch_compile(function, backend="eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", eager)
    flow_matching._compiled.cache_clear()
    plain = build(which, num_inference_timesteps=2)
    cls, arguments = HEADS_UNDER_TEST[which]
    fast = (TWINS[cls] if twin else cls)(**arguments | {"num_inference_timesteps": 2}, compile=True)
    fast.load_state_dict(plain.state_dict())
    features, state = observation(plain)
    noise = torch.randn(B, T, D)
    with torch.no_grad():
        expected = plain.sample(features, state, noise=noise)
        torch.testing.assert_close(fast.sample(features, state, noise=noise), expected, atol=1e-5, rtol=1e-5)
        other = ordinary(copy.deepcopy(fast))  # a copy runs on its own weights
        assert (other.sample(features, state, noise=noise) - expected).abs().max() > 1e-3
    assert compiled == [{"fullgraph": True, "dynamic": False, "mode": None}]
    flow_matching._compiled.cache_clear()


def test_a_machine_that_cannot_compile_says_so(monkeypatch):
    def no_compiler(function, **options):
        def fail(*args):
            raise torch._dynamo.exc.InternalTorchDynamoError("no working C++ compiler")

        return fail

    import torch._dynamo.exc

    monkeypatch.setattr(torch, "compile", no_compiler)
    flow_matching._compiled.cache_clear()
    head = FlowMatchingInferenceHead(**LAST, compile=True)
    features, state = observation(head)
    with pytest.raises(RuntimeError, match=r"cpu.*no working C\+\+ compiler.*action_model.compile to false"):
        head.sample(features, state)
    flow_matching._compiled.cache_clear()


# --- refused, with what to write instead ------------------------------------------------------------------------------


def test_a_twin_does_not_train():
    for which, name in (("last", "'FlowMatching'"), ("each", "'LayerwiseFlowMatching'")):
        _, twin = pair(which)
        features, state = observation(twin)
        with pytest.raises(ValueError, match=f"is for inference; train with .*{name}"):
            twin.loss(features, torch.zeros(B, T, D), torch.zeros(B, T, dtype=torch.bool), state)


@every_head
def test_what_does_not_fit_is_named(which):
    for head in pair(which):
        features, state = observation(head)
        with pytest.raises(ValueError, match=r"noise is \[1, 4, 3\], expected \[2, 4, 3\]"):
            head.sample(features, state, noise=torch.randn(1, T, D))
        if head.state_encoder is not None:
            for odd in (None, state[:1], state[:, :1]):
                with pytest.raises(ValueError, match="a state of 2 numbers per sample"):
                    head.sample(features, odd)
        if head.robots == 1:  # told or not, it makes no difference
            head.sample(replace(features, embodiment=torch.tensor([7, 9])), state)
            continue
        for robot, message in (
            (None, "list the datasets in framework.embodiments, or set num_embodiments to 1"),
            (torch.tensor([0, E]), f"embodiment {E} is outside 0..{E - 1}"),
            (torch.tensor([0, -1]), "embodiment -1 is outside"),
            (torch.tensor([0]), r"expected int64 \[2\]"),
            (torch.tensor([0.0, 1.0]), r"torch.float32 \[2\], expected int64"),
        ):
            with pytest.raises(ValueError, match=message):
                head.sample(replace(features, embodiment=robot), state)


def test_features_without_layers_are_refused():
    head = build("each")
    features, state = observation(head)
    with pytest.raises(ValueError, match="hold none; run the backbone with layers='all'"):
        head.sample(replace(features, layers=None), state)
    with pytest.raises(ValueError, match="4 layers of its backbone, the features hold 3"):
        head.sample(replace(features, layers=features.layers[1:]), state)


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (FlowMatchingHead, {"num_heads": 3}, "hidden_size=8 must be even and divisible by num_heads=3"),
        (FlowMatchingHead, {"max_positions": 3}, "max_positions=3 is less than the 4 actions"),
        (FlowMatchingHead, {"num_vl_layers": 1, "num_vl_heads": 5}, "12 is not divisible by num_vl_heads=5"),
        (FlowMatchingHead, {"num_embodiments": 0}, "num_embodiments=0 must be at least 1"),
        (FlowMatchingHead, {"repeated_diffusion_steps": 0}, "repeated_diffusion_steps=0 must be at least 1"),
        (LayerwiseFlowMatchingHead, {"num_layers": 5}, "num_layers=5, but the backbone has 4 layers"),
        (LayerwiseFlowMatchingHead, {"num_layers": 0}, "num_layers=0 must be at least 1"),
        (LayerwiseFlowMatchingHead, {"num_layers": 1}, "a state token would change nothing"),
        (
            LayerwiseFlowMatchingHead,
            {"interleave_self_attention": False},
            "framework.prompt and set state_token",
        ),
        (
            LayerwiseFlowMatchingHead,
            {"interleave_self_attention": False, "state_token": False},
            "num_future_tokens=2 would change nothing",
        ),
    ],
)
def test_a_head_that_could_not_work_is_refused(cls, change, message):
    for kind in (cls, TWINS[cls]):
        with pytest.raises(ValueError, match=message):
            kind(**(LAST if cls is FlowMatchingHead else EACH) | change)


def test_without_interleaving_a_state_token_really_would_change_nothing():
    # the reason for the refusal above, shown on a head that was made to have one
    head = build("each, all look")
    tokens = torch.randn(B, 3, H)
    with torch.no_grad():
        bucket, features = torch.tensor([5, 6]), observation(head)[0]
        alone, _ = head.dit(tokens[:, 1:], bucket, features.layers, features.mask)
        behind, _ = head.dit(tokens, bucket, features.layers, features.mask)
    torch.testing.assert_close(behind[:, 1:], alone)


def test_names_in_the_registry():
    assert HEADS.get("LayerwiseFM") is LayerwiseFlowMatchingHead
    assert HEADS.get("FlowMatchingInferenceHead") is FlowMatchingInferenceHead
    assert HEADS.get("LayerwiseFlowMatchingInference") is LayerwiseFlowMatchingInference
    assert HEADS.get("FlowMatchingHead") is FlowMatchingHead
    build_head = partial(HEADS.build, **SHAPES)
    twin = build_head({"type": "FlowMatchingInference", "hidden_size": 8, "num_heads": 2, "compile": True})
    assert twin.compiles and isinstance(twin, FlowMatchingHead)
    with pytest.raises(RegistryError, match="did you mean 'num_embodiments'"):
        build_head({"type": "FlowMatching", "num_embodiment": 2})
    with pytest.raises(RegistryError, match="needs 'backbone'"):
        build_head({"type": "LayerwiseFM"})
