"""The order of a stream: every sample once an epoch, of few shards at a time, whoever asks and wherever it resumes."""

import os

import numpy as np
import pytest

from vla_bench.data.streaming import ShardOrder, _ends
from vla_bench.training.loop import BatchSampler

CASES = int(os.environ.get("VLA_BENCH_CASES", "25"))


def draw(case: int) -> tuple[ShardOrder, np.random.Generator]:
    rng = np.random.default_rng([case, 66])
    shards = tuple(rng.integers(1, 25, rng.integers(1, 12)).tolist())
    return ShardOrder(shards, int(rng.integers(1000)), int(rng.integers(1, len(shards) + 1))), rng


@pytest.mark.parametrize("case", range(CASES))
def test_each_epoch_has_every_sample_once_and_few_shards_at_a_time(case):
    order, _ = draw(case)
    size, owner = len(order), np.repeat(np.arange(len(order.shards)), order.shards)
    rows = np.array([order.row_at(position) for position in range(3 * size)])
    for epoch in rows.reshape(3, size):
        assert np.array_equal(np.sort(epoch), np.arange(size))
    for number, epoch in enumerate(rows.reshape(3, size)):
        unit = np.searchsorted(_ends(order, number), np.arange(size), side="right")
        assert ((unit - owner[epoch]) % len(order.shards) < order.mixed).all()


@pytest.mark.parametrize("case", range(CASES))
def test_ranks_and_resumed_runs_draw_the_same_sequence(case):
    order, rng = draw(case)
    world, batch, steps = int(rng.integers(1, 5)), int(rng.integers(1, 5)), 12
    alone = [order.row_at(position) for position in range(world * batch * steps)]
    again = ShardOrder(order.shards, order.seed, order.mixed)
    cut = int(rng.integers(1, steps))
    found = []
    for first, stop in ((0, cut), (cut, steps)):
        samplers = [
            BatchSampler(len(order), order.seed, batch, first, stop, rank, world, order=again)
            for rank in range(world)
        ]
        found += [key for together in zip(*samplers, strict=True) for keys in together for key in keys]
    assert found == list(enumerate(alone))


def test_a_new_epoch_and_another_seed_have_another_order():
    order, other = ShardOrder((30,) * 8, 0, 4), ShardOrder((30,) * 8, 1, 4)
    rows = lambda order, begin: [order.row_at(position) for position in range(begin, begin + 240)]
    assert rows(order, 0) != rows(order, 240) and rows(order, 0) != rows(other, 0)


def test_samples_are_mixed_over_the_whole_buffer():
    order = ShardOrder((100,) * 20, 0, 5)
    shards = np.array([order.row_at(position) for position in range(2000)]) // 100
    for begin in range(0, 2000, 100):
        assert len(set(shards[begin : begin + 100])) >= 5
    assert (np.abs(np.diff(shards)) > 0).mean() > 0.7  # neighbours are seldom of one shard
