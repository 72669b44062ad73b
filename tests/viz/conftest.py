"""Policies whose reasons are known, and tiny untrained ones, for the tests of maps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.frameworks.build import build_framework
from vla_bench.viz.known import HEADS, INSTRUCTIONS, known_policy, known_scene


@pytest.fixture(scope="session")
def known():
    """OFT on a PaliGemma that has learnt the made-up world, a scene, its place, and other scenes."""
    rng = np.random.default_rng(31)
    scene, place = known_scene(rng)
    others = [known_scene(rng)[0] for _ in range(24)]
    return SimpleNamespace(model=known_policy(), scene=scene, place=place, others=others)


@pytest.fixture(scope="session")
def flow():
    """The same world learnt by a head that flows from noise to actions."""
    return known_policy("GR00T", steps=100)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Builds an untrained framework on a tiny backbone; the folder of the backbone comes with it."""
    home = tmp_path_factory.mktemp("relevance")

    def build(backbone: str, name: str, image_size: int = 64, spread: float = 0.1, **head):
        folder = home / f"{backbone}-{image_size}"
        if not folder.exists():
            sizes = {"image_size": image_size, "hidden_size": 32, "num_layers": 2}
            vision = {"vision_hidden_size": 32, "vision_layers": 2}
            write_tiny(backbone, folder, corpus=INSTRUCTIONS, **sizes, **vision)
        torch.manual_seed(0)
        section = {"name": name, "vlm": {"base_vlm": str(folder), "attn_implementation": "eager"}}
        section |= {"action_horizon": 4, "action_model": HEADS.get(name, {}) | head}
        model = build_framework(section, action_dim=3, state_dim=2).eval()
        with torch.no_grad():  # freshly made weights attend alike to everything
            for parameter in model.parameters():
                parameter += spread * torch.randn_like(parameter)
        model.vlm.model.save_pretrained(folder / "spread")
        return model, folder / "spread"

    return build
