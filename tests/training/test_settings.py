"""Each setting reaches what it controls: changed alone, it changes the numbers that are named here and no other."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from vla_bench.config import load_config
from vla_bench.data.mixture import MixtureEntry
from vla_bench.data.robots import read_robot
from vla_bench.data.writer import LeRobotWriter
from vla_bench.models.frameworks.blocks import repeated_blocks
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
        "training episodes": [member.train.episodes for member in run.data.members],
        "held-out episodes": progress(run)["held_out"],
        "images": [np.asarray(image).astype(int).sum() for image in sample["image"]],
        "pixels": [np.asarray(image).tolist() for image in sample["image"]],
        "augmentation": (run.view.seed, run.view.shift_pixels, run.view.state_noise),
        "state": sample["state"].tolist() if "state" in sample else None,
        "actions": sample["action"].tolist(),
        "later images": [np.asarray(image).tolist() for image in sample.get("future", ())],
        "instruction": sample["lang"],
        "dataset": sample["dataset"],
        "compared": sorted({key for video in run.identity["videos"].values() for key in video}),
        "layout": run.spec.action,
        "names": run.data.members[0].action_names,
        "view": (run.spec.encoding, run.spec.observation_steps, run.spec.observation_stride, run.spec.prompt),
        "prompt": run.framework.prepare.prompt,
        "tokens": batch["inputs"]["input_ids"].shape[1],
        "rates": {name[id(p)]: group["initial_lr"] for group in groups for p in group["params"]},
        "decay": {name[id(p)]: group["weight_decay"] for group in groups for p in group["params"]},
        "optimizer": (type(run.optimizer.optimizer).__name__, {group.get("eps") for group in groups}),
        "average": run.ema and (run.ema.decay, run.ema.warmup),
        "betas": {group.get("betas") for group in groups},
        "schedule": [[f(step) for f in run.scheduler.lr_lambdas[:1]] for step in range(6)],
        "specification": (run.spec.cameras, run.spec.horizon, run.spec.normalization, run.spec.state is None),
        "clipping": settings.gradient_clipping,
        "blocks": [
            run.framework.get_submodule(path).__dict__.get("forward")
            for path in repeated_blocks(run.framework)
        ],
        "weight of the loss": {name: source.weight for name, source in run.sources.items()},
        "workers": settings.num_workers,
        "intervals": (settings.log_interval, settings.eval_interval, settings.save_interval),
        "kept": (settings.keep_last, settings.keep_every),
        "measured": settings.eval_samples,
        "episodes": [getattr(settings, f"rollout_{key}") for key in ("interval", "episodes", "first_seed")],
        "guard": run.guard,
        "profiler": run.profiler,
        "trackers": run.trackers,
        "peak": settings.peak_tflops,
    }


VLA = "datasets.vla_data"


def words(value: dict | set) -> str:
    """The name of a case, which is the same in every process."""
    return str(value)[:40] if isinstance(value, dict) else ",".join(sorted(value))


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
    ("trainer.optimizer=sgd", {"optimizer", "betas"}),
    ("trainer.optimizer_args={eps: 1.0e-6}", {"optimizer"}),
    ("trainer.weight_decay=0.02", {"decay"}),
    ("trainer.warmup_steps=3", {"schedule"}),
    ("trainer.min_lr_ratio=0.5", {"schedule"}),
    ("trainer.schedule=wsd", {"schedule"}),
    (["trainer.schedule=wsd", "trainer.decay_steps=4"], {"schedule"}),
    ("trainer.gradient_clipping=0.5", {"clipping"}),
    ("trainer.ema_decay=0.9", {"average"}),
    ("trainer.gradient_checkpointing=true", {"blocks"}),
    ("trainer.compile=true", {"blocks"}),
    ("trainer.peft={type: LORA, target_modules: [q_proj]}", {"weights", "rates", "decay"}),
    ("trainer.loss_scale={vla: 0.5}", {"weight of the loss"}),
    ("trainer.mixed_precision=bf16", {"precision"}),
    ("trainer.num_workers=1", {"workers"}),
    ("trainer.log_interval=2", {"intervals"}),
    ("trainer.eval_interval=2", {"intervals"}),
    ("trainer.save_interval=2", {"intervals"}),
    ("trainer.keep_last=2", {"kept"}),
    (["trainer.keep_last=2", "trainer.keep_every=3"], {"kept"}),
    ("trainer.eval_samples=2", {"measured"}),
    ("trainer.spike_guard={window: 7}", {"guard"}),
    ("trainer.profile={steps: 2}", {"profiler"}),
    ("trainer.rollout_interval=0", {"episodes"}),
    ("trainer.rollout_episodes=2", {"episodes"}),
    ("trainer.rollout_first_seed=2", {"episodes"}),
    ("trainer.trackers=[tensorboard]", {"trackers"}),
    ("trainer.peak_tflops=2.5", {"peak"}),
    ("trainer.verify=true", {"compared"}),
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
    (f"{VLA}.future_frames=[2]", {"later images"}),
    (f"{VLA}.streaming=true", SPLIT),
    (f"{VLA}.buffer_size=3", set()),
    (f"{VLA}.cache=elsewhere", set()),
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
    found = numbers(set_up(config([change] if isinstance(change, str) else change)))
    assert {name for name in found if found[name] != unchanged[name]} == names


ARM = """
description: a position, a rotation and a gripper
sources: []
rates: [10]
cameras: {head: [cam0], hand: [cam1]}
state: &parts
  - {name: place, dims: [x, y], kind: position, unit: m}
  - {name: turn, dims: [r0, r1, r2], kind: rotation, rotation: axis_angle}
  - {name: gripper, dims: [gripper], kind: gripper, gripper: positive_opens}
action: *parts
"""


@pytest.fixture(scope="module")
def arm(home, tmp_path_factory):
    """A folder with a robot that turns, as `arm.yaml` and `turned.yaml` tell it, and recordings of it."""
    folder, rng = tmp_path_factory.mktemp("arm"), np.random.default_rng(4)
    (folder / "arm.yaml").write_text(ARM)
    (folder / "turned.yaml").write_text(ARM.replace("axis_angle", "euler_xyz"))
    layout = read_robot(folder / "arm.yaml").action_layout
    cameras = {"cam0": (32, 32), "cam1": (32, 32)}
    for name, frames in (("one", 6), ("two", 9), ("six", 6)):
        with LeRobotWriter(folder / name, fps=10, cameras=cameras, state=layout, action=layout) as writer:
            for number in range(4):
                films = {key: rng.integers(0, 255, (frames, 32, 32, 3), np.uint8) for key in cameras}
                state, action = rng.normal(size=(2, frames, 6))
                writer.add_episode(images=films, state=state, action=action, task=f"{name} {number % 2}")
    return folder


def of_the_arm(config, arm, change: dict, entries: list | None = None, name="run"):
    """A run on a recording of the arm, or on a mixture of such recordings."""
    tree = config(f"--run_id {name}", "GR00T").to_dict()
    where = {"mixture": entries} if entries else {"root": str(arm / "one"), "robot": str(arm / "arm.yaml")}
    tree["datasets"] = {"vla_data": {**where, "held_out": 0.25, **change}}
    return set_up(load_config(tree))


SIZES = {"weights", "names"}  # of a model with other numbers
ALL_SEEN = {*SEEN, "tokens"}
OF_AN_ARM = [
    ({"root": "six"}, {*SEEN, "state", "actions", "instruction", "dataset"}),
    ({"action_mode": "relative"}, {"actions", "view"}),
    ({"action_mode": "delta"}, {"actions", "view"}),
    ({"action_mode": {"place": "delta"}}, {"actions", "view"}),
    ({"action_mode": {"turn": "relative"}}, {"actions", "view"}),
    ({"rotation": "rotation_6d"}, {"actions", "state", "view", *SIZES}),
    ({"rotation": "euler_xyz"}, {"actions", "state", "view", "names"}),
    ({"robot": "turned.yaml"}, {"layout"}),
    ({"action_key": "observation.state"}, {"actions"}),
    ({"state_key": "action"}, {"state"}),
    ({"cameras": ["hand", "head"]}, {*SEEN, "specification"}),
    ({"cameras": ["head"]}, {*SEEN, "tokens", "specification"}),
    ({"observation_steps": 2}, {*ALL_SEEN, "state", "view", "weights"}),
    ({"observation_steps": 2, "observation_stride": 2}, {*ALL_SEEN, "state", "view", "weights"}),
    ({"observation_stride": 2}, set()),
    ({"future_frames": [1]}, {"later images"}),
]


@pytest.mark.parametrize("change, names", OF_AN_ARM, ids=words)
def test_a_setting_of_a_robot_changes_what_it_names_and_nothing_else(config, arm, unchanged, change, names):
    if "arm" not in unchanged:
        unchanged["arm"] = numbers(of_the_arm(config, arm, {}, name="unchanged"))
    files = ("root", "robot")
    change = {key: str(arm / value) if key in files else value for key, value in change.items()}
    found = numbers(of_the_arm(config, arm, change))
    assert {name for name in found if found[name] != unchanged["arm"][name]} == names


STEPS = {"observation_steps": 2}


def test_the_stride_of_observations_changes_what_is_seen(config, arm):
    near, far = (numbers(of_the_arm(config, arm, STEPS | more, name=name))
                 for name, more in (("near", {}), ("far", {"observation_stride": 2})))  # fmt: skip
    assert {name for name in near if near[name] != far[name]} <= {"view", "state", *SEEN} and (
        near["view"] != far["view"]
    )


OF_AN_ENTRY = [
    (
        {"dataset": "six"},
        {*SEEN, "state", "actions", "instruction", "dataset", "held-out episodes"},
    ),
    ({"weight": 5.0}, {"order"}),
    ({"name": "other"}, {"dataset", "held-out episodes"}),
    ({"robot": "turned.yaml"}, {"layout"}),
    ({"cameras": ["hand", "head"]}, {*SEEN, "specification"}),
    ({"prompt": "slowly: {lang}"}, {"instruction", "view", "tokens"}),
    ({"action_key": "observation.state"}, {"actions"}),
    ({"state_key": "action"}, {"state"}),
    ({"action_mode": "relative"}, {"actions", "view"}),
    ({"normalization": {"action": "mean_std"}}, {"actions", "specification"}),
]


@pytest.mark.parametrize("change, names", OF_AN_ENTRY, ids=words)
def test_an_entry_of_a_mixture_changes_what_it_names_and_nothing_else(config, arm, unchanged, change, names):
    first = {"dataset": str(arm / "one"), "robot": str(arm / "arm.yaml"), "weight": 1.0}
    second = {**first, "dataset": str(arm / "two")}
    if "mixture" not in unchanged:
        unchanged["mixture"] = numbers(of_the_arm(config, arm, {}, [first, second], "unchanged"))
    files = ("dataset", "robot")
    change = {key: str(arm / value) if key in files else value for key, value in change.items()}
    found = numbers(of_the_arm(config, arm, {}, [first | change, second]))
    assert {name for name in found if found[name] != unchanged["mixture"][name]} == names


@pytest.mark.parametrize("how", ["per_robot", "shared"])
def test_shared_statistics_change_the_numbers_and_nothing_else(config, arm, unchanged, how):
    entries = [
        {"dataset": str(arm / name), "robot": str(arm / "arm.yaml"), "weight": 1.0} for name in ("one", "two")
    ]
    if "mixture" not in unchanged:
        unchanged["mixture"] = numbers(of_the_arm(config, arm, {}, entries, "unchanged"))
    found = numbers(of_the_arm(config, arm, {"statistics": how}, entries))
    assert {name for name in found if found[name] != unchanged["mixture"][name]} == {"actions", "state"}


def test_every_key_is_changed_alone_by_one_of_these():
    words = [word for change, _ in CHANGES for word in ([change] if isinstance(change, str) else change)]
    changed = {word.partition("=")[0] for word in words}
    trainer = {name.split(".")[1] for name in changed if name.startswith("trainer.")}
    # test_pretrained, test_imitation, test_ema
    elsewhere = {"pretrained_checkpoint", "reload_modules", "resume", "ema_warmup"}
    assert trainer | elsewhere == {f.name for f in fields(TrainerSettings)}
    data = {name.split(".")[2] for name in changed if name.startswith(f"{VLA}.")}
    data |= {key for change, _ in OF_AN_ARM for key in change}
    assert data | {"mixture", "statistics"} == {f.name for f in fields(DataSettings)}
    assert {key for change, _ in OF_AN_ENTRY for key in change} == {f.name for f in fields(MixtureEntry)}


def test_the_defaults_are_these():
    assert vars(TrainerSettings(max_train_steps=10)) == {
        "max_train_steps": 10,
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "freeze_modules": None,
        "optimizer": "adamw",
        "optimizer_args": None,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_steps": 0,
        "min_lr_ratio": 0.0,
        "decay_steps": None,
        "gradient_clipping": 1.0,
        "ema_decay": None,
        "ema_warmup": False,
        "peft": None,
        "gradient_checkpointing": False,
        "compile": False,
        "mixed_precision": "no",
        "num_workers": 1,
        "log_interval": 10,
        "eval_interval": 500,
        "save_interval": 1000,
        "keep_last": None,
        "keep_every": None,
        "eval_samples": 1024,
        "spike_guard": None,
        "profile": None,
        "rollout_interval": None,
        "rollout_episodes": 10,
        "rollout_first_seed": 40000,
        "trackers": None,
        "peak_tflops": None,
        "pretrained_checkpoint": None,
        "reload_modules": None,
        "loss_scale": None,
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
        "statistics": "per_dataset",
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
