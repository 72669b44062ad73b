"""Values that cannot be meant are refused, with key and value, before the first folder is made."""

import pytest
import yaml

from vla_bench.config import ConfigError, load_config
from vla_bench.evaluation.rollout import EvaluationSettings
from vla_bench.training.run import DataSettings, RunSettings, TrainerSettings, set_up

COUNTS = ("max_train_steps", "per_device_batch_size", "gradient_accumulation_steps", "eval_samples")
INTERVALS = ("log_interval", "eval_interval", "save_interval")
RATES = ("learning_rate", "learning_rate.base", "learning_rate.vlm", "learning_rate.vlm.model.visual")
VLA = "datasets.vla_data"
REFUSED = [
    *((f"trainer.{key}", value) for key in (*COUNTS, *INTERVALS) for value in ("0", "-1", "1.5", "true")),
    *(
        (f"trainer.{key}", value)
        for key in ("num_workers", "warmup_steps")
        for value in ("-1", "0.5", "true")
    ),
    ("trainer.warmup_steps", "6"),
    *((f"trainer.{key}", value) for key in RATES for value in ("nan", "inf", "-1e-3")),
    *(("trainer.gradient_clipping", value) for value in ("nan", ".nan", "inf", "-.inf", "0", "-1")),
    *(("trainer.weight_decay", value) for value in ("nan", "inf", "-0.1")),
    *(("trainer.min_lr_ratio", value) for value in ("nan", "-0.1", "1.1")),
    *(
        ("trainer.betas", value)
        for value in ("[0.9,1]", "[-0.1,0.9]", "[.nan,0.9]", "[0.9]", "[0.9,0.9,0.9]")
    ),
    *(("trainer.schedule", value) for value in ("linear", "5", "null", "true")),
    *(("trainer.decay_steps", value) for value in ("0", "-1", "1.5", "true", "2")),
    *(("trainer.keep_last", value) for value in ("0", "-1", "1.5", "true")),
    *(("trainer.keep_every", value) for value in ("0", "1.5", "5")),
    ("trainer.mixed_precision", "fp8"),
    *(("trainer.freeze_modules", value) for value in ("5", "true", "[1]", "{vlm: 1}")),
    *(("trainer.reload_modules", value) for value in ("5", "true", "[1]", "{vlm: 1}", "vlm")),
    *((f"{VLA}.held_out", value) for value in ("1", "1.0", "-0.1", "nan", "inf")),
    *((f"{VLA}.shift_pixels", value) for value in ("-1", "0.5", "true")),
    *((f"{VLA}.state_noise", value) for value in ("-0.1", "nan", "inf")),
    *((f"{VLA}.horizon", value) for value in ("0", "-4", "1.5")),
    *((f"{VLA}.cameras", value) for value in ("[]", "[front, front]")),
    *((f"{VLA}.normalization.{key}", "q99") for key in ("actions", "gripper", "State")),
    *((f"{VLA}.normalization.action", value) for value in ("q98", "null", "[min_max, q98]", "true")),
    *(("seed", value) for value in ("1.5", "true", "-1", "4294967296", "nan", "abc", "null")),
    *(("run_id", value) for value in ("null", "a/b", "..", ".", "/", "a\\b")),
    ("run_root_dir", "null"),
    *(("framework.action_horizon", value) for value in ("0", "-1", "1.5", "true")),
]


@pytest.mark.parametrize("key, value", REFUSED)
def test_a_value_that_cannot_be_meant_is_refused_before_a_folder_is_made(config, tmp_path, key, value):
    with pytest.raises(ConfigError) as error:
        set_up(config([f"{key}={value}"]))
    assert key.removesuffix(".base") in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key, value", REFUSED)
def test_a_file_is_refused_like_the_command_line(config, tmp_path, key, value):
    file, folder = tmp_path / "wrong.yaml", tmp_path / "runs"
    config([f"run_root_dir={folder}"]).save(file)
    tree = yaml.safe_load(file.read_text())
    *parents, name = key.split(".")
    section = tree
    for parent in parents:
        if not isinstance(section.get(parent), dict):
            section[parent] = {"base": 1e-3} if parent == "learning_rate" else {}
        section = section[parent]
    section[name] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as error:
        set_up(load_config(file))
    assert key.removesuffix(".base") in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize(
    "settings, values, key",
    [
        (TrainerSettings, {"max_train_steps": True}, "trainer.max_train_steps"),
        (TrainerSettings, {"max_train_steps": 5, "log_interval": 0}, "trainer.log_interval"),
        (DataSettings, {"root": " "}, "datasets.vla_data.root"),
        (DataSettings, {"root": "set", "action_key": ""}, "datasets.vla_data.action_key"),
        (RunSettings, {"run_root_dir": "", "run_id": "mine"}, "run_root_dir"),
        (RunSettings, {"run_root_dir": "runs", "run_id": 20250115}, "run_id"),
        (EvaluationSettings, {"tasks": ["reach", "push", "reach"]}, "evaluation.tasks"),
        (EvaluationSettings, {"first_seed": 2**32}, "evaluation.first_seed"),
        *((EvaluationSettings, {"episodes": value}, "evaluation.episodes") for value in (1.5, True, -1)),
        *((EvaluationSettings, {"first_seed": value}, "evaluation.first_seed") for value in (-1, 0.5)),
    ],
)
def test_settings_that_python_makes_are_checked_too(settings, values, key):
    with pytest.raises(ConfigError, match=f"^{key} must be"):
        settings(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"warmup_steps": 0},
        {"learning_rate": {"base": 1e-3, "vlm": 0}},
        {"warmup_steps": 5},
        {"num_workers": 0},
        {"min_lr_ratio": 1.0},
        {"betas": (0, 0)},
    ],
)
def test_the_ends_of_a_range_are_taken(values):
    assert vars(TrainerSettings(max_train_steps=6, **values)).items() >= values.items()


NAMES = [
    "2025_01_15",
    "0010",
    "1e3",
    "1_1_1",
    "2025-01-15",
    "0x10",
    "1:30",
    "true",
    "no",
    ".5",
    "017",
    "1.50",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "key", ["run_id", "run_root_dir", "datasets.vla_data.root", "framework.qwenvl.base_vlm"]
)
@pytest.mark.parametrize("way", ["file", "override", "override of the file's"])
def test_a_name_stays_as_it_is_written(tmp_path, key, name, way):
    file, in_file = (
        tmp_path / "c.yaml",
        {"file": name, "override": None, "override of the file's": "other"}[way],
    )
    *sections, last = key.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(sections)]
    value = [f"{'  ' * len(sections)}{last}: {in_file}"] if in_file else []
    file.write_text("\n".join([*(lines if value else []), *value]) + "\n")
    cfg = load_config(file, [] if way == "file" else [f"{key}={name}"])
    assert cfg.get(key.replace("qwenvl", "vlm")) == name
    cfg.save(tmp_path / "config.yaml")
    assert load_config(tmp_path).get(key.replace("qwenvl", "vlm")) == name


@pytest.mark.parametrize("way", ["file", "override"])
def test_names_in_a_list_stay_as_they_are_written(tmp_path, way):
    (tmp_path / "c.yaml").write_text(
        f"evaluation: {{tasks: {NAMES}}}".replace("'", "") if way == "file" else "a: 1"
    )
    given = [] if way == "file" else [f"evaluation.tasks={NAMES}".replace("'", "")]
    settings = load_config(tmp_path / "c.yaml", given).section("evaluation").into(EvaluationSettings)
    assert settings.tasks == NAMES


@pytest.mark.parametrize("written", ["null", "~", "", "[a]", "{a: 1}"])
def test_a_run_without_a_name_is_refused_with_the_way_to_quote_it(config, tmp_path, written):
    file = tmp_path / "c.yaml"
    config([f"run_root_dir={tmp_path / 'runs'}"]).save(file)
    file.write_text(file.read_text().replace("run_id: run\n", f"run_id: {written}\n"))
    with pytest.raises(ConfigError, match="run_id"):
        set_up(load_config(file))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["notes.author", "evaluation.tasks", "trainer.weight_decay", "run_id"])
def test_a_reference_to_nothing_is_refused_before_a_folder_is_made(config, tmp_path, key):
    with pytest.raises(ConfigError, match="nowhere"):
        set_up(config([f"+{key}=${{nowhere}}" if key == "notes.author" else f"{key}=${{nowhere}}"]))
    assert list(tmp_path.iterdir()) == []
