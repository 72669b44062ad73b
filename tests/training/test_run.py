"""What a run refuses before it begins, and what it will not be continued with."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.utils import DistributedType

from vla_bench.config import ConfigError, load_config
from vla_bench.data.normalize import Normalizer, compute_statistics
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.registry import HEADS
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train
from vla_bench.training.run import (
    FREE_KEYS,
    TrainerSettings,
    check_data,
    check_dtype,
    check_launcher,
    check_processes,
    differences,
    inside,
    progress,
    save,
    set_up,
)


@pytest.mark.parametrize(
    "overrides, names",
    [
        ("--trainer.warmup_step 3", "'trainer.warmup_steps'"),
        ("--trainer.learning_rates.vlm 1e-4", "nothing reads"),
        ("--trainer.learning_rate.vml 1e-4", "did you mean 'vlm'"),
        ("--trainer.freeze_modules vlm.vision", "trainer.freeze_modules"),
        ("--datasets.vla_data.horizon 8", "framework.action_horizon is 4"),
        ("--datasets.vla_data.held_out 1.0", "nothing to train on"),
        ("--datasets.vla_data.cameras [frnt]", "front"),
        ("--framework.action_model.hiden_size 8", "hidden_size"),
        ("--trainer.warmup_steps 6", "trainer.max_train_steps"),
        ("--framework.vlm.dtype bfloat16", "framework.inference_model.vlm.dtype"),
        (
            "--trainer.learning_rate.vlm.model 1e-4 --trainer.learning_rate.vlm.base 1e-5",
            "learning_rate.vlm is",
        ),
    ],
)
def test_a_wrong_key_or_value_is_refused_before_anything_is_written(config, tmp_path, overrides, names):
    with pytest.raises(ValueError, match=".*") as error:
        train(config(overrides))
    assert names in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def untouched(straight):
    """Fails the test when a file of the finished run changes, appears or goes."""
    times = lambda: {p: p.stat().st_mtime_ns for p in straight.folder.rglob("*")}
    before = times()
    yield
    assert times() == before


def test_an_existing_run_is_not_trained_over(straight, untouched):
    with pytest.raises(ConfigError, match="--trainer.resume true"):
        train(load_config(straight.folder))


def test_a_run_is_not_continued_with_another_configuration(straight, untouched):
    with pytest.raises(ConfigError, match="trainer.weight_decay is 0.01 there and 0.5 here"):
        train(load_config(straight.folder, "--trainer.resume true --trainer.weight_decay 0.5"))


def test_a_run_is_not_continued_on_a_dataset_that_changed(config):
    run = train(config("--trainer.max_train_steps 3"))
    progress = latest_checkpoint(run) / "trainer/progress.json"
    (latest_checkpoint(run) / "manifest.json").unlink()  # the edited file itself would be refused
    progress.write_text(progress.read_text().replace('"statistics_hash": "', '"statistics_hash": "0'))
    with pytest.raises(ValueError, match="statistics_hash was '0"):
        train(load_config(run, "--trainer.resume true"))


def test_a_rate_reaches_a_component_by_its_other_name(config, home, tmp_path):
    """A composed backbone keeps its components deeper than the names that frameworks and rates call them by."""
    sizes = {"image_size": 32, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32}
    write_tiny_composed("prismatic", tmp_path / "prismatic", **sizes, vision_layers=2)
    rates = "--trainer.learning_rate.vlm.vision_backbone 1e-6 --trainer.learning_rate.vlm.base 1e-5"
    run = set_up(config(f"--framework.vlm.base_vlm {tmp_path}/prismatic {rates}"))
    vlm = run.framework.vlm
    modules = {"vlm.vision_backbone": vlm.model.model.vision_backbone, "vlm": vlm, "base": run.framework}
    remaining = set(run.framework.parameters())
    for name, module in modules.items():
        groups = [g for g in run.optimizer.param_groups if g["name"].removesuffix("/no_decay") == name]
        held = {p for group in groups for p in group["params"]}
        assert held and held == {p for p in module.parameters() if p.requires_grad and p in remaining}, name
        remaining -= held


def test_a_head_without_weights_may_keep_its_rate(config):
    groups = set_up(config("--trainer.learning_rate.action_model 1e-3", "OpenVLA")).optimizer.param_groups
    assert "action_model" not in {group["name"].removesuffix("/no_decay") for group in groups}


def test_a_model_that_is_frozen_as_a_whole_is_refused(config):
    with pytest.raises(ConfigError, match="framework.freeze_vlm_backbone.* leave no parameter"):
        set_up(config("--framework.freeze_vlm_backbone true", "OpenVLA"))


def modes_text(modes: dict) -> str:
    """Normalisation modes as overrides."""
    return " ".join(
        f"--datasets.vla_data.normalization.{key} {str(mode).replace(' ', '')}" for key, mode in modes.items()
    )


UNBOUNDED = [
    ("PI05", {"action": "min_max", "state": "mean_std"}, "state", "the prompt"),
    ("OpenVLA", {"action": "mean_std", "state": "min_max"}, "action", "BinsHead"),
    ("OpenVLA", {"action": ["min_max", "q99", "identity"]}, "action", "BinsHead"),
]


@pytest.mark.parametrize("framework, modes, field, reader", UNBOUNDED)
def test_bins_are_refused_numbers_that_lie_outside(config, framework, modes, field, reader):
    with pytest.raises(ConfigError, match="min_max or q99") as error:
        set_up(config(modes_text(modes), framework))
    assert f"datasets.vla_data.normalization.{field} is" in str(error.value) and reader in str(error.value)


@pytest.mark.parametrize("framework, modes, field, reader", UNBOUNDED)
def test_bins_take_numbers_that_lie_inside(config, framework, modes, field, reader):
    bounded = modes_text(modes).replace("mean_std", "q99").replace("identity", "binary")
    assert set_up(config(bounded, framework)).step == 0


@pytest.fixture
def tanh_head(monkeypatch):
    """Registers, for one test, a head of this file whose actions end at ±1."""
    monkeypatch.setattr(HEADS, "classes", dict(HEADS.classes))

    @HEADS.register("Tanh")
    class TanhHead(MLPHead):
        """The MLP head with bounded actions."""

        input_range = (-1.0, 1.0)

        def sample(self, features, noise=None):
            """Normalised actions in [-1, 1]."""
            return super().sample(features, noise).tanh()

    return TanhHead


TANH = "--framework.action_model.type Tanh"


@pytest.mark.parametrize("mode", ["mean_std", "[min_max,q99,identity]"])
def test_any_head_that_declares_a_range_is_refused_numbers_outside(config, tanh_head, mode):
    with pytest.raises(ConfigError, match="normalization.action is .*the head TanhHead .*min_max or q99"):
        set_up(config(f"{TANH} --datasets.vla_data.normalization.action {mode}"))


@pytest.mark.parametrize("mode", ["min_max", "q99", "[min_max,q99,binary]"])
def test_any_head_that_declares_a_range_takes_numbers_inside(config, tanh_head, mode):
    run = set_up(config(f"{TANH} --datasets.vla_data.normalization.action {mode}"))
    assert type(run.framework.action_model) is tanh_head


def test_a_range_that_no_mode_reaches_is_refused_without_naming_one(config, tanh_head, monkeypatch):
    monkeypatch.setattr(tanh_head, "input_range", (0.0, 1.0))
    with pytest.raises(ConfigError, match=r"reads numbers in \[0, 1\] .*scale the data to that range"):
        set_up(config(f"{TANH} --datasets.vla_data.normalization.action min_max"))


def test_a_head_that_declares_no_range_takes_any_numbers(config, tanh_head, monkeypatch):
    monkeypatch.setattr(tanh_head, "input_range", None)
    assert set_up(config(f"{TANH} --datasets.vla_data.normalization.action mean_std")).step == 0


def swap_two_actions(root):
    """Two actions of one episode change places: no statistic changes."""
    file = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    order = [1, 0, *range(2, len(table))]
    place = table.schema.get_field_index("action")
    swapped = table["action"].take(order).combine_chunks()
    pq.write_table(table.set_column(place, table.schema.field("action"), swapped), file)
    return "data/chunk-000/file-000.parquet has other content"


def replace_the_instruction(root):
    """The file of instructions is another one."""
    file = root / "meta/tasks.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.table({n: ["open the box"] if pa.types.is_string(table[n].type) else table[n]
                             for n in table.column_names}), file)  # fmt: skip
    return "meta/tasks.parquet has other content"


def touch_a_video(root):
    """One bit of a video is another one."""
    file = sorted(root.glob("videos/**/*.mp4"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file.relative_to(root).as_posix()} has other content"


@pytest.mark.parametrize("change", [swap_two_actions, replace_the_instruction, touch_a_video])
def test_a_run_is_not_continued_on_other_data(config, home, tmp_path, change):
    root = shutil.copytree(home / "toy", tmp_path / "toy")
    run = set_up(config([f"datasets.vla_data.root={root}", "trainer.max_train_steps=3"]))
    run.step = 1
    save(run)
    resumed = load_config(run.folder, "--trainer.resume true")
    assert set_up(resumed).step == 1
    told = change(root)
    with pytest.raises(ValueError, match="it was trained on other data") as error:
        set_up(resumed)
    assert told in str(error.value)


def test_a_video_that_was_only_touched_is_said_and_accepted(config, home, tmp_path, capsys):
    root = shutil.copytree(home / "toy", tmp_path / "toy")
    run = set_up(config([f"datasets.vla_data.root={root}"]))
    run.step = 1
    save(run)
    os.utime(sorted(root.glob("videos/**/*.mp4"))[0])
    assert set_up(load_config(run.folder, "--trainer.resume true")).step == 1
    assert "1 video files have another time of modification" in capsys.readouterr().out


TREE = {
    "a": 1,
    "trainer": {"weight_decay": 0.1, "num_workers": 2, "betas": [1, 2]},
    "evaluation": {"tasks": ["x"]},
}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, []),
        ({"a": 2}, ["a is 1 there and 2 here"]),
        ({"b": 3}, ["b is None there and 3 here"]),
        ({"trainer": {**TREE["trainer"], "weight_decay": 0.2}}, ["trainer.weight_decay is 0.1 there and 0.2 here"]),
        ({"trainer": {**TREE["trainer"], "betas": [1, 3]}}, ["trainer.betas is [1, 2] there and [1, 3] here"]),
        *(({"trainer": {**TREE["trainer"], key: 7}}, []) for key in FREE_KEYS),
        ({"evaluation": {"tasks": ["y"], "more": 1}}, []),
        ({"run_root_dir": "elsewhere", "run_id": "moved"}, []),
        ({"trainer": {}, "a": 5}, [
            "a is 1 there and 5 here", "trainer.betas is [1, 2] there and None here",
            "trainer.weight_decay is 0.1 there and None here",
        ]),
    ],
)  # fmt: skip
def test_configurations_differ_in_what_is_learned(change, expected):
    assert differences(TREE, TREE | change) == expected


def test_the_keys_that_change_nothing_that_is_learned_are_these():
    assert set(FREE_KEYS) == {
        "resume", "verify", "num_workers", "log_interval", "eval_interval", "eval_samples", "save_interval",
        "keep_last", "keep_every", "trackers", "gradient_checkpointing",
        "rollout_interval", "rollout_episodes", "rollout_first_seed", "peak_tflops", "spike_guard", "profile",
    }  # fmt: skip


@pytest.mark.parametrize(
    "world, found, kind, fits",
    [
        (1, 1, "NO", True),
        (2, 2, "MULTI_CPU", True),
        (2, 1, "NO", False),
        (2, 2, "NO", False),
        (1, 2, "MULTI_CPU", False),
    ],
)
def test_processes_are_those_that_were_launched(monkeypatch, world, found, kind, fits):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    accelerator = SimpleNamespace(num_processes=found, distributed_type=DistributedType[kind])
    if fits:
        check_processes(accelerator)
        return
    with pytest.raises(RuntimeError, match=f"started {world} processes, accelerate sees {found} "):
        check_processes(accelerator)


def test_without_a_launcher_one_process_is_meant(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_processes(SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO))


@pytest.mark.parametrize(
    "variable, value, fits",
    [
        ("ACCELERATE_MIXED_PRECISION", "no", True),
        ("ACCELERATE_MIXED_PRECISION", "bf16", False),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", False),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", True),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", False),
    ],
)
def test_a_launcher_that_names_other_numbers_is_refused(monkeypatch, variable, value, fits):
    monkeypatch.setenv(variable, value)
    settings = TrainerSettings(max_train_steps=1, gradient_accumulation_steps=2)
    if fits:
        check_launcher(settings)
        return
    with pytest.raises(ConfigError, match=f"the launcher sets .* to {value} .{variable}., trainer."):
        check_launcher(settings)


STATISTICS = compute_statistics(np.array([[-1.0, -0.5, -2], [1.0, 0.5, 2]]))


@pytest.mark.parametrize(
    "modes, low, high, expected",
    [
        ("min_max", -1, 1, [True] * 3),
        ("q99", -1, 1, [True] * 3),
        ("binary", -1, 1, [True] * 3),
        ("mean_std", -1, 1, [False] * 3),
        ("mean_std", -9, 9, [False] * 3),
        ("identity", -1, 1, [True, True, False]),
        ("identity", -0.5, 0.5, [False, True, False]),
        ("identity", -2, 1, [True, True, False]),
        ("identity", -1, 2, [True, True, False]),
        ("identity", -2, 2, [True] * 3),
        ("min_max", -0.9, 1, [False] * 3),
        ("min_max", -1, 0.9, [False] * 3),
        (["q99", "mean_std", "identity"], -2, 2, [True, False, True]),
    ],
)
def test_numbers_lie_inside_by_mode_and_by_what_was_recorded(modes, low, high, expected):
    assert inside(Normalizer(STATISTICS, modes), low, high) == expected


@pytest.mark.parametrize(
    "dtype, fits", [(None, True), ("float32", True), ("bfloat16", False), ("float16", False)]
)
def test_weights_are_trained_in_full_precision(dtype, fits):
    sections = [{"vlm": {"dtype": dtype}}, *([{"vlm": None}, {}] if fits else [])]
    for section in sections:
        if fits:
            check_dtype(section)
            continue
        with pytest.raises(ConfigError, match=f"framework.vlm.dtype is '{dtype}'"):
            check_dtype(section)


def test_where_a_run_stands_is_told_in_these_numbers(config):
    run = set_up(config("--trainer.gradient_accumulation_steps 3 --trainer.per_device_batch_size 2 --seed 5"))
    run.step = 4
    told = progress(run)
    assert told == {
        "step": 4, "position": 24, "samples_per_step": {"vla": 6}, "seed": 5, "processes": 1, "rows": len(run.data.train),
        "held_out": run.data.held_out_episodes(), "statistics_hash": run.spec.statistics_hash,
    }  # fmt: skip
    sampler = run.sampler()
    assert (sampler.first, sampler.stop, sampler.batch_size, sampler.seed) == (12, 18, 2, 5)
    assert (sampler.rank, sampler.processes, sampler.rows) == (0, 1, len(run.view))


@pytest.mark.parametrize("key", ["position", "seed", "rows", "held_out", "statistics_hash"])
def test_each_number_of_a_runs_place_is_compared(config, key):
    run = set_up(config())
    run.step = 1
    save(run)
    folder = latest_checkpoint(run.folder)
    (folder / "manifest.json").unlink()
    file = folder / "trainer/progress.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, key: [99] if key == "held_out" else 99}))
    with pytest.raises(ValueError, match=f"cannot be continued: {key} was"):
        set_up(load_config(run.folder, "--trainer.resume true"))


def test_of_many_files_that_differ_three_are_named(config, home, tmp_path):
    root = shutil.copytree(home / "toy", tmp_path / "toy")
    run = set_up(config([f"datasets.vla_data.root={root}"]))
    parts = {part: dict.fromkeys(names) for part, names in run.identity.items()}
    with pytest.raises(ValueError, match=r"progress.json: 'data'"):
        check_data(run, tmp_path, {"metadata": {}})
    saved = json.loads(json.dumps(run.identity))
    for count, more in ((3, ""), (4, " and 1 more"), (5, " and 2 more")):
        changed = {
            **saved,
            "metadata": {**saved["metadata"], **dict.fromkeys(list(parts["metadata"])[:count], "0")},
        }
        with pytest.raises(ValueError, match=f"in {root} .*other content{more}; restore the data") as error:
            check_data(run, tmp_path, changed)
        assert str(error.value).count("has other content") == 3


def test_data_that_were_not_remembered_are_said_not_to_be_compared(config, tmp_path, capsys):
    run = set_up(config())
    check_data(run, tmp_path / "step_000004", None)
    assert capsys.readouterr().out.startswith("step_000004 does not say which data it saw")
    with pytest.raises(ValueError, match="'data' is 'all', expected an object"):
        check_data(run, tmp_path, "all")


@pytest.mark.parametrize("field", ["size", "modified_ns", "sample"])
def test_a_video_that_is_remembered_by_half_is_named(config, tmp_path, field):
    run = set_up(config())
    saved = json.loads(json.dumps(run.identity))
    name = next(iter(saved["videos"]))
    del saved["videos"][name][field]
    with pytest.raises(ValueError, match=f"progress.json: 'data'.*{field}"):
        check_data(run, tmp_path, saved)


@pytest.mark.parametrize("resume", ["maybe", "1", "last", "None"])
def test_a_resume_that_cannot_be_meant_is_refused(config, resume):
    with pytest.raises(ConfigError, match="expected true, false, auto or last_good"):
        set_up(config([f"trainer.resume={resume}"]))


def test_a_run_goes_on_from_a_place_that_moved(config, home, tmp_path):
    """The run, its data and its backbone may stand elsewhere; what is learned may not be another."""
    root = shutil.copytree(home / "toy", tmp_path / "toy")
    run = set_up(config([f"datasets.vla_data.root={root}"]))
    run.step = 1
    save(run)
    moved = shutil.move(run.folder, tmp_path / "moved")
    shutil.move(root, tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "toy")
    tree = load_config(moved).to_dict() | {"run_id": "moved"}
    load_config(tree).save(tmp_path / "moved/config.yaml")
    assert set_up(load_config(tmp_path / "moved", "--trainer.resume true")).step == 1
    tree["trainer"]["weight_decay"] = 0.7
    load_config(tree).save(tmp_path / "moved/config.yaml")
    with pytest.raises(
        ConfigError, match="config.yaml is not what step_000001 was trained with: trainer.weight_decay"
    ):
        set_up(load_config(tmp_path / "moved", "--trainer.resume true"))


def test_the_optimizer_and_its_schedule_are_those_of_the_settings(config):
    options = "--trainer.betas [0.7,0.8] --trainer.weight_decay 0.25 --trainer.warmup_steps 3 --trainer.min_lr_ratio 0.5"
    run = set_up(config(f"{options} --trainer.max_train_steps 8 --trainer.freeze_modules vlm"))
    groups = run.optimizer.param_groups
    assert {(group["betas"], group["fused"], group["eps"]) for group in groups} == {((0.7, 0.8), True, 1e-8)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert not any(parameter.requires_grad for parameter in run.framework.vlm.parameters())
    schedule = run.scheduler.lr_lambdas[0]
    assert [schedule(step) for step in (0, 2, 7)] == pytest.approx([1 / 3, 1.0, 0.5])
