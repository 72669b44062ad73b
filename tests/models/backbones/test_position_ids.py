"""Position ids of a whole batch: those of transformers' own loop, in every family that counts in three directions."""

import numpy as np
import pytest
import torch

from vla_bench.models.backbones.position_ids import hand_on_positions, rope_positions, vision_positions

KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
every_kind = pytest.mark.parametrize("kind", KINDS)
SIDES = [(64, 64), (96, 64), (64, 128), (32, 160)]


def batch(vlm, observed, seed: int) -> dict:
    """Samples with one to three images of several sizes and instructions of several lengths."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    images = [
        [observed.image(seed, *SIDES[rng.integers(len(SIDES))]) for _ in range(rng.integers(1, 4))]
        for _ in range(count)
    ]
    return vlm.prepare(images, ["go " * int(rng.integers(1, 9)) for _ in range(count)])


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(8))
def test_ids_are_those_of_transformers(backbones, kind, observed, side, seed):
    vlm, tokenizer = backbones[kind], backbones[kind].processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        inputs = batch(vlm, observed, seed)
    finally:
        tokenizer.padding_side = before
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, _ = vlm.model.model.get_rope_index(**{name: inputs[name] for name in names})
    found = vlm.position_ids(inputs)
    assert found.dtype == expected.dtype and found.equal(expected)


def test_a_sample_without_an_image_counts_its_text(backbones):
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    is_image = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]]).bool()
    found = rope_positions(mask, is_image, torch.tensor([[1, 2]]))
    assert found[0].tolist() == [[0, 0, 1, 2], [0, 1, 1, 3]]
    assert found[2].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("grids", [[], [[1, 2], [1, 2]]], ids=["none", "two"])
def test_another_number_of_images_is_an_error(grids):
    is_image = torch.tensor([[False, True, True, False]])
    with pytest.raises(ValueError, match=f"1 images in the prompts, {len(grids)} in image_grid_thw"):
        rope_positions(torch.ones(1, 4), is_image, torch.tensor(grids).reshape(-1, 2))


@every_kind
@torch.no_grad()
def test_what_is_remembered_is_what_the_encoder_would_compute(backbones, kind, observed):
    vlm = backbones[kind]
    encoder, hooks = vlm.model.model.visual, vlm.model.model.visual._forward_pre_hooks
    assert hand_on_positions in hooks.values()
    for seed in (0, 1, 0):
        inputs = batch(vlm, observed, seed)
        pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
        found, kept = encoder(pixels, grid_thw=grid), dict(hooks)
        hooks.clear()
        try:
            expected = encoder(pixels, grid_thw=grid)
        finally:
            hooks.update(kept)
        assert found.pooler_output.equal(expected.pooler_output)


@torch.no_grad()
def test_a_second_batch_of_the_same_sizes_computes_none(backbones, observed):
    vlm = backbones["qwen2_5_vl"]
    inputs = batch(vlm, observed, 3)
    vlm(inputs)
    before = vision_positions.cache_info()
    vlm(batch(vlm, observed, 3))
    after = vision_positions.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)
