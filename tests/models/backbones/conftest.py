"""Every family of backbones, tiny, with weights large enough that a wrong position or a leak moves the features."""

from pathlib import Path

import pytest
import torch

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.vlm import VLM

KINDS = tuple(BUILDERS)


WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZES = {"hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("native")
    for kind in KINDS:
        write_tiny(kind, home / kind, image_size=64, corpus=WORDS, reserved_tokens=8, **SIZES)
    return home


@pytest.fixture(scope="session")
def backbones(home) -> dict[str, VLM]:
    """Every kind, with larger random weights, so that a wrong position or a leak moves the features."""
    found = {}
    for kind in KINDS:
        vlm, generator = load_vlm(home / kind), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in vlm.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        found[kind] = vlm.eval()
    return found
