"""Vision backbones against transformers' own models, called apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from vla_bench.models.backbones.component_loading import quiet
from vla_bench.models.backbones.vision import VisionBackbone
from vla_bench.registry import VISION_BACKBONES

WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZE, WIDTH = 64, 64


def make_image(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


RNG = np.random.default_rng(0)


IMAGES = [[make_image(RNG), make_image(RNG, 48, 80)] for _ in WORDS]


@pytest.fixture(scope="module")
def home(components) -> Path:
    return components


def normal(image: Image.Image, mean: list[float], std: list[float], size: int = SIZE) -> torch.Tensor:
    """One image, pixel by pixel."""
    values = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    return torch.tensor((values - mean) / std, dtype=torch.float32).permute(2, 0, 1)


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


HALF = ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("dino", ["dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("size", [SIZE, 96])
@torch.no_grad()
def test_fused_features_are_the_second_to_last_layers_of_both_models_dino_first(home, dino, size):
    config = {
        "type": "DinoSigLIP",
        "dinov2_path": home / dino,
        "siglip_path": home / "siglip",
        "image_size": size,
    }
    both = VISION_BACKBONES.build(config).eval()
    images = [image for row in IMAGES for image in row]
    with quiet():
        models = [AutoModel.from_pretrained(home / name).eval() for name in (dino, "siglip")]
    options, expected = ({}, {"interpolate_pos_encoding": True}), []
    for model, norm, more in zip(models, (IMAGENET, HALF), options):
        views = torch.stack([normal(image, *norm, size) for image in images])
        states = model(views, output_hidden_states=True, **more).hidden_states
        assert len(states) == 4  # the embedding and three layers
        expected.append(states[-2][:, -((size // 16) ** 2) :])
    ours = both(both.pixels(images))
    torch.testing.assert_close(ours, torch.cat(expected, dim=-1), atol=1e-5, rtol=1e-5)
    assert both.width == 80 and (ours[..., :32] - expected[1]).abs().max() > 0.1  # DINOv2 stands first


@torch.no_grad()
def test_a_backbone_is_restored_from_plain_settings_and_holds_nothing_unused(home):
    for config in (
        {"type": "SigLIP", "path": home / "siglip"},
        {"type": "SigLIP", "path": home / "siglip", "layer": -3},
        {"type": "DINOv2", "path": home / "dinov2_with_registers", "layer": -2},
    ):
        first = VISION_BACKBONES.build(config).eval()
        again = type(first).restore(json.loads(json.dumps(first.settings()))).eval()
        again.load_state_dict(first.state_dict())
        values = first.pixels(IMAGES[0])
        assert isinstance(again, VisionBackbone) and torch.equal(again(values), first(values))
        unread = [n for n, _ in first.named_parameters() if n.split(".")[1] in ("head",) or "mask_token" in n]
        assert not unread
        norms = [n for n, _ in first.named_parameters() if n.split(".")[1] in ("post_layernorm", "layernorm")]
        assert bool(norms) == (config.get("layer", -1) == -1)
