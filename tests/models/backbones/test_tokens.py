"""Padding, masked cameras and the company in a batch reach no feature, in any family."""

import pytest
import torch

from vla_bench.models.backbones.tiny import BUILDERS

every_kind = pytest.mark.parametrize("kind", BUILDERS)


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
def test_neither_the_padding_side_nor_the_batch_reaches_the_features(backbones, kind, observed):
    vlm = backbones[kind]
    inputs = vlm.prepare(observed.images, observed.texts)
    sides = [padded(inputs, side) for side in ("left", "right")]
    assert not sides[0]["attention_mask"].equal(sides[1]["attention_mask"]), "nothing was padded"
    found = [vlm(side, observed.extra) for side in sides]
    assert_close(found[0].extra, found[1].extra)
    assert (found[0].extra[0] - vlm(inputs, observed.extra.flip(0)).extra[0]).abs().max() > 1e-3
    for i, (images, text) in enumerate(zip(observed.images, observed.texts)):
        single = vlm.prepare([images], [text])
        alone = vlm(single, observed.extra[i : i + 1])
        for side, features in zip(sides, found):
            assert_close(at_valid(features, side)[i], alone.hidden[0, :-3])
            assert_close(features.extra[i], alone.extra[0])


@every_kind
@torch.no_grad()
def test_a_padded_token_changes_nothing(backbones, kind, observed):
    vlm = backbones[kind]
    for side in ("left", "right"):
        inputs = padded(vlm.prepare(observed.images, observed.texts), side)
        other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 33))
        assert not other["input_ids"].equal(inputs["input_ids"])
        one, two = vlm(inputs, observed.extra), vlm(other, observed.extra)
        assert_close(one.extra, two.extra, 1e-6)
        for mine, changed in zip(at_valid(one, inputs), at_valid(two, other)):
            assert_close(mine, changed, 1e-6)
        decoded = [vlm.decode(batch, max_tokens=2, allowed=ALLOWED) for batch in (inputs, other)]
        assert decoded[0].equal(decoded[1])


@every_kind
@pytest.mark.parametrize("masked", [0, 1])
@torch.no_grad()
def test_a_masked_camera_changes_nothing_and_a_seen_one_does(backbones, kind, masked, observed):
    vlm, seen = backbones[kind], torch.ones(len(observed.texts), 2, dtype=torch.bool)
    seen[:2, masked] = False  # in the third sample both are seen

    def read(changed: int | None) -> torch.Tensor:
        images = [
            [observed.image(50 + i) if c == changed else observed.images[i][c] for c in range(2)]
            for i in range(3)
        ]
        return vlm(vlm.prepare(images, observed.texts) | {"image_mask": seen}, observed.extra)

    base = read(None)
    assert not base.mask[:2].all(1).any()
    assert_close(read(masked).extra[:2], base.extra[:2], 1e-6)
    moved = (read(1 - masked).extra - base.extra).abs().amax((1, 2))
    assert (moved > 1e-3).all(), moved
    assert (read(masked).extra[2] - base.extra[2]).abs().max() > 1e-3
    everything = vlm(vlm.prepare(observed.images, observed.texts), observed.extra)
    assert (everything.extra[:2] - base.extra[:2]).abs().amax((1, 2)).min() > 1e-3
    assert_close(everything.extra[2], base.extra[2])
    # a camera is masked in a sample alone as it is in a batch
    alone = vlm(
        vlm.prepare(observed.images[:1], observed.texts[:1]) | {"image_mask": seen[:1]}, observed.extra[:1]
    )
    assert_close(alone.extra[0], base.extra[0])


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma3", "florence2"])
@torch.no_grad()
def test_moving_padding_is_needed(backbones, kind, monkeypatch, observed):
    vlm, side = backbones[kind], "left" if kind == "florence2" else "right"
    inputs = padded(vlm.prepare(observed.images, observed.texts), side)
    packed = vlm(inputs, observed.extra).extra
    monkeypatch.setattr(vlm, "padding_side", None)
    assert (vlm(inputs, observed.extra).extra[0] - packed[0]).abs().max() > 1e-3
