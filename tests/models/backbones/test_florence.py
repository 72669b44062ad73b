"""Florence-2: its own prompt, learnt positions, and a decoder that is frozen until tokens are wanted."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.loading import load_vlm

WORDS = ("open the drawer", "press the button from the top", "close the window")


def make_image(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


IMAGES = [[make_image(2 * i), make_image(2 * i + 1)] for i in range(len(WORDS))]


def test_a_prompt_longer_than_florences_positions_is_refused(backbones):
    vlm = backbones["florence2"]
    with pytest.raises(ValueError, match="positions for .* tokens, this prompt has"):
        vlm(vlm.prepare(IMAGES[:1], ["open the drawer " * 2000]))


@torch.no_grad()
def test_florences_prompt_is_its_processors(backbones):
    vlm = backbones["florence2"]
    own = vlm.processor(text=[WORDS[0]], images=[IMAGES[0][0]], return_tensors="pt")
    ours = vlm.prepare([IMAGES[0][:1]], WORDS[:1])
    assert ours.keys() == own.keys() and all(own[name].equal(ours[name]) for name in ours)


def test_florences_decoder_is_frozen_until_tokens_are_wanted(home):
    vlm = load_vlm(home / "florence2")
    decoder = vlm.model.model.language_model.decoder
    shared = vlm.model.get_input_embeddings().weight
    asleep = [p for p in decoder.parameters() if not p.requires_grad]
    assert len(asleep) == len(list(decoder.parameters())) - 1 and shared.requires_grad
    vlm.for_tokens()
    assert all(p.requires_grad for p in vlm.parameters())
