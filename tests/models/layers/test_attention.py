"""Attention against torch's own, its maps, its mask, and several draws of one observation."""

import torch

from vla_bench.models.layers.attention import Attention, masked_softmax, merge_repeats, split_repeats

B, N, M, W, C, HEADS = 2, 3, 5, 8, 6, 2
MASK = torch.tensor([[True] * M, [True, False, True, True, False]])


def inputs(rows: int = B) -> tuple[Attention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Attention(W, HEADS, context=C), torch.randn(rows, N, W), torch.randn(B, M, C)


def test_it_equals_torchs_multi_head_attention():
    ours, x, context = inputs()
    theirs = torch.nn.MultiheadAttention(W, HEADS, kdim=C, vdim=C, batch_first=True)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(theirs, f"{name}_proj_weight").copy_(getattr(ours, f"to_{name}").weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.to_q.bias, ours.to_k.bias, ours.to_v.bias]))
        theirs.out_proj.load_state_dict(ours.to_out.state_dict())
        found, maps = ours(x, context, MASK, maps=True)
        expected, weights = theirs(x, context, context, key_padding_mask=~MASK, average_attn_weights=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(maps, weights, atol=1e-6, rtol=1e-5)


def test_what_stands_at_padding_changes_nothing():
    attention, x, context = inputs()
    spoilt = torch.where(MASK[..., None], context, 1e4)
    torch.testing.assert_close(attention(x, spoilt, MASK)[0], attention(x, context, MASK)[0])


def test_maps_are_returned_only_when_asked_for_and_change_nothing():
    attention, x, context = inputs()
    (with_maps, maps), (without, none) = (attention(x, context, MASK, maps=m) for m in (True, False))
    assert none is None and maps.shape == (B, HEADS, N, M)
    assert torch.equal(with_maps, without)


def test_a_query_that_may_see_nothing_gets_zeros():
    attention, x, context = inputs()
    out, maps = attention(x, context, torch.zeros_like(MASK), maps=True)
    assert out.isfinite().all() and not maps.any()
    assert torch.equal(
        masked_softmax(torch.randn(1, M), torch.zeros(1, M, dtype=torch.bool)), torch.zeros(1, M)
    )


def test_draws_of_an_observation_share_its_keys_and_values():
    attention, x, context = inputs(rows=3 * B)
    found, maps = attention(x, context, MASK, maps=True)
    expected, weights = attention(x, context.repeat(3, 1, 1), MASK.repeat(3, 1), maps=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(maps, weights)


def test_keys_and_values_can_be_kept():
    attention, x, context = inputs()
    kept = attention.keys_values(context)
    assert torch.equal(attention.attend(x, kept, MASK)[0], attention(x, context, MASK)[0])


def test_merged_rows_hold_the_draws_of_one_observation():
    x = torch.arange(3 * 2 * 4).reshape(6, 4, 1)  # row r·B + b is draw r of observation b
    merged = merge_repeats(x, 2)
    for b in range(2):
        assert torch.equal(merged[b], torch.cat([x[2 * r + b] for r in range(3)]))


def test_split_undoes_merge_with_and_without_heads():
    for shape in ((6, 4, 5), (6, 2, 4, 5)):
        x = torch.randn(shape)
        assert torch.equal(split_repeats(merge_repeats(x, 2), 3), x)


def test_dropout_sits_behind_the_projection_and_not_on_the_weights():
    torch.manual_seed(0)
    attention = Attention(8, 2, dropout=0.5)
    x = torch.randn(1, 200, 8)
    out = attention(x, x)[0]
    expected = attention.eval()(x, x)[0] / 0.5
    kept = out != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(out[kept], expected[kept])
