"""A patch embedding as a matrix product: the convolution's results, gradients, names and shapes, in every family."""

import copy

import pytest
import torch
from torch import nn

from vla_bench.models.backbones.patch_embedding import PatchConv3d, is_patch_embedding, multiply_patches

WITH_CONV3D = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
with_conv3d = pytest.mark.parametrize("kind", WITH_CONV3D)


def convolved(vlm):
    """A copy of a backbone whose patch embeddings are transformers' own."""
    plain = copy.deepcopy(vlm)
    for module in plain.modules():
        if type(module) is PatchConv3d:
            module.__class__ = nn.Conv3d
    return plain


def learnt(vlm, observed) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and the gradient of their mean square in every weight."""
    vlm.zero_grad()
    hidden = vlm(vlm.prepare(observed.images, observed.texts), observed.extra).hidden
    hidden.square().mean().backward()
    return hidden.detach(), {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None}


@with_conv3d
def test_states_and_gradients_are_the_convolutions(backbones, kind, observed):
    vlm = copy.deepcopy(backbones[kind]).double()  # so that what differs is not rounding
    hidden, grads = learnt(vlm, observed)
    expected, others = learnt(convolved(vlm), observed)
    torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=0)
    assert grads.keys() == others.keys()
    assert any("patch_embed" in name for name in grads)
    for name, gradient in grads.items():
        size = others[name].abs().max().item()
        torch.testing.assert_close(gradient, others[name], atol=1e-6 * max(size, 1e-3), rtol=0)


def test_every_family_keeps_no_patch_embedding_that_is_convolved(backbones):
    found = {kind for kind, vlm in backbones.items() for m in vlm.modules() if type(m) is PatchConv3d}
    assert found == set(WITH_CONV3D)
    assert not any(is_patch_embedding(m) for vlm in backbones.values() for m in vlm.modules())


@with_conv3d
def test_weights_keep_their_names_order_and_shapes(backbones, kind):
    vlm = backbones[kind]
    shapes = [(name, value.shape) for name, value in vlm.state_dict().items()]
    assert shapes == [(name, value.shape) for name, value in convolved(vlm).state_dict().items()]
    weight = vlm.model.model.visual.patch_embed.proj.weight
    assert weight.ndim == 5 and any(weight is p for p in vlm.parameters())


def test_an_input_of_several_patches_is_convolved():
    module = nn.Sequential(nn.Conv3d(3, 4, (2, 8, 8), (2, 8, 8)))
    video = torch.randn(2, 3, 4, 16, 8)
    expected = module(video)
    multiply_patches(module)
    assert type(module[0]) is PatchConv3d and module(video).equal(expected)


@pytest.mark.parametrize("option", [{"padding": 1}, {"dilation": 2}, {"groups": 3}, {"stride": 1}], ids=str)
def test_another_convolution_is_left_alone(option):
    assert not is_patch_embedding(nn.Conv3d(3, 6, 2, **{"stride": 2, **option}))


def test_a_half_precision_product_is_as_near_as_the_convolution():
    torch.manual_seed(0)
    exact = nn.Conv3d(3, 32, (2, 14, 14), (2, 14, 14)).double()
    patches = torch.randn(20, 3, 2, 14, 14, dtype=torch.float64)
    expected, errors = exact(patches), []
    for kind in (nn.Conv3d, PatchConv3d):
        module = copy.deepcopy(exact).bfloat16()
        module.__class__ = kind
        errors.append((module(patches.bfloat16()).double() - expected).abs().max().item())
    assert errors[1] <= 1.5 * errors[0]
