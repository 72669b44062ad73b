"""Every backbone and head gives a map or says what it can give; shares are shares; weights matter."""

import copy
import os

import numpy as np
import pytest
import torch

from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.heads.fast import FASTCodec
from vla_bench.registry import BACKBONES, HEADS
from vla_bench.viz.known import known_scene
from vla_bench.viz.relevance import METHODS, methods_of, relevance_of

COMPOSED = ("prismatic", "dinosiglip", "eagle2_5_vl")
SERVED_BY = {"dinosiglip": "prismatic", "llava": "any"}
FLOW = {"num_heads": 4, "num_future_tokens": 2, "dropout": 0.0, "num_inference_timesteps": 2}
DIT = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.0}
EXPERT = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_inference_timesteps": 2}
ROWS = {
    "MLP": ("OFT", "MLP", {"hidden_size": 32, "num_queries": 2}),
    "FlowMatching": ("GR00T", "FlowMatching", {"hidden_size": 64, "num_layers": 2, **FLOW}),
    "FAST": ("FAST", "FAST", {}),
    "LayerwiseFlowMatching": ("PI", "LayerwiseFlowMatching", FLOW),
    "Transformer": ("LlavaVLA", "Transformer", {"hidden_size": 32}),
    "ActionExpert": ("PI0", "ActionExpert", EXPERT),
    "Diffusion": ("LlavaVLA", "Diffusion", DIT | {"num_inference_timesteps": 2}),
    "Bins": ("OpenVLA", "Bins", {}),
    "DiscreteDiffusion": ("LlavaVLA", "DiscreteDiffusion", DIT | {"num_steps": 2}),
    "ActionExpert, adaptive": ("PI05", "ActionExpert", EXPERT | {"adaptive_norm": True}),
}


def fits(backbone: str, row: str) -> bool:
    cls = BACKBONES.get(SERVED_BY.get(backbone, backbone))
    return cls.unsupported_reads.get(HEADS.get(ROWS[row][1]).reads) is None


EVERY = [(backbone, row) for backbone in (*BUILDERS, *COMPOSED) for row in ROWS if fits(backbone, row)]


def some_pairs() -> list[tuple[str, str]]:
    """Every backbone once and every head at least once; all pairs with VLA_BENCH_CASES=all."""
    if os.environ.get("VLA_BENCH_CASES") == "all":
        return EVERY
    found, used = [], {row: 0 for row in ROWS}
    for backbone in (*BUILDERS, *COMPOSED):
        row = min((row for b, row in EVERY if b == backbone), key=used.__getitem__)
        used[row] += 1
        found.append((backbone, row))
    missing = [row for row, count in used.items() if not count]
    return found + [next(pair for pair in EVERY if pair[1] == row) for row in missing]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    chunks = np.stack([known_scene(rng)[0]["action"] for _ in range(12)])
    FASTCodec.fit(chunks, vocab_size=256, scale=50).save(home / "tokenizer")
    return home


@pytest.mark.parametrize(("backbone", "row"), some_pairs(), ids=map("-".join, some_pairs()))
def test_every_pair_gives_a_map_or_says_what_it_gives(home, backbone, row):
    framework, head, sizes = ROWS[row]
    folder = home / backbone
    if not folder.exists():
        write = write_tiny_composed if backbone in COMPOSED else write_tiny
        small = {
            "image_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "vision_hidden_size": 32,
            "vision_layers": 2,
        }
        write(backbone, folder, corpus=["raise the arm", "lower the arm"], reserved_tokens=320, **small)
    own = {"tokenizer": str(home / "tokenizer")} if head == "FAST" else {}
    section = {"name": framework, "vlm": {"base_vlm": str(folder)}, "action_horizon": 4}
    torch.manual_seed(0)
    model = build_framework(
        section | {"action_model": {"type": head, **sizes, **own}}, action_dim=3, state_dim=2
    )
    scene = known_scene(np.random.default_rng(1))[0]
    scene["state"] = scene["state"].clip(-1, 1)
    assert "occlusion" in methods_of(model) and "attention" in methods_of(model)
    for method in METHODS:
        grid = {"grid": (2, 2)} if method in METHODS[:2] else {}
        try:
            found = relevance_of(model.eval(), scene, method=method, **grid)
        except ValueError as error:
            assert method in str(error) or "have attention maps" in str(error)
            assert "this policy gives occlusion" in str(error) or "use 'attention', or 'occlusion'" in str(
                error
            )
            assert "\n" not in str(error)
            continue
        assert abs(sum(found.shares.values()) - 1) < 1e-6
        assert all(np.isfinite(image).all() and (image >= 0).all() for image in found.images)
        assert [word for word, _ in found.words] == scene["lang"].split()


@pytest.mark.parametrize("method", METHODS)
def test_randomising_the_weights_changes_the_map(known, method):
    """A map that stays as it was says nothing about the policy (Adebayo et al. 2018)."""
    broken = copy.deepcopy(known.model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in broken.parameters():
            if parameter.ndim > 1:
                parameter.copy_(
                    parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(
                        parameter
                    )
                )
    frames = known.others if method in METHODS[:2] else ()
    maps = [relevance_of(each, known.scene, method=method, frames=frames) for each in (known.model, broken)]
    first, second = (
        np.concatenate([m.images[0].ravel(), [s for _, s in m.words], [m.state, m.rest]]) for m in maps
    )
    assert np.abs(first - second).sum() > 0.1
    again = relevance_of(known.model, known.scene, method=method, frames=frames)
    np.testing.assert_allclose(again.images[0], maps[0].images[0])


@pytest.mark.parametrize("method", METHODS)
def test_action_steps_are_chosen(known, method):
    whole, first = (
        relevance_of(known.model, known.scene, method=method, action_steps=s) for s in (None, [0])
    )
    assert (whole.chosen, first.chosen) == ({}, {"action_steps": [0]})
    assert np.abs(whole.images[0] - first.images[0]).max() > 1e-7
    with pytest.raises((ValueError, IndexError)):
        relevance_of(known.model, known.scene, method=method, action_steps=[9])


@pytest.mark.parametrize("method", ["attention", "rollout", "norm_weighted"])
def test_denoising_steps_are_the_parts_of_their_mean(flow, known, method):
    if method == "norm_weighted":  # norms of one step are no shares of the same whole
        pytest.skip("norms differ in scale from step to step")
    parts = [relevance_of(flow, known.scene, method=method, denoising_steps=i).images[0] for i in range(4)]
    whole = relevance_of(flow, known.scene, method=method).images[0]
    np.testing.assert_allclose(np.mean(parts, axis=0), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "occlusion", "denoising_steps": 0}, "method='occlusion' has no denoising_steps"),
        ({"method": "attention", "fill": "mean"}, "method='attention' has no fill"),
        ({"method": "attention", "heads": 9}, "heads=9 must name some of the 4"),
        ({"fill": "mean"}, "needs frames=[…]"),
        ({"fill": "gray"}, "did you mean 'grey'?"),
        ({"method": "atention"}, "did you mean 'attention'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_in_one_line(known, asked, message):
    with pytest.raises(ValueError) as refused:
        relevance_of(known.model, known.scene, **asked)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_head_that_tells_only_its_mean_still_gives_it(flow, known, monkeypatch):
    monkeypatch.setattr(type(flow.action_model), "offers_attention_steps", False)
    found = relevance_of(flow, known.scene, method="attention")
    assert abs(sum(found.shares.values()) - 1) < 1e-6
    with pytest.raises(ValueError, match="tells only its mean attention"):
        relevance_of(flow, known.scene, method="attention", layers=0)
    with pytest.raises(ValueError, match="this policy gives occlusion, integrated_gradients, attention"):
        relevance_of(flow, known.scene, method="rollout")
