"""Where images and words are in a prompt, for every family."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.tiny import BUILDERS

KINDS = tuple(BUILDERS)


WORDS = ("open the drawer", "press the button from the top", "close the window")


every_kind = pytest.mark.parametrize("kind", KINDS)


def make_image(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


IMAGES = [[make_image(2 * i), make_image(2 * i + 1)] for i in range(len(WORDS))]


@every_kind
@torch.no_grad()
def test_images_and_words_are_where_the_backbone_finds_them(backbones, kind):
    vlm = backbones[kind]
    inputs = vlm.prepare(IMAGES, WORDS)
    places, grids = vlm.image_token_mask(inputs), vlm.image_grids(inputs)
    assert places.sum(1).tolist() == [sum(h * w for h, w in row) for row in grids]
    assert [len(row) for row in grids] == [2, 2, 2]
    for row, text, ids in zip(vlm.words(inputs, WORDS), WORDS, inputs["input_ids"]):
        assert [word for word, _ in row] == text.split()
        for word, span in row:
            assert vlm.processor.tokenizer.decode(ids[span]).strip() == word


@every_kind
def test_characters_of_several_tokens_are_found(backbones, kind):
    vlm, texts = backbones[kind], ["pick up the café mug ☕ now", "打开 抽屉"]
    inputs = vlm.prepare(IMAGES[:2], texts)
    for row, text, ids in zip(vlm.words(inputs, texts), texts, inputs["input_ids"]):
        assert [word for word, _ in row] == text.split()
        for word, span in row:
            assert word in vlm.processor.tokenizer.decode(ids[span])
        taken = [place for _, span in row for place in span]
        assert taken == sorted(set(taken))  # no token belongs to two words
