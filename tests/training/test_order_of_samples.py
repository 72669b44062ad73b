"""The order of samples over (world size, workers, batch, accumulation, epochs, weights, resume point): 500 drawn cases."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from vla_bench.data.order import MixtureOrder
from vla_bench.training.loop import BatchSampler

CASES = 500
WITH_WORKERS = range(0, CASES, 125)  # worker processes cost a second each


class Keys:
    """A dataset that returns what it is addressed with."""

    def __getitem__(self, key):
        return key

    def __len__(self):
        return 1


def draw(case: int) -> dict:
    rng = np.random.default_rng([case, 11])
    datasets = int(rng.integers(1, 5))
    rows = tuple(rng.integers(1, 40, datasets).tolist())
    weights = None if rng.random() < 0.4 else tuple(rng.uniform(0.2, 5, datasets).round(2).tolist())
    return {
        "order": MixtureOrder(rows, int(rng.integers(1000)), weights),
        "world": int(rng.choice([1, 2, 3, 4, 8])),
        "workers": int(rng.integers(1, 3)),
        "batch": int(rng.integers(1, 6)),
        "accumulation": int(rng.integers(1, 4)),
        "epochs": int(rng.integers(2, 5)),
        "resume": float(rng.random()),
    }


def batches(case: dict, rank: int, first: int, stop: int) -> BatchSampler:
    order = case["order"]
    place = {"first": first, "stop": stop, "rank": rank, "processes": case["world"]}
    return BatchSampler(len(order), order.seed, case["batch"], **place, order=order)


def last_batch(case: dict) -> int:
    """So many batches of each process that every epoch is drawn in full, and whole optimizer steps."""
    per_step = case["batch"] * case["world"] * case["accumulation"]
    return -(-len(case["order"]) * case["epochs"] // per_step) * case["accumulation"]


def by_rank(case: dict, first: int, stop: int, workers: int = 0) -> list[list]:
    """Per rank, its batches, as the loader's workers return them where there are some."""
    found = []
    for rank in range(case["world"]):
        sampler = batches(case, rank, first, stop)
        if not workers:  # a loader without workers hands on what the sampler gives
            found.append([list(batch) for batch in sampler])
            continue
        loader = DataLoader(Keys(), batch_sampler=sampler, collate_fn=list, num_workers=workers)
        found.append([list(batch) for batch in loader])
    return found


def sequence(found: list[list]) -> list[tuple[int, int]]:
    """The (position, row) pairs in the order of the run: step by step, rank by rank."""
    return [key for step in zip(*found) for batch in step for key in batch]


def test_drawn_cases_vary_in_all_seven():
    drawn = [draw(case) for case in range(CASES)]
    for name in ("world", "workers", "batch", "accumulation", "epochs"):
        assert len({case[name] for case in drawn}) > 1
    assert {case["order"].shares is None for case in drawn} == {True, False}
    assert min(case["resume"] for case in drawn) < 0.01 and max(case["resume"] for case in drawn) > 0.99


@pytest.mark.parametrize("case", range(CASES))
def test_every_case_is_the_single_process_sequence(case):
    drawn = draw(case)
    order, stop = drawn["order"], last_batch(drawn)
    total = stop * drawn["batch"] * drawn["world"]
    expected = [(position, order.row_at(position)) for position in range(total)]
    first = int(drawn["resume"] * stop) // drawn["accumulation"] * drawn["accumulation"]
    begun, resumed = by_rank(drawn, 0, first), by_rank(drawn, first, stop)
    assert sequence(begun) + sequence(resumed) == expected
    if case in WITH_WORKERS:
        assert sequence(by_rank(drawn, first, stop, drawn["workers"])) == sequence(resumed)


@pytest.mark.parametrize("case", range(CASES))
def test_ranks_are_disjoint_and_epochs_cover_by_weight(case):
    drawn = draw(case)
    order, length = drawn["order"], len(drawn["order"])
    found = by_rank(drawn, 0, last_batch(drawn))
    positions = [{p for batch in rank for p, _ in batch} for rank in found]
    assert sum(map(len, positions)) == len(set().union(*positions))
    rows = np.array([row for _, row in sequence(found)])
    starts = np.cumsum([0, *order.rows])
    epochs = [rows[e * length : (e + 1) * length] for e in range(drawn["epochs"])]
    for epoch in epochs:
        dataset = np.searchsorted(starts, epoch, side="right") - 1
        assert np.bincount(dataset, minlength=len(order.rows)).tolist() == list(order.counts())
    if length > 12:
        assert any((epochs[0] != epoch).any() for epoch in epochs[1:])
    for which, count in enumerate(order.rows):  # within a dataset no row comes again before all have come
        own = rows[(rows >= starts[which]) & (rows < starts[which + 1])] - starts[which]
        for i in range(len(own) // count):
            assert sorted(own[i * count : (i + 1) * count]) == list(range(count))


@pytest.mark.parametrize("case", range(0, CASES, 10))
def test_the_order_is_the_same_at_any_world_size(case):
    drawn = draw(case)
    drawn |= {"batch": 12}
    sequences = []
    for world in (1, 2, 4):
        drawn |= {"world": world, "batch": 12 // world}
        sequences.append(sequence(by_rank(drawn, 0, 6)))
    assert sequences[0] == sequences[1] == sequences[2]


def test_shares_are_met_within_one_sample_per_epoch():
    order = MixtureOrder((700, 200, 100), seed=0, shares=(0.2, 0.3, 0.5))
    assert np.abs(np.array(order.counts()) - [200, 300, 500]).max() <= 1
