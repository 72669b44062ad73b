"""Padding, masked cameras and the company in a batch reach no feature, in any family."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.tiny import BUILDERS

KINDS = tuple(BUILDERS)


WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZES = {"hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}


every_kind = pytest.mark.parametrize("kind", KINDS)


def make_image(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


IMAGES = [[make_image(2 * i), make_image(2 * i + 1)] for i in range(len(WORDS))]


EXTRA = torch.randn(len(WORDS), 3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))


ALLOWED = torch.arange(15, 75)


def padded(inputs: dict, side: str) -> dict:
    """The same batch with its padding on one side."""
    shape, moved = inputs["input_ids"].shape, dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:
            rows = []
            for row, mask in zip(value, inputs["attention_mask"].bool()):
                parts = (row[~mask], row[mask])
                rows.append(torch.cat(parts if side == "left" else parts[::-1]))
            moved[name] = torch.stack(rows)
    return moved


def at_valid(features, inputs: dict) -> list[torch.Tensor]:
    """Per sample, the states at valid prompt tokens, in order."""
    length = inputs["input_ids"].shape[1]
    return [h[:length][m.bool()] for h, m in zip(features.hidden, inputs["attention_mask"])]


def assert_close(one, other, atol=1e-5):
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@every_kind
@torch.no_grad()
def test_neither_the_padding_side_nor_the_batch_reaches_the_features(backbones, kind):
    vlm = backbones[kind]
    inputs = vlm.prepare(IMAGES, WORDS)
    sides = [padded(inputs, side) for side in ("left", "right")]
    assert not sides[0]["attention_mask"].equal(sides[1]["attention_mask"]), "nothing was padded"
    found = [vlm(side, EXTRA) for side in sides]
    assert_close(found[0].extra, found[1].extra)
    assert (found[0].extra[0] - vlm(inputs, EXTRA.flip(0)).extra[0]).abs().max() > 1e-3
    for i, (images, text) in enumerate(zip(IMAGES, WORDS)):
        single = vlm.prepare([images], [text])
        alone = vlm(single, EXTRA[i : i + 1])
        for side, features in zip(sides, found):
            assert_close(at_valid(features, side)[i], alone.hidden[0, :-3])
            assert_close(features.extra[i], alone.extra[0])


@every_kind
@torch.no_grad()
def test_a_padded_token_changes_nothing(backbones, kind):
    vlm = backbones[kind]
    for side in ("left", "right"):
        inputs = padded(vlm.prepare(IMAGES, WORDS), side)
        other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 33))
        assert not other["input_ids"].equal(inputs["input_ids"])
        one, two = vlm(inputs, EXTRA), vlm(other, EXTRA)
        assert_close(one.extra, two.extra, 1e-6)
        for mine, changed in zip(at_valid(one, inputs), at_valid(two, other)):
            assert_close(mine, changed, 1e-6)
        decoded = [vlm.decode(batch, max_tokens=2, allowed=ALLOWED) for batch in (inputs, other)]
        assert decoded[0].equal(decoded[1])


@every_kind
@pytest.mark.parametrize("masked", [0, 1])
@torch.no_grad()
def test_a_masked_camera_changes_nothing_and_a_seen_one_does(backbones, kind, masked):
    vlm, seen = backbones[kind], torch.ones(len(WORDS), 2, dtype=torch.bool)
    seen[:2, masked] = False  # in the third sample both are seen

    def read(changed: int | None) -> torch.Tensor:
        images = [[make_image(50 + i) if c == changed else IMAGES[i][c] for c in range(2)] for i in range(3)]
        return vlm(vlm.prepare(images, WORDS) | {"image_mask": seen}, EXTRA)

    base = read(None)
    assert not base.mask[:2].all(1).any()
    assert_close(read(masked).extra[:2], base.extra[:2], 1e-6)
    moved = (read(1 - masked).extra - base.extra).abs().amax((1, 2))
    assert (moved > 1e-3).all(), moved
    assert (read(masked).extra[2] - base.extra[2]).abs().max() > 1e-3
    everything = vlm(vlm.prepare(IMAGES, WORDS), EXTRA)
    assert (everything.extra[:2] - base.extra[:2]).abs().amax((1, 2)).min() > 1e-3
    assert_close(everything.extra[2], base.extra[2])
    # a camera is masked in a sample alone as it is in a batch
    alone = vlm(vlm.prepare(IMAGES[:1], WORDS[:1]) | {"image_mask": seen[:1]}, EXTRA[:1])
    assert_close(alone.extra[0], base.extra[0])


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma3", "florence2"])
@torch.no_grad()
def test_moving_padding_is_needed(backbones, kind, monkeypatch):
    vlm, side = backbones[kind], "left" if kind == "florence2" else "right"
    inputs = padded(vlm.prepare(IMAGES, WORDS), side)
    packed = vlm(inputs, EXTRA).extra
    monkeypatch.setattr(vlm, "padding_side", None)
    assert (vlm(inputs, EXTRA).extra[0] - packed[0]).abs().max() > 1e-3
