"""Layers with weights for each embodiment."""

import numpy as np
import pytest
import torch

from vla_bench.models.layers.embodiment import (
    CategorySpecificLinear,
    apply_layer,
    check_embodiment,
    embodiment_linear,
    embodiment_mlp,
)


@pytest.fixture
def layer() -> CategorySpecificLinear:
    torch.manual_seed(0)
    return CategorySpecificLinear(4, 3, num_embodiments=5)


def test_it_is_a_matrix_per_embodiment(layer):
    x, embodiment = torch.randn(6, 2, 4), torch.tensor([4, 0, 4])
    found = layer(x, embodiment).detach().double().numpy()  # two draws of three samples
    w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    for row in range(6):
        e = int(embodiment[row % 3])
        np.testing.assert_allclose(found[row], x[row].double().numpy() @ w[e] + b[e], atol=1e-6)


def test_a_gradient_reaches_the_embodiments_of_the_batch_alone(layer):
    layer(torch.randn(6, 2, 4), torch.tensor([4, 0, 4])).sum().backward()
    assert [bool(g.any()) for g in layer.weight.grad] == [True, False, False, False, True]


def test_it_starts_as_torchs_layers_do():
    torch.manual_seed(0)
    ours = CategorySpecificLinear(4, 3, num_embodiments=2)
    torch.manual_seed(0)
    for e in range(2):
        theirs = torch.nn.Linear(4, 3)
        assert torch.equal(ours.weight[e], theirs.weight.T) and torch.equal(ours.bias[e], theirs.bias)


def test_one_embodiment_is_an_ordinary_layer():
    assert type(embodiment_linear(4, 3)) is torch.nn.Linear
    net = embodiment_mlp(4, 8, 3)
    assert [type(m) for m in net] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
    x = torch.randn(2, 1, 4)
    assert torch.equal(net(x), torch.nn.Sequential(*net)(x))


def test_an_mlp_with_several_embodiments_uses_each_ones_weights():
    torch.manual_seed(0)
    net, x = embodiment_mlp(4, 8, 3, torch.nn.SiLU, num_embodiments=3), torch.randn(2, 1, 4)
    found = net(x, torch.tensor([1, 2]))
    for row, e in enumerate((1, 2)):
        inner = torch.nn.functional.silu(x[row] @ net[0].weight[e] + net[0].bias[e])
        torch.testing.assert_close(found[row], inner @ net[2].weight[e] + net[2].bias[e])


def test_a_layer_is_run_with_what_it_wants(layer):
    x, embodiment = torch.randn(2, 1, 4), torch.tensor([1, 2])
    plain = torch.nn.Linear(4, 3)
    assert torch.equal(apply_layer(layer, x, embodiment), layer(x, embodiment))
    assert torch.equal(apply_layer(plain, x, embodiment), plain(x))


@pytest.mark.parametrize(
    ("embodiment", "message"),
    [
        (None, "list the datasets in framework.embodiments, or set num_embodiments to 1"),
        (torch.tensor([0, 3]), "embodiment 3 is outside 0..2"),
        (torch.tensor([-1, 0]), "embodiment -1 is outside 0..2"),
        (torch.tensor([0]), r"expected int64 \[2\]"),
        (torch.tensor([0.0, 1.0]), r"torch.float32 \[2\], expected int64"),
    ],
)
def test_an_embodiment_that_does_not_fit_is_named(embodiment, message):
    with pytest.raises(ValueError, match=message):
        check_embodiment(embodiment, 2, 3)
