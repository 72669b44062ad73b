"""The transformer, diffusion and discrete diffusion heads: small ones, inputs, and their equations in numpy.

The equations are written a second time, in double precision, from a state dictionary alone.
"""

import math

import numpy as np
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads.diffusion import DiffusionHead
from vla_bench.models.heads.discrete_diffusion import DiscreteDiffusionHead
from vla_bench.models.heads.head import ActionHead, HeadSizes
from vla_bench.models.heads.transformer import TransformerHead

# samples, tokens, their width, actions in a chunk, numbers in an action, numbers in a state
B, L, H, T, D, S = 3, 9, 24, 4, 3, 2
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1, 1, 0, 0, 0, 1, 1, 0, 0]], dtype=torch.bool)
IS_PAD = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
SIZES = HeadSizes(hidden_size=H, action_dim=D, horizon=T, state_dim=S)
TINY = {"hidden_size": 16, "num_heads": 2}
TWICE = {"dropout": 0.0, "repeated_diffusion_steps": 2}
BOUNDED = {"prediction": "epsilon", "clip_sample": 1.0}
HEADS = {
    "transformer": (TransformerHead, TINY | {"num_layers": 2}),
    "transformer l1": (TransformerHead, TINY | {"num_layers": 1, "loss": "l1"}),
    "diffusion": (DiffusionHead, TINY | TWICE | {"num_layers": 3}),
    "diffusion epsilon": (
        DiffusionHead,
        TINY | BOUNDED | {"num_layers": 2, "dropout": 0.0, "sampler": "ddpm"},
    ),
    "discrete": (DiscreteDiffusionHead, TINY | TWICE | {"num_layers": 2, "num_bins": 16}),
}


def build(name: str, *, state_dim: int = S, **arguments) -> ActionHead:
    """A head of HEADS with weights so large that a leak or a wrong position moves the output."""
    kind, own = HEADS[name]
    torch.manual_seed(0)
    sizes = HeadSizes(hidden_size=H, action_dim=D, horizon=T, state_dim=state_dim)
    head = kind(sizes, **own | arguments).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


def data(seed: int = 0) -> tuple[Features, torch.Tensor]:
    """Features with a state, and actions within [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    hidden, actions = torch.randn(B, L, H, generator=g), torch.rand(B, T, D, generator=g) * 2 - 1
    return Features(hidden, MASK.clone(), state=torch.randn(B, S, generator=g)), actions


def row(features: Features, b: int) -> Features:
    """One sample, padding and all."""
    one = slice(b, b + 1)
    return Features(features.hidden[one], features.mask[one], state=features.state[one])


def sampling_noise(head: ActionHead, seed: int = 5) -> torch.Tensor | None:
    """What `sample` starts from; None for a head that draws nothing."""
    return head.draw_noise(B, torch.Generator().manual_seed(seed))


def training_noise(head: ActionHead, seed: int = 6) -> dict[str, torch.Tensor]:
    """The noise and time of a loss; none for a head that draws nothing."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(head, TransformerHead):
        return {}
    rows = head.repeats * B
    if isinstance(head, DiffusionHead):
        noise, time = torch.randn(rows, T, D, generator=g), torch.randint(100, (rows,), generator=g)
    else:
        noise, time = torch.rand(rows, T * D, generator=g), torch.rand(rows, generator=g)
    return {"noise": noise, "time": time}


@torch.no_grad()
def predict(head: ActionHead, features: Features) -> torch.Tensor:
    """A sample from the noise of `sampling_noise`."""
    return head.sample(features, sampling_noise(head))


@torch.no_grad()
def sampled(head: ActionHead, features: Features, seed: int) -> torch.Tensor:
    """A sample from noise of a seed."""
    return head.sample(features, head.draw_noise(len(features.hidden), torch.Generator().manual_seed(seed)))


def loss(head: ActionHead, features: Features, actions: torch.Tensor, **given) -> float:
    """The action loss, with the noise of `training_noise` unless given."""
    return head.loss(features, actions, IS_PAD, **training_noise(head) | given)["action_loss"].item()


def fit(head: ActionHead, features, actions, steps: int, rate: float, is_pad=None) -> ActionHead:
    """Trains a head on one batch."""
    optimizer = torch.optim.Adam(head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    is_pad = torch.zeros(actions.shape[:2], dtype=torch.bool) if is_pad is None else is_pad
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(features, actions, is_pad)["action_loss"].backward()
        optimizer.step()
        schedule.step()
    return head


COUNT = 512
SIDES = torch.where(torch.rand(COUNT, 1, 1, generator=torch.Generator().manual_seed(0)) < 2 / 3, -0.8, 0.8)
SAME = Features(torch.ones(COUNT, 1, 4), torch.ones(COUNT, 1, dtype=torch.bool))
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "dropout": 0.0, "repeated_diffusion_steps": 1}


def two_modes(kind: type[ActionHead], horizon: int, steps: int, **own) -> ActionHead:
    """A head that saw chunks on two sides, 2 to 1."""
    torch.manual_seed(0)
    head = kind(HeadSizes(hidden_size=4, action_dim=1, horizon=horizon), **SMALL | own)
    return fit(head, SAME, SIDES + 0.05 * torch.randn(COUNT, horizon, 1), steps, 4e-3)


@torch.no_grad()
def drawn(head: ActionHead) -> torch.Tensor:  # [COUNT, T]
    """Samples of a head from `two_modes`."""
    return head.sample(SAME)[..., 0]


# --- the networks in numpy -------------------------------------------------------------------------------------------


class Weights:
    """A state dictionary in double precision, read by name."""

    def __init__(self, head: ActionHead):
        self.values = {name: value.double().numpy() for name, value in head.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.values[f"{name}.weight"].T + self.values[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return plain_norm(x) * self.values[f"{name}.weight"] + self.values[f"{name}.bias"]

    def attention(self, name: str, x, context, heads: int, mask=None) -> np.ndarray:
        q, k, v = (
            self.linear(f"{name}.to_{key}", y) for key, y in (("q", x), ("k", context), ("v", context))
        )
        out = np.zeros_like(q)
        size = q.shape[-1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for b in range(len(x)):
                keep = np.arange(context.shape[1]) if mask is None else np.flatnonzero(mask[b])
                scores = q[b][:, part] @ k[b][keep][:, part].T / math.sqrt(size)
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                out[b][:, part] = shares / shares.sum(-1, keepdims=True) @ v[b][keep][:, part]
        return self.linear(f"{name}.to_out", out)


def plain_norm(x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def pre_norm_block(w: Weights, name: str, x, heads: int, context=None, mask=None, keys=None) -> np.ndarray:
    y = w.norm(f"{name}.norm", x)
    x = x + w.attention(f"{name}.attention", y, y, heads, keys)
    if context is not None:
        x = x + w.attention(f"{name}.cross", w.norm(f"{name}.cross_norm", x), context, heads, mask)
    y = gelu(w.linear(f"{name}.feed_forward.1", w.norm(f"{name}.feed_forward.0", x)))
    return x + w.linear(f"{name}.feed_forward.3", y)


def transformer(head: TransformerHead, features: Features) -> np.ndarray:
    """The predicted chunk."""
    w, hidden = Weights(head), features.hidden.double().numpy()
    last = np.stack([hidden[b, max(i for i in range(L) if features.mask[b, i])] for b in range(len(hidden))])
    first = w.linear("state_in.layer", features.state.double().numpy())
    queries = np.broadcast_to(w.values["action_queries"], (len(hidden), T, 16))
    x = np.concatenate([first[:, None], w.linear("token_in", last)[:, None], queries], 1)
    for i in range(len(head.blocks)):
        x = pre_norm_block(w, f"blocks.{i}", x, heads=2)
    return w.linear("out.1", w.norm("out.0", x[:, -T:]))


def denoiser(head: DiffusionHead, noisy: np.ndarray, steps: np.ndarray, features: Features) -> np.ndarray:
    """The network's prediction."""
    w, context, mask = Weights(head), features.hidden.double().numpy(), features.mask.numpy()
    angles = steps[:, None] * 10000.0 ** (-np.arange(128) / 127)
    when = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    when = w.linear("network.dit.time.layers.2", silu(w.linear("network.dit.time.layers.0", when)))
    first = w.linear("network.state_in.layer", features.state.double().numpy())[:, None]
    x = np.concatenate([first, w.linear("network.action_in", noisy) + w.values["network.positions"]], 1)
    for i in range(len(head.network.dit.blocks)):
        name = f"network.dit.blocks.{i}"
        scale, shift = np.split(w.linear(f"{name}.adapt", silu(when))[:, None], 2, -1)
        y = plain_norm(x) * (1 + scale) + shift
        cross = i % 2 == 0
        x = x + w.attention(f"{name}.attention", y, context if cross else y, 2, mask if cross else None)
        y = gelu_tanh(w.linear(f"{name}.feed_forward.0", plain_norm(x)))
        x = x + w.linear(f"{name}.feed_forward.3", y)
    shift, scale = np.split(w.linear("network.dit.out_adapt", silu(when))[:, None], 2, -1)
    x = w.linear("network.dit.out", plain_norm(x, 1e-6) * (1 + scale) + shift)
    return w.linear("network.action_out.1", gelu(x[:, -T:]))


def token_logits(head: DiscreteDiffusionHead, tokens: np.ndarray, features: Features) -> np.ndarray:
    """The network's logits [B, T·D, bins]."""
    w, context, mask = Weights(head), features.hidden.double().numpy(), features.mask.numpy()
    first = w.linear("network.state_in.layer", features.state.double().numpy())[:, None]
    x = w.values["network.codes.weight"][tokens] + w.values["network.positions"]
    x = np.concatenate([first, x], 1)
    keys = np.array([True] + [d < head.valid_action_dim for _ in range(T) for d in range(D)])[None].repeat(
        len(x), 0
    )
    for i in range(len(head.network.blocks)):
        x = pre_norm_block(w, f"network.blocks.{i}", x, 2, context, mask, keys)
    return w.linear("network.out.1", w.norm("network.out.0", x[:, -T * D :]))
