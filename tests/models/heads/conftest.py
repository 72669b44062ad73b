"""The flow-matching heads in all their forms, and their equations written a second time in numpy."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads import flow
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead, LayerwiseFlowMatchingInference
from vla_bench.models.heads.flow_matching import DiTFlowHead, FlowMatchingHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead

T, D, S, H, L, E, B = 4, 3, 2, 12, 5, 3, 2
SIZES = HeadSizes(
    hidden_size=H,
    action_dim=D,
    horizon=T,
    state_dim=S,
    backbone=BackboneSizes(hidden_size=H, num_layers=4, vocab_size=10),
)
SMALL = {"num_heads": 2, "dropout": 0.0, "repeated_diffusion_steps": 3, "num_inference_timesteps": 5}
LAST = SMALL | {"hidden_size": 8, "num_layers": 3, "num_future_tokens": 2}
EACH = SMALL | {"mlp_size": 10, "num_future_tokens": 2}
ALL_LOOK = EACH | {"interleave_self_attention": False, "state_token": False, "num_future_tokens": 0}
ROBOTS = {"num_embodiments": E}
# what differs from SIZES, and the head's own arguments
FLOW_CASES = {
    "last": (FlowMatchingHead, {}, LAST),
    "last, one block": (FlowMatchingHead, {"state_dim": 0}, LAST | {"num_layers": 1, "num_future_tokens": 0}),
    "last, robots": (FlowMatchingHead, ROBOTS, LAST | {"mlp_size": 6, "output_size": 10}),
    "last, refined": (
        FlowMatchingHead,
        {},
        LAST | {"num_vl_layers": 2, "num_vl_heads": 3, "max_positions": 9},
    ),
    "each": (LayerwiseFlowMatchingHead, {}, EACH),
    "each, narrow": (LayerwiseFlowMatchingHead, {}, EACH | {"hidden_size": 8, "output_layer": True}),
    "each, all look": (LayerwiseFlowMatchingHead, {}, ALL_LOOK | {"max_positions": 7}),
    "each, two robots": (LayerwiseFlowMatchingHead, ROBOTS, EACH | {"num_layers": 3}),
}
INFERENCE = {
    FlowMatchingHead: FlowMatchingInferenceHead,
    LayerwiseFlowMatchingHead: LayerwiseFlowMatchingInference,
}


def ordinary(head):
    """Weights of ordinary size: those of a fresh head leave much that is wrong too small to see."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return head


@dataclass(frozen=True)
class FlowCase:
    """One form of a flow-matching head, by its name in FLOW_CASES."""

    name: str

    @property
    def cls(self) -> type[DiTFlowHead]:
        return FLOW_CASES[self.name][0]

    @property
    def sizes(self) -> HeadSizes:
        return replace(SIZES, **FLOW_CASES[self.name][1])

    @property
    def arguments(self) -> dict:
        return FLOW_CASES[self.name][2]

    def build(self, **change) -> DiTFlowHead:
        """A head with weights of ordinary size, the same ones each time."""
        torch.manual_seed(0)
        return ordinary(self.cls(self.sizes, **self.arguments | change))

    def build_inference(self, head: DiTFlowHead, **change) -> DiTFlowHead:
        """The inference head with the weights of a training head."""
        found = INFERENCE[self.cls](self.sizes, **self.arguments | change)
        found.load_state_dict(head.state_dict(), strict=True)
        return found

    def pair(self, **change) -> tuple[DiTFlowHead, DiTFlowHead]:
        """Training head and inference head with the same weights."""
        head = self.build(**change)
        return head.eval(), self.build_inference(head, **change).eval()

    def features(self, seed: int = 1, mask: torch.Tensor | None = None) -> Features:
        """Features of two samples, the second padded, with their state and robot."""
        torch.manual_seed(seed)
        if mask is None:
            mask = torch.tensor([[True] * L, [False, True, True, False, True]])
        layers = tuple(torch.randn(B, L, H) for _ in range(4))
        robot = torch.tensor([2, 0]) if self.sizes.num_embodiments > 1 else None
        state = torch.randn(B, S) if self.sizes.state_dim else None
        return Features(layers[-1], mask, layers=layers, state=state, embodiment=robot)

    def equations(self, head: DiTFlowHead, features: Features) -> "Equations":
        """The same head in numpy."""
        weights = {n: p.detach().double().numpy() for n, p in head.state_dict().items()}
        return Equations(self, weights, [numpy_sample(features, b) for b in range(B)])


def numpy_sample(features: Features, b: int) -> dict:
    """One sample as float64 arrays; padding is not even handed over."""
    valid = features.mask[b]
    return {
        "layers": [h[b, valid].double().numpy() for h in features.layers],
        "state": None if features.state is None else features.state[b].double().numpy(),
        "robot": None if features.embodiment is None else int(features.embodiment[b]),
    }


@pytest.fixture(params=FLOW_CASES)
def case(request) -> FlowCase:
    """Each form of a flow-matching head."""
    return FlowCase(request.param)


@pytest.fixture
def flow_case():
    """One form of a flow-matching head, by name."""
    return FlowCase


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
    """softmax(q kᵀ / √d) v over a context that holds valid tokens alone; also the shares [heads, N, M]."""
    q = linear(w, f"{name}.to_q", x)
    k, v = linear(w, f"{name}.to_k", context), linear(w, f"{name}.to_v", context)
    size, out = q.shape[1] // heads, np.zeros_like(q)
    shares = np.zeros((heads, len(x), len(context)))
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(q)):
            weights = np.exp(k[:, part] @ q[i, part] / np.sqrt(size))
            shares[h, i] = weights / weights.sum()
            out[i, part] = shares[h, i] @ v[:, part]
    return linear(w, f"{name}.to_out", out), shares


def feed(w, name: str, x):
    return linear(w, f"{name}.3", gelu(linear(w, f"{name}.0", x)))


def vl_self_attention(w, hidden, heads: int, depth: int):
    """GR00T N1.5's vlln and vl_self_attention, on the valid tokens alone."""
    x = layer_norm(w, "vl.norm", hidden)
    for i in range(depth):
        name = f"vl.blocks.{i}"
        y = layer_norm(w, f"{name}.norm1", x)
        x = x + attend(w, f"{name}.attention", y, y, heads)[0]
        x = x + feed(w, f"{name}.feed_forward", layer_norm(w, f"{name}.norm2", x))
    return x


@dataclass
class Equations:
    """A flow-matching head in float64."""

    case: FlowCase
    weights: dict
    samples: list[dict]

    def contexts(self, sample: dict) -> list:
        """What each block looks at: None is itself."""
        w, arguments = self.weights, self.case.arguments
        depth = arguments.get("num_layers", 4)
        if self.case.cls is FlowMatchingHead:
            hidden = sample["layers"][-1]
            if arguments.get("num_vl_layers"):
                hidden = vl_self_attention(w, hidden, arguments["num_vl_heads"], arguments["num_vl_layers"])
            return [hidden if i % 2 == 0 else None for i in range(depth)]
        layers, interleave = sample["layers"][-depth:], arguments.get("interleave_self_attention", True)
        looks = [i % 2 == 0 or not interleave for i in range(depth)]
        if arguments.get("hidden_size", H) != H:
            layers = [
                linear(w, f"project.{i}.1", layer_norm(w, f"project.{i}.0", h)) if look else None
                for i, (h, look) in enumerate(zip(layers, looks))
            ]
        return [h if look else None for h, look in zip(layers, looks)]

    def velocity(self, b: int, x, t: float) -> tuple[np.ndarray, list[np.ndarray]]:
        """v(x_t, t | o) of sample b for x [T, D], and the shares [heads, T, valid] of each cross-attention."""
        w, sample, arguments = self.weights, self.samples[b], self.case.arguments
        width, robot = w["positions"].shape[1], sample["robot"]
        bucket = min(int(np.floor(np.float32(t) * np.float32(1000))), 999)
        # AdaLN's time: diffusers' Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        angles = bucket * 10000.0 ** (-np.arange(128) / 127)
        time = mlp(w, "dit.time.layers", np.concatenate([np.cos(angles), np.sin(angles)])[None], silu)
        # the action encoder's time: sines first, and half the width frequencies that stop short of 1/10000
        angles = bucket * 10000.0 ** (-np.arange(width // 2) / (width // 2))
        beside = np.tile(np.concatenate([np.sin(angles), np.cos(angles)]), (T, 1))
        embedded = np.concatenate([linear(w, "action_in", x, robot), beside], 1)
        tokens = [mlp(w, "action_time", embedded, silu, robot) + w["positions"][:T]]
        if arguments.get("num_future_tokens"):
            tokens.insert(0, w["future_tokens"])
        if sample["state"] is not None and arguments.get("state_token", True):
            tokens.insert(0, mlp(w, "state_encoder", sample["state"][None], relu, robot))
        z, shares = np.concatenate(tokens), []
        for i, context in enumerate(self.contexts(sample)):
            name = f"dit.blocks.{i}"
            scale, shift = np.split(linear(w, f"{name}.adapt", silu(time)), 2, axis=1)
            y = standardise(z, 1e-5) * (1 + scale) + shift
            seen = y if context is None else context
            y, share = attend(w, f"{name}.attention", y, seen, arguments["num_heads"])
            if context is not None:
                shares.append(share[:, -T:])
            z = z + y
            z = z + feed(w, f"{name}.feed_forward", standardise(z, 1e-5))
        if "dit.out.weight" in w:
            shift, scale = np.split(linear(w, "dit.out_adapt", silu(time)), 2, axis=1)
            z = linear(w, "dit.out", standardise(z, 1e-6) * (1 + scale) + shift)
        return mlp(w, "action_out", z[-T:], relu, robot), shares

    def integrate(self, b: int, noise, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The sampled chunk [T, D] of sample b, and where its actions looked [valid]."""
        x, shares = noise, []
        for k in range(steps):
            v, looked = self.velocity(b, x, k / steps)
            x, shares = x + v / steps, shares + looked
        return x, np.mean(shares, axis=(0, 1, 2))


@pytest.fixture
def fresh_compiler():
    """Compiled samplers of this test alone."""
    flow._compiled.cache_clear()
    yield
    flow._compiled.cache_clear()


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """Small transformer and diffusion heads, inputs and equations: the module `hidden_state_heads.py` beside this file."""
    path = Path(__file__).with_name("hidden_state_heads.py")
    spec = importlib.util.spec_from_file_location("hidden_state_heads", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
