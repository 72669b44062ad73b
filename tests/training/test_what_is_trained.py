"""What is trained is said before it starts, and every loss that a head returns is logged."""

import io
import math
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.registry import HEADS
from vla_bench.training.imitation import other_losses, train
from vla_bench.training.loop import read_metrics
from vla_bench.training.optim import parts_text
from vla_bench.training.run import set_up


def row(run, start: str) -> dict:
    (found,) = [each for each in run.parts if each["part"].startswith(start)]
    return found


@pytest.mark.parametrize("framework", ["OFT", "GR00T", "OpenVLA"])
def test_every_parameter_is_counted_once(config, framework):
    run = set_up(config("", framework))
    total = sum(p.numel() for p in run.framework.parameters())
    assert sum(each["parameters"] for each in run.parts[:-1]) == total == run.parts[-1]["parameters"]
    held = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert run.parts[-1]["trained"] == held and run.parts[-1]["frozen"] == total - held


def test_the_parts_are_those_of_the_model(config):
    run = set_up(config("", "GR00T"))
    head = sum(p.numel() for p in run.framework.action_model.parameters())
    assert row(run, "action_model: FlowMatchingHead") == {
        "part": "action_model: FlowMatchingHead",
        "parameters": head,
        "trained": head,
        "frozen": 0,
        "learning_rate": "0.001",
    }
    vision = sum(p.numel() for p in run.framework.component("vision_backbone"))
    assert row(run, "vlm: vision encoder")["parameters"] == vision
    assert {each["part"] for each in run.parts} >= {"vlm: projector", "vlm: language model", "all"}


def test_a_composed_backbone_has_its_three_parts(config, tmp_path):
    sizes = {"image_size": 32, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32}
    write_tiny_composed("prismatic", tmp_path / "prismatic", **sizes, vision_layers=2)
    rates = "--trainer.learning_rate.vlm.vision_backbone 1e-6 --framework.freeze_projector true"
    run = set_up(config(f"--framework.vlm.base_vlm {tmp_path}/prismatic {rates}"))
    assert row(run, "vlm: vision encoder")["learning_rate"] == "1e-06"
    assert row(run, "vlm: language model")["learning_rate"] == "0.0001"
    assert row(run, "vlm: projector")["trained"] == 0 < row(run, "vlm: projector")["frozen"]


def test_a_part_with_several_rates_shows_them_all_and_what_is_frozen(config):
    rates = "--trainer.learning_rate.action_model.layers.2 5e-3"
    run = set_up(config(f"{rates} --trainer.freeze_modules vlm.model.model.visual"))
    head = row(run, "action_model")
    assert head["learning_rate"] == "0.001, 0.005" and head["frozen"] == 0
    vision = row(run, "vlm: vision encoder")
    assert vision["trained"] == 0 == vision["parameters"] - vision["frozen"] and vision["learning_rate"] == ""


def test_the_table_is_printed_before_the_first_step(config, capsys):
    seen = []
    run = train(config("--trainer.max_train_steps 1 --trainer.warmup_steps 0"))
    said = capsys.readouterr()
    assert said.out == "" and said.err.index("learning_rate") < said.err.index("1/1")
    train(config("--run_id other --trainer.max_train_steps 1 --trainer.warmup_steps 0"), show=seen.append)
    assert parts_text(seen[0].parts) in said.err and seen[0].folder == run.with_name("other")


@pytest.fixture
def several(monkeypatch):
    """Registers, for one test, a head that returns losses beside the one that is trained."""
    monkeypatch.setattr(HEADS, "classes", dict(HEADS.classes))

    @HEADS.register("Several")
    class SeveralHead(MLPHead):
        """The MLP head with two more losses."""

        spoilt = 1.0

        def loss(self, features, actions, is_pad, noise=None, time=None):
            """Losses."""
            found = super().loss(features, actions, is_pad, noise, time)
            first = actions[..., 0][~is_pad].mean()
            return {**found, "first_dim": first, "loss": 2 * first * self.spoilt}

    return SeveralHead


SEVERAL = "--framework.action_model.type Several --trainer.gradient_accumulation_steps 2"
SEVERAL += (
    " framework.action_model.hidden_size=32 framework.action_model.num_queries=2"  # as the MLP of the file
)


def test_every_loss_of_a_head_is_logged_and_shown(config, several):
    with redirect_stderr(io.StringIO()) as said:
        run = train(config(SEVERAL))
    rows = [each for each in read_metrics(run / "metrics.jsonl") if "loss" in each]
    assert len(rows) == 6 and all(each["loss/loss"] == pytest.approx(2 * each["first_dim"]) for each in rows)
    probe = set_up(config(f"{SEVERAL} --run_id probe"))
    keys = probe.sampler().batch(0) + probe.sampler().batch(1)
    samples = [probe.view[key] for key in keys]
    first = [a for s in samples for a in s["action"][~s["action_is_pad"]][:, 0]]
    assert rows[0]["first_dim"] == pytest.approx(sum(first) / len(first), rel=1e-5)
    assert f"first_dim={rows[-1]['first_dim']:.4f}" in said.getvalue()


def test_other_losses_train_nothing(config, several, losses):
    assert losses(train(config(SEVERAL))) == losses(
        train(config("--run_id plain --trainer.gradient_accumulation_steps 2"))
    )


def test_another_loss_that_is_not_finite_stops_the_run(config, several, monkeypatch):
    monkeypatch.setattr(several, "spoilt", math.inf)
    with pytest.raises(FloatingPointError, match="step 1: the loss is -?inf"):
        train(config(SEVERAL))


@pytest.mark.parametrize("given", ["trainer.learning_rate=0.002", "--trainer.learning_rate 0.002"])
def test_one_rate_may_stand_for_the_mapping(config, given):
    run = set_up(config(given))
    assert {group["initial_lr"] for group in run.optimizer.param_groups} == {0.002}
    assert {group["name"] for group in run.optimizer.param_groups} == {"base", "base/no_decay"}
    assert load_config(run.folder).trainer.learning_rate == 0.002


def test_a_mapping_may_stand_for_one_rate(config, home):
    one = config("trainer.learning_rate=0.002").to_dict()
    run = set_up(load_config(one, ["trainer.learning_rate={base: 0.1, vlm: 0.01}"]))
    assert {group["initial_lr"] for group in run.optimizer.param_groups} == {0.1, 0.01}


@pytest.mark.parametrize("value", ["fast", "true", "[1e-3]"])
def test_what_is_no_rate_is_refused(config, value):
    with pytest.raises(ConfigError, match="trainer.learning_rate"):
        set_up(config(f"trainer.learning_rate={value}"))


def test_a_loss_of_the_model_in_half_precision_is_logged_in_full(config, losses):
    run = train(config("--trainer.mixed_precision bf16 --trainer.max_train_steps 1 --trainer.warmup_steps 0"))
    ((_, loss, _),) = losses(run)
    assert torch.tensor(loss).bfloat16().item() != loss


def test_a_loss_is_logged_wherever_its_name_stands_in_the_alphabet():
    losses = {"a_first": 2.0, "action_loss": 1.0, "loss": 4.0, "text_loss": 3.0}
    sources = {"vla": SimpleNamespace(loss="action_loss")}
    found = other_losses(SimpleNamespace(losses=losses, sources=sources))
    assert found == {"a_first": 2.0, "loss/loss": 4.0, "text_loss": 3.0}
    both = sources | {"vlm": SimpleNamespace(loss="text_loss")}
    assert other_losses(SimpleNamespace(losses=losses, sources=both)) == found | {"action_loss": 1.0}


SEEDS = (
    '--trainer.freeze_modules "qwen_vl_interface.model.model.visual,dino_encoder" --trainer.learning_rate.base 1e-05 '
    "--trainer.learning_rate.qwen_vl_interface 2.0e-05 --trainer.learning_rate.action_model 1.0e-04 "
    "--trainer.max_train_steps 2 --trainer.warmup_steps 0"
)


def test_starvlas_command_freezes_and_trains_what_it_names(config, capsys):
    before = set_up(config(f"{SEEDS} --run_id before"))
    assert {g["name"]: g["initial_lr"] for g in before.optimizer.param_groups if "/" not in g["name"]} == {
        "base": 1e-5, "vlm": 2e-5, "action_model": 1e-4
    }  # fmt: skip
    weights = {name: value.clone() for name, value in before.framework.state_dict().items()}
    after = Framework.from_pretrained(train(config(SEEDS))).state_dict()
    same = {name for name in weights if torch.equal(weights[name], after[name])}
    visual = {name for name in weights if name.startswith("vlm.model.model.visual.")}
    assert visual <= same and any(
        name.startswith("vlm.model.model.language_model.") for name in weights.keys() - same
    )
    assert "this framework has no dino_encoder, so the name stands for nothing\n" in capsys.readouterr().err


def test_a_frozen_backbone_is_the_same_bit_for_bit_after_training(config):
    options = "--trainer.freeze_modules vlm --trainer.weight_decay 0.3 --trainer.max_train_steps 3"
    before = set_up(config(f"{options} --run_id before", "GR00T")).framework.vlm.state_dict()
    after = Framework.from_pretrained(train(config(options, "GR00T"))).vlm.state_dict()
    assert len(before) > 20 and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("pattern", ["vlm.*.layers.[0-3].*", r"re:vlm\..*layers\.\d+\..*"])
def test_a_pattern_freezes_the_layers_that_it_fits(config, pattern):
    framework = set_up(config([f"trainer.freeze_modules={pattern}"])).framework
    frozen = {name for name, p in framework.named_parameters() if not p.requires_grad}
    assert (
        frozen
        >= {n for n, _ in framework.named_parameters() if ".layers.0." in n and n.startswith("vlm.")}
        > set()
    )
    assert all(".layers.0." in name for name in frozen)


def test_dino_encoders_are_frozen_wherever_they_stand(config, tmp_path):
    sizes = {"image_size": 32, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32}
    write_tiny_composed("dinosiglip", tmp_path / "pair", **sizes, vision_layers=2)
    run = set_up(config(f"--framework.vlm.base_vlm {tmp_path}/pair --trainer.freeze_modules dino_encoder"))
    parameters = dict(run.framework.vlm.model.model.named_parameters())
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    assert frozen == {name for name in parameters if ".dinov2." in name} > set()
