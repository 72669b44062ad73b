"""The token of the state, and a pre-norm block."""

import pytest
import torch

from vla_bench.models.layers.transformer import StateToken, TransformerBlock

LIKE = torch.zeros(2, 7, 16)


def test_the_state_is_one_token():
    token = StateToken(4, 8)
    state = torch.randn(2, 4)
    assert torch.equal(token(state, LIKE), token.layer(state)[:, None])


def test_without_a_state_there_is_no_token():
    assert StateToken(0, 8)(None, LIKE).shape == (2, 0, 8)


@pytest.mark.parametrize("state, found", [(None, "none"), (torch.zeros(1, 4), r"\[1, 4\]")])
def test_a_state_that_does_not_fit_is_named(state, found):
    with pytest.raises(ValueError, match=f"a state of 4 numbers per sample, got {found}"):
        StateToken(4, 8)(state, LIKE)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three tokens, a context of five, and which of those are valid."""
    torch.manual_seed(0)
    return torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def test_a_block_adds_its_three_parts(inputs):
    x, context, mask = inputs
    block = TransformerBlock(8, 2, context=6)
    found, _ = block(x, None, context, mask)
    y = block.norm(x)
    x = x + block.attention(y, y)[0]
    x = x + block.cross(block.cross_norm(x), context, mask)[0]
    assert torch.equal(found, x + block.feed_forward(x))


def test_a_block_without_context_has_no_maps(inputs):
    assert TransformerBlock(8, 2)(inputs[0], maps=True)[1] is None


def test_masked_context_is_not_read(inputs):
    x, context, mask = inputs
    block, other = TransformerBlock(8, 2, context=6), torch.where(mask[..., None], context, 1e3)
    torch.testing.assert_close(
        block(x, None, other, mask)[0], block(x, None, context, mask)[0], atol=1e-6, rtol=0
    )


def test_masked_tokens_of_the_sequence_are_not_read(inputs):
    x, _, _ = inputs
    block, keys, moved = TransformerBlock(8, 2), torch.tensor([[True, True, False]] * 2), x.clone()
    moved[:, 2] += 1
    torch.testing.assert_close(block(moved, keys)[0][:, :2], block(x, keys)[0][:, :2], atol=1e-6, rtol=0)
    assert not torch.allclose(block(moved)[0][:, :2], block(x)[0][:, :2])


def test_maps_sum_to_one_over_valid_tokens(inputs):
    x, context, mask = inputs
    _, weights = TransformerBlock(8, 2, context=6)(x, None, context, mask, maps=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3), atol=1e-5, rtol=0)
    assert not weights[1, :, :, 3:].any()
