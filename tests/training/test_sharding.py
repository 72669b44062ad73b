"""Two processes in every mode against one, and checkpoints that any mode reads."""

import json
import math
import os
import shutil
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from vla_bench.config import ConfigError, load_config
from vla_bench.files import list_checkpoints
from vla_bench.models.frameworks.blocks import repeated_blocks
from vla_bench.serving.policy import Policy
from vla_bench.training.imitation import micro_batches, train, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import finish, set_up

pytest.importorskip("deepspeed")

CLUSTERS = Path(__file__).parents[2] / "experiments/clusters"
MODES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
WHOLE = "VLA_BENCH_EVERY_RUN" in os.environ
STEPS = 20 if WHOLE else 6
KEPT = ", small weights whole"  # DeepSpeed's default of stage 3, under which the weights of these tests are all small


def environ(mode):
    """What `accelerate launch` with the file of a mode tells its processes."""
    named = [
        "--config_file",
        str(CLUSTERS / f"{mode}.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args([*named, "-m", "program"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="session")
def every_weight(tmp_path_factory):
    """DeepSpeed's own file for stage 3, without the weights that it leaves whole because they are small: here, all."""
    path = tmp_path_factory.mktemp("zero") / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


@pytest.fixture
def run_in(config, launched, every_weight):
    """`run_in(mode, overrides, framework, processes)`: a run in a mode, `one` for one process; its folder.

    With a folder, the run in it goes on.
    """

    def run(mode, overrides, framework="OFT", folder=None, processes=2):
        cfg = load_config(folder, overrides) if folder else config(overrides, framework)
        if mode == "one":
            return train(cfg)
        asked = every_weight if mode == "zero3" else environ(mode.removesuffix(KEPT))
        launched(lambda: train(cfg), processes, asked)
        return Path(cfg["run_root_dir"]) / cfg["run_id"]

    return run


def options(name, batch, accumulation=1, more=""):
    numbers = f"--trainer.per_device_batch_size {batch} --trainer.gradient_accumulation_steps {accumulation}"
    return f"--run_id {name} --trainer.max_train_steps {STEPS} {numbers} {more}"


def state(run, step=-1):
    """Weights and optimizer of a checkpoint, flat."""
    folder = list_checkpoints(run)[step]
    trainer = torch.load(folder / "trainer/optimizer.pt", weights_only=True)["optimizer"]
    moments = {f"{i}.{k}": v for i, values in trainer["state"].items() for k, v in values.items()}
    return load_file(folder / "model.safetensors"), moments, trainer["param_groups"]


@pytest.mark.parametrize("mode", MODES)
def test_what_runs_is_what_was_asked_for(mode, config, launched):
    cfg = config(options("run", 2))

    def what_runs():
        run = set_up(cfg)
        found = run.sharding.mode, run.accelerator.num_processes, run.accelerator.distributed_type.value
        own = sum(p.to_local().numel() for p in run.model.parameters() if isinstance(p, DTensor))
        total = sum(p.numel() for p in run.model.parameters())
        finish(run)
        return *found, own, total

    told = launched(what_runs, 2, environ(mode))
    assert {each[:3] for each in told} == {("whole" if mode == "ddp" else mode, 2, "MULTI_CPU")}
    if mode == "fsdp2":  # every weight is in shards
        assert sum(own for *_, own, _ in told) == told[0][-1]


def norms_of_parts(run):
    """The norms of the gradient part by part, of each logged step."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    return [{key: value for key, value in row.items() if key.startswith("grad_norm/")} for row in rows]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_losses_and_the_gradients_of_one(mode, run_in, losses):
    one, two = run_in("one", options("one", 4)), run_in(mode, options("two", 2))
    assert [row[1] for row in losses(two)] == pytest.approx([row[1] for row in losses(one)], abs=1e-5)
    assert [row[2] for row in losses(two)] == pytest.approx([row[2] for row in losses(one)], rel=1e-4)
    alone, shared = norms_of_parts(one), norms_of_parts(two)
    assert len(alone) == STEPS and {"grad_norm/vlm/vision_encoder", "grad_norm/action_model"} <= {*alone[0]}
    for here, there in zip(alone, shared):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-6)
    (weights, moments, groups), (others, other_moments, other_groups) = state(two), state(one)
    assert (
        weights.keys() == others.keys() and moments.keys() == other_moments.keys() and groups == other_groups
    )
    for ours, theirs in ((weights, others), (moments, other_moments)):
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    assert Policy.from_pretrained(two).spec.horizon == 4


@pytest.mark.parametrize("mode", MODES[1:] if WHOLE else ["fsdp2", "zero2"])
def test_accumulation_and_clipping_are_those_of_one_process(mode, run_in, losses):
    tight = "--trainer.gradient_clipping 0.05"
    one, two = run_in("one", options("one", 8, more=tight)), run_in(mode, options("two", 2, 2, tight))
    for column in (1, 2):
        ours, theirs = ([row[column] for row in losses(run)] for run in (two, one))
        assert ours == pytest.approx(theirs, abs=1e-5 if column == 1 else 0, rel=1e-4)


def stopped_at_three(run, name):
    """A copy of a run with its checkpoint of step 3 only."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy)[1:]:
        shutil.rmtree(checkpoint)
    load_config(copy, f"--run_id {name}").save(copy / "config.yaml")
    return copy


def assert_same(ours, theirs):
    """Weights, moments and groups, bit for bit."""
    for mine, others in zip(state(ours)[:2], state(theirs)[:2]):
        assert mine.keys() == others.keys()
        assert [name for name in others if not torch.equal(mine[name], others[name])] == []
    assert state(ours)[2] == state(theirs)[2]


@pytest.mark.parametrize("mode", MODES)
def test_a_continued_run_is_the_uninterrupted_one(mode, run_in, losses):
    straight = run_in(mode, options("run", 2, more="--trainer.save_interval 3"))
    again = stopped_at_three(straight, "again")
    run_in(mode, "--trainer.resume true", folder=again)
    assert losses(again) == losses(straight)
    assert_same(again, straight)


@pytest.mark.parametrize(
    "first, then", [("zero2", "one"), ("zero2", "fsdp2"), ("one", "zero3"), ("fsdp2", "zero1")]
)
def test_any_mode_continues_any_other(first, then, run_in, losses):
    """The weights and moments of the checkpoint are read to the bit: saved again at once, they are the same."""
    batch = lambda mode: 4 if mode == "one" else 2
    straight = run_in(first, options("run", batch(first), more="--trainer.save_interval 3"))
    again = stopped_at_three(straight, "again")
    run_in(then, f"--trainer.resume true --trainer.per_device_batch_size {batch(then)}", folder=again)
    assert [row[1] for row in losses(again)] == pytest.approx([row[1] for row in losses(straight)], abs=1e-5)
    for ours, theirs in zip(state(again)[:2], state(straight)[:2]):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


NOISY = [("fsdp2", "PI05"), ("zero3", "GR00T")]
NOISY += (
    [(m, f) for m in MODES[1:] for f in ("GR00T", "PI05", "OpenVLA") if (m, f) not in NOISY] if WHOLE else []
)


@pytest.mark.parametrize("mode, framework", NOISY)
def test_other_frameworks_with_frozen_parts_and_evaluations_are_those_of_ddp(mode, framework, run_in, losses):
    more = "--framework.freeze_vision_backbone true --trainer.eval_interval 3 --trainer.eval_samples 8"
    more += (
        " --datasets.vla_data.normalization.state min_max --datasets.vla_data.normalization.action min_max"
    )
    ddp, ours = (run_in(m, options(m, 2, more=more), framework) for m in ("ddp", mode))
    assert [row[1] for row in losses(ours)] == pytest.approx([row[1] for row in losses(ddp)], abs=1e-5)
    errors = [
        [r["eval/action_error"] for r in read_metrics(run / "metrics.jsonl") if "eval/action_error" in r]
        for run in (ours, ddp)
    ]
    assert errors[0] == pytest.approx(errors[1], abs=1e-4) and len(errors[0]) >= 2
    first, last = (load_file(list_checkpoints(ours)[n] / "model.safetensors") for n in (0, -1))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and not any("visual.patch" in name or "visual.blocks" in name for name in moved)


@pytest.mark.parametrize("mode", MODES[1:] if WHOLE else ["fsdp2"])
def test_bfloat16_is_autocast_over_float32_weights(mode, run_in, losses):
    more = "--trainer.mixed_precision bf16"
    ddp, ours = (run_in(m, options(m, 2, more=more)) for m in ("ddp", mode))
    # FSDP2 gathers bfloat16, and ZeRO-3 has a linear layer of its own that rounds in another place
    exact = {"fsdp2": 2e-2, "zero3": 2e-3}.get(mode, 1e-5)
    found, expected = ([row[1] for row in losses(run)] for run in (ours, ddp))
    assert found[:6] == pytest.approx(expected[:6], abs=exact)
    # later a last digit of float32 has made one of bfloat16: one process is 1.7e-4 from two under DDP by then
    assert found[6:] == pytest.approx(expected[6:], abs=max(exact, 1e-3))
    weights, moments, _ = state(ours)
    assert {value.dtype for value in (*weights.values(), *moments.values())} == {torch.float32}


@pytest.mark.parametrize("mode", MODES if WHOLE else ["fsdp2"])
def test_a_loss_of_one_process_that_is_not_finite_stops_all_and_changes_nothing(mode, config, launched):
    cfg = config(options("run", 2))

    def spoiled():
        run = set_up(cfg)
        before, batches = run.sharding.weights(), [next(micro_batches(run))]
        own = next(iter(run.sampler().batch(0)))
        if run.accelerator.process_index == 1:
            batches[0]["vla"]["actions"][0] += 3e38
            run.sources["vla"].view = SpoiledView(run.sources["vla"].view, own)
        with pytest.raises(FloatingPointError) as told:
            update(run, batches)
        after = run.sharding.weights()
        same = before is None or all(torch.equal(before[name], after[name]) for name in before)
        finish(run)
        return str(told.value), same

    (first, same, *_), (second, *_) = launched(spoiled, 2, environ(mode))
    assert first == second and "Samples whose loss alone is not finite: " in first and same


class SpoiledView:
    """A view with one sample whose action is too large."""

    def __init__(self, view, key):
        self.view, self.key = view, key

    def __getitem__(self, key):
        sample = self.view[key]
        return {**sample, "action": sample["action"] + np.float32(3e38)} if key == self.key else sample

    def __len__(self):
        return len(self.view)


@pytest.mark.parametrize("mode", MODES[1:] if WHOLE else ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_changes_nothing(mode, config, launched):
    cfg = config(options("run", 2))

    def exploded():
        run = set_up(cfg)
        before = run.sharding.weights()
        with run.sharding.accumulate():
            found = run.model(next(micro_batches(run)))["vla"]["action_loss"]
            run.sharding.backward(found * float("inf"))
            norm = run.sharding.clip(1.0)
        after = run.sharding.weights()
        same = before is None or all(torch.equal(before[name], after[name]) for name in before)
        finish(run)
        return norm, same

    for norm, same in launched(exploded, 2, environ(mode)):
        assert not math.isfinite(norm) and same


REFUSED = [
    ("zero2", "--trainer.spike_guard '{factor: 10}'", "before anybody can refuse"),
    ("fsdp2", "--trainer.rollout_interval 2", "where weights are sharded"),
    ("zero3", "--trainer.rollout_interval 2", "where weights are sharded"),
]


@pytest.mark.parametrize("mode, asked, message", REFUSED)
def test_what_a_mode_cannot_do_is_refused_before_anything_is_written(mode, asked, message, config, launched):
    cfg = config(options("refused", 2, more=asked))

    def refused():
        with pytest.raises(ConfigError, match=message):
            set_up(cfg)
        return (Path(cfg["run_root_dir"]) / "refused").exists()

    assert launched(refused, 2, environ(mode)) == [False, False]


@pytest.mark.parametrize("mode", MODES if WHOLE else ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_average_of_two_processes_is_that_of_one(mode, run_in, losses):
    """Both the averaged weights and those that the optimizer moves; a large eps keeps Adam from magnifying rounding."""
    more = "--trainer.ema_decay 0.8 --trainer.ema_warmup true --trainer.optimizer_args {eps: 0.01} --trainer.warmup_steps 0"
    more += " --trainer.learning_rate.base 0.01 --trainer.learning_rate.vlm 0.01"
    one, two = run_in("one", options("one", 4, more=more)), run_in(mode, options("two", 2, more=more))
    files = ("model.safetensors", "trainer/weights.safetensors")
    ours, theirs = ([load_file(list_checkpoints(run)[-1] / name) for name in files] for run in (two, one))
    for mine, others in zip(ours, theirs):
        assert mine.keys() == others.keys() and len(others) > 30
        for name, value in others.items():
            torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=0, msg=name)
    averages, raw = theirs
    assert max((averages[name] - raw[name]).abs().max().item() for name in raw if name in averages) > 1e-4
    assert [row[1] for row in losses(two)] == pytest.approx([row[1] for row in losses(one)], abs=1e-5)


def test_an_average_of_weights_that_zero3_keeps_whole_is_measured_saved_and_continued(run_in, losses):
    more = (
        "--trainer.ema_decay 0.8 --trainer.warmup_steps 0 --trainer.eval_interval 3 --trainer.eval_samples 8"
    )
    more += " --trainer.learning_rate.base 0.01 --trainer.learning_rate.vlm 0.01 --trainer.optimizer_args {eps: 0.01}"
    one, two = (
        run_in("one", options("one", 4, more=more)),
        run_in(f"zero3{KEPT}", options("two", 2, more=f"{more} --trainer.save_interval 3")),
    )
    measured = [
        [
            row["eval/action_error"]
            for row in read_metrics(run / "metrics.jsonl")
            if "eval/action_error" in row
        ]
        for run in (one, two)
    ]
    assert len(measured[0]) == STEPS // 3 + (STEPS % 3 > 0) and measured[1] == pytest.approx(
        measured[0], abs=1e-5
    )
    again = stopped_at_three(two, "again")
    run_in(f"zero3{KEPT}", "--trainer.resume true", folder=again)
    assert losses(again) == losses(two)
    assert_same(again, two)
    raw = [load_file(list_checkpoints(run)[-1] / "trainer/weights.safetensors") for run in (again, two)]
    assert all(torch.equal(raw[0][name], value) for name, value in raw[1].items()) and len(raw[1]) > 30


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", *(["zero2", "zero3"] if WHOLE else [])])
def test_recomputed_blocks_are_run_twice_and_learn_the_same(mode, config, launched, every_weight):
    cfg = {each: config(options(each, 2, more=f"--trainer.gradient_checkpointing {each}"), "GR00T")
           for each in ("true", "false")}  # fmt: skip

    def three_steps(recompute):
        run, calls = set_up(cfg[recompute]), {}
        for path, block in repeated_blocks(run.framework).items():
            child = next(iter(block.children()))
            child.register_forward_pre_hook(
                lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1})
            )
        run.model.train()
        stream = micro_batches(run)
        found = [update(run, [next(stream)]) for _ in range(3)]
        finish(run)
        return found, calls

    asked = every_weight if mode == "zero3" else environ(mode)
    plain, again = (launched(partial(three_steps, each), 2, asked) for each in ("false", "true"))
    for (seen, calls), (expected, once) in zip(again, plain):
        assert once and calls == {path: 2 * count for path, count in once.items()}
        assert [loss for loss, _ in seen] == pytest.approx([loss for loss, _ in expected], abs=1e-6)
        assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected], rel=1e-5)


@pytest.mark.parametrize("mode", MODES if WHOLE else ["ddp", "fsdp2"])
def test_counting_the_arithmetic_changes_nothing(mode, run_in, losses):
    counted = run_in(mode, options("counted", 2, more="--trainer.peak_tflops 1 --trainer.log_interval 1"))
    plain = run_in(mode, options("plain", 2, more="--trainer.log_interval 1"))
    assert losses(counted) == losses(plain)
    told = ["mfu" in row for row in read_metrics(counted / "metrics.jsonl") if "loss" in row]
    assert told == [not mode.startswith("zero")] * STEPS


def test_a_run_that_cannot_count_its_arithmetic_says_so_once(config, launched):
    cfg = config(
        options(
            "told", 2, more="--trainer.peak_tflops 1 --trainer.max_train_steps 1 --trainer.warmup_steps 0"
        )
    )

    def told():
        with redirect_stderr(StringIO()) as said:
            train(cfg)
        return [line for line in said.getvalue().splitlines() if "peak_tflops" in line]

    line = "trainer.peak_tflops: arithmetic is not counted under DeepSpeed (zero2), so the log has no mfu"
    assert launched(told, 2, environ("zero2")) == [[line], []]


def test_a_spike_under_fsdp2_is_kept_without_weights_and_leaves_them(config, launched):
    guard = "--trainer.spike_guard '{factor: 1.0001, window: 2, action: stop}' --trainer.learning_rate 1.0"
    cfg = config(options("spiky", 2, more=guard))

    def spiky():
        with pytest.raises(FloatingPointError, match="the weights are still those of step"):
            train(cfg)
        kept = sorted(Path(cfg["run_root_dir"]).glob("spiky/offending/step_*/process_*"))
        return [[file.name for file in sorted(folder.iterdir())] for folder in kept]

    first, second = launched(spiky, 2, environ("fsdp2"))
    assert ["batch_0.safetensors", "offending.json", "rng.safetensors"] in first
    assert not any("weights" in files for files in (*first, *second))
