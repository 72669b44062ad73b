"""Each setting reaches what it controls: changed alone, it changes the numbers that are named here and no other."""

import numpy as np
import pytest
import torch

from vla_bench.training.imitation import make_loader
from vla_bench.training.run import DataSettings, RunSettings, TrainerSettings, progress, set_up


def numbers(run) -> dict:
    """Everything of a run that a setting may change before the first step, by name."""
    sample = run.view[0, 0]
    batch = next(iter(make_loader(run.view, run.sampler(), run.framework.prepare)))
    groups = run.optimizer.param_groups
    parameters = dict(run.framework.named_parameters())
    name = {id(p): n for n, p in parameters.items()}
    settings = run.settings
    return {
        "weights": {n: p.double().sum().item() for n, p in parameters.items()},
        "noise": torch.rand(2).tolist(),
        "order": [key for number in range(3) for key in run.sampler().batch(number)],
        "batches": len(run.sampler()),
        "accumulation": run.accelerator.gradient_accumulation_steps,
        "precision": run.accelerator.mixed_precision,
        "training episodes": run.data.train.episodes,
        "held-out episodes": progress(run)["held_out"],
        "images": [np.asarray(image).astype(int).sum() for image in sample["image"]],
        "pixels": [np.asarray(image).tolist() for image in sample["image"]],
        "augmentation": (run.view.seed, run.view.shift_pixels, run.view.state_noise),
        "state": sample["state"].tolist() if "state" in sample else None,
        "actions": sample["action"].tolist(),
        "prompt": run.framework.prepare.prompt,
        "tokens": batch["inputs"]["input_ids"].shape[1],
        "rates": {name[id(p)]: group["initial_lr"] for group in groups for p in group["params"]},
        "decay": {name[id(p)]: group["weight_decay"] for group in groups for p in group["params"]},
        "betas": {group["betas"] for group in groups},
        "schedule": [[f(step) for f in run.scheduler.lr_lambdas[:1]] for step in range(4)],
        "specification": (run.spec.cameras, run.spec.horizon, run.spec.normalization, run.spec.state is None),
        "clipping": settings.gradient_clipping,
        "workers": settings.num_workers,
        "intervals": (settings.log_interval, settings.eval_interval, settings.save_interval),
        "measured": settings.eval_samples,
    }


VLA = "datasets.vla_data"
SEEN = {"images", "pixels"}
SPLIT = {"training episodes", "held-out episodes", "order", "actions", "state"}
CHANGES = [
    ("trainer.max_train_steps=8", {"batches", "schedule"}),
    ("trainer.per_device_batch_size=2", {"order"}),
    ("trainer.gradient_accumulation_steps=2", {"accumulation", "batches"}),
    ("trainer.learning_rate.vlm=3e-4", {"rates"}),
    ("trainer.learning_rate.base=3e-4", {"rates"}),
    ("trainer.freeze_modules=vlm.model.model.visual", {"rates", "decay"}),
    ("trainer.betas=[0.8,0.95]", {"betas"}),
    ("trainer.betas=[0.9,0.99]", {"betas"}),
    ("trainer.weight_decay=0.02", {"decay"}),
    ("trainer.warmup_steps=3", {"schedule"}),
    ("trainer.min_lr_ratio=0.5", {"schedule"}),
    ("trainer.gradient_clipping=0.5", {"clipping"}),
    ("trainer.mixed_precision=bf16", {"precision"}),
    ("trainer.num_workers=1", {"workers"}),
    ("trainer.log_interval=2", {"intervals"}),
    ("trainer.eval_interval=2", {"intervals"}),
    ("trainer.save_interval=2", {"intervals"}),
    ("trainer.eval_samples=2", {"measured"}),
    ("trainer.verify=true", set()),
    ("seed=1", {"weights", "noise", "augmentation", *SPLIT, *SEEN}),
    (f"{VLA}.cameras=[wrist,front]", {*SEEN, "specification"}),
    (f"{VLA}.cameras=[front]", {*SEEN, "specification", "tokens"}),
    (f"{VLA}.state_key=null", {"state", "weights", "rates", "decay", "specification"}),
    (f"{VLA}.normalization.action=mean_std", {"actions", "specification"}),
    (f"{VLA}.normalization.state=min_max", {"state", "specification"}),
    (f"{VLA}.held_out=0.5", SPLIT),
    (f"{VLA}.shift_pixels=0", {*SEEN, "state", "augmentation"}),
    (f"{VLA}.shift_pixels=6", {*SEEN, "augmentation"}),
    (f"{VLA}.state_noise=0", {"state", "augmentation"}),
    (f"{VLA}.state_noise=0.5", {"state", "augmentation"}),
    (f"{VLA}.horizon=4", set()),
    (f"{VLA}.follow_links=true", set()),
    (f"{VLA}.image_transforms=[{{type: crop, fraction: 0.5}}]", {*SEEN, "state"}),
    (f"{VLA}.future_frames=[2]", set()),
    ("framework.prompt='Please {lang}'", {"prompt", "tokens"}),
    ("framework.action_horizon=2", {"actions", "weights", "specification"}),
    ("framework.action_model.hidden_size=16", {"weights"}),
]


@pytest.fixture(scope="module")
def unchanged():
    return {}


@pytest.mark.parametrize("change, names", CHANGES)
def test_a_setting_changes_what_it_names_and_nothing_else(config, unchanged, change, names):
    if not unchanged:
        unchanged.update(numbers(set_up(config("run_id=unchanged"))))
    found = numbers(set_up(config([change])))
    assert {name for name in found if found[name] != unchanged[name]} == names


def test_the_defaults_are_these():
    assert vars(TrainerSettings(max_train_steps=10)) == {
        "max_train_steps": 10,
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "freeze_modules": None,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "min_lr_ratio": 0.0,
        "gradient_clipping": 1.0,
        "mixed_precision": "no",
        "num_workers": 1,
        "log_interval": 10,
        "eval_interval": 500,
        "save_interval": 1000,
        "eval_samples": 1024,
        "pretrained_checkpoint": None,
        "reload_modules": None,
        "resume": False,
        "verify": False,
    }
    assert vars(DataSettings("set")) == {
        "root": "set",
        "cameras": None,
        "action_key": "action",
        "state_key": "observation.state",
        "normalization": {"action": "min_max", "state": "mean_std"},
        "held_out": 0.1,
        "shift_pixels": 0,
        "state_noise": 0.0,
        "horizon": None,
        "follow_links": False,
        "mixture": None,
        "robot": None,
        "action_mode": "absolute",
        "rotation": "",
        "image_transforms": None,
        "observation_steps": 1,
        "observation_stride": 1,
        "future_frames": [],
        "streaming": False,
        "buffer_size": 10_000,
        "cache": None,
    }
    assert RunSettings("runs", "mine").seed == 0
