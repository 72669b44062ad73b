"""Samples, splits, augmentation, errors and the log, by value."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.config import ConfigError
from vla_bench.data.normalize import Normalizer, Statistics
from vla_bench.data.order import MixtureOrder
from vla_bench.data.transforms import Crop, ImageTransforms, RandomShift
from vla_bench.training import loop
from vla_bench.training.loop import (
    AugmentedView,
    BatchSampler,
    EvaluationView,
    MetricsLog,
    action_error_sums,
    augment,
    error_row,
    event_weights,
    gripper_events,
    make_loader,
    read_metrics,
    split_episodes,
)
from vla_bench.training.worker import start_worker


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


def test_a_view_of_evaluation_draws_nothing(monkeypatch):
    crop = ImageTransforms((Crop(0.5), RandomShift(4)))
    view = EvaluationView(Rows(), crop)
    assert len(view) == 10 and seen(view[3]) == seen(view[3])
    expected = [np.asarray(image).tolist() for image in Crop(0.5).eval(Rows()[3]["image"])]
    assert seen(view[3]) == (expected, [3.0, 3.0])
    assert seen(EvaluationView(Rows())[3]) == seen(Rows()[3])


def test_transforms_come_before_the_shift_and_share_its_generator():
    crop = ImageTransforms((Crop(0.5),))
    found = AugmentedView(Rows(), 3, shift_pixels=4, state_noise=0.5, transforms=crop)[7, 2]
    rng = np.random.default_rng([3, 7])
    images = RandomShift(4).train(Crop(0.5).train(Rows()[2]["image"], rng), rng)
    noise = (Rows()[2]["state"] + 0.5 * rng.standard_normal(2)).astype(np.float32)
    assert seen(found) == ([np.asarray(image).tolist() for image in images], noise.tolist())
    assert found["state"].dtype == np.float32


def test_a_sample_without_a_state_stays_without_one():
    sample = {key: value for key, value in Rows()[1].items() if key != "state"}
    assert "state" not in augment(sample, np.random.default_rng(0), state_noise=1.0)


def test_a_loader_is_made_of_what_it_is_given(monkeypatch):
    given = {}
    monkeypatch.setattr(loop, "DataLoader", lambda dataset, **options: given.update(options, dataset=dataset))
    prepare = lambda samples: {}
    for workers, prefetch in ((0, None), (3, 4)):
        make_loader("data", [[1], [2]], prepare, workers)
        assert (given["dataset"], given["batch_sampler"], given["num_workers"]) == (
            "data",
            [[1], [2]],
            workers,
        )
        assert given["collate_fn"] is prepare and given["worker_init_fn"] is start_worker
        assert given["prefetch_factor"] == prefetch and given["pin_memory"] == torch.cuda.is_available()
        assert given["generator"].initial_seed() == 0


def test_an_order_of_a_mixture_stands_before_the_permutation():
    order = MixtureOrder((3, 7), 5, (1, 1))
    sampler = BatchSampler(10, 5, 4, 0, 3, order=order)
    assert [key for batch in sampler for key in batch] == [(p, order.row_at(p)) for p in range(12)]
    endless = BatchSampler(10, 5, 4)
    assert next(iter(endless)) == endless.batch(0) and len(endless) == 2**62


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_a_model_is_what_it_was_before_an_evaluation(training):
    model = Half().train(training)
    statistics = Statistics(*[np.ones(2) * value for value in (-1, 1, 0, 1, -1, 1)], count=2)
    batch = {"actions": torch.ones(1, 1, 3), "action_is_pad": torch.zeros(1, 1, dtype=torch.bool)}
    action_error_sums(model, [batch], Normalizer(statistics, "min_max"))
    assert model.training == training and model.modes == [False]


def test_the_row_of_an_evaluation_has_these_keys():
    sums = np.array([[1.0, 2], [30, 40], [5, 10]])
    assert error_row(sums, ["a", "b"]) == pytest.approx({
        "eval/action_error": 0.2, "eval/action_error/a": 0.2, "eval/action_error/b": 0.2,
        "eval/action_error_physical/a": 6.0, "eval/action_error_physical/b": 4.0,
    })  # fmt: skip


@pytest.mark.parametrize(
    "value, message", [("low", "'low'"), (None, "None"), ([1], r"\[1\]"), (True, "True")]
)
def test_a_row_that_holds_no_number_is_named(tmp_path, value, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2}) + "\n" + json.dumps({"step": 2, "loss": value}) + "\n")
    with pytest.raises(
        ValueError, match=f"metrics.jsonl line 2: 'loss' is {message}, expected a finite number"
    ):
        read_metrics(path)


def test_a_gripper_s_events_reach_two_steps_and_no_padding():
    command = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]], np.float32)
    valid = np.ones((2, 10), bool)
    assert [np.flatnonzero(row).tolist() for row in gripper_events(command, valid, 0.5)] == [
        [3, 4, 5, 6, 7],
        [7, 8, 9],
    ]
    valid[:, 6:] = False
    assert [np.flatnonzero(row).tolist() for row in gripper_events(command, valid, 0.5)] == [[3, 4, 5], []]
    assert not gripper_events(command, valid, 1.5).any()


@pytest.mark.parametrize("extremes", [True, False])
def test_open_and_closed_are_told_apart_halfway_between_what_the_data_hold(extremes):
    """Physically 0 is open and 0.08 closed; most of the time it is open, so the mean is no middle."""
    low, high = np.array([-1.0, 0.0]), np.array([1.0, 0.08])
    ends = (low, high) if extremes else (None, None)
    statistics = Statistics(
        *ends, mean=np.array([0.0, 0.01]), std=np.array([1.0, 0.02]), q01=low, q99=high, count=9
    )
    normalizer = Normalizer(statistics, "mean_std")
    physical = np.array(
        [[0, 0.0], [0, 0.03], [0, 0.03], [0, 0.03], [0, 0.05], [0, 0.08], [0, 0.08], [0, 0.08]]
    )
    weights = event_weights(normalizer.normalize(physical)[None], np.ones((1, 8), bool), normalizer, [1])
    assert weights[0, :, 1].tolist() == [0, 0, 1, 1, 1, 1, 1, 0] and not weights[..., 0].any()
