"""What a converted checkpoint computes, against implementations written from the public equations."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from vla_bench.config import Config, ConfigError, load_config
from vla_bench.data.normalize import load_statistics
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.features import Features
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead
from vla_bench.models.interop.checkpoint_formats import CHECKPOINT_FORMATS
from vla_bench.models.interop.convert import convert, policy_settings
from vla_bench.models.interop.weights import LoadReport
from vla_bench.serving.policy import Policy

D, S, T = 3, 4, 5  # numbers in an action and in a state, actions in a chunk; as in published.py
DINO, SIGLIP = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
PALIGEMMA = "paligemma_with_expert.paligemma"
EXPERT = "paligemma_with_expert.gemma_expert"


@dataclass
class Converted:
    """A checkpoint of random weights under public names, and the run that it became."""

    published: ModuleType
    run: Path
    report: LoadReport
    weights: dict[str, Tensor]  # of the head, or of everything, by public names
    model: Any = None  # the backbone, by an implementation that is not ours
    state: bool = True  # whether the policy reads one

    @cached_property
    def framework(self) -> Framework:
        return Framework.from_pretrained(self.run / "checkpoints/step_000000")

    @cached_property
    def batch(self) -> dict:
        return self.framework.prepare([self.published.example(state=self.state)])

    def actions(self, noise: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self.framework.actions(self.batch, None, noise)

    def states(self) -> tuple[Tensor, ...]:
        """The hidden states of the backbone by transformers itself, layer by layer."""
        return self.published.transformers_states(self.model, self.batch["inputs"])


# ---------------------------------------------------------------- StarVLA


def starvla_gr00t(
    published, vlms, home, kind: str, state: bool, suffix: str, all_cross: str = ""
) -> Converted:
    """With a key that `all_cross` names set to false, in a run that was given states although no action depends on them."""
    model, weights = published.hf_weights(vlms[kind])
    sizes = starvla_gr00t_sizes(published, all_cross)
    wide = all_cross == "interleave_self_attention"  # the odd blocks are built for the backbone's width
    head = published.drawn(published.flow_shapes(32, sizes.inner, sizes.inner, all_cross=wide, sizes=sizes))
    dit = {"num_layers": 2, "output_dim": sizes.inner, "num_attention_heads": sizes.heads}
    dit |= {"attention_head_dim": sizes.width // sizes.heads} | ({all_cross: False} if all_cross else {})
    action_model = flow_section(sizes) | {"hidden_size": sizes.inner, "diffusion_model_cfg": dit}
    run = published.starvla_run(
        home / "theirs", weights, head, action_model, include_state=state or bool(all_cross), suffix=suffix
    )
    config = {"framework": {"vlm": {"base_vlm": str(vlms[kind])}}, "policy": published.policy_section(state)}
    report = convert("starvla_gr00t", run, config, home / "run")
    return Converted(published, home / "run", report, head, model, state)


def starvla_gr00t_sizes(published, all_cross: str):
    """Blocks that were built to attend to their tokens can only read a backbone of their own width."""
    wide = all_cross == "use_canonical_forward"
    return published.FlowSizes(width=32, heads=4) if wide else published.SIZES


def starvla_pi(published, vlms, home, alternating: bool, **keys) -> Converted:
    sizes = starvla_pi_sizes(published, alternating)
    model, weights = published.hf_weights(vlms["qwen2_5_vl"])
    head = published.drawn(published.flow_shapes(32, 1024, 32, all_cross=True, sizes=sizes))
    dit = {"num_attention_heads": 2, "attention_head_dim": 16} if alternating else {}
    layout = {key: keys.pop(key) for key in ("layerwise_attention_layout",) if key in keys}
    action_model = flow_section(sizes) | layout | {"diffusion_model_cfg": dit | keys}
    run = published.starvla_run(home / "theirs", weights, head, action_model, include_state=True)
    framework = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}}
    config = {"framework": framework, "policy": published.policy_section(alternating)}
    report = convert("starvla_pi", run, config, home / "run")
    return Converted(published, home / "run", report, head, model, alternating)


def starvla_pi_sizes(published, alternating: bool):
    """As wide as the language model; one attention head per 64 numbers, unless the run has another number."""
    return published.FlowSizes(width=32, heads=2 if alternating else 1)


def flow_section(sizes) -> dict:
    """What both flow heads have in StarVLA's configuration."""
    section = {"num_target_vision_tokens": sizes.future, "max_seq_len": sizes.rows}
    return section | {"num_inference_timesteps": 4, "action_horizon": T}


def starvla_oft(published, vlms, home, state: bool) -> Converted:
    model, weights = published.hf_weights(vlms["qwen2_5_vl"])
    w = published.residual_head_weights()
    action_model, prompt = {"future_action_window_size": T - 1}, "Your task is {instruction}. Think."
    run = published.starvla_run(home / "theirs", weights, w, action_model, include_state=state, prompt=prompt)
    framework = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}}
    config = {"framework": framework, "policy": published.policy_section(state)}
    report = convert("starvla_oft", run, config, home / "run")
    return Converted(published, home / "run", report, w, model, state)


def starvla_fast(published, vlms, home) -> Converted:
    """Without a head, in bfloat16, and with the names of transformers before 4.52."""
    model, weights = published.hf_weights(vlms["qwen2_5_vl"], torch.bfloat16)
    old = lambda name: name.replace("model.visual", "visual").replace("model.language_model", "model")
    weights = {old(name): tensor for name, tensor in weights.items()}
    run = published.starvla_run(home / "theirs", weights, {}, {"action_horizon": 2}, include_state=False)
    head = {"tokenizer": None, "first_token_id": 4, "max_tokens": 4}
    framework = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}, "action_model": head}
    config = {"framework": framework, "policy": published.policy_section(False)}
    report = convert("starvla_fast", run, config, home / "run")
    return Converted(published, home / "run", report, {}, model, False)


# ---------------------------------------------------------------- openpi and LeRobot


def openpi(published, vlms, home, format_name: str, wrapper: str) -> Converted:
    """Both tied names and a norm_stats.json; with a wrapper one of them, bfloat16 and LeRobot's normaliser."""
    weights = published.drawn(published.openpi_shapes(vlms["paligemma"], format_name == "openpi_pi05"))
    embedding = f"{PALIGEMMA}.model.language_model.embed_tokens.weight"
    weights[f"{PALIGEMMA}.lm_head.weight"] = weights[embedding].clone()
    source = home / "theirs"
    source.mkdir()
    if wrapper:
        del weights[embedding]
        weights = {f"{wrapper}{name}": t.bfloat16() for name, t in weights.items()}
        weights["normalize_inputs.buffer_observation_state.mean"] = torch.zeros(8)
        features = (("action", D), ("observation.state", S))
        flat = {
            f"{key}.{n}": torch.tensor(v) for key, size in features for n, v in published.column(size).items()
        }
        save_file(flat, source / "policy_preprocessor_step_5_normalizer_processor.safetensors")
        save_file(flat, source / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    else:
        statistics = {"norm_stats": {"actions": published.column(D), "state": published.column(S)}}
        (source / "norm_stats.json").write_text(json.dumps(statistics))
    save_file(weights, source / "model.safetensors")
    head = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_inference_timesteps": 2}
    head |= {"adaptive_norm": True} if format_name == "openpi_pi05" else {}
    framework = {"vlm": {"base_vlm": str(vlms["paligemma"])}, "action_horizon": T, "action_model": head}
    framework |= {"max_action_dim": 8, "max_state_dim": 8}
    config = {"framework": framework, "policy": published.policy_section(dataset="droid")}
    report = convert(format_name, source, config, home / "run")
    return Converted(published, home / "run", report, weights)


# ---------------------------------------------------------------- GR00T N1.5 and OpenVLA


def gr00t_n15(published, vlms, home) -> Converted:
    eagle, head = published.gr00t_checkpoint(home)
    sizes = published.SIZES
    action_model = {"hidden_size": sizes.width, "num_layers": 2, "num_heads": sizes.heads}
    action_model |= {"mlp_size": sizes.inner, "output_size": sizes.inner, "num_vl_layers": 2}
    action_model |= {"num_vl_heads": 2, "num_future_tokens": sizes.future, "max_positions": sizes.rows}
    framework = {"vlm": {"base_vlm": f"{home}/eagle"}, "action_horizon": T, "action_model": action_model}
    framework |= {"max_action_dim": D, "max_state_dim": S}
    statistics = {"new": {"action": published.column(D), "state": published.column(S)}}
    (home / "statistics.json").write_text(json.dumps(statistics))
    policy = published.policy_section(statistics=str(home / "statistics.json"))
    config = {"framework": framework, "policy": policy}
    report = convert("gr00t_n15", home / "model.safetensors", config, home / "run")
    return Converted(published, home / "run", report, head, eagle)


def gr00t_n17(published, vlms, home, prefix: str) -> Converted:
    """As NVIDIA publishes it, with its configuration; and as LeRobot saves it, whose configuration says less."""
    model, weights = published.hf_weights(vlms["qwen3_vl"])
    head, public = published.n17_head_weights()
    tensors = {
        f"backbone.model.{name}": t for name, t in weights.items() if name != "lm_head.weight"
    } | public
    save_file({f"{prefix}{name}": t.clone() for name, t in tensors.items()}, home / "model.safetensors")
    action_model = {"num_heads": published.SIZES.heads, "num_vl_heads": 2}
    framework = {
        "vlm": {"base_vlm": str(vlms["qwen3_vl"])},
        "action_horizon": T,
        "action_model": action_model,
    }
    corrections = ()
    if not prefix:
        (home / "config.json").write_text(json.dumps(published.N17_CONFIG))
        (home / "embodiment_id.json").write_text(json.dumps({"new_embodiment": published.N17_ROW}))
        del framework["action_horizon"]
    else:
        lerobot = {
            "type": "groot",
            "model_version": "n1.7",
            "chunk_size": 16,
            "embodiment_tag": "new_embodiment",
        }
        lerobot |= {"normalization_mapping": {"ACTION": "MEAN_STD", "STATE": "MEAN_STD"}}
        (home / "config.json").write_text(json.dumps(lerobot))
        corrections = (f"embodiment_row={published.N17_ROW}",)
    statistics = {"new": {"action": published.column(D), "state": published.column(S)}}
    (home / "statistics.json").write_text(json.dumps(statistics))
    policy = published.policy_section(statistics=str(home / "statistics.json"))
    config = {"framework": framework, "policy": policy}
    report = convert("gr00t_n17", home / "model.safetensors", config, home / "run", corrections)
    return Converted(published, home / "run", report, head, model)


def timm_shapes(
    published, prefix: str, width: int, inner: int, depth: int, patches: int, registers: int
) -> dict:
    """A vision transformer as timm names it; DINOv2 when it has registers, SigLIP otherwise."""
    shapes = {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= {"pos_embed": (1, patches, width)} | published.affine("norm", width)
    if registers:
        shapes |= {"cls_token": (1, 1, width), "reg_token": (1, registers, width)}
    else:
        shapes |= {"attn_pool.latent": (1, 1, width), "attn_pool.kv.weight": (2 * width, width)}
    for i in range(depth):
        b = f"blocks.{i}"
        shapes |= published.affine(f"{b}.norm1", width) | published.affine(f"{b}.norm2", width)
        shapes |= published.linear(f"{b}.attn.qkv", 3 * width, width)
        shapes |= published.linear(f"{b}.attn.proj", width, width)
        shapes |= published.linear(f"{b}.mlp.fc1", inner, width) | published.linear(
            f"{b}.mlp.fc2", width, inner
        )
        if registers:
            shapes |= {f"{b}.ls{k}.scale_factor": (width,) for k in (1, 2)}
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def timm_patches(published, w, prefix, pixels, heads, depth, approximate) -> Tensor:
    """Block by block up to the last but one, patches only."""
    dense, norm = published.dense, published.norm
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
        inner = dense(w, f"{b}.mlp.fc1", norm(x, 1e-6, w, f"{b}.norm2"))
        inner = nn.functional.gelu(inner, approximate=approximate)
        x = x + dense(w, f"{b}.mlp.fc2", inner) * w.get(f"{b}.ls2.scale_factor", 1)
    return x[:, -count:]


def openvla(published, vlms, home) -> Converted:
    """Two shards with an index, statistics of two datasets in config.json."""
    for kind in ("dinov2_with_registers", "siglip", "llama"):
        write_tiny_component(kind, home / kind, image_size=32, hidden_size=32, num_layers=3)
    llama = LlamaForCausalLM.from_pretrained(home / "llama").eval()
    llama.resize_token_embeddings(448, mean_resizing=False)
    w = {f"language_model.{name}": t.clone() for name, t in llama.state_dict().items()}
    w |= published.drawn(timm_shapes(published, DINO, 32, 64, 3, 4, 2), 1)
    w |= published.drawn(timm_shapes(published, SIGLIP, 32, 64, 3, 4, 0), 2)
    sizes = {"fc1": (256, 64), "fc2": (32, 256), "fc3": (32, 32)}
    shapes = [published.linear(f"projector.{name}", *size) for name, size in sizes.items()]
    w |= published.drawn(functools.reduce(dict.__or__, shapes))
    source = home / "hub"
    source.mkdir()
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(w)}
    for file in set(index.values()):
        save_file({name: t for name, t in w.items() if index[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    bridge = published.column(D) | {"mask": [True, True, False]}
    statistics = {"bridge_orig": {"action": bridge}, "fractal": {"action": published.column(D)}}
    (source / "config.json").write_text(json.dumps({"model_type": "openvla", "norm_stats": statistics}))
    vision = {"type": "DinoSigLIP", "dinov2_path": f"{home}/dinov2_with_registers"}
    vlm = {"vision_backbone": vision | {"siglip_path": f"{home}/siglip"}, "projector": {"type": "FusedMLP"}}
    vlm |= {"llm_backbone": {"type": "Llama", "path": f"{home}/llama"}}
    policy = published.policy_section(False, dataset="bridge_orig")
    report = convert("openvla", source, {"framework": {"vlm": vlm}, "policy": policy}, home / "run")
    return Converted(published, home / "run", report, w, llama, False)


# ---------------------------------------------------------------- every case

PI = [  # (name, whether the odd blocks attend to the action tokens, what the run's configuration says of it)
    ("silent", True, {}),
    ("interleaved", True, {"interleave_self_attention": True}),
    ("canonical", True, {"use_canonical_forward": True}),
    ("both", True, {"interleave_self_attention": True, "use_canonical_forward": True}),
    ("legacy", False, {"use_canonical_forward": False}),
    ("all_cross", False, {"interleave_self_attention": False}),
    ("canonical_all_cross", False, {"interleave_self_attention": False, "use_canonical_forward": True}),
    ("interleaved_legacy", False, {"interleave_self_attention": True, "use_canonical_forward": False}),
    ("layout_all_cross", False, {"layerwise_attention_layout": "legacy_all_cross"}),
    ("layout_alternating", True, {"layerwise_attention_layout": "alternating"}),
]


def pi_case(alternating: bool, **keys) -> Callable[..., Converted]:
    return lambda published, vlms, home: starvla_pi(published, vlms, home, alternating, **keys)


CASES: dict[str, tuple[Callable[..., Converted], tuple, int | None]] = {  # and how many tensors are left out
    "starvla_gr00t": (starvla_gr00t, ("qwen2_5_vl", True, "pt"), 0),
    "starvla_gr00t-stateless": (starvla_gr00t, ("qwen3_vl", False, "safetensors"), 4),
    "starvla_gr00t-legacy": (starvla_gr00t, ("qwen2_5_vl", False, "pt", "use_canonical_forward"), 5),
    "starvla_gr00t-all_cross": (starvla_gr00t, ("qwen2_5_vl", False, "pt", "interleave_self_attention"), 5),
    **{f"starvla_pi-{name}": (pi_case(alternating, **keys), (), None) for name, alternating, keys in PI},
    "starvla_oft": (starvla_oft, (True,), None),
    "starvla_oft-stateless": (starvla_oft, (False,), None),
    "starvla_fast": (starvla_fast, (), 0),
    "openpi_pi0": (openpi, ("openpi_pi0", ""), 1),
    "openpi_pi0-lerobot": (openpi, ("openpi_pi0", "model."), 2),
    "openpi_pi05-lerobot": (openpi, ("openpi_pi05", "model."), 2),
    "gr00t_n15": (gr00t_n15, (), None),
    "gr00t_n17": (gr00t_n17, ("",), 0),
    "gr00t_n17-lerobot": (gr00t_n17, ("_groot_model.",), 0),
    "openvla": (openvla, (), None),
}
N17 = [case for case in CASES if case.startswith("gr00t_n17")]
OPENPI = [case for case in CASES if case.startswith("openpi")]


@pytest.fixture(scope="module")
def converted(published, vlms, tmp_path_factory) -> Callable[[str], Converted]:
    """`converted(case)`: made when it is first asked for, and shared by the tests of this file."""

    @functools.cache
    def make(case: str) -> Converted:
        write, options, _ = CASES[case]
        return write(published, vlms, tmp_path_factory.mktemp(case), *options)

    return make


@pytest.mark.parametrize("case", CASES)
def test_every_weight_finds_its_place(converted, case):
    report, ignored = converted(case).report, CASES[case][2]
    assert report.complete
    assert ignored is None or len(report.ignored) == ignored, report.ignored


@pytest.mark.parametrize("case", CASES)
def test_the_policy_predicts_a_chunk(converted, published, case):
    policy = Policy.from_pretrained(converted(case).run)
    observation = published.example(3, state=policy.spec.state is not None)
    chunk = policy.predict(observation, seed=0)
    assert chunk.shape == (policy.spec.horizon, policy.spec.action.dim)
    assert np.isfinite(chunk).all()


@pytest.mark.parametrize("case", ["starvla_gr00t", "starvla_gr00t-stateless"])
def test_starvla_gr00t_computes_the_same(converted, published, case):
    made, noise = converted(case), published.noise()
    state, velocity = made.batch.get("state"), published.gr00t_velocity
    expected = published.euler(velocity, made.weights, noise, state, made.states())
    assert (made.actions(noise) - expected).abs().max() < 1e-5
    assert (expected - noise).abs().max() > 0.1


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("starvla_gr00t-legacy", "use_canonical_forward"),
        ("starvla_gr00t-all_cross", "interleave_self_attention"),
    ],
)
def test_starvla_gr00t_without_alternation_computes_the_same(converted, published, case, key):
    made, noise = converted(case), published.noise()
    state = torch.from_numpy(published.example()["state"])[None]  # it must change nothing
    sizes, velocity = starvla_gr00t_sizes(published, key), published.all_cross_gr00t_velocity
    expected = published.euler(velocity, made.weights, noise, state, made.states(), sizes)
    assert (made.actions(noise) - expected).abs().max() < 1e-5
    assert (expected - noise).abs().max() > 0.1


@pytest.mark.parametrize(("name", "alternating", "keys"), PI)
def test_starvla_pi_computes_the_same(converted, published, name, alternating, keys):
    made = converted(f"starvla_pi-{name}")
    noise, sizes = published.noise(), starvla_pi_sizes(published, alternating)
    velocity = published.alternating_velocity if alternating else published.pi_velocity
    state = torch.from_numpy(published.example()["state"])[None]  # without alternation it must change nothing
    expected = published.euler(velocity, made.weights, noise, state, made.states(), sizes)
    assert (made.actions(noise) - expected).abs().max() < 1e-5
    assert (expected - noise).abs().max() > 0.1


@pytest.mark.parametrize("state", [True, False])
def test_starvla_oft_has_the_prompt(converted, published, state):
    made = converted("starvla_oft" if state else "starvla_oft-stateless")
    text = made.framework.vlm.processor.tokenizer.decode(made.batch["inputs"]["input_ids"][0])
    bins = state_bins(published.example()["state"])
    numbers = f" [STATE] {' '.join(map(str, bins))} [ACTION]" if state else ""
    queries = f"Please predict the next {T} robot actions: <action>{'🔍' * T}<action>."
    assert f"Your task is open the drawer{numbers} {queries}. Think." in text


@pytest.mark.parametrize("name", ["silent", "interleaved"])
def test_what_no_file_says_of_starvla_pi_is_stated(converted, name):
    made = converted(f"starvla_pi-{name}")
    assert "before 2026-06-16" in made.report.assumed[0]
    assert made.report.assumed[0] in str(made.report)
    record = json.loads((made.run / "conversion.json").read_text())
    assert record["assumed"] == list(made.report.assumed)


@pytest.mark.parametrize("name", ["legacy", "all_cross", "canonical", "both", "layout_alternating"])
def test_what_the_file_of_starvla_pi_says_is_no_assumption(converted, name):
    assert not any("2026" in sentence for sentence in converted(f"starvla_pi-{name}").report.assumed)


@pytest.fixture(scope="module")
def undecided(published, vlms, tmp_path_factory):
    """A QwenPI run whose configuration is silent and that has no future tokens, which would tell; and our configuration."""
    sizes = starvla_pi_sizes(published, True)
    _, weights = published.hf_weights(vlms["qwen2_5_vl"])
    head = published.drawn(published.flow_shapes(32, 1024, 32, all_cross=True, sizes=sizes))
    head = {
        name: t for name, t in head.items() if "future_tokens" not in name and "state_encoder" not in name
    }
    dit = {"num_attention_heads": 2, "attention_head_dim": 16}
    action_model = flow_section(sizes) | {"num_target_vision_tokens": 0, "diffusion_model_cfg": dit}
    run = published.starvla_run(
        tmp_path_factory.mktemp("pi") / "theirs", weights, head, action_model, include_state=False
    )
    framework = {"vlm": {"base_vlm": str(vlms["qwen2_5_vl"])}}
    return run, {"framework": framework, "policy": published.policy_section(False)}, head


def test_an_undecided_starvla_pi_is_refused(undecided, tmp_path):
    run, config, _ = undecided
    with pytest.raises(ConfigError, match="--set use_canonical_forward=true"):
        convert("starvla_pi", run, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["short", "dotted", "ours"])
@pytest.mark.parametrize("alternating", [True, False])
def test_the_user_decides_an_undecided_starvla_pi(undecided, published, tmp_path, alternating, how):
    run, config, head = undecided
    dotted, answer = "framework.action_model.diffusion_model_cfg.", f"use_canonical_forward={alternating}"
    corrections = {"short": [answer], "dotted": [dotted + answer], "ours": []}[how]
    if how == "ours":
        own = {"interleave_self_attention": alternating}
        config = {**config, "framework": {**config["framework"], "action_model": own}}
    report = convert("starvla_pi", run, config, tmp_path / "run", corrections)
    made = Converted(published, tmp_path / "run", report, head, state=False)
    made.model = published.hf_weights(config["framework"]["vlm"]["base_vlm"])[0]
    noise, sizes = published.noise(), starvla_pi_sizes(published, True)
    w = head | {"future_tokens.weight": torch.empty(0, sizes.width)}
    velocity = published.alternating_velocity if alternating else published.pi_velocity
    expected = published.euler(velocity, w, noise, None, made.states(), sizes)
    assert (made.actions(noise) - expected).abs().max() < 1e-5


def state_bins(state: np.ndarray) -> np.ndarray:
    """π0.5's: 256 equal bins on [-1, 1], and -1 for whatever is below."""
    return np.clip(np.floor((state.astype(np.float64) + 1) * 128), -1, 255).astype(int)


@pytest.mark.parametrize("state", [True, False])
def test_starvla_oft_computes_the_same(converted, published, state):
    made = converted("starvla_oft" if state else "starvla_oft-stateless")
    w, dense, norm = made.weights, published.dense, published.norm
    query = made.framework.vlm.processor.tokenizer("🔍")["input_ids"][0]
    hidden = made.states()[-1][made.batch["inputs"]["input_ids"] == query][None]
    x = torch.relu(dense(w, "model.fc1", norm(hidden, 1e-5, w, "model.layer_norm1")))
    for i in range(2):
        name = f"model.mlp_resnet_blocks.{i}.ffn"
        x = x + torch.relu(dense(w, f"{name}.1", norm(x, 1e-5, w, f"{name}.0")))
    expected = dense(w, "model.fc2", norm(x, 1e-5, w, "model.layer_norm2"))
    assert expected.shape == (1, T, D)
    assert (made.actions() - expected).abs().max() < 1e-5


def test_starvla_fast_has_the_weights_of_its_backbone(converted):
    made = converted("starvla_fast")
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(made.framework.vlm.model.state_dict()[name], tensor.float()), name


def test_starvla_fast_has_its_first_token(converted):
    assert converted("starvla_fast").framework.token_ids[0] == 4


@pytest.mark.parametrize("case", OPENPI)
def test_openpi_leaves_no_name_over(converted, case):
    made, lerobot = converted(case), case.endswith("lerobot")
    # LeRobot's file has one of the two names of a tied tensor, and both are loaded here
    assert len(made.report.loaded) == len(made.weights) - len(made.report.ignored) + lerobot


@pytest.mark.parametrize("case", OPENPI)
def test_openpi_has_the_weights_of_its_expert(converted, case):
    made, wrapper = converted(case), "model." if case.endswith("lerobot") else ""
    theirs = made.weights[f"{wrapper}{EXPERT}.model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(made.framework.action_model.layers[1].self_attn.k_proj.weight, theirs.float())


@pytest.mark.parametrize("case", OPENPI)
def test_openpi_ties_its_embedding(converted, case):
    made, wrapper = converted(case), "model." if case.endswith("lerobot") else ""
    embedding = made.framework.vlm.model.get_input_embeddings().weight
    assert torch.equal(embedding, made.weights[f"{wrapper}{PALIGEMMA}.lm_head.weight"].float())


@pytest.mark.parametrize("case", OPENPI)
def test_openpi_brings_its_statistics(converted, case):
    kept = load_statistics(converted(case).run / "dataset_statistics.json")["droid"]
    assert kept["action"].q99.tolist() == [2.0] * D
    assert kept["state"].std.tolist() == [1.5] * S


def test_a_missing_layer_of_openpi_is_reported_by_name(published, vlms, tmp_path):
    weights = published.drawn(published.openpi_shapes(vlms["paligemma"], pi05=False))
    weights = {name: t for name, t in weights.items() if "action_time_mlp_out" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    head = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 4}
    framework = {"vlm": {"base_vlm": str(vlms["paligemma"])}, "action_horizon": T, "action_model": head}
    framework |= {"max_action_dim": 8, "max_state_dim": 8}
    config = {"framework": framework, "policy": published.policy_section()}
    missing = r"action_model.action_time_mlp_out.weight \(looked for action_time_mlp_out.weight\)"
    with pytest.raises(ValueError, match=rf"(?s)2 missing.*{missing}"):
        convert("openpi_pi0", tmp_path / "model.safetensors", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gr00t_n15_computes_the_same(converted, published):
    made = converted("gr00t_n15")
    expected = published.gr00t_actions(made.model, made.weights, made.batch)
    assert (made.actions(published.noise()) - expected).abs().max() < 1e-5


def test_gr00t_n15_looks_at_padding_as_its_original_does(converted, published):
    """Two prompts of unequal length in one batch: neither the refiner nor the transformer masks the padding."""
    made = converted("gr00t_n15")
    framework, w = made.framework, made.weights
    hidden, valid, _ = ragged(published)
    head, state, noise = framework.action_model, torch.randn(2, S), torch.randn(2, T, D)
    with torch.no_grad():
        found = head.sample(Features(hidden, valid, state=state), noise)
        expected = published.euler(
            published.gr00t_velocity, w, noise, state, [published.vl_self_attention(w, hidden)]
        )
    assert (found - expected).abs().max() < 1e-5
    head.mask_padding = head.mask_vl_padding = True  # ours
    with torch.no_grad():
        masked = head.sample(Features(hidden, valid, state=state), noise)
    assert (masked[1] - expected[1]).abs().max() < 1e-5 < (masked[0] - expected[0]).abs().max()


def ragged(published) -> tuple[Tensor, Tensor, Tensor]:
    """States of two prompts, the first padded on the left; which tokens are valid, and which an image's."""
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(9))
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]).bool()
    image = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    return hidden, valid, image


@pytest.mark.parametrize("case", N17)
def test_gr00t_n17_has_the_velocity_and_the_loss_of_its_equations(converted, published, case):
    made = converted(case)
    head, (hidden, valid, image) = made.framework.action_model.eval(), ragged(published)
    state, actions, noise = torch.randn(2, S), torch.randn(2, T, D), torch.randn(2, T, D)
    is_pad, time = torch.tensor([[False] * T, [False] * 2 + [True] * (T - 2)]), torch.tensor([0.31, 0.9])
    features = Features(hidden, valid, state=state, image=image)
    given = (made.weights, actions, is_pad, noise, time, state, hidden, valid, image)
    with torch.no_grad():
        found = head.loss(features, actions, is_pad, noise, time)["action_loss"]
        velocity, _ = head.velocity(actions, time, head.encode_context(features))
        bucket = (time * 1000).long()
        expected = published.n17_velocity(made.weights, actions, bucket, state, hidden, valid, image)
    assert (velocity - expected).abs().max() < 1e-5
    assert abs(found - published.n17_loss(*given)) < 1e-5


@pytest.mark.parametrize("case", N17)
def test_gr00t_n17_samples_as_its_equations_do(converted, published, case):
    made = converted(case)
    head, (hidden, valid, image) = made.framework.action_model.eval(), ragged(published)
    state, noise = torch.randn(2, S), torch.randn(2, T, D)
    with torch.no_grad():
        found = head.sample(Features(hidden, valid, state=state, image=image), noise)
    expected = published.n17_actions(made.weights, noise, state, hidden, valid, image)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "what", ["turns", "a turn's order", "padding of the refiner", "padding of the blocks"]
)
def test_gr00t_n17_is_not_the_same_without_one_of_its_differences(converted, published, what):
    """The equations tell apart what they shall tell apart."""
    made = converted("gr00t_n17")
    head, (hidden, valid, image) = made.framework.action_model.eval(), ragged(published)
    state, noise = torch.randn(2, S), torch.randn(2, T, D)
    expected = published.n17_actions(made.weights, noise, state, hidden, valid, image)
    change = {"turns": ("text_every", None), "a turn's order": ("text_every", 1)}
    change |= {
        "padding of the refiner": ("mask_vl_padding", True),
        "padding of the blocks": ("mask_padding", False),
    }
    name, other = change[what]
    kept = getattr(head, name)
    setattr(head, name, other)
    try:
        with torch.no_grad():
            found = head.sample(Features(hidden, valid, state=state, image=image), noise)
    finally:
        setattr(head, name, kept)
    assert (found - expected).abs().max() > 1e-3


def test_gr00t_n17_looks_at_the_states_before_the_final_norm_and_knows_its_images(converted, published):
    made, noise = converted("gr00t_n17"), published.noise()
    inputs, ids = made.batch["inputs"], made.batch["inputs"]["input_ids"]
    image = ids == made.framework.vlm.config.image_token_id
    assert 0 < image.sum() < image.numel()
    valid, state = inputs["attention_mask"].bool(), made.batch["state"]
    expected = published.n17_actions(made.weights, noise, state, made.states()[-1], valid, image)
    assert (made.actions(noise) - expected).abs().max() < 1e-5
    assert (expected - noise).abs().max() > 0.1


def test_gr00t_n17_samples_the_same_with_the_inference_head(converted, published):
    made = converted("gr00t_n17")
    head, (hidden, valid, image) = made.framework.action_model.eval(), ragged(published)
    arguments = {k: v for k, v in made.framework.config["action_model"].items() if k != "type"}
    faster = FlowMatchingInferenceHead(head.sizes, **arguments).eval()
    faster.load_state_dict(head.state_dict())
    features = Features(hidden, valid, state=torch.randn(2, S), image=image)
    noise = torch.randn(2, T, D)
    with torch.no_grad():
        torch.testing.assert_close(faster.sample(features, noise), head.sample(features, noise))


def test_gr00t_n17_is_told_the_robots_row_and_says_what_it_assumed(converted, published):
    nvidia, lerobot = (converted(case).report.assumed for case in N17)
    assert (
        f"row {published.N17_ROW} of the robots' encoders is new_embodiment, from embodiment_id.json"
        in nvidia
    )
    assert not any("robots' encoders" in sentence for sentence in lerobot)  # it was said with --set
    assert any("formalize_language" in sentence for sentence in nvidia)
    assert not any("does not know" in sentence for sentence in (*nvidia, *lerobot))


def test_gr00t_n17_with_a_longer_backbone_says_how_many_layers_to_write(converted, published, vlms, tmp_path):
    longer = write_tiny("qwen3_vl", tmp_path / "longer", image_size=32, hidden_size=32, num_layers=3)
    made = converted("gr00t_n17")
    framework = {"vlm": {"base_vlm": str(longer)}}
    statistics = made.run.parent / "statistics.json"
    config = {"framework": framework, "policy": published.policy_section(statistics=str(statistics))}
    with pytest.raises(ConfigError, match="has 3 layers, the checkpoint 2 .* set num_hidden_layers to 2"):
        convert("gr00t_n17", made.run.parent / "model.safetensors", config, tmp_path / "run")


@pytest.mark.parametrize(("given", "right"), [("gr00t_n15", "gr00t_n17"), ("gr00t_n17", "gr00t_n15")])
def test_one_gr00t_given_as_the_other_is_recognised(converted, published, tmp_path, given, right):
    source = converted(right).run.parent / "model.safetensors"
    shutil.copy(source, tmp_path / "model.safetensors")
    config = {"framework": {"vlm": {"base_vlm": "x"}}, "policy": published.policy_section()}
    with pytest.raises(ConfigError, match=f"use --format {right}"):
        convert(given, tmp_path / "model.safetensors", config, tmp_path / "run")


def test_openvla_leaves_out_what_is_behind_its_features(converted):
    ignored = converted("openvla").report.ignored
    assert ignored
    assert all("blocks.2." in name or "norm." in name or "attn_pool" in name for name in ignored)


def test_openvla_does_not_normalise_its_gripper(converted):
    spec = Policy.from_pretrained(converted("openvla").run).spec
    assert spec.normalization["action"] == ["q99", "q99", "identity"]


def test_openvla_computes_the_same(converted, published):
    made = converted("openvla")
    w, llama, inputs, dense = made.weights, made.model, made.batch["inputs"], published.dense
    views = inputs["pixel_values"].split(3, dim=1)
    x = torch.cat(
        [
            timm_patches(published, w, DINO, views[0], 4, 3, "none"),
            timm_patches(published, w, SIGLIP, views[1], 4, 3, "tanh"),
        ],
        dim=-1,
    )
    for name in ("fc1", "fc2"):
        x = nn.functional.gelu(dense(w, f"projector.{name}", x))
    x = dense(w, "projector.fc3", x)
    tokens = llama.get_input_embeddings()(inputs["input_ids"])
    embedded = torch.cat([tokens[:, :1], x, tokens[:, 5:]], dim=1)  # behind the beginning-of-text token
    with torch.no_grad():
        expected = llama.model(inputs_embeds=embedded).last_hidden_state
        found = made.framework.vlm(inputs).hidden
    assert (found - expected).abs().max() < 1e-5


def test_openvla_puts_the_image_behind_the_first_token(converted):
    made = converted("openvla")
    assert (made.batch["inputs"]["input_ids"][0, 1:5] == made.framework.vlm.config.image_token_id).all()


def test_openvla_counts_its_action_tokens_from_the_last_token(converted):
    assert converted("openvla").framework.token_ids[0] == 448 - 64 - 1


# ---------------------------------------------------------------- the example configurations

EXAMPLES = Path(__file__).parents[3] / "experiments/configs/convert"
UNSEEN = ("num_heads", "num_vl_heads", "tokenizer", "first_token_id", "max_tokens", "adaptive_norm")


def tiny(name: str, config: dict) -> Config:
    """The example of a format with the names, images and backbone of the synthetic checkpoint; sizes are left to its tensors."""
    merged = OmegaConf.load(EXAMPLES / f"{name}.yaml")
    framework, policy = config["framework"], config["policy"]
    for key in ("vlm", "action_horizon"):
        if key in framework:
            merged.framework[key] = framework[key]
    own = {k: v for k, v in framework.get("action_model", {}).items() if k in UNSEEN}
    if name == "openpi_pi0" or name == "openpi_pi05":
        own = {}  # one head of keys shows how many there are
    if own:
        merged.framework.action_model = own
    for key in ("action", "state", "image_size", "normalization", "statistics", "dataset"):
        merged.policy.pop(key, None)
        if key in policy:
            merged.policy[key] = policy[key]
    merged.policy.cameras = policy["cameras"]
    return load_config(OmegaConf.to_container(merged))


def test_every_format_has_an_example():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CHECKPOINT_FORMATS)


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
def test_the_example_of_a_format_is_whole(name):
    cfg = load_config(EXAMPLES / f"{name}.yaml")
    settings = policy_settings(cfg)
    assert settings.cameras and settings.action["names"] and settings.control_rate > 0
    assert cfg.section("framework").to_dict()["vlm"]


@pytest.mark.parametrize("name", CHECKPOINT_FORMATS)
def test_the_example_of_a_format_converts(published, vlms, tmp_path, monkeypatch, name):
    case = next(case for case in CASES if case == name or case.startswith(f"{name}-"))
    write, options, _ = CASES[case]
    plain = convert
    with_example = lambda format_name, source, config, out, corrections=(): plain(
        format_name, source, tiny(name, config), out, corrections
    )
    monkeypatch.setitem(globals(), "convert", with_example)
    made = write(published, vlms, tmp_path, *options)
    assert made.report.complete
    assert any(sentence.startswith("action_horizon ") for sentence in made.report.assumed)
    policy = Policy.from_pretrained(made.run)
    chunk = policy.predict(published.example(3, state=policy.spec.state is not None), seed=0)
    assert np.isfinite(chunk).all()
