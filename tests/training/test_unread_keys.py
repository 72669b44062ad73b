"""A key that nothing reads is never silent: refused, listed, or added for the user's own code."""

import re
from pathlib import Path

import pytest
import yaml

from vla_bench.config import ConfigError, load_config
from vla_bench.data.conversations import ConversationSettings
from vla_bench.evaluation.rollout import EvaluationSettings
from vla_bench.training.imitation import train
from vla_bench.training.run import set_up

SHIPPED = sorted((Path(__file__).parents[2] / "experiments/configs").glob("*.yaml"))
CONFIGS = [
    path for path in SHIPPED if path.stem != "rl"
]  # that one adapts a run, which brings its framework and data


@pytest.fixture
def file(config, tmp_path):
    """`file({"trainer.max_train_step": 3}, overrides)`: a configuration with these keys in its file."""

    def written(keys: dict, overrides="", framework="OFT"):
        config([f"run_root_dir={tmp_path / 'runs'}"], framework).save(tmp_path / "c.yaml")
        tree = yaml.safe_load((tmp_path / "c.yaml").read_text())
        for key, value in keys.items():
            *parents, name = key.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            section[name] = value
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        return load_config(tmp_path / "c.yaml", overrides)

    return written


MISSPELT = [
    ("trainer.max_train_step", 3, "trainer.max_train_steps"),
    ("trainer.gradient_cliping", 0.5, "trainer.gradient_clipping"),
    ("trainer.Warmup_steps", 1, "trainer.warmup_steps"),
    ("trainer.lerning_rate.base", 1e-3, "trainer.learning_rate"),
    ("datasets.vla_data.camera", ["front"], "datasets.vla_data.cameras"),
    ("datasets.vla_data.normalisation", {"action": "q99"}, "datasets.vla_data.normalization"),
    ("datasets.vla_dta.held_out", 0.2, "datasets.vla_data"),
    ("datasets.vla_data.normalization", {"actions": "q99"}, "action"),
    ("trainner.max_train_steps", 3, "trainer.max_train_steps"),
    ("dataset.vla_data.held_out", 0.3, "datasets.vla_data.held_out"),
    ("evaluaton.episodes", 3, "evaluation.episodes"),
    ("evaluation.episode", 3, "evaluation.episodes"),
    ("evaluation.num_env", 3, "evaluation.num_envs"),
    ("framework.action_horizn", 4, "action_horizon"),
    ("framework.action_model.hiden_size", 4, "hidden_size"),
    ("framework.vlm.atn_implementation", "sdpa", "attn_implementation"),
    ("sed", 3, "seed"),
    ("sede", 3, "seed"),
    ("run_ids", "mine", "run_id"),
    ("run_rot_dir", "mine", "run_root_dir"),
]


@pytest.mark.parametrize("key, value, meant", MISSPELT)
def test_a_misspelt_key_of_a_file_is_refused_with_the_key_that_was_meant(file, tmp_path, key, value, meant):
    with pytest.raises(ValueError) as error:
        train(file({key: value}))
    assert f"did you mean '{meant}" in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key, value, meant", [case for case in MISSPELT if not isinstance(case[1], dict)])
def test_a_misspelt_key_of_the_command_line_is_refused_in_the_same_way(file, tmp_path, key, value, meant):
    with pytest.raises(ValueError, match=meant.rpartition(".")[2]):
        train(file({}, [f"{key}={value}"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["dropout_schedule", "lora", "x"])
@pytest.mark.parametrize("section", ["trainer", "datasets.vla_data", "datasets", "evaluation"])
def test_a_section_of_a_dataclass_takes_no_other_name(file, section, name):
    with pytest.raises(
        ConfigError, match=f"nothing reads '{section}.{name}'.*\\+key=value.*`extra:`"
    ) as error:
        set_up(file({f"{section}.{name}": 1}))
    assert "did you mean" not in str(error.value)


def test_any_other_unread_key_is_listed_once(file, capsys):
    set_up(file({"notes.author": "me", "color": "blue"}))
    assert (
        capsys.readouterr().err.count("nothing reads these keys of the configuration: color, notes.author")
        == 1
    )


def test_nothing_is_listed_for_a_file_that_is_read_as_a_whole(file, capsys):
    set_up(file({"evaluation.episodes": 2}))
    assert "nothing reads" not in capsys.readouterr().err


@pytest.mark.parametrize("way", ["file", "command line"])
@pytest.mark.parametrize("key, meant", [("wandb_projct", "wandb_project"), ("wandb_entty", "wandb_entity")])
def test_a_misspelt_key_at_the_top_is_refused(file, tmp_path, key, meant, way):
    with pytest.raises(ConfigError, match=f"nothing reads '{key}'; did you mean '{meant}'"):
        train(file({key: "mine"}) if way == "file" else file({}, [f"{key}=mine"]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["trainer.loss_scale", "datasets.vlm_data", "wandb_project"])
def test_a_feature_that_is_not_asked_for_is_no_fault(file, key, capsys):
    assert set_up(file({key: None})).step == 0
    assert "nothing reads" not in capsys.readouterr().err


@pytest.mark.parametrize("way", ["file", "command line"])
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("datasets.vlm_data", {"dataset_use": "a"}, "python -m vla_bench.training.cotrain"),
        ("trainer.loss_scale", {"vla": 1.0, "vlm": 0.1}, "trainer.loss_scale.vlm is the weight of no source"),
        ("trainer.loss_scale", {"vla": -1.0}, "trainer.loss_scale.vla must be a finite number, not below 0"),
        ("trainer.loss_scale", {"vla": 0.0}, "trainer.loss_scale is 0 for every source"),
        ("trainer.loss_scale", 0.1, "trainer.loss_scale must be a section such as"),
        ("framework.knowledge_insulation", "maybe", "framework.knowledge_insulation takes true or false"),
    ],
)
def test_imitation_says_what_only_co_training_reads(file, tmp_path, key, value, message, way):
    spelt = f"{key}={value}".replace("'", "")
    with pytest.raises(ValueError, match=re.escape(message)):
        train(file({key: value}) if way == "file" else file({}, [spelt]))
    assert not (tmp_path / "runs").exists()


ADDED = [
    "framework.action_model.new_module",
    "trainer.ema",
    "datasets.vla_data.cut",
    "evaluation.mine",
    "a.b",
]


@pytest.mark.parametrize("key", ADDED)
def test_a_key_that_is_added_lands_in_the_snapshot_and_is_resumed_with(file, key):
    cfg = file({}, [f"+{key}=7"])
    run = set_up(cfg)
    assert cfg.get(key) == 7
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    for part in key.split("."):
        saved = saved[part]
    assert saved == 7
    again = load_config(run.folder, "--trainer.resume true")
    assert set_up(again).step == 0 and again.get(key) == 7


def test_the_section_extra_lands_in_the_snapshot_and_may_be_overridden(file, capsys):
    cfg = file({"extra.mine.depth": 3, "extra.sed": 1}, ["extra.mine.depth=4", "+extra.other=5"])
    run = set_up(cfg)
    assert cfg.extra.to_dict() == {"mine": {"depth": 4}, "sed": 1, "other": 5}
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["extra"] == cfg.extra.to_dict()
    assert "nothing reads" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["extra.depht", "extra.mine.dept"])
def test_a_key_that_extra_does_not_have_is_not_added_by_an_override(file, key):
    with pytest.raises(ConfigError, match=f"nothing reads '{key}'"):
        set_up(file({"extra.mine.depth": 3}, [f"{key}=4"]))


@pytest.mark.parametrize(
    "key", ["seed", "trainer.max_train_steps", "trainer.gradient_clipping", "datasets.vla_data.horizon"]
)
def test_a_key_of_ours_cannot_be_added(file, key):
    with pytest.raises(ConfigError, match="write it without \\+"):
        set_up(file({}, [f"+{key}=5"]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("framework", ["QwenOFT", "GR00T", "PI05", "FAST"])
def test_the_shipped_configurations_have_no_unread_key(path, framework):
    from vla_bench.training.run import DataSettings, TrainerSettings

    cfg = load_config(path, f"--framework.framework_py {framework}")
    cfg.require_sections()
    cfg.trainer.into(TrainerSettings), cfg.framework.to_dict()
    if "vla_data" in cfg.datasets:  # not where a backbone learns alone
        cfg.datasets.vla_data.into(DataSettings)
    if "evaluation" in cfg:
        cfg.evaluation.into(EvaluationSettings)
    if "vlm_data" in cfg.datasets:
        cfg.datasets.vlm_data.into(ConversationSettings)
    assert [cfg.get(key) is None for key in ("seed", "run_id", "run_root_dir")] == [False] * 3
    cfg.require_read()
    assert cfg.unread() == []


def test_a_head_that_is_not_trained_is_not_unread(file, capsys):
    heads = {"heads.OFT": {"type": "MLP", "hidden_size": 32}, "heads.PI": {"type": "LayerwiseFlowMatching"}}
    set_up(file({**heads, "framework.action_model": "${heads.${framework.name}}"}))
    assert "nothing reads" not in capsys.readouterr().err
