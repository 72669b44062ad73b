"""Attention by length: what transformers' loop over images computes, with fewer calls, in every family that loops."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vla_bench.models.backbones.image_attention import BY_LENGTH, attention_by_length, segments_of

LOOPING = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
looping = pytest.mark.parametrize("kind", LOOPING)
SIDES = ((64, 64), (96, 64), (64, 64), (64, 128))  # of the images, height and width


def looped(vlm):
    """A copy of a backbone whose images are attended to one by one, by transformers."""
    other = copy.deepcopy(vlm)
    other.model.set_attn_implementation({"vision_config": "sdpa"})
    return other


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the queries of each call of PyTorch's attention."""
    found, original = [], F.scaled_dot_product_attention

    def counted(query, *args, **options):
        found.append(tuple(query.shape))
        return original(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return found


def of_sides(observed, sides):
    return [[observed.image(i, *size)] for i, size in enumerate(sides)], ["go"] * len(sides)


@looping
@pytest.mark.parametrize("sides", [SIDES[:1] * 3, SIDES], ids=["one size", "several sizes"])
def test_states_and_gradients_are_those_of_the_loop(backbones, kind, observed, sides):
    vlm = copy.deepcopy(backbones[kind]).double()  # so that what differs is not rounding
    inputs = vlm.prepare(*of_sides(observed, sides))
    found = []
    for each in (vlm, looped(vlm)):
        hidden = each(inputs).hidden
        hidden.square().mean().backward()
        found.append((hidden, [p.grad for p in each.parameters()]))
    (hidden, grads), (expected, others) = found
    torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=0)
    for gradient, other in zip(grads, others, strict=True):
        assert (gradient is None) == (other is None)
        if other is not None:
            size = max(other.abs().max().item(), 1e-3)
            torch.testing.assert_close(gradient, other, atol=1e-6 * size, rtol=0)


@looping
@torch.no_grad()
def test_an_image_does_not_see_another(backbones, kind, observed):
    vlm = backbones[kind]
    images, texts = of_sides(observed, SIDES)
    together = vlm(vlm.prepare(images, texts)).hidden
    changed = [images[0], [observed.image(9, *SIDES[1])], *images[2:]]
    other = vlm(vlm.prepare(changed, texts)).hidden
    moved = (together - other).abs().amax((1, 2)) > 0
    assert moved.tolist() == [False, True, False, False]


@looping
@torch.no_grad()
def test_images_of_one_size_are_one_call_per_block(backbones, kind, observed, calls):
    vlm = backbones[kind]
    inputs = vlm.prepare(*of_sides(observed, SIDES[:1] * 3))
    del calls[:]
    vlm.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    assert len(calls) == vlm.config.vision_config.depth and {shape[0] for shape in calls} == {3}


@looping
def test_only_the_vision_encoder_attends_so(backbones, kind):
    vlm = backbones[kind]
    assert vlm.config.vision_config._attn_implementation == BY_LENGTH
    assert vlm.text_config._attn_implementation == "sdpa"
    assert BY_LENGTH not in vlm.config.to_json_string()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@torch.no_grad()
def test_another_implementation_set_later_is_what_runs(backbones, observed, calls, name):
    vlm = copy.deepcopy(backbones["qwen2_5_vl"])
    inputs = vlm.prepare(*of_sides(observed, SIDES[:1] * 3))
    expected = vlm(inputs).hidden
    vlm.model.set_attn_implementation({"vision_config": name})
    del calls[:]
    torch.testing.assert_close(vlm(inputs).hidden, expected, atol=1e-5, rtol=0)
    vision = [shape for shape in calls if shape[1:] == (vlm.config.vision_config.num_heads, 16, calls[0][3])]
    assert {shape[0] for shape in vision} == ({1} if name == "sdpa" else set())


@pytest.mark.parametrize("seed", range(20))
def test_any_division_of_a_row(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (int(torch.randint(1, 8, (), generator=generator)),), generator=generator)
    bounds = F.pad(lengths.cumsum(0), (1, 0))
    query, key, value = torch.randn(3, 1, 2, int(bounds[-1]), 4, generator=generator, dtype=torch.float64)
    segments = segments_of(bounds)
    assert len(segments.groups) == len(lengths.unique())
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    mask = owner[:, None] == owner
    expected = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
    found, _ = attention_by_length(nn.Module(), query, key, value, None, segments=segments, is_causal=False)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
