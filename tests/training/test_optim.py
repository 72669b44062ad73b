"""Absolute values: what a run's steps do to the weights, against plain torch and closed formulas."""

import copy
import math

import pytest
import torch

from vla_bench.training.imitation import learning_rates, micro_batches, train, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import set_up

STEPS, WARMUP, RATIO, CLIP, DECAY, BETAS, EPS = 6, 2, 0.1, 0.5, 0.3, (0.7, 0.8), 1e-8
OPTIONS = (
    f"--trainer.warmup_steps {WARMUP} --trainer.min_lr_ratio {RATIO} --trainer.gradient_clipping {CLIP} "
    f"--trainer.weight_decay {DECAY} --trainer.betas [{BETAS[0]},{BETAS[1]}] --trainer.max_train_steps {STEPS}"
)


def rate(peak: float, step: int, steps: int = STEPS, warmup: int = WARMUP, ratio: float = RATIO) -> float:
    """The rate of a step, from 0: a ramp to the peak, then half a cosine to `ratio` of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    part = (step - warmup + 1) / (steps - warmup)
    return peak * (ratio + (1 - ratio) * (1 + math.cos(math.pi * part)) / 2)


class PlainAdamW:
    """AdamW by its equations (Loshchilov & Hutter, algorithm 2), in float64."""

    def __init__(self, named: dict[str, torch.nn.Parameter]):
        self.named, self.step_number = named, 0
        self.weights = {name: p.detach().double().clone() for name, p in named.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}

    def step(self, peaks: dict[str, float]) -> float:
        """One step on the gradients that are there; the norm before clipping."""
        gradients = {name: p.grad.double() for name, p in self.named.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        scale = min(1.0, CLIP / norm)
        self.step_number += 1
        for name, gradient in gradients.items():
            eta = rate(peaks[name], self.step_number - 1)
            gradient, weight = gradient * scale, self.weights[name]
            self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * gradient
            self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * gradient**2
            first = self.first[name] / (1 - BETAS[0] ** self.step_number)
            second = self.second[name] / (1 - BETAS[1] ** self.step_number)
            if weight.ndim > 1:
                weight = weight * (1 - eta * DECAY)
            self.weights[name] = weight - eta * first / (second.sqrt() + EPS)
            self.named[name].data.copy_(self.weights[name])
        return norm


@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_are_those_of_the_equations(config, accumulation):
    options = f"--trainer.gradient_accumulation_steps {accumulation} --trainer.per_device_batch_size 2"
    run = set_up(config(f"{OPTIONS} {options}"))
    twin = copy.deepcopy(run.framework)
    stream = micro_batches(run)
    plain = PlainAdamW(dict(twin.named_parameters()))
    peaks = {name: 1e-4 if name.startswith("vlm.") else 1e-3 for name in plain.named}
    run.model.train()
    twin.train()
    clipped = []
    for step in range(3):
        batches = [next(stream) for _ in range(accumulation)]
        twin.zero_grad()
        valid = [float((~micro["vla"]["action_is_pad"]).sum()) for micro in batches]
        expected = 0.0
        for micro, count in zip(batches, valid):
            loss = twin(micro["vla"])["action_loss"] * count / sum(valid)
            loss.backward()
            expected += loss.item()
        expected_norm = plain.step(peaks)
        loss, norm = update(run, batches)
        clipped.append(expected_norm > CLIP)
        assert loss == pytest.approx(expected, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-4)
        for name, parameter in run.framework.named_parameters():
            moved = (parameter - plain.weights[name]).abs().max().item()
            assert moved < 2e-3 * rate(peaks[name], step) + 1e-7, (step, name)
        assert run.step == step + 1 == run.scheduler.last_epoch
        assert all(p.grad is None or not p.grad.any() for p in run.framework.parameters())
    assert any(clipped), "choose a smaller bound: nothing was clipped"


@pytest.mark.parametrize("clip", [0.05, 1e4])
def test_the_gradient_is_clipped_to_the_bound_and_not_below(config, clip):
    run = set_up(config(f"--trainer.gradient_clipping {clip}"))
    run.optimizer.zero_grad = lambda: None
    _, norm = update(run, [next(micro_batches(run))])
    left = torch.cat([p.grad.flatten() for p in run.framework.parameters()]).norm().item()
    assert left == pytest.approx(min(clip, norm), rel=1e-4) and norm > 0.05


def test_frozen_modules_do_not_count_in_the_norm(config):
    run = set_up(config("--trainer.freeze_modules vlm --trainer.gradient_clipping 1e9"))
    run.optimizer.zero_grad = lambda: None
    _, norm = update(run, [next(micro_batches(run))])
    own = [p.grad.flatten() for n, p in run.framework.named_parameters() if not n.startswith("vlm.")]
    assert norm == pytest.approx(torch.cat(own).norm().item(), rel=1e-5)
    assert all(p.grad is None for p in run.framework.vlm.parameters())


@pytest.mark.parametrize("warmup, ratio, accumulation", [(2, 0.1, 1), (0, 0.0, 1), (4, 0.5, 2), (5, 1.0, 1)])
def test_the_logged_rates_follow_the_formula(config, warmup, ratio, accumulation):
    options = f"--trainer.warmup_steps {warmup} --trainer.min_lr_ratio {ratio}"
    run = train(config(f"{options} --trainer.gradient_accumulation_steps {accumulation}"))
    rows = read_metrics(run / "metrics.jsonl")
    for name, peak in (("base", 1e-3), ("vlm", 1e-4)):
        found = [row[f"learning_rate/{name}"] for row in rows if "loss" in row]
        assert found == pytest.approx([rate(peak, step, 6, warmup, ratio) for step in range(6)], abs=1e-12)


def test_matrices_decay_and_nothing_else(config):
    run = set_up(config("--trainer.weight_decay 0.25", "GR00T"))
    groups = run.optimizer.param_groups
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim > 1} == {0.25}
    assert {g["weight_decay"] for g in groups for p in g["params"] if p.ndim < 2} == {0.0}
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in run.framework.parameters() if p.requires_grad)
    assert {(type(run.optimizer.optimizer), g["eps"], g["amsgrad"], g["maximize"]) for g in groups} == {
        (torch.optim.AdamW, EPS, False, False)
    }


def test_what_is_logged_as_the_rate_is_the_one_of_the_step(config):
    run = set_up(config(OPTIONS))
    before = learning_rates(run)
    update(run, [next(micro_batches(run))])
    assert before == pytest.approx({"learning_rate/base": 5e-4, "learning_rate/vlm": 5e-5})
    assert learning_rates(run) == pytest.approx({"learning_rate/base": 1e-3, "learning_rate/vlm": 1e-4})
