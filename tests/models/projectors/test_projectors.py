"""Projectors against their equations, written with loops."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from vla_bench.models.projectors.pixel_shuffle import pixel_shuffle
from vla_bench.registry import PROJECTORS


def shuffled_by_hand(features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = []
    for one in features:
        grid = one.reshape(rows, columns, -1)
        blocks = [(r, c) for r in range(0, rows, 2) for c in range(0, columns, 2)]
        corners = ((0, 0), (0, 1), (1, 0), (1, 1))
        out.append(torch.stack([torch.cat([grid[r + i, c + j] for i, j in corners]) for r, c in blocks]))
    return torch.stack(out)


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (6, 4)])
def test_pixel_shuffle_joins_each_block_row_by_row(grid):
    features = torch.randn(3, grid[0] * grid[1], 5)
    assert torch.equal(pixel_shuffle(features, grid), shuffled_by_hand(features, *grid))
    assert grid == (2, 2) or not torch.equal(
        pixel_shuffle(features, grid), shuffled_by_hand(features, *grid[::-1])
    )


@pytest.mark.parametrize("kind", ["Linear", "MLP", "FusedMLP", "PixelShuffleMLP"])
def test_projectors_are_their_equations_and_tell_their_grid(kind):
    projector = PROJECTORS.build(kind, vision_size=6, text_size=10)
    features, p = torch.randn(2, 24, 6), dict(projector.named_parameters())
    if kind == "Linear":
        expected = features @ p["linear.weight"].T + p["linear.bias"]
    elif kind == "PixelShuffleMLP":
        hidden = shuffled_by_hand(features, 4, 6)
        hidden = layer_norm(hidden, (24,), p["layers.0.weight"], p["layers.0.bias"])
        hidden = gelu(hidden @ p["layers.1.weight"].T + p["layers.1.bias"])
        expected = hidden @ p["layers.3.weight"].T + p["layers.3.bias"]
    else:
        expected, last = features, {"MLP": 2, "FusedMLP": 3}[kind]
        for i in range(1, last + 1):
            expected = expected @ p[f"fc{i}.weight"].T + p[f"fc{i}.bias"]
            expected = gelu(expected) if i < last else expected
    rows, columns = projector.token_grid((4, 6))
    assert projector(features, (4, 6)).shape == (2, rows * columns, 10)
    torch.testing.assert_close(projector(features, (4, 6)), expected, atol=1e-5, rtol=1e-5)
