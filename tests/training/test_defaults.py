"""What every function of the training takes where nothing is given, and which values stay as they were made."""

import inspect
from dataclasses import FrozenInstanceError, fields
from importlib import import_module

import pytest

DEFAULTS = {
    "checkpoint.find_checkpoint": {"checkpoint": "latest"},
    "checkpoint.load_trainer": {"rank": 0},
    "checkpoint.save_checkpoint": {"weights": None},
    "checkpoint.check_checkpoint": {"resume": False, "verify": False},
    "checkpoint.data_identity": {"verify": False},
    "data.open_dataset": {"horizon": 1},
    "imitation.not_finite": {"loss": ""},
    "imitation.main": {"argv": None},
    "loop.BatchSampler": {"first": 0, "stop": 4611686018427387904, "rank": 0, "processes": 1, "order": None},
    "loop.augment": {"shift_pixels": 0, "state_noise": 0.0},
    "loop.AugmentedView": {"shift_pixels": 0, "state_noise": 0.0},
    "loop.make_loader": {"num_workers": 0},
    "loop.action_error_sums": {"seed": 0},
    "loop.MetricsLog": {"step": 0},
    "optim.find_module": {"key": "path"},
    "optim.flat_learning_rates": {"prefix": ""},
    "optim.parameter_groups": {"weight_decay": 0.0},
    "optim.warmup_cosine": {"warmup_steps": 0, "min_lr_ratio": 0.0},
    "pretrained.misfits": {"prefix": ""},
    "pretrained.load_pretrained": {"modules": None},
    "run.Run": {"step": 0},
}
FROZEN = ["data.Member", "data.Data", "loop.BatchSampler", "loop.AugmentedView", "loop.EvaluationView"]


def named(name: str) -> object:
    """The function or class that is meant by "module.name"."""
    module, *names = name.split(".")
    found = import_module(f"vla_bench.training.{module}")
    for each in names:
        found = vars(found)[each]
    return found


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_left_out_means_this(name):
    parameters = inspect.signature(named(name)).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", FROZEN)
def test_a_value_is_not_changed_after_it_was_made(name):
    """Values are shared between views, members and processes: a changed one would change them all."""
    cls = named(name)
    one = object.__new__(cls)
    for field in fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(one, field.name, None)
