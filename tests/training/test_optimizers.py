"""Optimizers by name: which they are, what they are told, and what they refuse."""

import shutil

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.training.checkpoint import list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.optimizers import BETAS, OPTIMIZERS, build_optimizer, check_optimizer
from vla_bench.training.run import set_up


def groups() -> list[dict]:
    """Two groups with rates and decays of their own."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    layer(torch.randn(4, 3)).square().sum().backward()
    return [
        {"params": [layer.weight], "lr": 0.1, "weight_decay": 0.5, "name": "base"},
        {"params": [layer.bias], "lr": 0.2, "weight_decay": 0.0, "name": "base/no_decay"},
    ]


OURS = {
    "adamw": ({"eps": 1e-3}, lambda g: torch.optim.AdamW(g, betas=(0.5, 0.6), eps=1e-3)),
    "sgd": ({"momentum": 0.9, "nesterov": True}, lambda g: torch.optim.SGD(g, momentum=0.9, nesterov=True)),
    "adafactor": (
        {"d": 2.0, "eps": [1e-8, 1e-2]},
        lambda g: torch.optim.Adafactor(g, d=2.0, eps=(1e-8, 1e-2)),
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_a_step_is_that_of_torchs_class(name):
    arguments, plain = OURS[name]
    ours, theirs = groups(), groups()
    betas = (0.5, 0.6) if OPTIMIZERS[name].betas else BETAS
    found, expected = build_optimizer(ours, name, arguments, betas), plain(theirs)
    for _ in range(3):
        found.step()
        expected.step()
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine["params"][0], other["params"][0], rtol=1e-6, atol=1e-7)
    assert [g["name"] for g in found.param_groups] == ["base", "base/no_decay"]


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_a_run_trains_with_it_and_continues_bit_for_bit(config, losses, name):
    arguments = "{momentum: 0.9}" if name == "sgd" else "{d: 2.0}"
    run = train(config([f"trainer.optimizer={name}", f"trainer.optimizer_args={arguments}"]))
    whole = losses(run)
    shutil.rmtree(list_checkpoints(run)[-1])
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == whole and len({loss for _, loss, _ in whole}) == 6


def test_another_optimizer_does_not_continue_a_run(config):
    run = train(config("--trainer.max_train_steps 3"))
    with pytest.raises(ConfigError, match="trainer.optimizer is None there and 'sgd' here"):
        set_up(load_config(run, "--trainer.resume true --trainer.optimizer sgd"))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("adamW", None, "trainer.optimizer: unknown optimizer 'adamW'; did you mean 'adamw'"),
        (True, None, "trainer.optimizer: unknown optimizer True"),
        ("adamw", {"beta2_decay": 1}, "trainer.optimizer_args.beta2_decay: adamw takes no such argument"),
        ("sgd", [0.9], "trainer.optimizer_args must be a section such as {momentum: …}"),
    ],
)
def test_what_is_no_optimizer_is_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(name, arguments)


def test_a_missing_package_is_named_with_its_line_of_installation(monkeypatch):
    monkeypatch.setattr("vla_bench.training.optimizers.find_spec", lambda package: None)
    with pytest.raises(
        ConfigError,
        match=r'needs the package bitsandbytes; install it: pip install "vla_bench\[bitsandbytes\]"',
    ):
        check_optimizer("adamw_8bit", None)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.module != "torch.optim"])
def test_the_eight_bit_ones_step(name):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 128))
    before, weight.grad = weight.detach().clone(), torch.randn(128, 128)
    optimizer = build_optimizer(
        [{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], name, {"min_8bit_size": 1}
    )
    optimizer.step()
    assert torch.allclose(before - weight, 0.1 * weight.grad.sign(), atol=1e-4)
