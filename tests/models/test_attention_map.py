"""Attention over tokens, sorted into patches and words."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.attention_map import attention_map
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny import write_tiny

TINY = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
INSTRUCTIONS = ["open the drawer", "press the button from the top"]
GRIDS = {"qwen2_5_vl": (2, 2), "paligemma": (4, 4)}  # tokens of an image of 64 x 64 pixels


@pytest.fixture(params=GRIDS)
def found(request, tmp_path):
    """The maps of half of the attention on one patch and a quarter on one word of the second sample."""
    write_tiny(request.param, tmp_path, corpus=INSTRUCTIONS, **TINY)
    vlm, (rows, columns) = load_vlm(tmp_path), GRIDS[request.param]
    inputs = vlm.prepare([[Image.new("RGB", (64, 64))] * 2] * 2, INSTRUCTIONS)
    ids, weights = inputs["input_ids"], torch.zeros(inputs["input_ids"].shape)
    patches = vlm.image_token_mask(inputs)[1].nonzero().flatten()
    weights[1, patches[rows * columns + columns]] = 0.5  # second camera, second row, first column
    decode = vlm.processor.tokenizer.decode
    button = [i for i, token in enumerate(ids[1].tolist()) if decode([token]).strip() == "button"]
    assert len(button) == 1
    weights[1, button[0]] = 0.25
    words = vlm.words(inputs, INSTRUCTIONS)
    maps = attention_map(weights, vlm.image_token_mask(inputs), vlm.image_grids(inputs), words)
    return maps, (rows, columns)


def test_attention_is_sorted_into_the_right_patch(found):
    maps, grid = found
    expected = np.zeros(grid, np.float32)
    expected[1, 0] = 0.5
    np.testing.assert_array_equal(maps[1].images[1], expected)


def test_other_images_get_nothing(found):
    maps, _ = found
    assert not maps[1].images[0].any() and not any(m.any() for m in maps[0].images)


def test_attention_is_sorted_into_the_right_word(found):
    maps, _ = found
    assert maps[1].words == [(w, 0.25 if w == "button" else 0.0) for w in INSTRUCTIONS[1].split()]
