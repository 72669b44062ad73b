"""Tiny compositions load like any other checkpoint."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny_composed import write_tiny_composed

WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZE, WIDTH = 64, 64


def make_image(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


RNG = np.random.default_rng(0)


IMAGES = [[make_image(RNG), make_image(RNG, 48, 80)] for _ in WORDS]


EXTRA = torch.randn(len(WORDS), 3, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["prismatic", "dinosiglip", "eagle2_5_vl"])
@torch.no_grad()
def test_tiny_compositions_load_in_half_precision_and_without_weights(tmp_path, kind):
    sizes = {"hidden_size": WIDTH, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 1}
    path = write_tiny_composed(kind, tmp_path / kind, image_size=SIZE, reserved_tokens=64, **sizes)
    full, half = load_vlm(path).eval(), load_vlm(path, dtype="bfloat16").eval()
    inputs = full.prepare(IMAGES, WORDS)
    exact, rough = full(inputs, EXTRA).extra, half(inputs, EXTRA).extra
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
    bare = load_vlm(path, load_weights=False).eval()
    bare.load_state_dict(full.state_dict())
    torch.testing.assert_close(bare(inputs, EXTRA).extra, exact, atol=1e-6, rtol=1e-6)
    assert len(full.processor.tokenizer) + 64 <= full.sizes.vocab_size
