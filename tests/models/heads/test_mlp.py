"""The MLP head, written a second time from its state dictionary."""

import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.mlp import MLPHead, ResidualMLP

T, D = 4, 3  # actions in a chunk, numbers in an action


@pytest.fixture
def case():
    """A head with two queries, features, and the chunk that its equation gives."""
    torch.manual_seed(0)
    head = MLPHead(HeadSizes(hidden_size=6, action_dim=D, horizon=T), num_queries=2, hidden_size=5)
    hidden = torch.randn(2, 7, 6)
    features = Features(hidden, torch.ones(2, 7, dtype=torch.bool), num_extra=3)
    w = head.state_dict()
    expected = torch.empty(2, T, D)
    for b in range(2):
        for k in range(2):
            x = hidden[b, 5 + k] @ w["layers.0.weight"].T + w["layers.0.bias"]
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
            expected[b, 2 * k : 2 * k + 2] = (x @ w["layers.2.weight"].T + w["layers.2.bias"]).reshape(2, D)
    return head, features, expected


def test_it_is_linear_gelu_linear_on_its_query(case):
    head, features, expected = case
    torch.testing.assert_close(head.sample(features), expected, atol=1e-6, rtol=0)


def test_its_loss_is_the_mean_absolute_error_of_valid_actions(case):
    head, features, expected = case
    actions = torch.randn(2, T, D)
    is_pad = torch.tensor([[False, False, False, True], [False, True, True, True]])
    valid = [(expected[b, t] - actions[b, t]).abs() for b in range(2) for t in range(T) if not is_pad[b, t]]
    loss = head.loss(features, actions, is_pad)["action_loss"]
    torch.testing.assert_close(loss, torch.cat(valid).mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_residual_network_adds_what_each_block_says(blocks):
    torch.manual_seed(0)
    network, x = ResidualMLP(4, 6, 2, blocks), torch.randn(5, 4)
    inner = network.into(x)
    for block in network.blocks:
        inner = inner + block(inner)
    assert len(network.blocks) == blocks and torch.equal(network(x), network.out(inner))
    assert not torch.allclose(network(x), network.out(network.into(x)))
