"""Training gives the same numbers for the same seed, also after a restart; and it stops before a bad number is learned."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.training import imitation
from vla_bench.training.checkpoint import latest_checkpoint, list_checkpoints
from vla_bench.training.imitation import micro_batches, train, update
from vla_bench.training.loop import AugmentedView, read_metrics
from vla_bench.training.run import set_up


def weights_of(run):
    return load_file(latest_checkpoint(run) / "model.safetensors")


def evaluations_of(run):
    return [row for row in read_metrics(run / "metrics.jsonl") if "eval/action_error" in row]


def test_the_same_seed_gives_the_same_losses(config, straight, losses):
    assert [step for step, _, _ in straight.losses] == [1, 2, 3, 4, 5, 6]
    assert losses(train(config("", straight.framework))) == straight.losses


def test_evaluations_and_workers_change_no_loss(config, straight, losses):
    run = train(config("--trainer.eval_interval 1 --trainer.num_workers 1", straight.framework))
    assert losses(run) == straight.losses
    assert [row["step"] for row in evaluations_of(run)] == [1, 2, 3, 4, 5, 6]


def test_another_seed_gives_other_losses(config, straight, losses):
    assert losses(train(config("--seed 1", straight.framework))) != straight.losses


def test_a_resumed_run_repeats_the_losses_and_the_weights(config, straight, losses):
    run = train(config("", straight.framework))
    shutil.rmtree(latest_checkpoint(run))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 9.0, "grad_norm": 9.0}\n{"step": 8, "lo')
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == straight.losses
    expected, again = weights_of(straight.folder), weights_of(run)
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[key], again[key]) for key in expected)


def test_a_resumed_run_accumulates_from_the_same_place_and_trains(config, losses, monkeypatch):
    options, modes, clean = "--trainer.gradient_accumulation_steps 2", set(), imitation.update
    expected = losses(train(config(f"{options} --run_id straight")))

    def watching(run, batches):
        modes.update(module.training for module in run.model.modules())
        return clean(run, batches)

    run = train(config(options))
    shutil.rmtree(latest_checkpoint(run))
    monkeypatch.setattr(imitation, "update", watching)
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == expected and modes == {True}


def test_a_policy_in_bfloat16_leaves_the_training_in_float32(config, straight, losses):
    run = train(config("--framework.inference_model.vlm.dtype bfloat16", straight.framework))
    shutil.rmtree(latest_checkpoint(run))
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == straight.losses
    expected, again = weights_of(straight.folder), weights_of(run)
    assert all(torch.equal(expected[key], again[key]) for key in expected)


@pytest.fixture
def stopped(config, monkeypatch):
    """A run in which one sample's loss overflows: its folder, the message, the sample's origin, and all origins."""
    probe = set_up(config("--run_id probe"))
    offending = probe.view[probe.sampler().batch(2)[1]]["origin"]
    clean = AugmentedView.__getitem__

    def spoilt(self, key):
        sample = clean(self, key)
        if sample["origin"] == offending:
            return {**sample, "action": sample["action"] + np.float32(3e38)}
        return sample

    monkeypatch.setattr(AugmentedView, "__getitem__", spoilt)
    with pytest.raises(FloatingPointError) as error:
        train(config("--trainer.save_interval 1"))
    train_data = probe.data.train
    origins = {train_data[row]["origin"] for row in range(len(train_data))}
    return probe.folder.with_name("run"), str(error.value), offending, origins


def test_a_loss_that_is_not_finite_names_the_offending_sample_and_no_other(stopped):
    _, message, offending, origins = stopped
    assert offending in message
    assert not any(f"{origin};" in f"{message};" for origin in origins - {offending})


def test_a_loss_that_is_not_finite_leaves_the_weights_of_the_step_before(stopped, losses):
    run, message, _, _ = stopped
    step = len(losses(run))
    assert f"still those of step {step}" in message
    assert [int(p.name[5:]) for p in list_checkpoints(run)] == list(range(1, step + 1))


@pytest.fixture
def moved(config):
    """How far each parameter moves in a first step with a rate of zero for the VLM and no weight decay; and the rate."""
    rates = "--trainer.learning_rate.vlm 0.0 --trainer.weight_decay 0.0 --trainer.warmup_steps 0"
    run = set_up(config(f"{rates} --trainer.learning_rate.base 0.01"))
    before = {name: p.detach().clone() for name, p in run.framework.named_parameters()}
    rate = max(group["lr"] for group in run.optimizer.param_groups)
    update(run, [next(micro_batches(run))])
    parameters = run.framework.named_parameters()
    return {name: (p.detach() - before[name]).abs().max().item() for name, p in parameters}, rate


def test_a_module_with_a_rate_of_zero_stands_still(moved):
    steps, _ = moved
    assert all(step == 0.0 for name, step in steps.items() if name.startswith("vlm."))


def test_the_first_step_of_adamw_has_the_size_of_the_rate(moved):
    steps, rate = moved
    heads = [step for name, step in steps.items() if name.startswith("action_model.")]
    assert len(heads) > 2 and max(heads) == pytest.approx(rate, rel=1e-3)


def test_frozen_modules_stand_still(config):
    run = set_up(config("--trainer.freeze_modules qwen_vl_interface --trainer.warmup_steps 0"))
    before = {name: p.detach().clone() for name, p in run.framework.named_parameters()}
    update(run, [next(micro_batches(run))])
    same = {name for name, p in run.framework.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("vlm.")} <= same
    assert any(not name.startswith("vlm.") for name in before.keys() - same)


@pytest.fixture
def watched(config, home, monkeypatch):
    """A run of 30 steps: its folder, the origins that it drew, and the datasets trained on and held out."""
    seen = set()
    clean = AugmentedView.__getitem__

    def watching(self, key):
        sample = clean(self, key)
        seen.add(sample["origin"])
        return sample

    monkeypatch.setattr(AugmentedView, "__getitem__", watching)
    run = train(config("--trainer.max_train_steps 30"))
    held_out = json.loads((latest_checkpoint(run) / "trainer/progress.json").read_text())["held_out"]
    assert len(held_out) == 2
    whole = LeRobotDataset(home / "toy", horizon=4)
    return run, seen, whole.select([e for e in whole.episodes if e not in held_out]), whole.select(held_out)


def test_held_out_episodes_are_never_trained_on(watched):
    _, seen, trained, held_out = watched
    assert seen == {trained[row]["origin"] for row in range(len(trained))}
    assert not seen & {held_out[row]["origin"] for row in range(len(held_out))}


def test_the_statistics_are_those_of_the_training_episodes(watched):
    run, _, trained, _ = watched
    found = json.loads((run / "dataset_statistics.json").read_text())["toy"]["action"]
    columns = trained.columns["action"]
    np.testing.assert_allclose(found["max"], columns.max(0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], columns.astype(np.float64).std(0), rtol=1e-6)


def test_accumulation_is_exact_although_chunks_hold_padding(config):
    """Two micro-batches of four against plain autograd on the eight samples at once."""
    run = set_up(config("--trainer.gradient_clipping 1e9 --trainer.gradient_accumulation_steps 2"))
    stream = micro_batches(run)
    batches = [next(stream), next(stream)]
    valid = [int((~micro["vla"]["action_is_pad"]).sum()) for micro in batches]
    assert valid[0] != valid[1], "choose another seed: this test needs unequal padding"
    run.model.eval()
    keys = run.sampler().batch(0) + run.sampler().batch(1)
    expected_loss = run.framework.forward([run.view[key] for key in keys])["action_loss"]
    expected_loss.backward()
    expected = [p.grad.clone() for p in run.framework.parameters()]
    run.framework.zero_grad()
    run.optimizer.zero_grad = lambda: None
    loss, norm = update(run, batches)
    for parameter, gradient in zip(run.framework.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-4)


def test_two_processes_train_like_one(config, losses, tmp_path):
    """Two processes with batch 2 see in each step what one process with batch 4 sees."""
    measured = "--trainer.eval_samples 8"  # four for each
    alone = train(config(f"--run_id alone --trainer.per_device_batch_size 4 {measured}"))
    config(f"--run_id pair --trainer.per_device_batch_size 2 {measured}").save(tmp_path / "pair.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vla_bench.training.imitation", "--config_yaml", tmp_path / "pair.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    pair = tmp_path / "pair"
    np.testing.assert_allclose(losses(pair), losses(alone), rtol=1e-3)
    (ours,), (theirs,) = evaluations_of(pair), evaluations_of(alone)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert len(json.loads((latest_checkpoint(pair) / "trainer/rng.json").read_text())) == 2


def test_a_model_wider_than_the_robot_is_measured_on_the_robots_numbers(config):
    wide = "--framework.max_action_dim 8 --framework.max_state_dim 6 --trainer.eval_interval 3"
    (row,) = evaluations_of(train(config(f"--trainer.max_train_steps 3 {wide}", "GR00T")))
    each = [row[f"eval/action_error/{name}"] for name in ("dx", "dy", "gripper")]
    assert row["eval/action_error"] == pytest.approx(np.mean(each)) and np.isfinite(each).all()


def test_bfloat16_arithmetic_keeps_float32_weights(config):
    run = train(config("--trainer.mixed_precision bf16 --trainer.eval_interval 3"))
    rows = read_metrics(run / "metrics.jsonl")
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert {value.dtype for value in weights_of(run).values()} == {torch.float32}


def test_bfloat16_arithmetic_gives_nearly_the_first_loss(config, losses):
    half = losses(train(config("--run_id half --trainer.mixed_precision bf16")))
    exact = losses(train(config("--run_id exact")))
    assert half[0] != exact[0] and half[0][1] == pytest.approx(exact[0][1], rel=0.05)


def test_the_program_reports_an_error_of_the_user_in_one_line(config, tmp_path, capsys):
    config().save(tmp_path / "program.yaml")
    with pytest.raises(SystemExit) as stop:
        imitation.main(["--config_yaml", str(tmp_path / "program.yaml"), "--trainer.max_train_step", "3"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "trainer.max_train_steps" in err and "Traceback" not in err


@pytest.fixture
def by_intervals(config):
    """Seven steps with intervals that do not divide them."""
    intervals = "--trainer.log_interval 2 --trainer.eval_interval 3 --trainer.save_interval 4"
    return train(config(f"--trainer.max_train_steps 7 {intervals}"))


def test_what_happens_at_intervals_happens_there_and_at_the_end(by_intervals):
    rows = read_metrics(by_intervals / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 7]
    assert [row["step"] for row in rows if "eval/action_error" in row] == [3, 6, 7]
    assert [path.name for path in list_checkpoints(by_intervals)] == ["step_000004", "step_000007"]


def test_a_checkpoint_holds_the_weights_of_its_step(by_intervals, config):
    run = train(config("--run_id four --trainer.max_train_steps 7 --trainer.save_interval 1"))
    for name in ("step_000004", "step_000007"):
        ours, theirs = (
            load_file(r / "checkpoints" / name / "model.safetensors") for r in (by_intervals, run)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert json.loads((run / "checkpoints" / name / "trainer/progress.json").read_text())["step"] == int(
            name[5:]
        )


def test_the_first_loss_is_the_mean_error_over_actions_that_are_there(config, losses):
    one = "--trainer.max_train_steps 1 --trainer.warmup_steps 0 --trainer.per_device_batch_size 12"
    run, probe = train(config(one)), set_up(config(f"{one} --run_id probe"))
    samples = [probe.view[key] for key in probe.sampler().batch(0)]
    predicted = probe.framework.predict_action(samples)["normalized_actions"]
    valid = ~np.stack([sample["action_is_pad"] for sample in samples])
    assert not valid.all(), "choose another seed: this test needs a chunk beyond an episode's end"
    errors = np.abs(predicted - np.stack([sample["action"] for sample in samples]))
    ((_, loss, _),) = losses(run)
    assert loss == pytest.approx(errors[valid].mean(), rel=1e-5)


def test_what_stands_beyond_an_episodes_end_is_not_learned(config, monkeypatch, losses):
    expected, clean = losses(train(config("--run_id clean"))), AugmentedView.__getitem__

    def spoilt(self, key):
        sample = clean(self, key)
        action = np.where(sample["action_is_pad"][:, None], np.float32(1e3), sample["action"])
        return {**sample, "action": action}

    monkeypatch.setattr(AugmentedView, "__getitem__", spoilt)
    np.testing.assert_allclose(losses(train(config())), expected, rtol=1e-6)


def test_a_chunk_is_padded_from_the_episodes_end_on(config):
    data = set_up(config()).data.train
    starts = data.dataset.starts
    for start, length in zip(starts, np.diff([*starts, len(data)])):
        padded = [data[int(start) + frame]["action_is_pad"].sum() for frame in range(length)]
        assert padded == [max(0, frame + 4 - length) for frame in range(length)]


@pytest.mark.parametrize("micro_batch, place", [(0, 3), (1, 0), (1, 2)])
def test_the_offending_sample_is_named_in_any_micro_batch(config, monkeypatch, micro_batch, place):
    options = "--trainer.gradient_accumulation_steps 2 --trainer.warmup_steps 0"
    run = set_up(config(options))
    stream = micro_batches(run)
    update(run, [next(stream), next(stream)])
    key = run.sampler().batch(2 + micro_batch)[place]
    clean = AugmentedView.__getitem__

    def spoilt(self, asked):
        sample = clean(self, asked)
        return {**sample, "action": sample["action"] + np.float32(3e38)} if asked == key else sample

    monkeypatch.setattr(AugmentedView, "__getitem__", spoilt)
    keys = [run.sampler().batch(number) for number in (2, 3)]
    batches = [{"vla": run.framework.prepare([run.view[k] for k in own])} for own in keys]
    with pytest.raises(FloatingPointError) as error:
        update(run, batches)
    origin = run.data.train[key[1]]["origin"]
    assert str(error.value).startswith("step 2: the loss is") and str(error.value).endswith(
        f"finite: {origin}"
    )


@pytest.mark.parametrize("norm", [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(config, monkeypatch, norm):
    run = set_up(config("--trainer.warmup_steps 0"))
    before = {name: p.detach().clone() for name, p in run.framework.named_parameters()}
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(norm))
    with pytest.raises(FloatingPointError) as error:
        update(run, [next(micro_batches(run))])
    origins = [run.data.train[row]["origin"] for _, row in run.sampler().batch(0)]
    assert f"step 1: the gradient's norm is {norm}; " in str(error.value)
    assert str(error.value).endswith(f"learning rate and precision. The batch: {'; '.join(origins)}")
    assert all(torch.equal(p, before[name]) for name, p in run.framework.named_parameters()) and run.step == 0


def test_the_speed_is_the_mean_since_the_last_row(config, monkeypatch):
    """A clock whose n-th reading is n²: step k waits 6k+1 seconds and computes 6k+3."""
    readings = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: float(next(readings) ** 2))
    monkeypatch.setattr(imitation, "time", clock)
    sizes = "--trainer.per_device_batch_size 2 --trainer.gradient_accumulation_steps 2"
    run = train(config(f"--trainer.log_interval 2 {sizes}"))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    for row, steps in zip(rows, ([0, 1], [2, 3], [4, 5]), strict=True):
        waited, computed = (np.mean([6 * k + more for k in steps]) for more in (1, 3))
        assert (row["data_s"], row["step_s"]) == (waited, computed)
        assert row["samples_per_s"] == pytest.approx(4 / (waited + computed))


@pytest.fixture
def measured(config, monkeypatch):
    """`measured(overrides)`: the rows that an evaluation draws, and its result."""

    def evaluated(overrides: str, framework="OFT"):
        run = set_up(config(overrides, framework))
        held_out = type(next(iter(run.data.held_out().values())))
        seen, rows = [], held_out.__getitem__

        def watching(self, row):
            seen.append(row)
            return rows(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(held_out, "__getitem__", watching)
            found = imitation.evaluate(run)
        assert run.framework.training == run.framework.action_model.training
        return seen, found, run

    return evaluated


@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_an_evaluation_is_spread_evenly_over_what_is_held_out(measured, count):
    rows, found, run = measured(f"--trainer.eval_samples {count}")
    total = len(run.data.held_out()["toy"])
    expected = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    assert rows == expected.tolist() and np.isfinite(found["eval/action_error"])


def test_an_evaluation_starts_from_the_same_noise_for_the_same_seed(measured):
    _, first, run = measured("--run_id a", "GR00T")
    torch.rand(5)
    assert imitation.evaluate(run) == first
    run.seed = 1
    assert imitation.evaluate(run) != first


def test_no_two_samples_of_an_evaluation_start_from_the_same_noise(config, monkeypatch):
    run = set_up(config("--trainer.per_device_batch_size 3", "GR00T"))
    drawn, draw = [], type(run.framework).draw_noise

    def watching(self, features, generator):
        drawn.append(draw(self, features, generator))
        return drawn[-1]

    monkeypatch.setattr(type(run.framework), "draw_noise", watching)
    imitation.evaluate(run)
    noise = torch.cat(drawn).flatten(1)
    assert len(drawn) > 2 and len(torch.unique(noise, dim=0)) == len(noise)
    assert len(noise) == len(run.data.held_out()["toy"])


def test_an_evaluation_leaves_the_model_training(measured):
    _, _, run = measured("")
    for mode in (True, False):
        run.framework.train(mode)
        imitation.evaluate(run)
        assert {module.training for module in run.framework.modules()} == {mode}


def test_a_run_that_holds_nothing_out_measures_nothing(config, measured):
    rows, found, _ = measured("--datasets.vla_data.held_out 0.0001", "OFT")
    assert rows and found
    assert imitation.evaluate(set_up(config("--run_id nothing --datasets.vla_data.held_out 0"))) == {}


@pytest.mark.parametrize(
    "step, interval, expected",
    [
        (3, 3, True),
        (6, 3, True),
        (4, 3, False),
        (1, 1, True),
        (10, 3, True),
        (10, 7, True),
        (9, 7, False),
        (2, 100, False),
    ],
)
def test_what_happens_every_so_many_steps_is_due_then_and_at_the_end(step, interval, expected):
    run = SimpleNamespace(step=step, settings=SimpleNamespace(max_train_steps=10))
    assert imitation.due(run, interval) is expected


def test_the_bar_counts_the_steps_of_the_run_on_the_main_process():
    for main in (True, False):
        run = SimpleNamespace(
            step=4, settings=SimpleNamespace(max_train_steps=10), folder=Path("runs/mine"),
            accelerator=SimpleNamespace(is_main_process=main),
        )  # fmt: skip
        with imitation.progress_bar(run) as bar:
            assert bar.disable is not main
            if main:
                assert (bar.total, bar.initial, bar.n, bar.desc.strip(": ")) == (10, 4, 4, "mine")


def test_rates_are_told_once_per_module():
    groups = [{"name": n, "lr": lr} for n, lr in (("base", 1), ("base/no_decay", 1), ("vlm/no_decay", 0.5))]
    found = imitation.learning_rates(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)))
    assert found == {"learning_rate/base": 1.0, "learning_rate/vlm": 0.5}
    assert all(type(rate) is float for rate in found.values())


def test_the_speed_counts_the_samples_of_all_sources_and_processes():
    settings = SimpleNamespace(gradient_accumulation_steps=2)
    sources = {name: SimpleNamespace(batch_size=size) for name, size in (("vla", 2), ("vlm", 1))}
    run = SimpleNamespace(settings=settings, sources=sources, accelerator=SimpleNamespace(num_processes=4))
    found = imitation.speed(run, [(1.0, 2.0), (3.0, 6.0)])
    assert found == {"data_s": 2.0, "step_s": 4.0, "samples_per_s": 4.0}


@pytest.mark.parametrize("several", [False, True])
def test_names_of_our_own_in_a_row_of_the_log_are_kept_apart(several):
    """The only source's main loss is logged as `loss` already; of several each is told."""
    assert imitation.OWN == ("step", "loss", "grad_norm", "data_s", "step_s", "samples_per_s")
    losses = {name: float(i) for i, name in enumerate(("action_loss", *imitation.OWN, "more"))}
    sources = {name: SimpleNamespace(loss=f"{name}_loss") for name in ("action", "language")[: 1 + several]}
    found = imitation.other_losses(SimpleNamespace(losses=losses, sources=sources))
    kept = {name: value for name, value in losses.items() if several or name != "action_loss"}
    assert found == {f"loss/{n}" if n in imitation.OWN else n: v for n, v in kept.items()}


def test_the_rows_of_two_processes_are_disjoint_and_as_many(measured, config, monkeypatch):
    """Each of two processes measures every other one of the rows, an even number of them."""
    run = set_up(config("--trainer.eval_samples 7"))
    (member,), (held_out,) = run.data.members, run.data.held_out().values()
    drawn: list[list] = []
    monkeypatch.setattr(
        imitation, "make_loader", lambda data, chunks, prepare, workers: drawn.append(chunks) or []
    )
    monkeypatch.setattr(imitation, "action_error_sums", lambda *_: np.ones((3, 3)))
    monkeypatch.setattr(imitation, "error_row", lambda sums, names: {"names": names})
    for index in (0, 1):
        accelerator = SimpleNamespace(
            num_processes=2, process_index=index, device="cpu", reduce=lambda total, how: total,
            autocast=run.accelerator.autocast,
        )  # fmt: skip
        told = SimpleNamespace(
            accelerator=accelerator,
            settings=run.settings,
            framework=run.framework,
            seed=0,
            sharding=run.sharding,
        )
        assert imitation.held_out_errors(told, member, held_out) == {"names": ("dx", "dy", "gripper")}
    rows = np.linspace(0, len(held_out) - 1, 7).round().astype(int).tolist()[:6]
    assert [sum(chunks, []) for chunks in drawn] == [rows[::2], rows[1::2]]
    assert {len(chunk) for chunks in drawn for chunk in chunks} == {3}  # of four at most


ROWS = {"a": {"eval/action_error": 1.0, "eval/action_error/x": 5.0}, "b": {"eval/action_error": 4.0}}
NAMED = {
    "eval/action_error": 2.5,
    "eval/a/action_error": 1.0,
    "eval/a/action_error/x": 5.0,
    "eval/b/action_error": 4.0,
}


@pytest.mark.parametrize(
    "mixed, held, expected",
    [
        (False, ["a"], ROWS["a"]),
        (False, [], {}),
        (True, ["a", "b"], NAMED),
        (True, ["b"], {"eval/action_error": 4.0, "eval/b/action_error": 4.0}),
        (True, [], {}),
    ],
)
def test_errors_are_named_by_dataset_in_a_mixture_and_plain_otherwise(monkeypatch, mixed, held, expected):
    members = [SimpleNamespace(dataset=SimpleNamespace(name=name)) for name in ("a", "b")]
    data = SimpleNamespace(
        members=members,
        mixture="it" if mixed else None,
        held_out=lambda: {name: f"view of {name}" for name in held},
    )

    def errors(run, member, view):
        assert view == f"view of {member.dataset.name}"
        return ROWS[member.dataset.name]

    monkeypatch.setattr(imitation, "held_out_errors", errors)
    assert imitation.evaluate(SimpleNamespace(data=data)) == expected


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_run_that_leaves_says_so_lets_go_of_the_model_and_ends(monkeypatch, number, status):
    done = []
    monkeypatch.setattr(imitation, "finish", lambda run: done.append(("finish", run.step)))
    accelerator = SimpleNamespace(print=lambda text, file: done.append((text, file)))
    run = SimpleNamespace(step=3, settings=SimpleNamespace(max_train_steps=8), accelerator=accelerator)
    with pytest.raises(SystemExit) as end:
        imitation.leave(run, number)
    text = f"{number.name}: stopped after step 3 of 8, which is saved; continue with --trainer.resume true"
    assert done == [(text, sys.stderr), ("finish", 3)] and end.value.code == status


def test_no_graph_is_built_to_find_the_offending_samples(config):
    """One sample after the other would otherwise keep what its gradient needs."""
    run = set_up(config())
    asked, clean = [], run.sources["vla"].losses

    def watching(framework, batch):
        found = clean(framework, batch)
        asked.append(found["action_loss"].requires_grad)
        return found

    run.sources["vla"].losses = watching
    assert "Each sample alone gives a finite loss" in imitation.not_finite(run, "loss is nan", 0)
    assert asked == [False] * 4
