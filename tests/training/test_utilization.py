"""Gradient norms by part, memory and arithmetic: right numbers, or none, and no other training."""

import numpy as np
import pytest
import torch

from vla_bench.config import load_config
from vla_bench.training import utilization
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import micro_batches, train, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up
from vla_bench.training.utilization import Arithmetic, gradient_norms, peak_tflops, short_name


def norms_after(config, text):
    """The norms of the first step with clipping at `text`'s value, of the parts and of all."""
    run = set_up(config(f"--trainer.warmup_steps 0 --trainer.learning_rate.vlm 1e-3 {text}"))
    stream = micro_batches(run)
    run.model.eval()  # dropout would differ between batches of other sizes
    _, norm = update(run, [next(stream) for _ in range(run.settings.gradient_accumulation_steps)])
    return run.grad_norms, norm


def test_the_squares_of_the_parts_add_up_to_the_square_of_the_norm_before_clipping(config):
    parts, norm = norms_after(config, "--run_id one --trainer.gradient_clipping 1e-6")
    assert norm > 1e-3 and np.sqrt(np.sum(np.square([*parts.values()]))) == pytest.approx(norm, rel=1e-5)
    assert {"grad_norm/vlm/vision_encoder", "grad_norm/vlm/language_model", "grad_norm/action_model"} <= {
        *parts
    }


def test_the_norms_of_accumulated_batches_are_those_of_the_whole_batch(config):
    whole, _ = norms_after(config, "--run_id whole --trainer.per_device_batch_size 4")
    halves, _ = norms_after(
        config, "--run_id halves --trainer.per_device_batch_size 2 --trainer.gradient_accumulation_steps 2"
    )
    assert halves == pytest.approx(whole, rel=1e-4) and min(whole.values()) > 0


def test_norms_are_taken_at_the_steps_that_are_logged_and_at_no_other(config, monkeypatch):
    taken, norms = [], gradient_norms
    monkeypatch.setattr("vla_bench.training.sharding.gradient_norms", lambda f: taken.append(1) or norms(f))
    rows = read_metrics(train(config("--trainer.log_interval 4")) / "metrics.jsonl")
    assert len(taken) == 2
    assert [row["step"] for row in rows if "grad_norm/action_model" in row] == [4, 6]


def test_a_frozen_part_has_no_norm(config):
    parts, norm = norms_after(config, "--run_id frozen --trainer.freeze_modules qwen_vl_interface")
    assert parts and not any("vlm" in name for name in parts)
    assert np.sqrt(np.sum(np.square([*parts.values()]))) == pytest.approx(norm, rel=1e-5)


def test_a_weight_of_two_parts_counts_once():
    model = torch.nn.Module()
    model.component = lambda name: (_ for _ in ()).throw(ValueError(name))
    model.one, model.two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    model.two.weight = model.one.weight
    model.one(torch.ones(1, 2)).sum().backward()
    assert gradient_norms(model) == {"grad_norm/one": pytest.approx(2.0)}


def test_short_names_are_these():
    assert short_name("vlm: vision encoder") == "vlm/vision_encoder"
    assert short_name("vlm: the rest") == "vlm/the_rest"
    assert short_name("action_model: MLPHead") == "action_model"
    assert short_name("queries") == "queries"


def test_counting_the_arithmetic_changes_no_loss_of_a_run_or_of_one_that_is_continued(
    config, straight, losses
):
    run = train(config("--trainer.peak_tflops 0.5", straight.framework))
    assert losses(run) == straight.losses
    latest_checkpoint(run).rename(run / "gone")
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == straight.losses
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert all(0 < row["mfu"] for row in rows)
    arithmetic = {round(row["mfu"] * (row["data_s"] + row["step_s"]), 12) for row in rows}
    assert len(arithmetic) == 1  # counted once


def test_a_device_that_nobody_knows_has_no_mfu_and_is_not_watched(config, straight, monkeypatch):
    monkeypatch.delattr(utilization, "FlopCounterMode")
    rows = read_metrics(train(config("--run_id none", straight.framework)) / "metrics.jsonl")
    assert not any("mfu" in row for row in rows)
    assert all(row["memory_gib"] > 0.05 for row in rows if "loss" in row)


@pytest.mark.parametrize(
    "name, precision, told, peak",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", None, 989.4),
        ("NVIDIA H100 PCIe", "bf16", None, 756.0),
        ("NVIDIA H200", "bf16", None, 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", None, 312.0),
        ("NVIDIA GeForce RTX 4090", "bf16", None, 165.2),
        ("NVIDIA H100 80GB HBM3", "no", None, None),
        ("Tesla V100-SXM2-32GB", "bf16", None, None),
        ("", "bf16", None, None),
        ("NVIDIA H200", "bf16", 100.0, 100.0),
    ],
)
def test_the_peak_of_a_device_is_its_data_sheets_or_unknown(name, precision, told, peak):
    assert peak_tflops(name, precision, told) == peak


def test_mfu_is_operations_per_second_over_the_peak():
    arithmetic = Arithmetic(2.0, passes=2)
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7, requires_grad=True)
    for _ in range(2):  # counted the first time
        arithmetic.count(lambda: (a @ b).sum().backward())
    assert a.grad[0, 0] == 7 and arithmetic.flops == 2 * (3 * 2 * 3 * 5 * 7)
    assert arithmetic.row(data_s=1.0, step_s=3.0, samples_per_s=9.0) == {"mfu": 1260 / 4 / 2e12}
