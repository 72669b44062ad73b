"""The diffusion transformer's parts: time, adaptive norms, blocks, and self-attention on the backbone's states."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vla_bench.models.layers.dit import (
    DiT,
    DiTBlock,
    SelfAttentionBlock,
    TimeEmbedding,
    VLSelfAttention,
    adaptive_layer_norm,
    geometric_frequencies,
    sinusoidal_embedding,
)

B, N, L, W, H = 2, 3, 5, 8, 6
MASK = torch.tensor([[True] * L, [True, False, True, True, False]])


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Action tokens and the backbone's states."""
    torch.manual_seed(0)
    return torch.randn(B, N, W), torch.randn(B, L, H)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "last"), [(128, 127), (128, 128), (4, 4)])
def test_frequencies_fall_geometrically(count, last):
    expected = 10000.0 ** (-np.arange(count) / last)
    np.testing.assert_allclose(geometric_frequencies(count, last).numpy(), expected, rtol=1e-5)


def test_an_embedding_is_the_sine_and_the_cosine_of_each_product():
    x, frequencies = torch.tensor([[0.0, 1.0], [2.0, 999.0]]), torch.tensor([1.0, 0.1, 1e-4])
    sines, cosines = sinusoidal_embedding(x, frequencies)
    angles = x.double().numpy()[..., None] * frequencies.double().numpy()
    np.testing.assert_allclose(sines.numpy(), np.sin(angles), atol=1e-4)
    np.testing.assert_allclose(cosines.numpy(), np.cos(angles), atol=1e-4)


def test_angles_are_computed_in_the_precision_of_the_frequencies():
    x, fast = torch.tensor([0.7]), torch.tensor([1571.0])
    error = lambda f: abs(float(sinusoidal_embedding(x, f)[0]) - np.sin(float(x.double()) * 1571.0))
    assert error(fast.double()) < 1e-7 < error(fast)
    assert sinusoidal_embedding(x, fast.double())[0].dtype == torch.float32


def test_the_norms_time_puts_cosines_before_sines():
    torch.manual_seed(0)
    embed, bucket = TimeEmbedding(W), torch.tensor([0, 7, 999])
    angles = bucket.numpy()[:, None] * 10000.0 ** (-np.arange(128) / 127)
    both = torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], 1)).float()
    torch.testing.assert_close(embed(bucket), embed.layers(both), atol=1e-4, rtol=0)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_an_adaptive_norm_scales_and_shifts_a_plain_one(tokens):
    x, scale, shift = tokens[0], torch.randn(B, W), torch.randn(B, W)
    for b in range(B):
        expected = F.layer_norm(x[b], (W,)) * (1 + scale[b]) + shift[b]
        torch.testing.assert_close(adaptive_layer_norm(x, scale, shift, 1e-5)[b], expected)


def test_a_block_run_on_cached_inputs_equals_the_block(tokens):
    x, context = tokens
    block, time = DiTBlock(W, 2, H, 0.0), torch.randn(B, W)
    expected, maps = block(x, time, context, MASK, True)
    keys_values = block.attention.keys_values(context)
    found, looks = block.run(x, block.adapt(F.silu(time)), keys_values, MASK, maps=True)
    assert torch.equal(found, expected) and torch.equal(looks, maps)


def test_scale_comes_before_shift_in_a_block_and_behind_it_in_the_output_layer(tokens):
    x, _ = tokens
    dit, time = DiT(W, 2, 1, H, 0.0), torch.zeros(B, W)
    with torch.no_grad():
        dit.out_adapt.weight.zero_()
        dit.out_adapt.bias.copy_(torch.cat([torch.full((W,), 3.0), torch.zeros(W)]))  # shift 3, scale 0
        found = dit.output_layer(x, time)
        expected = dit.out(F.layer_norm(x, (W,), eps=1e-6) + 3)
    torch.testing.assert_close(found, expected)
    block = dit.blocks[0]
    seen = []
    block.attention.to_q.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    modulation = torch.cat([torch.zeros(B, W), torch.full((B, W), 3.0)], 1)  # scale 0, shift 3
    block.run(x, modulation, block.attention.keys_values(tokens[1]), MASK)
    torch.testing.assert_close(seen[0], F.layer_norm(x, (W,)) + 3)


def test_even_blocks_look_at_the_backbone_unless_all_do():
    assert DiT(W, 2, 4, H, 0.0).crosses == [True, False, True, False]
    assert DiT(W, 2, 3, H, 0.0, interleave=False).crosses == [True, True, True]


def test_padding_of_the_backbone_changes_nothing(tokens):
    x, context = tokens
    dit, bucket = DiT(W, 2, 4, H, 0.0), torch.tensor([0, 999])
    spoilt = torch.where(MASK[..., None], context, 1e4)
    found, maps = dit(x, bucket, spoilt, MASK, maps=True)
    torch.testing.assert_close(found, dit(x, bucket, context, MASK)[0], atol=1e-5, rtol=1e-5)
    assert len(maps) == 2 and not any(m[1, :, :, ~MASK[1]].any() for m in maps)


def test_a_block_reads_the_context_that_is_for_it(tokens):
    x, context = tokens
    dit, bucket = DiT(W, 2, 4, H, 0.0), torch.tensor([0, 999])
    same = dit(x, bucket, [context] * 4, MASK)[0]
    torch.testing.assert_close(same, dit(x, bucket, context, MASK)[0])
    for i, reads in enumerate(dit.crosses):
        contexts = [context + (i == j) for j in range(4)]
        assert torch.allclose(dit(x, bucket, contexts, MASK)[0], same) != reads


def test_time_changes_the_result(tokens):
    x, context = tokens
    dit = DiT(W, 2, 2, H, 0.0)
    early, late = (dit(x, torch.tensor([t, t]), context, MASK)[0] for t in (0, 999))
    assert not torch.allclose(early, late, atol=1e-3)


def test_the_output_layer_can_be_narrower_or_left_away(tokens):
    x, context = tokens
    assert DiT(W, 2, 1, H, 0.0, output=5)(x, torch.tensor([0, 1]), context, MASK)[0].shape == (B, N, 5)
    bare = DiT(W, 2, 1, H, 0.0, output=0)
    assert not any(n.startswith("out") for n, _ in bare.named_parameters())
    assert bare(x, torch.tensor([0, 1]), context, MASK)[0].shape == (B, N, W)


# --- self-attention on the backbone's states --------------------------------------------------------------------------


def test_self_attention_sees_valid_tokens_alone(tokens):
    _, hidden = tokens
    layers = VLSelfAttention(H, 2, 2, 0.0)
    spoilt = torch.where(MASK[..., None], hidden, 1e4)
    torch.testing.assert_close(layers(spoilt, MASK)[MASK], layers(hidden, MASK)[MASK], atol=1e-5, rtol=1e-5)


def test_self_attention_equals_the_valid_tokens_run_alone(tokens):
    _, hidden = tokens
    layers = VLSelfAttention(H, 2, 2, 0.0)
    found = layers(hidden, MASK)
    for b in range(B):
        alone = layers(hidden[b : b + 1, MASK[b]], torch.ones(1, int(MASK[b].sum()), dtype=torch.bool))
        torch.testing.assert_close(found[b, MASK[b]], alone[0], atol=1e-5, rtol=1e-5)


def test_self_attention_is_norm_attention_and_feed_forward():
    torch.manual_seed(0)
    layers, x = VLSelfAttention(H, 1, 1, 0.0), torch.randn(1, 3, H)
    block = layers.blocks[0]
    y = layers.norm(x)
    z = block.norm1(y)
    q, k, v = (getattr(block.attention, f"to_{n}")(z) for n in "qkv")
    y = y + block.attention.to_out((q @ k.transpose(1, 2) / H**0.5).softmax(-1) @ v)
    w = block.feed_forward
    inner = F.gelu(w[0](block.norm2(y)), approximate="tanh")
    torch.testing.assert_close(layers(x, torch.ones(1, 3, dtype=torch.bool)), y + w[3](inner))


@pytest.mark.parametrize("kind", ["DiTBlock", "SelfAttentionBlock"])
def test_what_a_block_adds_is_dropped_before_it_is_added(kind):
    """Beside the dropout within attention there is one behind it: what is added is nothing, or twice as much."""
    torch.manual_seed(0)
    block = DiTBlock(8, 2, None, 0.5) if kind == "DiTBlock" else SelfAttentionBlock(8, 2, 0.5)
    block.attention.dropout.p = 0.0
    with torch.no_grad():
        block.feed_forward[3].weight.zero_()
        block.feed_forward[3].bias.zero_()
    x, seen = torch.randn(2, 5, 8), torch.ones(2, 5).bool()
    run = lambda: block(x, torch.zeros(2, 8), None, None, False)[0] if kind == "DiTBlock" else block(x, seen)
    dropped, added = run() - x, block.eval() and run() - x
    kept = (dropped - 2 * added).abs() < 1e-5
    assert (kept | (dropped.abs() < 1e-6)).all() and 0.2 < kept.float().mean() < 0.8
