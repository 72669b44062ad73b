"""Absolute values: what a run's steps do to the weights, against plain torch and closed formulas."""

import copy
import math

import pytest
import torch

from vla_bench.config import ConfigError
from vla_bench.training.imitation import learning_rates, micro_batches, train, update
from vla_bench.training.loop import read_metrics
from vla_bench.training.optim import (
    find_module,
    flat_learning_rates,
    freeze_modules,
    named_parts,
    parameter_groups,
    parts_table,
    parts_text,
    rate_paths,
    warmup_cosine,
)
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


class Toy(torch.nn.Module):
    """Two nested modules, a parameter of its own, a module without weights, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.vlm = torch.nn.ModuleDict(
            {"eye": torch.nn.Linear(3, 2), "tongue": torch.nn.Linear(2, 2, bias=False)}
        )
        self.head = torch.nn.Linear(2, 1)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.empty = torch.nn.Identity()

    def component(self, name):
        """Only the eye is kept apart."""
        if name == "vision_backbone":
            return list(self.vlm["eye"].parameters())
        raise ValueError(name)


@pytest.mark.parametrize("path", ["vlm", "vlm.eye", "vlm.eye.weight", "scale", "head.bias", "empty"])
def test_modules_and_parameters_are_found_by_their_paths(path):
    model = Toy()
    named = {**dict(model.named_modules()), **dict(model.named_parameters())}
    assert find_module(model, path) is named[path]


@pytest.mark.parametrize(
    "path, message",
    [
        ("vml", "the model has no module 'vml'; did you mean 'vlm'"),
        ("vlm.eey", "the model has no module 'vlm.eey'; did you mean 'vlm.eye'"),
        ("vlm.eye.wieght", "did you mean 'vlm.eye.weight'"),
        ("scal", "did you mean 'scale'"),
        ("vlm.eye.in_features", "the model has no module 'vlm.eye.in_features'"),
        ("scale.data", "the model has no module 'scale.data'"),
        ("", "the model has no module ''"),
    ],
)
def test_a_path_that_leads_nowhere_is_named_with_its_key_and_the_nearest(path, message):
    with pytest.raises(ConfigError) as error:
        find_module(Toy(), path, "trainer.it")
    assert str(error.value).startswith("trainer.it: ") and message in str(error.value)


FROZEN = ["vlm.eye.weight", "vlm.eye.bias"]


@pytest.mark.parametrize(
    "paths, frozen",
    [
        (None, []), ([], []), ("vlm.eye", FROZEN), (["vlm.eye"], FROZEN), ("vlm.eye, scale", ["scale", *FROZEN]),
        (("vlm",), [*FROZEN, "vlm.tongue.weight"]), ("head.bias", ["head.bias"]),
    ],
)  # fmt: skip
def test_what_is_named_is_frozen_and_nothing_else(paths, frozen):
    model = Toy()
    assert sorted(freeze_modules(model, paths)) == sorted(frozen)
    assert sorted(n for n, p in model.named_parameters() if not p.requires_grad) == sorted(frozen)
    with pytest.raises(ConfigError, match="^trainer.freeze_modules: "):
        freeze_modules(model, "eye")


@pytest.mark.parametrize(
    "given, rates",
    [
        (0.5, {"": 0.5}),
        (1, {"": 1.0}),
        ({"base": 0.1, "vlm": 0.2}, {"": 0.1, "vlm": 0.2}),
        (
            {"vlm": {"base": 0.1, "eye": {"weight": 0.2, "base": 0}}},
            {"vlm": 0.1, "vlm.eye.weight": 0.2, "vlm.eye": 0.0},
        ),
        ({"base": {"base": 0.3}}, {"": 0.3}),
        ({}, {}),
    ],
)
def test_nested_rates_become_paths(given, rates):
    found = flat_learning_rates(given)
    assert found == rates and all(type(rate) is float for rate in found.values())


@pytest.mark.parametrize(
    "given, key",
    [(-1e-9, "trainer.learning_rate must"), (True, "trainer.learning_rate must"), ("1", "trainer.learning_rate must"),
     (None, "trainer.learning_rate must"), ({"vlm": {"eye": -1}}, "trainer.learning_rate.vlm.eye must"),
     ({"base": "a"}, "trainer.learning_rate must")],
)  # fmt: skip
def test_what_is_no_rate_is_named_by_its_path(given, key):
    with pytest.raises(ConfigError, match=f"^{key} be a number that is not negative"):
        flat_learning_rates(given)


def test_each_parameter_has_the_rate_of_the_deepest_module():
    model = Toy()
    rates = dict.fromkeys(["", "vlm", "vlm.eye", "vlm.eye.bias", "scale"], 1.0)
    assert rate_paths(model, rates) == {
        "scale": "scale", "vlm.eye.weight": "vlm.eye", "vlm.eye.bias": "vlm.eye.bias", "vlm.tongue.weight": "vlm",
        "head.weight": "", "head.bias": "",
    }  # fmt: skip
    assert (
        rate_paths(model, {"": 1.0, "empty": 1.0})["scale"] == ""
    )  # a module without weights keeps its rate
    with pytest.raises(ConfigError, match="names no rate for 'scale'; add `base`"):
        rate_paths(model, {"vlm": 1.0, "head": 1.0})
    with pytest.raises(
        ConfigError, match="trainer.learning_rate.vlm is the rate of nothing, since deeper paths"
    ):
        rate_paths(model, dict.fromkeys(["", "vlm", "vlm.eye", "vlm.tongue"], 1.0))


def test_of_two_names_of_one_module_the_longer_counts():
    model = Toy()
    model.alias_of_the_head = torch.nn.ModuleDict({"head": model.head})
    with pytest.raises(ConfigError, match="trainer.learning_rate.head is the rate of nothing"):
        rate_paths(model, dict.fromkeys(["", "head", "alias_of_the_head.head"], 1.0))


def test_groups_are_by_rate_and_by_decay():
    model = Toy()
    model.vlm["tongue"].requires_grad_(False)
    groups = parameter_groups(model, {"base": 0.1, "vlm": {"eye": 0.2, "tongue": 0.3}}, weight_decay=0.7)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {g["name"]: ([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups}
    assert found == {
        "base/no_decay": (["scale", "head.bias"], 0.1, 0.0),
        "base": (["head.weight"], 0.1, 0.7),
        "vlm.eye": (["vlm.eye.weight"], 0.2, 0.7),
        "vlm.eye/no_decay": (["vlm.eye.bias"], 0.2, 0.0),
    }
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="leave no parameter to train"):
        parameter_groups(model, 0.1)


def test_the_table_of_parts_is_these_rows_and_this_text():
    model = Toy()
    freeze_modules(model, "vlm.tongue")
    optimizer = torch.optim.AdamW(parameter_groups(model, {"base": 0.1, "vlm": {"eye": 0.2, "tongue": 1}}))
    assert [name for name, _ in named_parts(model)] == [
        "vlm: vision encoder", "vlm: the rest", "head: Linear", "empty: Identity", "scale"
    ]  # fmt: skip
    columns = ("part", "parameters", "trained", "frozen", "learning_rate")
    rows = [
        ("vlm: vision encoder", 8, 8, 0, "0.2"), ("vlm: the rest", 4, 0, 4, ""), ("head: Linear", 3, 3, 0, "0.1"),
        ("scale", 1, 1, 0, "0.1"), ("all", 16, 12, 4, ""),
    ]  # fmt: skip
    expected = [dict(zip(columns, row)) for row in rows]
    assert parts_table(model, optimizer.param_groups) == expected
    for group in optimizer.param_groups:  # a schedule has begun: the peak is what is told
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    assert parts_table(model, optimizer.param_groups) == expected
    expected[0]["parameters"] = 1234567
    assert parts_text(expected) == "\n".join([
        "part                 parameters  trained  frozen  learning_rate",
        "vlm: vision encoder   1,234,567        8       0            0.2",
        "vlm: the rest                 4        0       4",
        "head: Linear                  3        3       0            0.1",
        "scale                         1        1       0            0.1",
        "all                          16       12       4",
    ])  # fmt: skip


@pytest.mark.parametrize(
    "steps, warmup, fits", [(5, 0, True), (5, 4, True), (5, 5, False), (5, 6, False), (5, -1, False)]
)
def test_a_warmup_ends_before_the_run(steps, warmup, fits):
    optimizer = torch.optim.AdamW(Toy().parameters(), lr=2.0)
    if not fits:
        with pytest.raises(ConfigError, match=f"warmup_steps is {warmup} but the run has only {steps} steps"):
            warmup_cosine(optimizer, steps, warmup)
        return
    schedule = warmup_cosine(optimizer, steps, warmup, 0.25)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([rate(2.0, step, steps, warmup, 0.25) for step in range(steps)])
