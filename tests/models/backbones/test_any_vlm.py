"""The fallback for architectures without a class here reads what a class of its own reads."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.any_vlm import AnyVLM

WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZES = {"hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}


def make_image(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


IMAGES = [[make_image(2 * i), make_image(2 * i + 1)] for i in range(len(WORDS))]


EXTRA = torch.randn(len(WORDS), 3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))


ALLOWED = torch.arange(15, 75)


def assert_close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "internvl", "idefics3"])
@torch.no_grad()
def test_the_fallback_reads_what_a_class_of_its_own_reads(backbones, kind):
    known = backbones[kind]
    guessed = AnyVLM(known.model, known.processor).eval()
    inputs, others = known.prepare(IMAGES, WORDS), guessed.prepare(IMAGES, WORDS)
    if kind == "internvl":
        others = inputs  # the fallback does not know that tiles must be refused
    assert_close(guessed(others, EXTRA).extra, known(inputs, EXTRA).extra)
    assert guessed.image_grids(others) == known.image_grids(inputs)
    assert guessed.decode(others, max_tokens=3, allowed=ALLOWED).equal(
        known.decode(inputs, max_tokens=3, allowed=ALLOWED)
    )


def test_the_fallback_is_taken_for_llava_and_refuses_what_it_cannot_read(backbones):
    assert type(backbones["llava"]) is AnyVLM
    florence, gemma = backbones["florence2"], backbones["gemma3"]
    with pytest.raises(ValueError, match="write a class for it"):
        AnyVLM(florence.model, florence.processor)
    guessed = AnyVLM(gemma.model, gemma.processor)
    inputs = guessed.prepare(IMAGES, WORDS) | {"image_mask": torch.tensor([[True, False]] * 3)}
    with pytest.raises(ValueError, match="masked camera"):
        guessed(inputs)
