"""The expert's layers against their equations in numpy, and against transformers' Gemma."""

import numpy as np
import pytest
import torch
import transformers

from vla_bench.models.features import BackboneSizes
from vla_bench.models.layers.expert import (
    AdaptiveRMSNorm,
    ExpertLayer,
    PrefixCache,
    RMSNorm,
    apply_rope,
    block_mask,
    rope_cos_sin,
)

SIZES = BackboneSizes(16, 2, 64, num_key_value_heads=2, head_dim=6, rope_theta=100.0)


def test_a_token_sees_its_block_and_the_blocks_before():
    starts = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    number = [0, 0, 1, 2, 2, 2]
    expected = [[number[j] <= number[i] for j in range(6)] for i in range(6)]
    assert block_mask(starts).tolist() == expected


def test_rope_turns_pairs_as_complex_numbers():
    torch.manual_seed(0)
    x, positions, theta = torch.randn(2, 3, 4, 8), torch.tensor([[0, 1, 2, 9], [5, 6, 7, 8]]), 100.0
    first, second = x.double().chunk(2, dim=-1)
    angle = positions[:, None, :, None] * theta ** (-torch.arange(4).double() / 4)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    turned = apply_rope(x, *rope_cos_sin(positions, 8, theta))
    torch.testing.assert_close(turned.double(), torch.cat([z.real, z.imag], dim=-1), atol=1e-5, rtol=0)


def test_rope_keeps_half_precision():
    x = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)
    assert apply_rope(x, *rope_cos_sin(torch.arange(2)[None], 8, 100.0)).dtype == torch.bfloat16


def test_the_norm_is_its_equation():
    torch.manual_seed(0)
    norm, x = RMSNorm(6), 3 * torch.randn(2, 5, 6)
    torch.nn.init.normal_(norm.weight)
    y, gate = norm(x)
    rms = np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y.detach(), x.numpy() / rms * (1 + norm.weight.detach().numpy()), atol=1e-5)
    assert gate == 1.0


def test_the_adaptive_norm_is_its_equation():
    torch.manual_seed(0)
    norm, x, condition = AdaptiveRMSNorm(6), 3 * torch.randn(2, 5, 6), torch.randn(2, 6)
    torch.nn.init.normal_(norm.dense.weight)
    torch.nn.init.normal_(norm.dense.bias)
    y, gate = (value.detach().numpy() for value in norm(x, condition))
    three = condition.numpy() @ norm.dense.weight.detach().numpy().T + norm.dense.bias.detach().numpy()
    scale, shift, expected_gate = np.split(three[:, None], 3, axis=-1)
    rms = np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, x.numpy() / rms * (1 + scale) + shift, atol=1e-5)
    np.testing.assert_allclose(gate, expected_gate, atol=1e-5)


def test_the_adaptive_norm_starts_plain_with_its_gate_shut():
    torch.manual_seed(0)
    plain, gate = AdaptiveRMSNorm(6)(3 * torch.randn(2, 5, 6), torch.randn(2, 6))
    assert not gate.any()
    np.testing.assert_allclose(plain.detach().pow(2).mean(-1), 1, atol=1e-4)


@pytest.fixture
def prefix() -> PrefixCache:
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    cache = tuple((torch.randn(2, 2, 7, 6), torch.randn(2, 2, 7, 6)) for _ in range(2))
    return PrefixCache(cache, mask, torch.tensor([7, 4]))


def test_a_repeated_cache_holds_the_batch_again_and_again(prefix):
    again = prefix.repeated(3)
    for r in range(3):
        part = slice(2 * r, 2 * r + 2)
        assert torch.equal(again.mask[part], prefix.mask)
        assert torch.equal(again.position[part], prefix.position)
        for layer, whole in zip(prefix.cache, again.cache):
            assert all(torch.equal(x, y[part]) for x, y in zip(layer, whole))


def test_an_extended_cache_goes_on_behind(prefix):
    more = [(torch.randn(2, 2, 3, 6), torch.randn(2, 2, 3, 6)) for _ in range(2)]
    grown = prefix.extended(more)
    assert grown.position.tolist() == [10, 7]
    assert torch.equal(grown.mask[:, :7], prefix.mask) and grown.mask[:, 7:].all()
    for old, new, both in zip(prefix.cache, more, grown.cache):
        assert all(torch.equal(torch.cat([a, b], 2), c) for a, b, c in zip(old, new, both))


def inputs(prefix: PrefixCache) -> tuple:
    """Five tokens [2, 5, 8] that see the valid prefix and each other, and their rotary angles."""
    torch.manual_seed(1)
    seen = prefix.mask[:, None].expand(-1, 5, -1)
    allowed = torch.cat([seen, torch.ones(2, 5, 5, dtype=torch.bool)], dim=-1)[:, None]
    return torch.randn(2, 5, 8), allowed, rope_cos_sin(7 + torch.arange(5).expand(2, -1), 6, 100.0)


def test_a_layer_is_gemmas(prefix):
    config = transformers.GemmaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    theirs = transformers.models.gemma.modeling_gemma.GemmaDecoderLayer(config, 0)
    ours = ExpertLayer(8, 16, 4, SIZES, adaptive=False)
    ours.load_state_dict(theirs.state_dict())
    (x, allowed, rope), cache = inputs(prefix), transformers.DynamicCache()
    cache.update(*prefix.cache[0], 0)
    expected = theirs(
        x,
        attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf),
        position_embeddings=[angle[:, 0] for angle in rope],
        past_key_values=cache,
    )
    found = ours(x, None, prefix.cache[0], allowed, rope, maps=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_masked_keys_and_values_are_not_read(prefix):
    layer, (x, allowed, rope) = ExpertLayer(8, 16, 4, SIZES, adaptive=False), inputs(prefix)
    loud = tuple(kv.masked_fill(~prefix.mask[:, None, :, None], 1e4) for kv in prefix.cache[0])
    expected = layer(x, None, prefix.cache[0], allowed, rope, maps=False)[0]
    torch.testing.assert_close(
        layer(x, None, loud, allowed, rope, maps=False)[0], expected, atol=1e-5, rtol=0
    )


def test_maps_are_the_weights_that_were_used(prefix):
    attention, (x, allowed, rope) = ExpertLayer(8, 16, 4, SIZES, adaptive=False).self_attn, inputs(prefix)
    out, (_, values), weights = attention(x, prefix.cache[0], allowed, rope, maps=True)
    values = torch.cat([prefix.cache[0][1], values], dim=2)
    mixed = torch.stack([weights[:, h] @ values[:, h // 2] for h in range(4)], dim=2).flatten(2)
    torch.testing.assert_close(attention.o_proj(mixed), out, atol=1e-5, rtol=0)


def test_a_layer_with_shut_gates_is_the_identity(prefix):
    layer, (x, allowed, rope) = ExpertLayer(8, 16, 4, SIZES, adaptive=True), inputs(prefix)
    assert torch.equal(layer(x, torch.randn(2, 8), prefix.cache[0], allowed, rope, maps=False)[0], x)
