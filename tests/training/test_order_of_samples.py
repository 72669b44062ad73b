"""The order of samples over (world size, workers, batch, accumulation, epochs, weights, resume point): 500 drawn cases."""

from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from vla_bench.data.order import MixtureOrder
from vla_bench.data.streaming import ShardOrder
from vla_bench.training.loop import BatchSampler, make_loader
from vla_bench.training.resume import Split, splits
from vla_bench.training.run import Run

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


def place(case: int) -> SimpleNamespace:
    """A run of two sources, killed somewhere, that goes on from its last checkpoint with other processes."""
    rng = np.random.default_rng([case, 23])
    rows = rng.integers(1, 30, int(rng.integers(1, 5))).tolist()
    seed, kind = int(rng.integers(1000)), ("plain", "mixture", "stream")[case % 3]
    order = {
        "plain": None,
        "mixture": MixtureOrder(tuple(rows), seed, tuple(rng.uniform(0.2, 5, len(rows)).round(2).tolist())),
        "stream": ShardOrder(tuple(rows), seed, int(rng.integers(1, len(rows) + 1))),
    }[kind]
    before = Split(*(int(number) for number in (rng.integers(1, 5), rng.integers(1, 6), rng.integers(1, 4))))
    worlds = [world for world in (1, 2, 3, 4) if before.samples % world == 0]
    after = rng.choice(np.array(splits(before.samples, int(rng.choice(worlds))), object))
    steps = int(rng.integers(2, 12))
    killed = int(rng.integers(0, steps))  # in the step after this one
    return SimpleNamespace(
        kind=kind, order=order, rows=sum(rows), seed=seed, steps=steps, killed=killed,
        saved=killed - killed % int(rng.integers(1, 4)), before=before, after=after, workers=int(rng.integers(0, 3)),
    )  # fmt: skip


def read(case: SimpleNamespace, split: Split, first: int, stop: int, source: str, workers: int = 0) -> list:
    """What all processes of a run read of a source in some of its steps, in the order of the positions."""
    shared = {
        "vla": SimpleNamespace(view=range(case.rows), batch_size=split.batch_size, order=case.order),
        "vlm": SimpleNamespace(view=range(7), batch_size=split.batch_size * 2, order=None),
    }
    found = []
    for rank in range(split.processes):
        run = Run(
            folder=None, seed=case.seed, data=None, spec=None, framework=None, model=None, optimizer=None,
            scheduler=None, sources=shared, step=first,
            settings=SimpleNamespace(gradient_accumulation_steps=split.accumulation, max_train_steps=stop),
            accelerator=SimpleNamespace(process_index=rank, num_processes=split.processes),
        )  # fmt: skip
        found.append(list(make_loader(Keys(), run.sampler(source), list, workers)))
    return sequence(found)


def test_drawn_interruptions_vary_in_all_that_is_asked_for():
    drawn = [place(case) for case in range(CASES)]
    for side in ("before", "after"):
        assert {getattr(case, side).processes for case in drawn} == {1, 2, 3, 4}
        for name in ("batch_size", "accumulation"):
            assert len({getattr(getattr(case, side), name) for case in drawn}) > 2
    assert {case.kind for case in drawn} == {"plain", "mixture", "stream"}
    assert {case.workers for case in drawn} == {0, 1, 2} and {case.killed for case in drawn} == set(range(11))
    moved = [case for case in drawn if case.before != case.after]
    assert CASES // 3 < len(moved) < CASES


@pytest.mark.parametrize("case", range(CASES))
def test_a_run_that_goes_on_elsewhere_reads_what_the_uninterrupted_one_reads(case):
    drawn = place(case)
    for source in ("vla", "vlm"):
        whole = read(drawn, drawn.before, 0, drawn.steps, source)
        kept = read(drawn, drawn.before, 0, drawn.saved, source)
        workers = max(1, drawn.workers) if case in WITH_WORKERS else 0
        went_on = read(drawn, drawn.after, drawn.saved, drawn.steps, source, workers)
        assert kept + went_on == whole
        assert [position for position, _ in whole] == list(range(len(whole)))


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_end_of_an_epoch_is_no_place_where_ranks_are_padded(shuffled):
    """Ten rows, batches of two, two ranks: of eight or twelve places, the padding would move with the resume point."""
    row = (
        (lambda position: BatchSampler(10, 0, 1).row(position))
        if shuffled
        else (lambda position: position % 10)
    )
    order = SimpleNamespace(row_at=row)
    for first in range(6):
        for rank in (0, 1):
            sampler = BatchSampler(10, 0, 2, first, 6, rank, 2, order)
            positions = [[4 * batch + 2 * rank, 4 * batch + 2 * rank + 1] for batch in range(first, 6)]
            assert [[key[1] for key in batch] for batch in sampler] == [
                [row(p) for p in each] for each in positions
            ]
