"""InternVL reads one tile per image."""

import numpy as np
from PIL import Image

WORDS = ("open the drawer", "press the button from the top", "close the window")


def make_image(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


IMAGES = [[make_image(2 * i), make_image(2 * i + 1)] for i in range(len(WORDS))]


def test_a_wide_image_is_one_tile_for_internvl(backbones):
    vlm, wide = backbones["internvl"], IMAGES[0][0].resize((192, 64))
    inputs = vlm.prepare([[wide, wide]], WORDS[:1])
    assert vlm.image_grids(inputs) == [[(2, 2), (2, 2)]] and len(inputs["pixel_values"]) == 2
    prompt = vlm.prepare.prompt(WORDS[0], 1)
    assert len(vlm.processor(text=[prompt], images=[wide], return_tensors="pt")["pixel_values"]) > 1
