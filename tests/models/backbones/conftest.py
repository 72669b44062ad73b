"""Every family of backbones, tiny, with weights large enough that a wrong position or a leak moves the features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.eagle import compose_eagle
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.prismatic import compose
from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component
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


@dataclass(frozen=True)
class Observed:
    """Three samples for a tiny backbone of the width in `sizes`."""

    images: list[list[Image.Image]]  # two each
    texts: tuple[str, ...]
    extra: torch.Tensor  # three more tokens behind each prompt
    sizes: dict[str, Any]  # of `write_tiny`

    @staticmethod
    def image(seed: int, height: int = 64, width: int = 64) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="session")
def observed() -> Observed:
    """Three samples of two images, an instruction and three extra tokens."""
    images = [[Observed.image(2 * i), Observed.image(2 * i + 1)] for i in range(len(WORDS))]
    extra = torch.randn(len(WORDS), 3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))
    return Observed(images, WORDS, extra, SIZES)


def loud(vlm: VLM) -> VLM:
    """Larger random weights, so that a wrong position or a leak moves the features."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vlm.eval()


@pytest.fixture
def with_larger_weights():
    """Makes the random weights of a backbone larger."""
    return loud


@pytest.fixture(scope="session")
def backbones(home) -> dict[str, VLM]:
    """Every kind, with larger random weights, so that a wrong position or a leak moves the features."""
    found = {}
    for kind in KINDS:
        found[kind] = loud(load_vlm(home / kind))
    return found


COMPOSED = ("siglip_linear_gemma", "siglip_mlp_qwen2", "dinosiglip_fused_llama", "eagle_qwen3")
SIZE, WIDTH = 64, 64


@pytest.fixture(scope="module")
def components(tmp_path_factory) -> Path:
    """A folder with every tiny component of a composed backbone."""
    home = tmp_path_factory.mktemp("components")
    for kind in ("siglip", "dinov2", "dinov2_with_registers"):
        width = 32 if kind == "siglip" else 48
        write_tiny_component(kind, home / kind, image_size=SIZE, hidden_size=width, num_layers=3)
    for kind in ("llama", "gemma", "qwen2", "qwen3"):
        write_tiny_component(kind, home / kind, corpus=WORDS, hidden_size=WIDTH, num_layers=3)
    return home


def composed(home: Path, kind: str) -> VLM:
    vision = {"type": "SigLIP", "path": str(home / "siglip")}
    if kind == "siglip_linear_gemma":
        return compose(vision, {"type": "Linear"}, {"type": "Gemma", "path": str(home / "gemma")})
    if kind == "siglip_mlp_qwen2":
        return compose(
            vision | {"layer": -2}, {"type": "MLP"}, {"type": "Qwen2", "path": str(home / "qwen2")}
        )
    if kind == "eagle_qwen3":
        return compose_eagle(home / "siglip", home / "qwen3", select_layer=2)
    vision = {"dinov2_path": str(home / "dinov2_with_registers"), "siglip_path": str(home / "siglip")}
    llama = {"type": "Llama", "path": str(home / "llama")}
    return compose({"type": "DinoSigLIP", **vision}, {"type": "FusedMLP"}, llama)


@pytest.fixture(scope="module")
def composed_backbones(components) -> dict[str, VLM]:
    """Every composition, with larger random weights; made anew for each module."""
    torch.manual_seed(0)
    return {kind: loud(composed(components, kind)) for kind in COMPOSED}
