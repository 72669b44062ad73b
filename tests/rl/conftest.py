"""Adaptations of a tiny policy on `point`: a few short episodes per update."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vla_bench.config import Config, load_config

FIXTURE = Path(__file__).parents[1] / "fixtures/version_0_1/runs"
RL = {"groups": 2, "group_size": 3, "exploration": {"std": 0.3}, "success_range": [0.0, 1.0], "epochs": 2}
TRAINER = {
    "max_train_steps": 2,
    "per_device_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "schedule": "constant_with_warmup",
    "freeze_modules": "vlm",
    "save_interval": 1,
}
EVALUATION = {"benchmark": "point", "n_action_steps": 2, "max_steps": 13}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def config(tmp_path) -> Callable[..., Config]:
    """`config(overrides, policy)`: an adaptation in a folder of this test, `run` unless it says so."""

    def build(overrides: str = "", policy: str = "llava", **sections: Any) -> Config:
        tree = {"run_root_dir": str(tmp_path), "run_id": "run", "seed": 0}
        tree |= {"rl": {"policy": str(FIXTURE / policy), **RL}, "trainer": TRAINER, "evaluation": EVALUATION}
        return load_config(tree | sections, overrides)

    return build
