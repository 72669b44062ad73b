"""Blocks that are recomputed: that they are, in every framework and on every backbone, and that nothing else changes."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import COMPOSED, write_tiny_composed
from vla_bench.models.frameworks.blocks import compile_blocks, recompute_blocks, repeated_blocks
from vla_bench.models.frameworks.build import build_framework

SIZES = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
DIT = {"hidden_size": 64, "num_layers": 2, "num_heads": 4}
EXPERT = {"type": "ActionExpert", "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
FRAMEWORKS = {
    "OFT": ("OFT", {"type": "MLP", "hidden_size": 32, "num_queries": 2}),
    "OpenVLA": ("OpenVLA", {"type": "Bins", "first_token_id": 0}),
    "Transformer": ("LlavaVLA", {"type": "Transformer", **DIT}),
    "Diffusion": ("LlavaVLA", {"type": "Diffusion", **DIT}),
    "DiscreteDiffusion": ("LlavaVLA", {"type": "DiscreteDiffusion", **DIT}),
    "GR00T": ("GR00T", {"type": "FlowMatching", **DIT, "num_vl_layers": 1, "num_future_tokens": 2}),
    "PI": ("PI", {"type": "LayerwiseFlowMatching", "num_heads": 4, "num_future_tokens": 2}),
    "PI0": ("PI0", EXPERT),
    "PI05": ("PI05", {**EXPERT, "adaptive_norm": True}),
}


def tiny(kind: str, home) -> str:
    """The folder of a tiny backbone."""
    if not (home / kind).exists():
        write = write_tiny_composed if kind in COMPOSED else write_tiny
        write(kind, home / kind, corpus=["open the drawer"], reserved_tokens=320, **SIZES)
    return str(home / kind)


def build(vlm: str, name: str, head: dict, toy):
    torch.manual_seed(0)
    section = {"name": name, "vlm": {"base_vlm": vlm}, "action_horizon": toy.T, "action_model": head}
    model = build_framework(section, **toy.sizes)
    for p in model.action_model.parameters():  # open gates, so that the backbone gets a gradient
        p.data += 0.05 * torch.randn_like(p)
    return model.train()


def kept(model, toy):
    """Bytes kept for the backward pass, the loss, and the gradients."""
    sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model([{**e, "state": e["state"].clip(-1, 1)} for e in toy.examples])["action_loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sum(size for place, size in sizes.items() if place not in weights), loss.item(), gradients


def counted(model) -> Counter:
    """Counts the runs of each block, those in the backward pass too."""
    runs = Counter()

    def count(path, forward, *args, **kwargs):
        runs[path] += 1
        return forward(*args, **kwargs)

    for path, block in repeated_blocks(model).items():
        block.forward = partial(count, path, block.forward)
    return runs


def check(model, toy, share):
    lean = copy.deepcopy(model)
    runs = counted(lean)
    paths = recompute_blocks(lean)
    before, after = kept(model, toy), kept(lean, toy)
    assert after[1] == before[1] and after[0] < share * before[0], (before[0], after[0])
    learning = {
        path for path in paths if any(p.grad is not None for p in lean.get_submodule(path).parameters())
    }
    assert learning and {runs[path] for path in learning} == {2}
    assert any(path.startswith("vlm.") for path in learning)
    assert after[2].keys() == before[2].keys()
    for name in before[2]:
        assert torch.allclose(after[2][name], before[2][name], rtol=1e-5, atol=1e-7), name
    return learning


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_every_framework_keeps_less_and_learns_the_same(toy, tmp_path_factory, name):
    home = tmp_path_factory.getbasetemp()
    learning = check(build(tiny("paligemma", home), *FRAMEWORKS[name], toy), toy, 0.7)
    has_blocks = name not in ("OFT", "OpenVLA")
    assert any(path.startswith("action_model.") for path in learning) == has_blocks


@pytest.mark.parametrize(
    "kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "internvl", "smolvlm", "florence2", *COMPOSED]
)
def test_every_backbone_keeps_less_and_learns_the_same(toy, tmp_path_factory, kind):
    home = tmp_path_factory.getbasetemp()
    learning = check(build(tiny(kind, home), *FRAMEWORKS["OFT"], toy), toy, 0.75)
    assert {"language" if "visi" not in path and "visual" not in path else "vision" for path in learning} == {
        "language",
        "vision",
    }


def test_blocks_of_the_expert_and_its_backbone_are_run_again_with_qwen_too(toy, tmp_path_factory):
    check(build(tiny("qwen2_5_vl", tmp_path_factory.getbasetemp()), *FRAMEWORKS["PI0"], toy), toy, 0.7)


@pytest.mark.parametrize("name", ["GR00T", "PI0"])
def test_a_prediction_is_not_touched(toy, tmp_path_factory, name):
    model = build(tiny("paligemma", tmp_path_factory.getbasetemp()), *FRAMEWORKS[name], toy).eval()
    before = toy.predict(model, toy.examples)
    runs = counted(model)
    recompute_blocks(model)
    assert (toy.predict(model, toy.examples) == before).all() and max(runs.values()) <= 12
    assert list(model.state_dict()) == list(
        build(tiny("paligemma", tmp_path_factory.getbasetemp()), *FRAMEWORKS[name], toy).state_dict()
    )


@pytest.mark.parametrize("name", ["OFT", "GR00T", "PI0"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_learn_the_same(toy, tmp_path_factory, name, recompute):
    """With the tracer alone: the code that torch generates is torch's to test, and takes a minute."""
    model = build(tiny("paligemma", tmp_path_factory.getbasetemp()), *FRAMEWORKS[name], toy)
    compiled = copy.deepcopy(model)
    paths = compile_blocks(compiled, partial(torch.compile, backend="aot_eager"))
    if recompute:
        recompute_blocks(compiled)
    before, after = kept(model, toy), kept(compiled, toy)
    assert paths == list(repeated_blocks(model)) and list(compiled.state_dict()) == list(model.state_dict())
    assert after[1] == pytest.approx(before[1], rel=1e-5)
    for key in before[2]:
        assert torch.allclose(after[2][key], before[2][key], rtol=1e-3, atol=1e-6), key
