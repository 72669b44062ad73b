"""Networks as graphs of tensors: every backbone with every head that can be one, and why the others cannot."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.heads.fast import FASTCodec
from vla_bench.registry import BACKBONES, HEADS
from vla_bench.serving.graph import (
    GraphError,
    export_graph,
    fixed_inputs,
    graph_tensors,
    pad_prompt,
    visible_fixed,
    without_questions,
)

T, D, S = 4, 3, 2
SIZES = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 1}
INSTRUCTIONS = ("open the drawer", "pick up the red block and place it")
COMPOSED = ("prismatic", "dinosiglip", "eagle2_5_vl")
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 4}
FLOW = {"num_heads": 4, "num_inference_timesteps": 3}
EXPERT = {"hidden_size": 32, "intermediate_size": 64, **FLOW}
ROWS = {
    "MLP": ("OFT", {"type": "MLP", "hidden_size": 32}),
    "Transformer": ("LlavaVLA", {"type": "Transformer", "hidden_size": 32}),
    "FlowMatching": ("GR00T", {"type": "FlowMatching", **SMALL, **FLOW}),
    "FlowMatchingInference": ("GR00T", {"type": "FlowMatchingInference", **SMALL, **FLOW}),
    "LayerwiseFlowMatchingInference": ("PI", {"type": "LayerwiseFlowMatchingInference", **FLOW}),
    "LayerwiseFlowMatching": ("PI", {"type": "LayerwiseFlowMatching", **FLOW}),
    "Diffusion": ("LlavaVLA", {"type": "Diffusion", **SMALL}),
    "DDPM": ("LlavaVLA", {"type": "Diffusion", **SMALL, "sampler": "ddpm", "num_train_timesteps": 5}),
    "DiscreteDiffusion": ("LlavaVLA", {"type": "DiscreteDiffusion", **SMALL}),
    "ActionExpert": ("PI0", {"type": "ActionExpert", **EXPERT}),
    "adaptive": ("PI05", {"type": "ActionExpert", **EXPERT, "adaptive_norm": True}),
    "FAST": ("FAST", {"type": "FAST"}),
    "Bins": ("OpenVLA", {"type": "Bins"}),
}
TOKENS = ("FAST", "Bins")
SERVED_BY = {"dinosiglip": "prismatic", "llava": "any"}


def fits(backbone, row):
    cls = BACKBONES.get(SERVED_BY.get(backbone, backbone))
    return HEADS.get(ROWS[row][1]["type"]).reads not in cls.unsupported_reads


PAIRS = [(b, r) for b in (*BUILDERS, *COMPOSED) for r in ROWS if fits(b, r) and r not in TOKENS]
FEW = [
    ("qwen2_5_vl", "FlowMatching"),
    ("paligemma", "adaptive"),
    ("prismatic", "DiscreteDiffusion"),
    ("florence2", "Transformer"),
]
CASES = PAIRS if "VLA_BENCH_EVERY_RUN" in os.environ else FEW


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    home = tmp_path_factory.mktemp("graphs")
    actions = np.random.default_rng(0).uniform(-1, 1, (8, T, D)).astype(np.float32)
    FASTCodec.fit(actions, vocab_size=256, scale=50).save(home / "tokenizer")

    def make(backbone, row, **section):
        if not (home / backbone).is_dir():
            write = write_tiny_composed if backbone in COMPOSED else write_tiny
            write(backbone, home / backbone, corpus=INSTRUCTIONS, reserved_tokens=320, **SIZES)
        name, head = ROWS[row]
        head = {**head, **({"tokenizer": str(home / "tokenizer")} if row == "FAST" else {})}
        section |= {"name": name, "vlm": {"base_vlm": str(home / backbone)}, "action_horizon": T}
        torch.manual_seed(0)
        made = build_framework({**section, "action_model": head}, action_dim=D, state_dim=S).eval()
        with torch.no_grad():
            for parameter in made.parameters():  # what begins at zero would say nothing
                if not parameter.any():
                    torch.nn.init.normal_(parameter, 0, 0.05)
        return made

    return make


def sample(seed, lang=INSTRUCTIONS[0], **more):
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]
    return {"image": images, "lang": lang, "state": rng.uniform(-1, 1, S).astype(np.float32), **more}


def exported(framework, samples, spare):
    batch = framework.prepare(samples)
    noise = framework.action_model.draw_noise(len(samples), torch.Generator().manual_seed(0))
    fixed = fixed_inputs(framework, batch, spare)
    return export_graph(framework, graph_tensors(batch, noise, fixed), fixed), fixed


def difference(framework, graph, fixed, samples, seed=1):
    batch = framework.prepare(samples)
    noise = framework.action_model.draw_noise(len(samples), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = graph(graph_tensors(batch, noise, fixed)).numpy()
    return np.abs(found - framework.predict_action(batch, noise=noise)["normalized_actions"]).max()


@pytest.mark.parametrize(("backbone", "row"), CASES)
def test_a_graph_computes_what_the_framework_computes(backbone, row, build, tmp_path):
    """Of other observations than it was traced with, another instruction and other noise, read from its file."""
    framework = build(backbone, row)
    program, fixed = exported(framework, [sample(0)], spare=16)
    torch.export.save(program, tmp_path / "graph.pt2")
    graph = torch.export.load(tmp_path / "graph.pt2").module(check_guards=False)
    for seed, lang in enumerate(INSTRUCTIONS, 1):
        assert difference(framework, graph, fixed, [sample(seed, lang)], seed) < 1e-6
    changed = {name: value for name, value in sample(1).items()} | {"state": np.float32([0.9, -0.9])}
    assert difference(framework, graph, fixed, [changed]) < 1e-6


def test_a_batch_is_a_graph_too(build):
    framework = build("qwen2_5_vl", "FlowMatching")
    program, fixed = exported(framework, [sample(0)] * 3, spare=0)
    graph = program.module()
    assert difference(framework, graph, fixed, [sample(seed) for seed in range(3)]) < 1e-6
    with pytest.raises(RuntimeError):  # of two: no graph for it
        difference(framework, graph, fixed, [sample(0)] * 2)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "florence2"])
def test_images_that_are_not_there_are_not_seen(backbone, build):
    """As at the beginning of an episode, for a policy that sees several observations."""
    framework = build(backbone, "MLP")
    mask = lambda *there: {"image_mask": np.array(there)}
    program, fixed = exported(framework, [sample(0, **mask(True, True))], spare=8)
    graph = program.module()
    for there in ((True, True), (False, True), (True, False)):
        assert difference(framework, graph, fixed, [sample(1, **mask(*there))]) < 1e-6
    chunks = []
    for there in ((True, True), (False, True)):
        batch = framework.prepare([sample(1, **mask(*there))])
        chunks.append(graph(graph_tensors(batch, None, fixed)).detach())
    assert not torch.allclose(*chunks, atol=1e-4)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "florence2", "paligemma", "internvl"])
def test_the_mask_of_seen_tokens_is_the_backbones_own(backbone, build):
    framework = build(backbone, "MLP")
    rows = [
        sample(seed, lang, image_mask=np.array([seed > 0, True])) for seed, lang in enumerate(INSTRUCTIONS)
    ]
    inputs = framework.prepare(rows)["inputs"]
    own = framework.vlm.visible(inputs)
    with without_questions(framework.vlm, inputs):
        assert torch.equal(framework.vlm.visible(inputs), own)
    assert own.sum(1).diff() != 0
    assert torch.equal(framework.vlm.visible(inputs), own)  # and is its own again


def test_a_framework_that_was_exported_is_as_it_was(build):
    framework = build("qwen2_5_vl", "MLP").train()
    before = {name: value.clone() for name, value in framework.state_dict().items()}
    chunk = framework.predict_action([sample(0)])["normalized_actions"]
    exported(framework, [sample(0)], spare=4)
    assert framework.training and all(torch.equal(v, before[n]) for n, v in framework.state_dict().items())
    assert (framework.predict_action([sample(0)])["normalized_actions"] == chunk).all()
    other = {**sample(0), "image": [image.resize((96, 96)) for image in sample(0)["image"]]}
    assert framework.predict_action([other])["normalized_actions"].shape == (1, T, D)  # another grid


def test_no_path_of_this_machine_is_in_the_file(build, tmp_path):
    program, _ = exported(build("paligemma", "MLP"), [sample(0)], spare=4)
    torch.export.save(program, tmp_path / "graph.pt2")
    content = (tmp_path / "graph.pt2").read_bytes()
    assert (
        b"site-packages" not in content
        and b"/vla_bench/" not in content
        and str(tmp_path).encode() not in content
    )


@pytest.mark.parametrize("row", TOKENS)
def test_a_head_that_writes_tokens_is_refused_with_the_reason(row, build):
    with pytest.raises(GraphError, match="writes one after another.*serve the checkpoint itself"):
        exported(build("qwen2_5_vl", row), [sample(0)], spare=4)


def test_positions_that_transformers_counts_in_a_loop_are_refused(build, monkeypatch):
    framework = build("llava", "MLP")
    monkeypatch.setattr(type(framework.vlm.model.model), "get_rope_index", lambda self: None, raising=False)
    with pytest.raises(GraphError, match="counts? the positions of llava in a loop"):
        exported(framework, [sample(0)], spare=4)


def test_what_asks_for_a_value_is_named(build, monkeypatch):
    framework = build("paligemma", "MLP")
    own = framework.action_model.sample

    def asks(features, noise=None):
        if features.hidden.sum() > 1e9:
            return None
        return own(features, noise)

    monkeypatch.setattr(framework.action_model, "sample", asks)
    with pytest.raises(GraphError, match="OFT on PaliGemma cannot be traced: .*data-dependent"):
        exported(framework, [sample(0)], spare=4)


def test_prompts_are_padded_behind_their_end():
    inputs = {
        "input_ids": torch.tensor([[3, 4]]),
        "attention_mask": torch.tensor([[0, 1]]),
        "pixels": torch.ones(3),
    }
    padded = pad_prompt(inputs, 4, token=7)
    assert padded["input_ids"].tolist() == [[3, 4, 7, 7]] and padded["attention_mask"].tolist() == [
        [0, 1, 0, 0]
    ]
    assert padded["pixels"] is inputs["pixels"]
    with pytest.raises(ValueError, match="2 tokens long, .* exported for 1"):
        pad_prompt(inputs, 1, token=7)


def test_each_image_has_its_own_tokens():
    inputs = {
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "image_mask": torch.tensor([[False, True]]),
    }
    is_image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    seen = visible_fixed(inputs, is_image, [2, 3])
    assert seen.tolist() == [[True, False, False, True, True, True, True, True]]


def test_the_cases_have_every_head():
    assert {head["type"] for _, head in ROWS.values()} == set(HEADS.names())
