"""Public checkpoints and modules, written a second time: names as published, numbers from the equations."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from vla_bench.models.backbones.eagle import compose_eagle
from vla_bench.models.backbones.tiny_composed import write_tiny_component

D, S, T = 3, 4, 5  # numbers in an action and in a state, actions in a chunk


@dataclass(frozen=True)
class FlowSizes:
    """Sizes of a flow head in these tests."""

    width: int = 24
    heads: int = 3
    inner: int = 20  # of the MLPs around the transformer
    future: int = 6  # future tokens
    rows: int = 9  # of the table of positions


SIZES = FlowSizes()

# ---------------------------------------------------------------- samples, weights, sections


def hf_weights(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of transformers and its parameters by transformers' names; tied ones under both names."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def drawn(shapes: dict[str, tuple], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for n, shape in shapes.items()}


def linear(name: str, out: int, into: int) -> dict[str, tuple]:
    """Shapes of a linear layer."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def affine(name: str, width: int) -> dict[str, tuple]:
    """Shapes of a norm with weight and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def example(seed: int = 0, state: bool = True) -> dict:
    """A sample with one random image."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
    sample = {"image": [image], "lang": "open the drawer"}
    return sample | ({"state": rng.normal(size=S).astype(np.float32)} if state else {})


def noise() -> Tensor:
    """What a flow head starts from, [1, T, D]."""
    return torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))


def column(size: int) -> dict[str, list[float]]:
    """Statistics of `size` dimensions."""
    values = {"mean": 0.1, "std": 1.5, "min": -3.0, "max": 3.0, "q01": -2.0, "q99": 2.0}
    return {key: [value] * size for key, value in values.items()}


def policy_section(state: bool = True, **more) -> dict:
    """The section `policy` of a configuration."""
    section = {"cameras": ["front"], "image_size": [32, 32], "control_rate": 10, **more}
    section |= {"action": {"names": [f"a{i}" for i in range(D)]}}
    section["normalization"] = {"action": "q99"} | ({"state": "mean_std"} if state else {})
    return section | ({"state": {"names": [f"s{i}" for i in range(S)]}} if state else {})


def transformers_states(model: nn.Module, inputs: dict) -> tuple[Tensor, ...]:
    """Every layer's hidden states, by transformers itself; of Qwen3-VL the last before its norm, as StarVLA's version."""
    if model.config.model_type == "qwen3_vl":
        model.model.language_model.norm = torch.nn.Identity()
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[1:]


# ---------------------------------------------------------------- layers, from the equations


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(x, eps, w=None, name=None):
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return y if name is None else y * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w, name, x, context, heads):
    """diffusers' Attention: to_q, to_k, to_v, to_out.0."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)
    q = split(dense(w, f"{name}.to_q", x))
    k, v = (split(dense(w, f"{name}.to_{n}", context)) for n in "kv")
    shares = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return dense(w, f"{name}.to_out.0", (shares @ v).transpose(1, 2).flatten(2))


def block(w, name, x, context, timestep, heads):
    """Adaptive norm (scale, then shift), attention, norm, feed-forward; all with residuals."""
    scale, shift = dense(w, f"{name}.norm1.linear", nn.functional.silu(timestep)).chunk(2, dim=-1)
    y = norm(x, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    x = x + attend(w, f"{name}.attn1", y, y if context is None else context, heads)
    inner = nn.functional.gelu(dense(w, f"{name}.ff.net.0.proj", norm(x, 1e-5)), approximate="tanh")
    return x + dense(w, f"{name}.ff.net.2", inner)


def angles(bucket, count, last):
    return bucket * torch.exp(-math.log(10_000) * torch.arange(count) / last)


def mlp(w, name, x):
    return dense(w, f"{name}.layer2", torch.relu(dense(w, f"{name}.layer1", x)))


# ---------------------------------------------------------------- StarVLA's flow heads


def flow_tokens(w, x, bucket, state, sizes):
    """State, future tokens and noisy actions, and the embedded time."""
    half = angles(bucket, sizes.width // 2, sizes.width // 2)
    beside = torch.cat([half.sin(), half.cos()]).expand(*x.shape[:2], -1)
    encoded = torch.cat([dense(w, "action_encoder.layer1", x), beside], dim=-1)
    actions = dense(w, "action_encoder.layer2", encoded)
    actions = dense(w, "action_encoder.layer3", actions * torch.sigmoid(actions))
    actions = actions + w["position_embedding.weight"][: x.shape[1]]
    tokens = [w["future_tokens.weight"].expand(len(x), -1, -1), actions]
    if state is not None:
        tokens.insert(0, mlp(w, "state_encoder", state)[:, None])
    half = angles(bucket, 128, 127)
    embedder = "model.timestep_encoder.timestep_embedder"
    timestep = dense(w, f"{embedder}.linear_1", torch.cat([half.cos(), half.sin()])[None])
    return torch.cat(tokens, dim=1), dense(w, f"{embedder}.linear_2", nn.functional.silu(timestep))


def gr00t_velocity(w, x, bucket, state, contexts, sizes, all_cross=False):
    tokens, timestep = flow_tokens(w, x, bucket, state, sizes)
    for i in range(2):
        context = contexts[-1] if i % 2 == 0 or all_cross else None
        tokens = block(w, f"model.transformer_blocks.{i}", tokens, context, timestep, sizes.heads)
    shift, scale = dense(w, "model.proj_out_1", nn.functional.silu(timestep)).chunk(2, dim=-1)
    tokens = dense(w, "model.proj_out_2", norm(tokens, 1e-6) * (1 + scale[:, None]) + shift[:, None])
    return mlp(w, "action_decoder", tokens)[:, -x.shape[1] :]


def all_cross_gr00t_velocity(w, x, bucket, state, contexts, sizes):
    return gr00t_velocity(w, x, bucket, state, contexts, sizes, all_cross=True)


def pi_velocity(w, x, bucket, state, contexts, sizes):
    tokens, timestep = flow_tokens(w, x, bucket, state, sizes)
    for i, context in enumerate(contexts):
        tokens = block(w, f"model.transformer_blocks.{i}", tokens, context, timestep, sizes.heads)
    return mlp(w, "action_decoder", tokens)[:, -x.shape[1] :]


def alternating_velocity(w, x, bucket, state, contexts, sizes):
    contexts = [context if i % 2 == 0 else None for i, context in enumerate(contexts)]
    return pi_velocity(w, x, bucket, state, contexts, sizes)


def euler(velocity, w, x, state, contexts, sizes=SIZES, steps=4):
    for k in range(steps):
        x = x + velocity(w, x, int(1000 * k / steps), state, contexts, sizes) / steps
    return x


def flow_shapes(context: int, inner: int, output: int, all_cross: bool, sizes: FlowSizes = SIZES) -> dict:
    """Names and shapes of a flow head with two blocks."""
    width, embedder = sizes.width, "model.timestep_encoder.timestep_embedder"
    shapes = linear(f"{embedder}.linear_1", width, 256) | linear(f"{embedder}.linear_2", width, width)
    for i in range(2):
        name, source = f"model.transformer_blocks.{i}", context if i == 0 or all_cross else width
        shapes |= linear(f"{name}.norm1.linear", 2 * width, width)
        shapes |= linear(f"{name}.attn1.to_q", width, width) | linear(f"{name}.attn1.to_out.0", width, width)
        shapes |= linear(f"{name}.attn1.to_k", width, source) | linear(f"{name}.attn1.to_v", width, source)
        shapes |= linear(f"{name}.ff.net.0.proj", 4 * width, width)
        shapes |= linear(f"{name}.ff.net.2", width, 4 * width)
    shapes |= linear("model.proj_out_1", 2 * width, width) | linear("model.proj_out_2", output, width)
    shapes |= linear("state_encoder.layer1", inner, S) | linear("state_encoder.layer2", width, inner)
    shapes |= linear("action_encoder.layer1", width, D) | linear("action_encoder.layer2", width, 2 * width)
    shapes |= linear("action_encoder.layer3", width, width)
    shapes |= linear("action_decoder.layer1", inner, output) | linear("action_decoder.layer2", D, inner)
    tables = {"future_tokens.weight": (sizes.future, width), "position_embedding.weight": (sizes.rows, width)}
    return shapes | tables


def starvla_run(
    folder: Path,
    vlm_weights: dict[str, Tensor],
    head: dict[str, Tensor],
    action_model: dict,
    *,
    include_state: bool,
    suffix: str = "pt",
    prompt: str | None = None,
) -> Path:
    """What a run of StarVLA consists of: config.yaml, dataset_statistics.json, checkpoints/steps_N_*."""
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"qwen_vl_interface.model.{name}": t for name, t in vlm_weights.items()}
    weights |= {f"action_model.{name}": t for name, t in head.items()}
    weights = {name: t.clone() for name, t in weights.items()}
    if suffix == "pt":
        torch.save(weights, folder / "checkpoints/steps_300_pytorch_model.pt")
        torch.save({}, folder / "checkpoints/steps_20_pytorch_model.pt")  # an older one
    else:
        save_file(weights, folder / "checkpoints/steps_300_model.safetensors")
    data = {"include_state": include_state} | ({"CoT_prompt": prompt} if prompt else {})
    framework = {"qwenvl": {"base_vlm": "./playground/Qwen2.5-VL-3B"}, "action_model": action_model}
    config = {"framework": framework, "datasets": {"vla_data": data}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    action = column(D) | {"mask": [True] * D}
    statistics = {"franka": {"action": action, "state": column(S), "num_transitions": 7}}
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    return folder


def residual_head_weights() -> dict[str, Tensor]:
    """QwenOFT's head with two blocks of width 64."""
    shapes = affine("model.layer_norm1", 32) | affine("model.layer_norm2", 64)
    shapes |= linear("model.fc1", 64, 32) | linear("model.fc2", D, 64)
    for i in range(2):
        name = f"model.mlp_resnet_blocks.{i}.ffn"
        shapes |= affine(f"{name}.0", 64) | linear(f"{name}.1", 64, 64)
    return drawn(shapes)


# ---------------------------------------------------------------- openpi and LeRobot

PALIGEMMA = "paligemma_with_expert.paligemma"
EXPERT = "paligemma_with_expert.gemma_expert"


def openpi_shapes(vlm: Path, pi05: bool) -> dict[str, tuple]:
    """Public names and shapes, as in openpi's PyTorch models, for the sizes of the tiny PaliGemma."""
    config = json.loads((vlm / "config.json").read_text())
    text = config["text_config"]
    width, expert = text["hidden_size"], 16
    shapes = siglip_shapes(config["vision_config"])
    shapes |= linear(
        f"{PALIGEMMA}.model.multi_modal_projector.linear", width, config["vision_config"]["hidden_size"]
    )
    shapes |= {f"{PALIGEMMA}.model.language_model.embed_tokens.weight": (text["vocab_size"], width)}
    shapes |= gemma_shapes(f"{PALIGEMMA}.model.language_model", text, width, text["intermediate_size"], False)
    shapes |= gemma_shapes(f"{EXPERT}.model", text, expert, 24, adaptive=pi05)
    shapes[f"{EXPERT}.lm_head.weight"] = (text["vocab_size"], expert)
    shapes |= linear("action_in_proj", expert, 8) | linear("action_out_proj", 8, expert)
    if pi05:
        return shapes | linear("time_mlp_in", expert, expert) | linear("time_mlp_out", expert, expert)
    shapes |= linear("state_proj", expert, 8) | linear("action_time_mlp_in", expert, 2 * expert)
    return shapes | linear("action_time_mlp_out", expert, expert)


def siglip_shapes(vision: dict) -> dict[str, tuple]:
    encoder, width, inner = (
        f"{PALIGEMMA}.model.vision_tower.vision_model",
        vision["hidden_size"],
        vision["intermediate_size"],
    )
    shapes = {f"{encoder}.embeddings.patch_embedding.weight": (width, 3, 16, 16)}
    shapes |= {f"{encoder}.embeddings.patch_embedding.bias": (width,)}
    shapes[f"{encoder}.embeddings.position_embedding.weight"] = ((vision["image_size"] // 16) ** 2, width)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{encoder}.encoder.layers.{i}"
        for n in ("k", "v", "q", "out"):
            shapes |= linear(f"{layer}.self_attn.{n}_proj", width, width)
        shapes |= affine(f"{layer}.layer_norm1", width) | affine(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
    return shapes | affine(f"{encoder}.post_layernorm", width)


def gemma_shapes(prefix: str, text: dict, width: int, inner: int, adaptive: bool) -> dict[str, tuple]:
    head, heads = text["head_dim"], text["num_attention_heads"]
    shapes = {}
    for i in range(text["num_hidden_layers"]):
        layer = f"{prefix}.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (heads * head, width)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, heads * head)
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (head, width) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        for n in ("input_layernorm", "post_attention_layernorm"):
            shapes |= rms_norm_shapes(f"{layer}.{n}", width, adaptive)
    return shapes | rms_norm_shapes(f"{prefix}.norm", width, adaptive)


def rms_norm_shapes(name: str, width: int, adaptive: bool) -> dict[str, tuple]:
    if adaptive:
        return {f"{name}.dense.weight": (3 * width, width), f"{name}.dense.bias": (3 * width,)}
    return {f"{name}.weight": (width,)}


# ---------------------------------------------------------------- NVIDIA's GR00T N1.5


def vl_self_attention(w, x):
    """vlln, then plain self-attention layers on the backbone's states."""
    x = norm(x, 1e-5, w, "vlln")
    for i in range(2):
        b = f"vl_self_attention.transformer_blocks.{i}"
        y = norm(x, 1e-5, w, f"{b}.norm1")
        x = x + attend(w, f"{b}.attn1", y, y, 2)
        y = dense(w, f"{b}.ff.net.0.proj", norm(x, 1e-5, w, f"{b}.norm3"))
        x = x + dense(w, f"{b}.ff.net.2", nn.functional.gelu(y, approximate="tanh"))
    return x


def gr00t_head_weights(robots: int = 32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The head of robot 31 alone in StarVLA's names, and the public head with encoders for every robot."""
    w = drawn(flow_shapes(32, SIZES.inner, SIZES.inner, all_cross=False))
    shapes = affine("vlln", 32)
    for i in range(2):
        b = f"vl_self_attention.transformer_blocks.{i}"
        shapes |= affine(f"{b}.norm1", 32) | affine(f"{b}.norm3", 32)
        shapes |= linear(f"{b}.ff.net.0.proj", 128, 32) | linear(f"{b}.ff.net.2", 32, 128)
        for n in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{b}.attn1.{n}", 32, 32)
    w |= drawn(shapes, 5)
    public = {}
    for name, tensor in w.items():
        if not name.startswith(("state_encoder", "action_encoder", "action_decoder")):
            public[name] = tensor
            continue
        module, layer, end = name.split(".")
        layer = layer.replace("layer", "W") if module == "action_encoder" else layer
        stacked = torch.randn(robots, *(tensor.T if tensor.ndim == 2 else tensor).shape)
        stacked[31] = tensor.T if tensor.ndim == 2 else tensor
        public[f"{module}.{layer}.{'W' if end == 'weight' else 'b'}"] = stacked
    return w, {f"action_head.{name}": tensor for name, tensor in public.items()}


def gr00t_checkpoint(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Writes `eagle/`, the backbone's configuration, and `model.safetensors`; returns the Eagle and the head's weights."""
    for kind in ("siglip", "qwen3"):
        write_tiny_component(kind, folder / kind, image_size=32, hidden_size=32, num_layers=2)
    eagle = compose_eagle(folder / "siglip", folder / "qwen3", projector="Linear")
    eagle.model.save_pretrained(folder / "eagle")
    eagle.save_config(folder / "eagle")
    names = {
        "model.vision_backbone.siglip": "vision_model.vision_model",
        "model.language_model": "language_model.model",
        "model.projector.linear": "mlp1.0",
        "lm_head": "language_model.lm_head",
    }
    public = {}
    for name, tensor in eagle.model.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(f"{ours}."):
                public[f"backbone.eagle_model.{theirs}{name[len(ours) :]}"] = tensor.clone()
    plain, head = gr00t_head_weights()
    save_file({**public, **head}, folder / "model.safetensors")
    return eagle, plain


def gr00t_actions(eagle: nn.Module, head: dict[str, Tensor], batch: dict) -> Tensor:
    """What the public GR00T computes from a prepared batch and `noise()`."""
    with torch.no_grad():
        hidden = vl_self_attention(head, eagle(batch["inputs"]).hidden)
    return euler(gr00t_velocity, head, noise(), batch["state"], [hidden])


# ---------------------------------------------------------------- GR00T N1.7

N17_ROBOTS, N17_BLOCKS, N17_ROW = 12, 6, 7


def masked_attend(w, name, x, context, heads, seen=None):
    """`attend`, in which keys that are not `seen` [B, M] get no share."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)
    q = split(dense(w, f"{name}.to_q", x))
    k, v = (split(dense(w, f"{name}.to_{n}", context)) for n in "kv")
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = torch.where(seen[:, None, None, :], scores, -torch.inf)
    return dense(w, f"{name}.to_out.0", (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))


def n17_velocity(w, x, bucket, state, hidden, valid, image, sizes=SIZES, every=2):
    """N1.7's velocity for a batch [B, T, D], from the backbone's states as they are; `bucket` is a number per row."""
    hidden = vl_self_attention(w, hidden)  # no mask, whatever is padding
    rows = [flow_tokens_n17(w, x[i : i + 1], int(bucket[i]), state[i : i + 1], sizes) for i in range(len(x))]
    tokens, timestep = (torch.cat(each) for each in zip(*rows))
    for i in range(N17_BLOCKS):
        name = f"model.transformer_blocks.{i}"
        scale, shift = dense(w, f"{name}.norm1.linear", nn.functional.silu(timestep)).chunk(2, dim=-1)
        y = norm(tokens, 1e-5) * (1 + scale[:, None]) + shift[:, None]
        if i % 2 == 1:
            y = masked_attend(w, f"{name}.attn1", y, y, sizes.heads)
        else:
            turn = ~image if i % (2 * every) == 0 else image
            y = masked_attend(w, f"{name}.attn1", y, hidden, sizes.heads, turn & valid)
        tokens = tokens + y
        inner = dense(w, f"{name}.ff.net.0.proj", norm(tokens, 1e-5))
        tokens = tokens + dense(w, f"{name}.ff.net.2", nn.functional.gelu(inner, approximate="tanh"))
    shift, scale = dense(w, "model.proj_out_1", nn.functional.silu(timestep)).chunk(2, dim=-1)
    tokens = dense(w, "model.proj_out_2", norm(tokens, 1e-6) * (1 + scale[:, None]) + shift[:, None])
    return mlp(w, "action_decoder", tokens)[:, -x.shape[1] :]


def flow_tokens_n17(w, x, bucket, state, sizes):
    """State and noisy actions: no future tokens."""
    none = {"future_tokens.weight": torch.empty(0, sizes.width)}
    return flow_tokens(w | none, x, bucket, state, sizes)


def n17_loss(w, actions, is_pad, noise, time, state, hidden, valid, image):
    """The mean squared error of the velocity over steps that are no padding."""
    t = time[:, None, None]
    bucket = (time * 1000).long()
    predicted = n17_velocity(w, (1 - t) * noise + t * actions, bucket, state, hidden, valid, image)
    squares = (predicted - (actions - noise)) ** 2 * ~is_pad[..., None]
    return squares.sum() / (~is_pad).sum() / actions.shape[-1]


def n17_actions(w, x, state, hidden, valid, image, steps=4):
    """Euler steps from noise x."""
    for k in range(steps):
        bucket = torch.full((len(x),), int(k / steps * 1000))
        x = x + n17_velocity(w, x, bucket, state, hidden, valid, image) / steps
    return x


def n17_head_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The head of robot `N17_ROW` alone, and the public head with encoders for every robot."""
    shapes = flow_shapes(32, SIZES.inner, SIZES.inner, all_cross=False)
    for i in range(2, N17_BLOCKS):
        block = {n: s for n, s in shapes.items() if n.startswith(f"model.transformer_blocks.{i % 2}.")}
        shapes |= {n.replace(f"blocks.{i % 2}.", f"blocks.{i}."): s for n, s in block.items()}
    del shapes["future_tokens.weight"]
    w = drawn(shapes, 3) | {n: t for n, t in gr00t_head_weights()[0].items() if n.startswith("vl")}
    public = {}
    for name, tensor in w.items():
        if not name.startswith(("state_encoder", "action_encoder", "action_decoder")):
            public[name] = tensor
            continue
        module, layer, end = name.split(".")
        layer = layer.replace("layer", "W") if module == "action_encoder" else layer
        inputs_first = tensor.T if tensor.ndim == 2 else tensor
        stacked = torch.randn(N17_ROBOTS, *inputs_first.shape)
        stacked[N17_ROW] = inputs_first
        public[f"{module}.{layer}.{'W' if end == 'weight' else 'b'}"] = stacked
    return w, {f"action_head.{name}": tensor for name, tensor in public.items()}


N17_CONFIG = {
    "model_type": "Gr00tN1d7",
    "action_horizon": T,
    "max_action_dim": D,
    "max_state_dim": S,
    "hidden_size": SIZES.inner,
    "input_embedding_dim": SIZES.width,
    "max_seq_len": SIZES.rows,
    "num_inference_timesteps": 4,
    "attend_text_every_n_blocks": 2,
    "state_history_length": 1,
    "state_dropout_prob": 0.2,
    "use_alternate_vl_dit": True,
    "use_vlln": True,
    "add_pos_embed": True,
    "diffusion_model_cfg": {
        "num_layers": N17_BLOCKS,
        "num_attention_heads": SIZES.heads,
        "output_dim": SIZES.inner,
    }
    | {"interleave_self_attention": True, "positional_embeddings": None, "norm_type": "ada_norm"}
    | {"dropout": 0.2, "final_dropout": True, "attention_head_dim": SIZES.width // SIZES.heads},
    "vl_self_attention_cfg": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "dropout": 0.1,
    }
    | {"final_dropout": True, "positional_embeddings": None},
}
