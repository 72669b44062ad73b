"""Which row comes when, as numbers: seeds, epochs, shares, and a mixture's places."""

import numpy as np
import pytest

from vla_bench.data.order import MixtureOrder, row_at, slot_counts


@pytest.mark.parametrize("seed", [0, 5, (3, 1, 1)])
def test_a_position_is_a_place_in_the_permutation_of_its_epoch(seed):
    key = list(seed) if isinstance(seed, tuple) else [seed]
    for epoch in range(3):
        expected = np.random.default_rng([*key, epoch]).permutation(7)
        assert [row_at(7 * epoch + place, 7, seed) for place in range(7)] == expected.tolist()
    assert type(row_at(3, 7, seed)) is int


SHARES = [
    (10, (0.5, 0.5), [5, 5]),
    (10, (0.25, 0.75), [3, 7]),  # of equal remainders the first
    (10, (0.34, 0.33, 0.33), [4, 3, 3]),
    (10, (0.26, 0.26, 0.48), [3, 2, 5]),
    (11, (0.29, 0.31, 0.4), [3, 4, 4]),
    (10, (0.001, 0.999), [1, 9]),
    (5, (0.02, 0.02, 0.96), [1, 1, 3]),
    (3, (0.1, 0.1, 0.8), [1, 1, 1]),
    (2, (0.1, 0.1, 0.8), [1, 1, 1]),  # each at least one
    (100, (1.0,), [100]),
]


@pytest.mark.parametrize("total, shares, counts", SHARES)
def test_shares_become_whole_numbers(total, shares, counts):
    assert slot_counts(total, shares) == counts


def test_shares_have_any_sum():
    for shares in ((1, 3), (0.5, 1.5), (100, 300)):
        assert MixtureOrder((8, 4), 0, shares).counts() == (3, 9)


def test_by_frames_a_mixture_is_one_dataset():
    order = MixtureOrder((3, 4), seed=9)
    assert order.counts() == (3, 4) and len(order) == 7
    assert [order.row_at(p) for p in range(21)] == [row_at(p, 7, 9) for p in range(21)]


def test_with_weights_each_dataset_has_an_order_of_its_own():
    """By hand: which dataset is at a place, its how manieth sample that is, and its own permutation of that number."""
    rows, seed, shares = (3, 5, 4), 2, (1, 1, 2)
    order = MixtureOrder(rows, seed, shares)
    counts = order.counts()
    assert counts == (3, 3, 6)
    taken = [0, 0, 0]
    for epoch in range(3):
        which = np.random.default_rng([seed, 3, epoch]).permutation(np.repeat([0, 1, 2], counts))
        for place, dataset in enumerate(which):
            own = row_at(taken[dataset], rows[dataset], (seed, int(dataset), 1))
            assert order.row_at(12 * epoch + place) == sum(rows[:dataset]) + own
            taken[dataset] += 1


@pytest.mark.parametrize(
    "rows, shares, message",
    [
        ((), None, r"at least one sample each, got \[\]"),
        ((3, 0), None, r"at least one sample each, got \[3, 0\]"),
        ((3, 4), (1,), "a mixture of 2 datasets needs a positive weight for each"),
        ((3, 4), (1, 0), "needs a positive weight for each"),
        ((3, 4), (1, -1), "needs a positive weight for each"),
    ],
)
def test_an_order_that_cannot_be_is_refused(rows, shares, message):
    with pytest.raises(ValueError, match=message):
        MixtureOrder(rows, 0, shares)


def test_datasets_of_one_sample_may_be_mixed():
    assert sorted(MixtureOrder((1, 1), 0, (1, 1)).row_at(p) for p in range(2)) == [0, 1]
