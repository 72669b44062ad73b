"""Samples, splits, augmentation, errors and the log, by value."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.config import ConfigError
from vla_bench.data.normalize import Normalizer, Statistics
from vla_bench.training.loop import (
    AugmentedView,
    BatchSampler,
    MetricsLog,
    action_error_sums,
    augment,
    error_row,
    read_metrics,
    split_episodes,
)


class Rows:
    """Ten samples; a row's number stands in its pixels and its state."""

    def __getitem__(self, row):
        pixels = np.random.default_rng(row).integers(0, 255, (16, 16, 3), np.uint8)
        state = np.full(2, row, np.float32)
        return {"image": [Image.fromarray(pixels)] * 2, "state": state, "action": state[None], "lang": "go"}

    def __len__(self):
        return 10


def seen(sample) -> tuple:
    return [np.asarray(image).tolist() for image in sample["image"]], sample["state"].tolist()


def test_an_augmentation_follows_from_seed_and_position():
    view = AugmentedView(Rows(), seed=3, shift_pixels=4, state_noise=0.5)
    for position, row in ((0, 0), (7, 0), (17, 7)):
        rng = np.random.default_rng([3, position])
        assert seen(view[position, row]) == seen(augment(Rows()[row], rng, shift_pixels=4, state_noise=0.5))
    others = [view[0, 0], view[7, 0], AugmentedView(Rows(), 4, 4, 0.5)[0, 0]]
    assert len({json.dumps(seen(sample)) for sample in others}) == 3 and len(view) == 10


def test_both_cameras_are_shifted_alike_and_the_action_stays():
    sample = AugmentedView(Rows(), 0, shift_pixels=4)[5, 2]
    first, second = (np.asarray(image) for image in sample["image"])
    assert (first == second).all() and (first != np.asarray(Rows()[2]["image"][0])).any()
    assert sample["action"].tolist() == [[2.0, 2.0]] and sample["state"].tolist() == [2.0, 2.0]


def test_the_noise_of_the_state_has_the_size_that_is_asked_for():
    view = AugmentedView(Rows(), 0, state_noise=0.25)
    noise = np.stack([view[position, 3]["state"] - 3 for position in range(2000)])
    assert noise.std() == pytest.approx(0.25, rel=0.05) and abs(noise.mean()) < 0.02


@pytest.mark.parametrize("processes, rank, batch, first", [(1, 0, 4, 0), (2, 1, 3, 2), (3, 2, 2, 5)])
def test_a_batch_holds_these_positions_and_rows(processes, rank, batch, first):
    sampler = BatchSampler(10, 7, batch, first, first + 3, rank, processes)
    rows = np.concatenate([np.random.default_rng([7, epoch]).permutation(10) for epoch in range(8)])
    expected = []
    for number in range(first, first + 3):
        start = number * processes * batch + rank * batch
        expected.append([(p, rows[p]) for p in range(start, start + batch)])
    assert list(sampler) == expected and len(sampler) == 3


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.01, 1), (0.1, 1), (0.24, 2), (0.26, 3), (0.9, 9)])
def test_so_many_episodes_are_held_out(fraction, count):
    train, held_out = split_episodes(range(10, 20), fraction, seed=1)
    order = np.random.default_rng(1).permutation(np.arange(10, 20))
    assert held_out == sorted(order[:count]) and train == sorted(order[count:])


@pytest.mark.parametrize("fraction", [0.96, 1, -0.1, 2])
def test_something_is_left_to_train_on(fraction):
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        split_episodes(range(10), fraction, seed=1)


@dataclass
class Half(torch.nn.Module):
    """Predicts half of what is right, in two of three dimensions; remembers its mode and its generators."""

    def __post_init__(self):
        super().__init__()
        self.modes, self.drawn = [], []

    def predict_action(self, batch, generator):
        self.modes.append(self.training)
        self.drawn.append(torch.rand(1, generator=generator).item())
        return {"normalized_actions": batch["actions"][..., :2].numpy() / 2}


def sums_and_model(seed=0):
    values = torch.tensor([[[1.0, 2, 9], [3, 4, 9]], [[5, 6, 9], [7, 8, 9]]])
    padded = torch.tensor([[False, True], [False, False]])
    batch = {"actions": values, "action_is_pad": padded}
    zeros, low, high = np.zeros(2), np.array([-1.0, -2.0]), np.array([1.0, 2.0])
    statistics = Statistics(min=low, max=high, mean=zeros, std=zeros, q01=zeros, q99=zeros, count=2)
    model = Half()
    return action_error_sums(model, [batch, batch], Normalizer(statistics, "min_max"), seed), model


def test_errors_are_summed_over_what_is_no_padding():
    sums, model = sums_and_model()
    normalized = np.array([1 + 5 + 7, 2 + 6 + 8]) / 2 * 2
    np.testing.assert_allclose(sums, [normalized, normalized * [1, 2], [6, 6]])
    assert model.modes == [False, False] and model.training
    row = error_row(sums, ["dx", "dy"])
    assert row["eval/action_error"] == pytest.approx((13 + 16) / 12)
    assert row["eval/action_error/dy"] == pytest.approx(16 / 6)
    assert row["eval/action_error_physical/dy"] == pytest.approx(32 / 6)


def test_the_noise_of_an_evaluation_follows_from_its_seed():
    state = torch.get_rng_state()
    (_, first), (_, again), (_, other) = sums_and_model(), sums_and_model(), sums_and_model(1)
    assert first.drawn == again.drawn and len({*first.drawn, *other.drawn}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_the_log_keeps_the_rows_up_to_the_step_that_the_run_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    log = MetricsLog(path)
    for step in (1, 2, 3, 4):
        log.write(step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    MetricsLog(path, 3).write(4, loss=7.0, other=8.0)
    expected = [{"step": step, "loss": step / 2} for step in (1, 2, 3)]
    assert read_metrics(path) == [*expected, {"step": 4, "loss": 7.0, "other": 8.0}]


def test_a_new_log_begins_at_step_0(tmp_path):
    """Of a run that is begun anew only what was measured before its first step stays."""
    path = tmp_path / "metrics.jsonl"
    for step in (0, 1, 2):
        MetricsLog(path, 9).write(step, loss=1.0)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    MetricsLog(path)
    assert [row["step"] for row in read_metrics(path)] == [0]
