"""LoRA and its relatives: what is trained, what a checkpoint remembers, and what is left after merging."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.frameworks.adapters import KINDS, add_adapters
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.describe import made_up_sample
from vla_bench.models.frameworks.framework import Framework
from vla_bench.serving.policy import Policy
from vla_bench.training.adapters import main, merge_run
from vla_bench.training.checkpoint import list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.run import set_up

LORA = [
    "trainer.peft={type: LORA, r: 4, lora_alpha: 8}",
    "trainer.weight_decay=0.3",
    "trainer.warmup_steps=0",
]
LORA += ["datasets.vla_data.normalization.state=min_max"]  # as π0.5 needs it
FRAMEWORKS = ["OFT", "GR00T", "OpenVLA", "PI05"]
SIZES = {"image_size": 32, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32, "vision_layers": 2}


def plain(weights: dict) -> dict:
    """Weights without adapters, under the names that they have without."""
    return {name.replace(".base_layer.", "."): w for name, w in weights.items() if "lora_" not in name}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_only_adapters_and_what_stands_beside_the_backbone_are_trained(config, framework):
    before = plain(set_up(config(["run_id=before", *LORA[1:]], framework)).framework.state_dict())
    loaded = Framework.from_pretrained(train(config(LORA, framework)))
    after = plain(loaded.state_dict())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in moved if name.startswith("vlm.")}
    own = {name for name, _ in loaded.action_model.named_parameters()}
    assert bool(moved) == bool(own), "the head is trained whole"
    adapters = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert all(p.requires_grad for p in adapters.values()) and len(adapters) > 10
    assert all(p.abs().max() > 0 for name, p in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_merged_weights_predict_the_same(config, tmp_path, observation, framework, capsys):
    run = train(config(LORA, framework))
    main(["merge", str(run), str(tmp_path / "merged")])
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"
    first, second = (
        Policy.from_pretrained(each).predict(observation(), seed=3) for each in (run, tmp_path / "merged")
    )
    assert abs(first - second).max() < 1e-5
    names = load_file(list_checkpoints(tmp_path / "merged")[-1] / "model.safetensors").keys()
    assert not [name for name in names if "lora_" in name or "base_layer" in name]


def backbone(kind: str, folder) -> str:
    """A tiny backbone of a kind."""
    write = write_tiny_composed if kind in ("prismatic", "dinosiglip") else write_tiny
    write(kind, folder / kind, corpus=["open the drawer"], reserved_tokens=300, **SIZES)
    return str(folder / kind)


def adapted(vlm: str, peft: dict) -> Framework:
    """A framework whose adapters say something."""
    torch.manual_seed(0)
    section = {
        "name": "OFT",
        "vlm": {"base_vlm": vlm},
        "action_horizon": 2,
        "action_model": {"type": "MLP", "hidden_size": 16},
    }
    framework = build_framework(section, action_dim=3, state_dim=0)
    add_adapters(framework, peft)
    for p in framework.vlm.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    return framework.eval()


KINDS_AND_ARGUMENTS = {
    "LORA": {"r": 2}, "LOHA": {"r": 2}, "LOKR": {"r": 2}, "OFT": {"r": 0, "oft_block_size": 4}, "IA3": {"feedforward_modules": []}
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*")
def test_every_kind_survives_a_checkpoint_and_merges(tmp_path, kind):
    framework = adapted(backbone("qwen2_5_vl", tmp_path), {"type": kind, **KINDS_AND_ARGUMENTS[kind]})
    sample = [made_up_sample(framework, 32)]
    before = framework.predict_action(sample)["normalized_actions"]
    framework.save_pretrained(tmp_path / "saved")
    again = Framework.from_pretrained(tmp_path / "saved")
    assert abs(again.predict_action(sample)["normalized_actions"] - before).max() < 1e-6
    again.merge_adapters()
    assert abs(again.predict_action(sample)["normalized_actions"] - before).max() < 1e-5
    for name, p in framework.named_parameters():
        if "base_layer" not in name and p.requires_grad and name.startswith("vlm."):
            p.data.zero_()
    assert abs(framework.predict_action(sample)["normalized_actions"] - before).max() > 1e-4


@pytest.mark.parametrize("kind", ["paligemma", "smolvlm", "internvl", "prismatic"])
def test_every_adapter_of_a_backbone_is_read_and_merges(tmp_path, kind):
    framework = adapted(backbone(kind, tmp_path), {"type": "LORA", "r": 2, "lora_alpha": 8})
    sample = [made_up_sample(framework, 32)]
    before = framework.predict_action(sample)["normalized_actions"]
    framework(sample)["action_loss"].backward()
    silent = [
        n for n, p in framework.named_parameters() if "lora_" in n and (p.grad is None or not p.grad.any())
    ]
    assert not silent
    framework.merge_adapters()
    assert abs(framework.predict_action(sample)["normalized_actions"] - before).max() < 1e-5


@pytest.mark.parametrize("framework", ["OFT", "GR00T"])
def test_a_run_with_adapters_continues_bit_for_bit(config, losses, framework):
    run = train(config([*LORA, "trainer.ema_decay=0.9"], framework))
    first, last = list_checkpoints(run)
    names = ("model.safetensors", "trainer/weights.safetensors")
    whole, seen = [load_file(last / name) for name in names], losses(run)
    shutil.rmtree(last)
    train(load_config(run, "--trainer.resume true"))
    assert losses(run) == seen
    for before, name in zip(whole, names):
        after = load_file(last / name)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not [name for name in whole[1] if name.startswith("vlm.") and "lora_" not in name]


def test_rates_by_path_reach_the_adapters(config):
    run = set_up(config([*LORA, "trainer.learning_rate.vlm.model.model.visual=5e-5"]))
    rates = {id(p): g["initial_lr"] for g in run.optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in run.framework.named_parameters() if "lora_" in name}
    assert set(found.values()) == {1e-4, 5e-5}
    assert {rate for name, rate in found.items() if name.startswith("vlm.model.model.visual.")} == {5e-5}


def test_what_is_frozen_gets_no_adapters(config):
    run = set_up(config([*LORA, "trainer.freeze_modules=vlm.model.model.visual"]))
    adapters = [name for name, _ in run.framework.named_parameters() if "lora_" in name]
    assert adapters and not [name for name in adapters if ".visual." in name]


def test_one_part_of_the_backbone_gets_them_and_the_other_is_trained_whole(config):
    peft = "{type: LORA, r: 2, modules: vlm.model.model.language_model, target_modules: [q_proj]}"
    framework = set_up(config([f"trainer.peft={peft}"])).framework
    trained = {
        name for name, p in framework.named_parameters() if p.requires_grad and name.startswith("vlm.")
    }
    language = {name for name in trained if ".language_model." in name}
    assert language and all("q_proj.lora_" in name for name in language)
    assert {
        n for n, _ in framework.named_parameters() if n.startswith("vlm.model.model.visual.")
    } == trained - language


@pytest.mark.parametrize(
    "peft, message",
    [
        ("{type: lora}", "trainer.peft.type: unknown adapter 'lora'; did you mean 'LORA'"),
        ("{type: LORA, lora_alpa: 8}", "did you mean 'lora_alpha'"),
        ("{r: 8}", "trainer.peft is a section such as"),
        ("{type: LORA, r: 0}", "trainer.peft: `r` should be a positive integer"),
        ("{type: LORA, target_modules: [qproj]}", r"\['qproj'\] is no layer of vlm.model that is trained"),
        (
            "{type: LORA, modules: vlm.modl}",
            "trainer.peft.modules: the framework has no 'vlm.modl'; did you mean",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(config, tmp_path, peft, message):
    with pytest.raises(ConfigError, match=message):
        train(config([f"trainer.peft={peft}"]))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_adapters_has_nothing_to_merge(config, tmp_path):
    run = train(config("--trainer.max_train_steps 1 --trainer.warmup_steps 0"))
    with pytest.raises(ValueError, match="this framework has no adapters to merge"):
        merge_run(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
