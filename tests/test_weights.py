"""Weights of others: names, and what they compute, against implementations written from the public equations."""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaForCausalLM

from vla_bench.data.normalize import Normalizer, load_statistics, save_statistics
from vla_bench.models.backbones.eagle import compose_eagle
from vla_bench.models.backbones.tiny import CORPUS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.interop.convert import PolicySettings, convert, main, policy_spec
from vla_bench.models.interop.fluxvla import from_fluxvla, remarks
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.interop.checkpoint_formats import LAYOUTS
from vla_bench.models.interop.weights import Take, load_mapped, read_weights
from vla_bench.serving.policy import Policy

SIZES = {"image_size": 32, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 1}
D, S, T, WIDTH, HEADS, INNER, FUTURE, ROWS = 3, 4, 5, 24, 3, 20, 6, 9
NAMES = [f"a{i}" for i in range(D)]


@pytest.fixture(scope="module")
def vlms(tmp_path_factory):
    """A tiny model per family, written once: {kind: folder}."""
    home = tmp_path_factory.mktemp("vlms")
    corpus = (*CORPUS, "🔍")
    return {
        kind: write_tiny(kind, home / kind, corpus=corpus, **SIZES)
        for kind in ("qwen2_5_vl", "qwen3_vl", "paligemma")
    }


def hf_weights(folder, dtype=torch.float32):
    """A model of transformers and its parameters by transformers' names; tied ones under both names."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for n, shape in shapes.items()}


def example(seed=0, state=True):
    rng = np.random.default_rng(seed)
    sample = {
        "image": [Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))],
        "lang": "open the drawer",
    }
    return sample | ({"state": rng.normal(size=S).astype(np.float32)} if state else {})


# ---------------------------------------------------------------- StarVLA's heads, from the equations


def dense(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(x, eps, w=None, name=None):
    y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return y if name is None else y * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(w, name, x, context, heads):
    """diffusers' Attention: to_q, to_k, to_v, to_out.0."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)
    q, k, v = (
        split(dense(w, f"{name}.to_q", x)),
        split(dense(w, f"{name}.to_k", context)),
        split(dense(w, f"{name}.to_v", context)),
    )
    shares = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return dense(w, f"{name}.to_out.0", (shares @ v).transpose(1, 2).flatten(2))


def block(w, name, x, context, when, heads):
    """Adaptive norm (scale, then shift), attention, norm, feed-forward; all with residuals."""
    scale, shift = dense(w, f"{name}.norm1.linear", nn.functional.silu(when)).chunk(2, dim=-1)
    y = norm(x, 1e-5) * (1 + scale[:, None]) + shift[:, None]
    x = x + attend(w, f"{name}.attn1", y, y if context is None else context, heads)
    inner = nn.functional.gelu(dense(w, f"{name}.ff.net.0.proj", norm(x, 1e-5)), approximate="tanh")
    return x + dense(w, f"{name}.ff.net.2", inner)


def waves(bucket, count, last):
    return bucket * torch.exp(-math.log(10_000) * torch.arange(count) / last)


def mlp(w, name, x):
    return dense(w, f"{name}.layer2", torch.relu(dense(w, f"{name}.layer1", x)))


def flow_tokens(w, x, bucket, state):
    """State, future tokens and noisy actions, and the embedded time."""
    angles = waves(bucket, WIDTH // 2, WIDTH // 2)
    beside = torch.cat([angles.sin(), angles.cos()]).expand(*x.shape[:2], -1)
    actions = dense(
        w, "action_encoder.layer2", torch.cat([dense(w, "action_encoder.layer1", x), beside], dim=-1)
    )
    actions = dense(w, "action_encoder.layer3", actions * torch.sigmoid(actions))
    actions = actions + w["position_embedding.weight"][: x.shape[1]]
    tokens = [w["future_tokens.weight"].expand(len(x), -1, -1), actions]
    if state is not None:
        tokens.insert(0, mlp(w, "state_encoder", state)[:, None])
    angles = waves(bucket, 128, 127)
    embedder = "model.timestep_encoder.timestep_embedder"
    when = dense(w, f"{embedder}.linear_1", torch.cat([angles.cos(), angles.sin()])[None])
    return torch.cat(tokens, dim=1), dense(w, f"{embedder}.linear_2", nn.functional.silu(when))


def gr00t_velocity(w, x, bucket, state, contexts):
    tokens, when = flow_tokens(w, x, bucket, state)
    for i in range(2):
        tokens = block(
            w, f"model.transformer_blocks.{i}", tokens, contexts[-1] if i % 2 == 0 else None, when, HEADS
        )
    shift, scale = dense(w, "model.proj_out_1", nn.functional.silu(when)).chunk(2, dim=-1)
    tokens = dense(w, "model.proj_out_2", norm(tokens, 1e-6) * (1 + scale[:, None]) + shift[:, None])
    return mlp(w, "action_decoder", tokens)[:, -x.shape[1] :]


def pi_velocity(w, x, bucket, state, contexts):
    tokens, when = flow_tokens(w, x, bucket, state)
    for i, context in enumerate(contexts):
        tokens = block(w, f"model.transformer_blocks.{i}", tokens, context, when, HEADS)
    return mlp(w, "action_decoder", tokens)[:, -x.shape[1] :]


def alternating_velocity(w, x, bucket, state, contexts):
    return pi_velocity(w, x, bucket, state, [c if i % 2 == 0 else None for i, c in enumerate(contexts)])


def euler(velocity, w, noise, state, contexts, steps=4):
    for k in range(steps):
        noise = noise + velocity(w, noise, int(1000 * k / steps), state, contexts) / steps
    return noise


def flow_shapes(context, inner, output, all_cross):
    linear = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    shapes = linear("model.timestep_encoder.timestep_embedder.linear_1", WIDTH, 256)
    shapes |= linear("model.timestep_encoder.timestep_embedder.linear_2", WIDTH, WIDTH)
    for i in range(2):
        name, source = f"model.transformer_blocks.{i}", context if i == 0 or all_cross else WIDTH
        shapes |= linear(f"{name}.norm1.linear", 2 * WIDTH, WIDTH) | linear(
            f"{name}.attn1.to_q", WIDTH, WIDTH
        )
        shapes |= linear(f"{name}.attn1.to_k", WIDTH, source) | linear(f"{name}.attn1.to_v", WIDTH, source)
        shapes |= linear(f"{name}.attn1.to_out.0", WIDTH, WIDTH)
        shapes |= linear(f"{name}.ff.net.0.proj", 4 * WIDTH, WIDTH) | linear(
            f"{name}.ff.net.2", WIDTH, 4 * WIDTH
        )
    shapes |= linear("model.proj_out_1", 2 * WIDTH, WIDTH) | linear("model.proj_out_2", output, WIDTH)
    shapes |= linear("state_encoder.layer1", inner, S) | linear("state_encoder.layer2", WIDTH, inner)
    shapes |= linear("action_encoder.layer1", WIDTH, D) | linear("action_encoder.layer2", WIDTH, 2 * WIDTH)
    shapes |= linear("action_encoder.layer3", WIDTH, WIDTH)
    shapes |= linear("action_decoder.layer1", inner, output) | linear("action_decoder.layer2", D, inner)
    return shapes | {"future_tokens.weight": (FUTURE, WIDTH), "position_embedding.weight": (ROWS, WIDTH)}


# ---------------------------------------------------------------- run folders of StarVLA


def column(size):
    values = {"mean": 0.1, "std": 1.5, "min": -3.0, "max": 3.0, "q01": -2.0, "q99": 2.0}
    return {key: [value] * size for key, value in values.items()}


def starvla_run(folder, vlm_weights, head, action_model, *, include_state, suffix="pt", cot=None):
    """What StarVLA leaves behind: config.yaml, dataset_statistics.json, checkpoints/steps_N_*."""
    (folder / "checkpoints").mkdir(parents=True)
    weights = {f"qwen_vl_interface.model.{name}": t for name, t in vlm_weights.items()}
    weights |= {f"action_model.{name}": t for name, t in head.items()}
    weights = {name: t.clone() for name, t in weights.items()}
    if suffix == "pt":
        torch.save(weights, folder / "checkpoints/steps_300_pytorch_model.pt")
        torch.save({}, folder / "checkpoints/steps_20_pytorch_model.pt")  # an older one
    else:
        save_file(weights, folder / "checkpoints/steps_300_model.safetensors")
    data = {"include_state": include_state} | ({"CoT_prompt": cot} if cot else {})
    framework = {"qwenvl": {"base_vlm": "./playground/Qwen2.5-VL-3B"}, "action_model": action_model}
    OmegaConf.save(
        OmegaConf.create({"framework": framework, "datasets": {"vla_data": data}}), folder / "config.yaml"
    )
    statistics = {
        "franka": {"action": column(D) | {"mask": [True] * D}, "state": column(S), "num_transitions": 7}
    }
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    return folder


def policy_section(state=True, **more):
    fields = {"action": "q99"} | ({"state": "mean_std"} if state else {})
    section = {"action": {"names": NAMES}, "cameras": ["front"], "image_size": [32, 32], "control_rate": 10}
    section |= {"normalization": fields} | more
    return section | ({"state": {"names": [f"s{i}" for i in range(S)]}} if state else {})


FLOW = {
    "num_target_vision_tokens": FUTURE,
    "max_seq_len": ROWS,
    "num_inference_timesteps": 4,
    "action_horizon": T,
}


def loaded(run):
    framework = Framework.from_pretrained(run / "checkpoints/step_000000")
    policy = Policy.from_pretrained(run)
    observation = example(3, state=policy.spec.state is not None)
    chunk = policy.predict(observation, seed=0)
    assert chunk.shape == (policy.spec.horizon, policy.spec.action.dim) and np.isfinite(chunk).all()
    return framework


def transformers_states(model, batch):
    """Every layer's hidden states, by transformers itself; of Qwen3-VL the last before its norm, as StarVLA's version."""
    if model.config.model_type == "qwen3_vl":
        model.model.language_model.norm = torch.nn.Identity()
    with torch.no_grad():
        states = model(**batch["inputs"], output_hidden_states=True).hidden_states
    return states[1:]


@pytest.mark.parametrize(
    ("kind", "state", "suffix"), [("qwen2_5_vl", True, "pt"), ("qwen3_vl", False, "safetensors")]
)
def test_starvla_gr00t_computes_the_same(vlms, tmp_path, kind, state, suffix):
    model, weights = hf_weights(vlms[kind])
    head = drawn(flow_shapes(32, INNER, INNER, all_cross=False))
    dit = {"num_layers": 2, "output_dim": INNER}
    dit |= {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS}
    action_model = FLOW | {"hidden_size": INNER, "diffusion_model_cfg": dit}
    run = starvla_run(tmp_path / "theirs", weights, head, action_model, include_state=state, suffix=suffix)
    ours = {"vlm": {"base_vlm": str(vlms[kind])}}
    report = convert(
        "starvla_gr00t", run, {"framework": ours, "policy": policy_section(state)}, tmp_path / "run"
    )
    assert report.complete and (len(report.ignored) == 4) == (not state)
    framework = loaded(tmp_path / "run")
    batch = framework.prepare([example(state=state)])
    noise = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
    expected = euler(gr00t_velocity, head, noise, batch.get("state"), transformers_states(model, batch))
    assert (framework.actions(batch, None, noise) - expected).abs().max() < 1e-5
    assert (expected - noise).abs().max() > 0.1


@pytest.mark.parametrize("alternating", [False, True])
def test_starvla_pi_computes_the_same(vlms, tmp_path, monkeypatch, alternating):
    monkeypatch.setitem(globals(), "WIDTH", 32)  # as wide as the language model
    monkeypatch.setitem(
        globals(), "HEADS", 2 if alternating else 1
    )  # one per 64, unless the run says otherwise
    model, weights = hf_weights(vlms["qwen2_5_vl"])
    head = drawn(flow_shapes(32, 1024, 32, all_cross=True))
    action_model = FLOW
    if alternating:
        dit = {"num_attention_heads": 2, "attention_head_dim": 16}
        action_model |= {"layerwise_attention_layout": "alternating", "diffusion_model_cfg": dit}
    run = starvla_run(tmp_path / "theirs", weights, head, action_model, include_state=True)
    config = {
        "framework": {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}},
        "policy": policy_section(alternating),
    }
    report = convert("starvla_pi", run, config, tmp_path / "run")
    assert len(report.ignored) == (4 if alternating else 9), report.ignored
    framework = loaded(tmp_path / "run")
    batch = framework.prepare([example(state=alternating)])
    noise = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
    velocity = alternating_velocity if alternating else pi_velocity
    state = torch.from_numpy(example()["state"])[None]  # without alternation it must change nothing
    expected = euler(velocity, head, noise, state, transformers_states(model, batch))
    assert (framework.actions(batch, None, noise) - expected).abs().max() < 1e-5
    assert (expected - noise).abs().max() > 0.1


@pytest.mark.parametrize("state", [True, False])
def test_starvla_oft_computes_the_same(vlms, tmp_path, state):
    model, weights = hf_weights(vlms["qwen2_5_vl"])
    shapes = {"model.layer_norm1": (32,), "model.layer_norm2": (64,)}
    shapes |= {f"model.mlp_resnet_blocks.{i}.ffn.0": (64,) for i in range(2)}
    shapes = {f"{name}.{end}": shape for name, shape in shapes.items() for end in ("weight", "bias")}
    for name, shape in {"fc1": (64, 32), "fc2": (D, 64)}.items():
        shapes |= {f"model.{name}.weight": shape, f"model.{name}.bias": shape[:1]}
    for i in range(2):
        shapes |= {
            f"model.mlp_resnet_blocks.{i}.ffn.1.weight": (64, 64),
            f"model.mlp_resnet_blocks.{i}.ffn.1.bias": (64,),
        }
    w = drawn(shapes)
    sentence = "Your task is {instruction}. Think."
    run = starvla_run(
        tmp_path / "theirs",
        weights,
        w,
        {"future_action_window_size": T - 1},
        include_state=state,
        cot=sentence,
    )
    ours = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}}
    assert convert(
        "starvla_oft", run, {"framework": ours, "policy": policy_section(state)}, tmp_path / "run"
    ).complete
    framework = loaded(tmp_path / "run")
    batch = framework.prepare([example(state=state)])
    tokenizer = framework.vlm.processor.tokenizer
    text = tokenizer.decode(batch["inputs"]["input_ids"][0])
    numbers = f" [STATE] {' '.join(str(b) for b in bins(example()['state']))} [ACTION]" if state else ""
    sentence = (
        f"open the drawer{numbers} Please predict the next {T} robot actions: <action>{'🔍' * T}<action>."
    )
    assert f"Your task is {sentence}. Think." in text
    word = tokenizer("🔍")["input_ids"][0]
    hidden = transformers_states(model, batch)[-1][batch["inputs"]["input_ids"] == word][None]
    x = torch.relu(dense(w, "model.fc1", norm(hidden, 1e-5, w, "model.layer_norm1")))
    for i in range(2):
        name = f"model.mlp_resnet_blocks.{i}.ffn"
        x = x + torch.relu(dense(w, f"{name}.1", norm(x, 1e-5, w, f"{name}.0")))
    expected = dense(w, "model.fc2", norm(x, 1e-5, w, "model.layer_norm2"))
    assert expected.shape == (1, T, D)
    assert (framework.actions(batch, None, None) - expected).abs().max() < 1e-5


def bins(state):
    """π0.5's: 256 equal bins on [-1, 1], and -1 for whatever is below."""
    return np.clip(np.floor((state.astype(np.float64) + 1) * 128), -1, 255).astype(int)


def test_starvla_fast_has_the_words(vlms, tmp_path):
    model, weights = hf_weights(vlms["qwen2_5_vl"], torch.bfloat16)
    old = {
        name.replace("model.visual", "visual").replace("model.language_model", "model"): t
        for name, t in weights.items()
    }
    run = starvla_run(tmp_path / "theirs", old, {}, {"action_horizon": 2}, include_state=False)
    ours = {
        "vlm": {"base_vlm": str(vlms["qwen2_5_vl"])},
        "action_model": {"tokenizer": None, "first_token_id": 4, "max_tokens": 4},
    }
    report = convert(
        "starvla_fast", run, {"framework": ours, "policy": policy_section(False)}, tmp_path / "run"
    )
    assert report.complete and not report.ignored
    framework = loaded(tmp_path / "run")
    for name, tensor in model.state_dict().items():
        assert torch.equal(framework.vlm.model.state_dict()[name], tensor.float()), name
    assert framework.token_ids[0] == 4


# ---------------------------------------------------------------- openpi and LeRobot


def openpi_names(pi05):
    """Public names and shapes, as in openpi's PyTorch models, for the sizes of the tiny PaliGemma."""
    config = json.loads((openpi_names.vlm / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    H, F, V, VF, W = (
        text["hidden_size"],
        text["intermediate_size"],
        vision["hidden_size"],
        vision["intermediate_size"],
        16,
    )
    head, heads = text["head_dim"], text["num_attention_heads"]
    tower = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
    shapes = {
        f"{tower}.embeddings.patch_embedding.weight": (V, 3, 16, 16),
        f"{tower}.embeddings.patch_embedding.bias": (V,),
    }
    shapes[f"{tower}.embeddings.position_embedding.weight"] = ((vision["image_size"] // 16) ** 2, V)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for n in ("k", "v", "q", "out"):
            shapes |= {f"{layer}.self_attn.{n}_proj.weight": (V, V), f"{layer}.self_attn.{n}_proj.bias": (V,)}
        shapes |= {
            f"{layer}.{n}.{e}": (V,) for n in ("layer_norm1", "layer_norm2") for e in ("weight", "bias")
        }
        shapes |= {f"{layer}.mlp.fc1.weight": (VF, V), f"{layer}.mlp.fc1.bias": (VF,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (V, VF), f"{layer}.mlp.fc2.bias": (V,)}
    shapes |= {f"{tower}.post_layernorm.{e}": (V,) for e in ("weight", "bias")}
    pali, expert = "paligemma_with_expert.paligemma", "paligemma_with_expert.gemma_expert"
    shapes |= {
        f"{pali}.model.multi_modal_projector.linear.weight": (H, V),
        f"{pali}.model.multi_modal_projector.linear.bias": (H,),
    }
    shapes |= {f"{pali}.model.language_model.embed_tokens.weight": (text["vocab_size"], H)}
    for prefix, width, inner in ((f"{pali}.model.language_model", H, F), (f"{expert}.model", W, 24)):
        adaptive = pi05 and prefix.startswith(expert)
        for i in range(text["num_hidden_layers"]):
            layer = f"{prefix}.layers.{i}"
            shapes |= {
                f"{layer}.self_attn.q_proj.weight": (heads * head, width),
                f"{layer}.self_attn.o_proj.weight": (width, heads * head),
            }
            shapes |= {f"{layer}.self_attn.{n}_proj.weight": (head, width) for n in "kv"}
            shapes |= {f"{layer}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
            shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
            for n in ("input_layernorm", "post_attention_layernorm"):
                shapes |= norm_shapes(f"{layer}.{n}", width, adaptive)
        shapes |= norm_shapes(f"{prefix}.norm", width, adaptive)
    shapes[f"{expert}.lm_head.weight"] = (text["vocab_size"], W)
    small = {"action_in_proj": (W, 8), "action_out_proj": (8, W)}
    small |= (
        {"time_mlp_in": (W, W), "time_mlp_out": (W, W)}
        if pi05
        else {
            "state_proj": (W, 8),
            "action_time_mlp_in": (W, 2 * W),
            "action_time_mlp_out": (W, W),
        }
    )
    for name, shape in small.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def norm_shapes(name, width, adaptive):
    return (
        {f"{name}.dense.weight": (3 * width, width), f"{name}.dense.bias": (3 * width,)}
        if adaptive
        else {f"{name}.weight": (width,)}
    )


@pytest.mark.parametrize(
    ("layout", "wrapper"), [("openpi_pi0", ""), ("openpi_pi0", "model."), ("openpi_pi05", "model.")]
)
def test_openpi_names_are_complete_both_ways(vlms, tmp_path, layout, wrapper):
    openpi_names.vlm = vlms["paligemma"]
    weights = drawn(openpi_names(layout == "openpi_pi05"))
    pali = "paligemma_with_expert.paligemma"
    weights[f"{pali}.lm_head.weight"] = weights[f"{pali}.model.language_model.embed_tokens.weight"].clone()
    if wrapper:  # LeRobot: another prefix, and one of two tied names as safetensors leaves it
        del weights[f"{pali}.model.language_model.embed_tokens.weight"]
        weights = {f"{wrapper}{name}": t.bfloat16() for name, t in weights.items()}
        weights["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(8)
    source = tmp_path / "theirs"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    if wrapper:  # its normaliser lies beside the weights, once for each direction
        features = (("action", D), ("observation.state", S))
        flat = {f"{key}.{n}": torch.tensor(v) for key, size in features for n, v in column(size).items()}
        save_file(flat, source / "policy_preprocessor_step_5_normalizer_processor.safetensors")
        save_file(flat, source / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    else:
        statistics = {"norm_stats": {key: column(n) for key, n in (("actions", D), ("state", S))}}
        (source / "norm_stats.json").write_text(json.dumps(statistics))
    head = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_inference_timesteps": 2}
    ours = {
        "vlm": {"base_vlm": str(vlms["paligemma"])},
        "action_horizon": T,
        "max_action_dim": 8,
        "max_state_dim": 8,
    }
    if layout == "openpi_pi05":
        head["adaptive_norm"] = True
    config = {"framework": {**ours, "action_model": head}, "policy": policy_section(dataset="droid")}
    report = convert(layout, source, config, tmp_path / "run")
    assert report.complete and len(report.ignored) == (2 if wrapper else 1)
    assert len(report.loaded) == len(weights) - len(report.ignored) + bool(
        wrapper
    )  # a tied one counts twice here
    framework = loaded(tmp_path / "run")
    key = f"{wrapper}paligemma_with_expert.gemma_expert.model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(framework.action_model.layers[1].self_attn.k_proj.weight, weights[key].float())
    assert torch.equal(
        framework.vlm.model.get_input_embeddings().weight, weights[f"{wrapper}{pali}.lm_head.weight"].float()
    )
    assert (tmp_path / "run/conversion.json").is_file()
    kept = load_statistics(tmp_path / "run/dataset_statistics.json")["droid"]
    assert kept["action"].q99.tolist() == [2.0] * D and kept["state"].std.tolist() == [1.5] * S


def test_a_missing_expert_is_reported_by_name(vlms, tmp_path):
    openpi_names.vlm = vlms["paligemma"]
    weights = {name: t for name, t in drawn(openpi_names(False)).items() if "action_time_mlp_out" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    head = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 4}
    ours = {"vlm": {"base_vlm": str(vlms["paligemma"])}, "action_horizon": T, "action_model": head}
    config = {"framework": {**ours, "max_action_dim": 8, "max_state_dim": 8}, "policy": policy_section()}
    with pytest.raises(
        ValueError,
        match=r"(?s)2 missing.*action_model.action_time_mlp_out.weight \(looked for action_time_mlp_out.weight\)",
    ):
        convert("openpi_pi0", tmp_path / "model.safetensors", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- NVIDIA's GR00T N1.5


def gr00t_refined(w, x):
    """vlln, then plain self-attention layers on the backbone's states."""
    x = norm(x, 1e-5, w, "vlln")
    for i in range(2):
        b = f"vl_self_attention.transformer_blocks.{i}"
        y = norm(x, 1e-5, w, f"{b}.norm1")
        x = x + attend(w, f"{b}.attn1", y, y, 2)
        y = nn.functional.gelu(
            dense(w, f"{b}.ff.net.0.proj", norm(x, 1e-5, w, f"{b}.norm3")), approximate="tanh"
        )
        x = x + dense(w, f"{b}.ff.net.2", y)
    return x


def gr00t_checkpoint(robots=32):
    """The public head with one set of encoders per robot, and the same of robot 31 alone in StarVLA's names."""
    w = drawn(flow_shapes(32, INNER, INNER, all_cross=False))
    shapes = {"vlln.weight": (32,), "vlln.bias": (32,)}
    for i in range(2):
        b = f"vl_self_attention.transformer_blocks.{i}"
        shapes |= {f"{b}.{n}.{e}": (32,) for n in ("norm1", "norm3") for e in ("weight", "bias")}
        for n, out, into in (("ff.net.0.proj", 128, 32), ("ff.net.2", 32, 128)):
            shapes |= {f"{b}.{n}.weight": (out, into), f"{b}.{n}.bias": (out,)}
        for n in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= {f"{b}.attn1.{n}.weight": (32, 32), f"{b}.attn1.{n}.bias": (32,)}
    w |= drawn(shapes, 5)
    public = {}
    for name, tensor in w.items():
        if not name.startswith(("state_encoder", "action_encoder", "action_decoder")):
            public[name] = tensor
            continue
        module, layer, end = name.split(".")
        layer = layer.replace("layer", "W") if module == "action_encoder" else layer
        others = torch.randn(robots, *(tensor.T if tensor.ndim == 2 else tensor).shape)
        others[31] = tensor.T if tensor.ndim == 2 else tensor
        public[f"{module}.{layer}.{'W' if end == 'weight' else 'b'}"] = others
    return w, {f"action_head.{name}": tensor for name, tensor in public.items()}


def eagle_checkpoint(folder, projector):
    """A tiny Eagle, and its weights under public names."""
    for kind in ("siglip", "qwen3"):
        write_tiny_component(kind, folder / kind, image_size=32, hidden_size=32, num_layers=2)
    eagle = compose_eagle(folder / "siglip", folder / "qwen3", projector=projector)
    eagle.model.save_pretrained(folder / "eagle")
    eagle.save_config(folder / "eagle")
    theirs = {
        "model.vision_backbone.siglip": "vision_model.vision_model",
        "model.language_model": "language_model.model",
    }
    theirs |= {
        "model.projector.linear": "mlp1.0",
        "model.projector.layers": "mlp1",
        "lm_head": "language_model.lm_head",
    }
    public = {}
    for name, tensor in eagle.model.state_dict().items():
        for ours, public_name in theirs.items():
            if name.startswith(f"{ours}."):
                public[f"backbone.eagle_model.{public_name}{name[len(ours) :]}"] = tensor.clone()
    return eagle, public


def test_gr00t_n15_computes_the_same(tmp_path):
    eagle, weights = eagle_checkpoint(tmp_path, "Linear")
    plain, head = gr00t_checkpoint()
    save_file({**weights, **head}, tmp_path / "model.safetensors")
    sizes = {
        "hidden_size": WIDTH,
        "num_layers": 2,
        "num_heads": HEADS,
        "mlp_size": INNER,
        "output_size": INNER,
    }
    sizes |= {"num_vl_layers": 2, "num_vl_heads": 2, "num_future_tokens": FUTURE, "max_positions": ROWS}
    ours = {
        "vlm": {"base_vlm": f"{tmp_path}/eagle"},
        "action_horizon": T,
        "max_action_dim": D,
        "max_state_dim": S,
    }
    statistics = {"new": {"action": column(D), "state": column(S)}}
    (tmp_path / "statistics.json").write_text(json.dumps(statistics))
    policy = policy_section(statistics=str(tmp_path / "statistics.json"))
    config = {"framework": {**ours, "action_model": sizes}, "policy": policy}
    assert convert("gr00t_n15", tmp_path / "model.safetensors", config, tmp_path / "run").complete
    framework = loaded(tmp_path / "run")
    batch = framework.prepare([example()])
    noise = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = gr00t_refined(plain, eagle(batch["inputs"]).hidden)
    expected = euler(gr00t_velocity, plain, noise, batch["state"], [hidden])
    assert (framework.actions(batch, None, noise) - expected).abs().max() < 1e-5


def test_a_fluxvla_configuration_loads_gr00t_by_its_own_mapping(tmp_path, capsys):
    eagle, weights = eagle_checkpoint(tmp_path, "Linear")
    plain, head = gr00t_checkpoint()
    save_file({**weights, **head}, tmp_path / "model.safetensors")
    flow = {"type": "FlowMatchingHead", "state_dim": S, "action_dim": D, "num_steps": T, "traj_length": 99}
    flow |= {
        "hidden_size": INNER,
        "input_embedding_dim": WIDTH,
        "max_seq_len": ROWS,
        "num_target_vision_tokens": FUTURE,
    }
    flow |= {"diffusion_model_cfg": {"num_layers": 2, "num_attention_heads": HEADS, "dropout": 0.2}}
    flow |= {"vl_self_attention_cfg": {"num_layers": 2, "num_attention_heads": 2}}
    model = {
        "type": "LlavaVLA",
        "vlm_backbone": {"type": "EagleBackbone", "vlm_path": f"{tmp_path}/eagle"},
        "vla_head": flow,
        "pretrained_name_or_path": f"{tmp_path}/model.safetensors",
        "name_mapping": {"vlm_backbone.vlm": "backbone.eagle_model", "vla_head": "action_head"},
    }
    assert any("traj_length = 99 is left out" in line for line in remarks(model))
    framework = build_framework(from_fluxvla(model), action_dim=D, state_dim=S).eval()
    count = len(framework.state_dict())
    assert f"loaded {count} of the model's {count} tensors" in capsys.readouterr().out
    framework.save_pretrained(tmp_path / "saved")
    framework = Framework.from_pretrained(tmp_path / "saved")  # the mapping is data, so it is saved
    batch = framework.prepare([example()])
    noise = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = gr00t_refined(plain, eagle(batch["inputs"]).hidden)
    expected = euler(gr00t_velocity, plain, noise, batch["state"], [hidden])
    assert (framework.actions(batch, None, noise) - expected).abs().max() < 1e-5


# ---------------------------------------------------------------- OpenVLA: vision transformers as timm writes them


def timm_shapes(prefix, width, inner, depth, patches, registers):
    shapes = {
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, patches, width),
    }
    if registers:
        shapes |= {"cls_token": (1, 1, width), "reg_token": (1, registers, width)}
    else:
        shapes |= {"attn_pool.latent": (1, 1, width), "attn_pool.kv.weight": (2 * width, width)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.norm{k}.{e}": (width,) for k in (1, 2) for e in ("weight", "bias")}
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        if registers:
            shapes |= {f"blocks.{i}.ls{k}.scale_factor": (width,) for k in (1, 2)}
    shapes |= {f"norm.{e}": (width,) for e in ("weight", "bias")}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def timm_patches(w, prefix, pixels, heads, depth, approximate):
    """Block by block up to the last but one, patches only."""
    w = {name.removeprefix(f"{prefix}."): t for name, t in w.items() if name.startswith(f"{prefix}.")}
    x = nn.functional.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).mT + w["pos_embed"]
    front = [w[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in w]
    count, x = x.shape[1], torch.cat([*front, x], dim=1)
    for i in range(depth - 1):
        b = f"blocks.{i}"
        qkv = dense(w, f"{b}.attn.qkv", norm(x, 1e-6, w, f"{b}.norm1"))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v).transpose(1, 2).flatten(2)
        x = x + dense(w, f"{b}.attn.proj", mixed) * w.get(f"{b}.ls1.scale_factor", 1)
        inner = nn.functional.gelu(
            dense(w, f"{b}.mlp.fc1", norm(x, 1e-6, w, f"{b}.norm2")), approximate=approximate
        )
        x = x + dense(w, f"{b}.mlp.fc2", inner) * w.get(f"{b}.ls2.scale_factor", 1)
    return x[:, -count:]


def test_openvla_computes_the_same(tmp_path):
    for kind in ("dinov2_with_registers", "siglip", "llama"):
        write_tiny_component(kind, tmp_path / kind, image_size=32, hidden_size=32, num_layers=3)
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    llama.resize_token_embeddings(448, mean_resizing=False)
    w = {f"language_model.{name}": t.clone() for name, t in llama.state_dict().items()}
    dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    w |= drawn(timm_shapes(dino, 32, 64, 3, 4, 2), 1) | drawn(timm_shapes(siglip, 32, 64, 3, 4, 0), 2)
    sizes = {"fc1": (256, 64), "fc2": (32, 256), "fc3": (32, 32)}
    w |= drawn(
        {
            f"projector.{n}.{e}": s if e == "weight" else s[:1]
            for n, s in sizes.items()
            for e in ("weight", "bias")
        }
    )
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(w)}
    (tmp_path / "hub").mkdir()
    for file in set(index.values()):
        save_file({name: t for name, t in w.items() if index[name] == file}, tmp_path / "hub" / file)
    (tmp_path / "hub/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    statistics = {
        "bridge_orig": {"action": column(D) | {"mask": [True, True, False]}},
        "fractal": {"action": column(D)},
    }
    (tmp_path / "hub/config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": statistics}))
    eyes = {
        "type": "DinoSigLIP",
        "dinov2_path": f"{tmp_path}/dinov2_with_registers",
        "siglip_path": f"{tmp_path}/siglip",
    }
    parts = {
        "vision_backbone": eyes,
        "projector": {"type": "FusedMLP"},
        "llm_backbone": {"type": "Llama", "path": f"{tmp_path}/llama"},
    }
    config = {"framework": {"vlm": parts}, "policy": policy_section(False, dataset="bridge_orig")}
    report = convert("openvla", tmp_path / "hub", config, tmp_path / "run")
    assert report.complete and all(
        "blocks.2." in n or "norm." in n or "attn_pool" in n for n in report.ignored
    )
    framework = loaded(tmp_path / "run")
    assert Policy.from_pretrained(tmp_path / "run").spec.normalization["action"] == ["q99", "q99", "identity"]
    inputs = framework.prepare([example(state=False)])["inputs"]
    views = inputs["pixel_values"].split(3, dim=1)
    patches = [timm_patches(w, dino, views[0], 4, 3, "none"), timm_patches(w, siglip, views[1], 4, 3, "tanh")]
    x = torch.cat(patches, dim=-1)
    for name in ("fc1", "fc2"):
        x = nn.functional.gelu(dense(w, f"projector.{name}", x))
    x = dense(w, "projector.fc3", x)
    ids = inputs["input_ids"]
    words = llama.get_input_embeddings()(ids)
    assert (ids[0, 1:5] == framework.vlm.config.image_token_id).all()  # behind the beginning-of-text token
    with torch.no_grad():
        expected = llama.model(
            inputs_embeds=torch.cat([words[:, :1], x, words[:, 5:]], dim=1)
        ).last_hidden_state
        found = framework.vlm(inputs).hidden
    assert (found - expected).abs().max() < 1e-5
    assert framework.token_ids[0] == 448 - 64 - 1


# ---------------------------------------------------------------- faults


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.vlm, self.vlm_extra = nn.Linear(2, 2), nn.Linear(2, 2)
        self.a = nn.ModuleDict({"vlm": nn.Linear(2, 2)})
        self.register_buffer("mean", torch.zeros(2))


def small_weights(**change):
    names = {"x": "backbone", "y": "vlm_extra", "z": "a.vlm"}
    weights = {
        f"{n}.{e}": torch.full((2, 2) if e == "weight" else (2,), float(i))
        for i, n in enumerate(names.values())
        for e in ("weight", "bias")
    }
    return weights | {"mean": torch.full((2,), 7.0)} | change


def test_prefixes_are_not_substrings():
    model = Small()
    report = load_mapped(model, small_weights(), {"vlm": "backbone"})
    assert len(report.loaded) == 7
    filled = [float(m.weight.detach()[0, 0]) for m in (model.vlm, model.vlm_extra, model.a["vlm"])]
    assert filled == [0.0, 1.0, 2.0] and model.mean[0] == 7


@pytest.mark.parametrize(
    ("weights", "mapping", "message"),
    [
        (
            small_weights(),
            {"vlm": "backbon"},
            "nothing in the checkpoint begins with 'backbon'; did you mean 'backbone'",
        ),
        (small_weights(), {"vl": "backbone"}, "nothing in the model begins with 'vl'; did you mean 'vlm'"),
        (small_weights(), {}, "did you mean|2 missing"),
        (
            small_weights(**{"backbone.weight": torch.ones(2, 3)}),
            {"vlm": "backbone"},
            r"vlm.weight: \[2, 2\] here, \[2, 3\]",
        ),
        (small_weights(extra=torch.ones(1)), {"vlm": "backbone"}, "1 unexpected"),
        (small_weights(), {"vlm": "backbone", "vlm_extra": "backbone"}, "would both be filled from"),
        ({"q": torch.ones(1)}, {}, "not one weight was loaded"),
    ],
)
def test_a_refused_checkpoint_changes_nothing(weights, mapping, message):
    model = Small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_mapped(model, weights, mapping)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_parts_of_one_matrix_land_in_order():
    model = nn.ModuleDict({n: nn.Linear(2, 2, bias=False) for n in "qkv"})
    stacked = torch.arange(12.0).reshape(6, 2)
    load_mapped(
        model, {"attn.qkv.weight": stacked}, {n: Take("attn.qkv", part=(i, 3)) for i, n in enumerate("qkv")}
    )
    assert torch.equal(torch.cat([model[n].weight.data for n in "qkv"]), stacked)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_unsafe_and_damaged_files(tmp_path):
    torch.save({"w": torch.ones(1), "x": Bomb(tmp_path / "boom")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="may use to run code"):
        read_weights(tmp_path / "bomb.pth")
    assert not (tmp_path / "boom").exists()
    save_file({"w": torch.ones(64)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        read_weights(tmp_path / "cut.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, folder / "1.safetensors")
    with pytest.raises(FileNotFoundError, match="not there: 2.safetensors"):
        read_weights(folder)
    save_file({"c": torch.ones(1)}, folder / "2.safetensors")
    with pytest.raises(ValueError, match="do not hold: b"):
        read_weights(folder)


@pytest.mark.parametrize(
    "content", [{}, [1], {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": "/etc/hosts"}}]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        read_weights(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="model.safetensors.index.json is not JSON"):
        read_weights(folder)
    index.write_text(json.dumps({"weight_map": {"a": "sub/../../outside.safetensors"}}))
    with pytest.raises(ValueError, match="expected a file in this folder"):
        read_weights(folder)


def test_every_damaged_pickle_is_called_damaged(tmp_path):
    path, draw = tmp_path / "w.pt", random.Random(0)
    torch.save({"model": {"a": torch.ones(3, 3)}}, path)
    zipped = path.read_bytes()
    torch.save({"a": torch.ones(3, 3)}, path, _use_new_zipfile_serialization=False)
    for whole in (zipped, path.read_bytes()):
        for _ in range(100):
            path.write_bytes(whole[: draw.randrange(len(whole))])
            with pytest.raises(ValueError, match="w.pt is damaged"):
                read_weights(path)


@pytest.mark.parametrize(
    ("take", "tensor", "message"),
    [
        (
            Take("w", index=31),
            torch.ones(4, 2, 2),
            r"\[2, 2\] here, \[4, 2, 2\] in w \(index 31 is out of bounds",
        ),
        (Take("w", transpose=True), torch.ones(4), r"\[2, 2\] here, \[4\] in w \(Dimension out of range"),
        (Take("w", first_rows=True), torch.tensor(1.0), r"\[2, 2\] here, \[\] in w \("),
        (Take("w", squeeze=True), torch.tensor(1.0), r"\[2, 2\] here, \[\] in w \("),
        (Take("w", part=(0, 3)), torch.tensor(1.0), r"\[2, 2\] here, \[\] in w \("),
        (Take("w", index=4), torch.ones(2, 2), r"\[2, 2\] here, \[2, 2\] in w \(index 4 is out of bounds"),
    ],
)
def test_a_tensor_that_cannot_be_taken_is_reported(take, tensor, message):
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    weights = {"w": tensor, "bias": torch.full((2,), 7.0)}
    with pytest.raises(ValueError, match=message):
        load_mapped(model, weights, {"weight": take})
    report = load_mapped(model, weights, {"weight": take}, strict=False)
    assert report.wrong_shape == ("weight",) and report.loaded == ("bias",)
    assert torch.equal(model.weight, before) and model.bias[0] == 7


def test_a_rare_event_survives_statistics_without_extremes(tmp_path):
    rare = np.zeros(1000)
    rare[:5] = 1
    q01, q99 = np.quantile(rare, [0.01, 0.99])
    values = {"mean": rare.mean(), "std": rare.std(), "q01": q01, "q99": q99}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"actions": {key: [value] for key, value in values.items()}}}))
    settings = {"action": {"names": ["a"]}, "cameras": ["front"], "image_size": [32, 32], "control_rate": 10}
    spec, content = policy_spec(PolicySettings(**settings, normalization={"action": "mean_std"}), 4, path)
    save_statistics(tmp_path / "saved.json", content)
    normalizer = Normalizer(load_statistics(tmp_path / "saved.json")["openpi"]["action"], "mean_std")
    assert normalizer.unnormalize(normalizer.normalize(np.array([1.0]))) == pytest.approx(1)
    for mode in ("min_max", "binary"):
        with pytest.raises(
            ValueError, match=f"norm_stats.json: openpi.action: .* no extremes, which {mode} needs"
        ):
            policy_spec(PolicySettings(**settings, normalization={"action": mode}), 4, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "framework is missing"),
        ("[1]", "config.yaml holds a list"),
        ("a: [1", "config.yaml cannot be read as YAML"),
        ("framework: {qwenvl: {base_vlm: x}}", "framework.action_model is missing"),
        ("framework: {qwenvl: {base_vlm: x}, action_model: {}}", "framework.action_model says no length"),
        (
            "framework: {qwenvl: {base_vlm: x}, action_model: {action_horizon: 4}}\ndatasets: null",
            "is damaged",
        ),
    ],
)
def test_a_broken_starvla_configuration_is_one_line(vlms, tmp_path, capsys, text, message):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/steps_1_pytorch_model.pt").touch()
    (tmp_path / "config.yaml").write_text(text)
    ours = {"framework": {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}}, "policy": policy_section(False)}
    ours["framework"]["action_model"] = {"hidden_size": WIDTH, "num_heads": HEADS, "num_layers": 1}
    OmegaConf.save(OmegaConf.create(ours), tmp_path / "ours.yaml")
    words = ["--layout", "starvla_gr00t", str(tmp_path), "--config", str(tmp_path / "ours.yaml")]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_the_program_lists_and_refuses(capsys):
    main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in LAYOUTS)
    with pytest.raises(SystemExit) as stopped:
        main(["--layout", "openpi_pi0", "x", "--config", "no.yaml", "--out", "y"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
