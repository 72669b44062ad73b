"""Norms with their gradient in closed form: transformers' values and gradients, only where something is learnt."""

import copy

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from vla_bench.models.backbones import rms_norm
from vla_bench.models.backbones.rms_norm import RMS_NORMS, FastRMSNorm, RMSNormGradient, shorten_norms

SHORTENED = {"qwen2_5_vl": True, "qwen3_vl": True, "qwen3_5": False, "gemma3": False, "paligemma": False}


def pair(width: int = 24) -> tuple[Qwen2_5_VLRMSNorm, torch.nn.Module]:
    """transformers' norm, and the same with the short gradient."""
    theirs = Qwen2_5_VLRMSNorm(width)
    torch.nn.init.normal_(theirs.weight)
    ours = copy.deepcopy(theirs)
    shorten_norms(ours)
    assert type(ours) is FastRMSNorm
    return theirs, ours


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_values_and_gradients_are_those_of_transformers(shape, size):
    torch.manual_seed(0)
    found, given = [], size * torch.randn(shape)
    for module in pair():
        torch.manual_seed(1)
        x = given.clone().requires_grad_()
        y = module(x)
        y.backward(torch.randn(shape))
        found.append((y.detach(), x.grad * size, module.weight.grad))
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=3e-6)


def test_the_gradient_is_that_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 4, 5), (5,)))
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: RMSNormGradient.apply(a, b, 1e-5), inputs)


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_what_is_frozen_gets_no_gradient(frozen):
    _, ours = pair()
    x = torch.randn(3, 24, requires_grad=frozen == "weight")
    ours.weight.requires_grad_(frozen == "input")
    ours(x).sum().backward()
    assert (x.grad is None, ours.weight.grad is None) == (frozen == "input", frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32], ids=str)
def test_what_is_not_learnt_in_float32_is_bit_equal(dtype, monkeypatch):
    theirs, ours = pair()
    monkeypatch.setattr(rms_norm, "RMSNormGradient", None)  # whoever calls it fails
    x = torch.randn(6, 24).to(dtype)
    with torch.set_grad_enabled(dtype is not torch.float32):
        assert ours(x).equal(theirs(x)) and ours(x).dtype == theirs(x).dtype


def test_autocast_leaves_the_norm_alone():
    theirs, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(torch.ones(2, 24)), theirs(torch.ones(2, 24)))


@pytest.mark.parametrize("kind", SHORTENED)
def test_every_norm_of_the_kind_is_shortened_and_no_other(backbones, kind):
    kinds = [type(module) for module in backbones[kind].modules()]
    assert (FastRMSNorm in kinds) == SHORTENED[kind]
    assert not {each.__name__ for each in kinds} & set(RMS_NORMS)


@pytest.mark.parametrize("norm", [Gemma3RMSNorm, LlamaRMSNorm])
def test_another_norm_keeps_its_class(norm):
    module = norm(8)
    shorten_norms(module)
    assert type(module) is norm
