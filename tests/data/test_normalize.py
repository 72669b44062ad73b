"""A dimension that moves is never a constant."""

import numpy as np
import pytest

from vla_bench.data.normalize import Normalizer, Statistics, compute_statistics


@pytest.mark.parametrize("share", [0.001, 0.004, 0.008, 0.009])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 1), (-3, 0), (5, 6)])
def test_moves_rarer_than_the_quantiles_come_back(share, low, high):
    rng = np.random.default_rng(0)
    rest = 0.0
    x = np.where(rng.random(5000) < share, rng.uniform(low, high, 5000), rest)[:, None]
    scale = Normalizer(compute_statistics(x), "q99")
    y = scale.normalize(x)
    assert scale.statistics.q01 == scale.statistics.q99 == rest
    assert ((y == 0) == (x == rest)).all() and np.abs(y).max() == 1
    assert np.abs(scale.unnormalize(y) - x).max() < 1e-6 * max(abs(low), abs(high))


def test_only_a_constant_is_a_constant():
    x = np.stack([np.full(1000, 0.1), np.where(np.arange(1000) == 3, 1e-3, 0.0)], axis=1)
    assert Normalizer(compute_statistics(x), "q99").constant.tolist() == [True, False]


def test_dimensions_whose_quantiles_differ_keep_their_line():
    x = np.random.default_rng(0).normal(size=(5000, 2))
    scale = Normalizer(compute_statistics(x), "q99")
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    assert (scale.offset == (q99 + q01) / 2).all() and (scale.scale == (q99 - q01) / 2).all()


def test_statistics_without_extremes_refuse_what_they_cannot_tell():
    x = np.where(np.arange(1000) == 3, 1.0, 0.0)[:, None]
    told = {k: v for k, v in compute_statistics(x).to_dict().items() if k not in ("min", "max")}
    with pytest.raises(ValueError, match="dimension 0 moves .* use mean_std"):
        Normalizer(Statistics.from_dict(told), "q99")


@pytest.mark.parametrize("mode", ["q99", ["min_max", "q99"]])
def test_a_dimension_that_rests_nearly_always_is_named(mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 2))
    x[:, 1] = np.where(rng.random(5000) < 0.008, 1.0, rng.normal(0, 1e-4, 5000))
    with pytest.warns(UserWarning, match="dimension 1 up to .* min_max fits it"):
        Normalizer(compute_statistics(x), mode)
