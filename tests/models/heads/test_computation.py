"""Every head computes where its features are, in float32 at its ends, and no attention map that nobody asked for.

What it makes on the way is made there, whatever torch's default is: in these tests the default device one that holds no numbers, while the features are on the CPU. A tensor that was made without
saying where then has no value, as on a GPU it would be on the wrong device.
"""

from dataclasses import replace

import pytest
import torch

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads.head import HeadSizes
from vla_bench.registry import HEADS

B, L, H, T, D, S, K = 2, 6, 24, 4, 3, 2, 4
BACKBONE = BackboneSizes(H, 3, 64, num_key_value_heads=2, head_dim=6, rope_theta=100.0)
SIZES = HeadSizes(hidden_size=H, action_dim=D, horizon=T, state_dim=S, backbone=BACKBONE)
SMALL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
EXPERT = {"hidden_size": 16, "intermediate_size": 20, "num_heads": 4, "num_inference_timesteps": 2}
DIFFUSION = SMALL | {"num_train_timesteps": 20, "num_inference_timesteps": 3, "clip_sample": 2.0}
HEADS_HERE = {
    "pi0": ("ActionExpert", EXPERT),
    "pi05": ("ActionExpert", EXPERT | {"adaptive_norm": True}),
    "ddim": ("Diffusion", DIFFUSION),
    "ddpm": ("Diffusion", DIFFUSION | {"sampler": "ddpm"}),
    "discrete": ("DiscreteDiffusion", SMALL | {"num_bins": 8, "num_steps": 3, "outside": "clip"}),
    "discrete likeliest": ("DiscreteDiffusion", SMALL | {"num_bins": 8, "temperature": 0.0, "outside": "clip"}),
    "flow": ("FlowMatching", SMALL | {"num_future_tokens": 2, "num_vl_layers": 1, "state_dropout": 0.5}),
    "flow in turns": (
        "FlowMatching", SMALL | {"num_future_tokens": 2, "attend_text_every_n_blocks": 1, "mask_padding": False},
    ),
    "flow without prefix": ("FlowMatching", SMALL | {"num_future_tokens": 0}),
    "layer-wise": ("LayerwiseFlowMatching", {"num_heads": 2, "mlp_size": 16, "num_future_tokens": 2}),
    "MLP": ("MLP", {"hidden_size": 16}),
    "transformer": ("Transformer", {"hidden_size": 16, "num_heads": 2}),
}  # fmt: skip
TRAINED_ONLY = ("flow", "layer-wise")  # with an inference head of their own


def made(name: str, kind: str | None = None):
    """A head, its features and a chunk."""
    torch.manual_seed(0)
    registered, arguments = HEADS_HERE[name]
    sizes = replace(SIZES, state_dim=0) if name == "flow without prefix" else SIZES
    head = HEADS.get(kind or registered)(sizes, **arguments)
    mask = torch.tensor([[True] * L, [True] * 4 + [False] * 2])
    cache = tuple((torch.randn(B, 2, L, 6), torch.randn(B, 2, L, 6)) for _ in range(3))
    layers = tuple(torch.randn(B, L, H) for _ in range(3))
    features = Features(
        layers[-1], mask, num_extra=K, layers=layers, cache=cache, next_position=mask.sum(1),
        state=torch.randn(B, sizes.state_dim), image=torch.arange(L) < mask.sum(1, keepdim=True) - 3,
        action_mask=torch.tensor([[True] * 3, [True, True, False]]) if head.masks_actions else None,
    )  # fmt: skip
    return head, features, torch.rand(B, T, D) * 2 - 1


def both(call):
    """What a call gives, and what it gives with a default device that holds no numbers."""
    torch.manual_seed(5)
    there = call()
    torch.manual_seed(5)
    with torch.device("meta"):
        return there, call()


@pytest.mark.parametrize("name", HEADS_HERE)
def test_a_loss_is_computed_where_the_features_are(name):
    head, features, actions = made(name)
    is_pad = torch.tensor([[False] * T, [False, False, True, True]])
    ours, theirs = both(lambda: head.train().loss(features, actions, is_pad)["action_loss"])
    assert ours.isfinite() and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", HEADS_HERE)
@torch.no_grad()
def test_actions_are_sampled_where_the_features_are(name):
    head, features, _ = made(name)
    ours, theirs = both(lambda: head.eval().sample(features))
    assert ours.isfinite().all() and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TRAINED_ONLY)
@torch.no_grad()
def test_an_inference_head_samples_where_the_features_are(name):
    head, features, _ = made(name, f"{HEADS_HERE[name][0]}Inference")
    ours, theirs = both(lambda: head.eval().sample(features))
    assert ours.isfinite().all() and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name", [name for name, (kind, _) in HEADS_HERE.items() if HEADS.get(kind).offers_attention]
)
@torch.no_grad()
def test_attention_is_computed_where_the_features_are(name):
    head, features, _ = made(name)
    ours, theirs = both(lambda: head.eval().attention(features))
    assert ours.isfinite().all() and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in HEADS_HERE if name not in ("MLP", "transformer")])
@pytest.mark.parametrize("with_generator", [False, True])
def test_noise_is_drawn_on_the_device_that_is_asked_for(name, with_generator):
    """By a generator where that one is: a seed gives the same noise on every device."""
    head, _, _ = made(name)
    generator = lambda: torch.Generator().manual_seed(3) if with_generator else None
    ours, theirs = both(lambda: head.draw_noise(B, generator(), "cpu"))
    assert torch.equal(ours, theirs)
    assert head.draw_noise(B, generator(), "meta").device.type == "meta"


@pytest.mark.parametrize("name", ["pi0", "ddim", "ddpm", "flow", "layer-wise"])
@pytest.mark.parametrize("what", ["sample", "attention"])
@torch.no_grad()
def test_noise_that_nobody_gave_is_drawn_where_the_features_are(name, what, monkeypatch):
    head, features, _ = made(name)
    asked, draw = [], head.draw_noise
    monkeypatch.setattr(
        head, "draw_noise", lambda *given, **more: asked.append((given, more)) or draw(*given, **more)
    )
    getattr(head.eval(), what)(features)
    assert asked == [((B,), {"device": features.hidden.device})]


# --- no more than is asked for ------------------------------------------------------------------------------------------


def maps_made(head, call) -> list[bool]:
    """For each block that was run, whether it computed the weights of its attention."""
    made, kinds = [], tuple(head.layer_classes())
    blocks = [module for module in head.modules() if isinstance(module, kinds)]
    hooks = [
        block.register_forward_hook(lambda *given: made.append(given[2][-1] is not None)) for block in blocks
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return made


@pytest.mark.parametrize(
    "name", ["pi0", "pi05", "ddim", "ddpm", "discrete", "flow without prefix", "layer-wise"]
)
def test_maps_are_computed_for_attention_and_for_nothing_else(name):
    head, features, actions = made(name)
    head.eval()
    is_pad = torch.zeros(B, T, dtype=torch.bool)
    for call in (lambda: head.sample(features), lambda: head.loss(features, actions, is_pad)):
        found = maps_made(head, call)
        assert found and not any(found)
    assert any(maps_made(head, lambda: head.attention(features)))


# --- the ends are float32 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HEADS_HERE if name not in ("pi0", "pi05")])
def test_a_head_in_bfloat16_gives_float32(name):
    """Noise, actions and the loss keep their precision when weights and hidden states are halved."""
    head, features, actions = made(name)
    head = head.bfloat16().eval()
    half = replace(
        features, hidden=features.hidden.bfloat16(), layers=tuple(h.bfloat16() for h in features.layers),
        state=features.state.bfloat16(),
    )  # fmt: skip
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        noise = head.draw_noise(B)
        sampled = head.sample(half, noise)
        loss = head.loss(half, actions, torch.zeros(B, T, dtype=torch.bool))["action_loss"]
    assert sampled.dtype == loss.dtype == torch.float32
    assert noise is None or noise.dtype == torch.float32
