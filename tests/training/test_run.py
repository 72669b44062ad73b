"""What a run refuses before it begins, and what it will not be continued with."""

import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.config import ConfigError, load_config
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.registry import HEADS
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train
from vla_bench.training.run import save, set_up


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
