"""From a configuration to a framework: what is read, what is refused before a backbone is loaded, what is assembled."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vla_bench.models.frameworks import build as build_module
from vla_bench.models.frameworks.build import assemble, build_framework, check_fit, parse_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.head import ActionHead
from vla_bench.registry import HEADS

OFT, GR00T = ("qwen2_5_vl", "OFT"), ("qwen2_5_vl", "GR00T")

# --- step 1: what is written ----------------------------------------------------------------------------------------


def test_a_parsed_configuration_cannot_be_changed(toy):
    config = parse_framework(toy.configuration(OFT))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "GR00T"


def test_aliases_become_names(toy):
    assert parse_framework(toy.configuration(OFT) | {"name": "Qwen-OFT"}).name == "OFT"


def test_the_default_head_needs_no_section(toy):
    config = toy.configuration(OFT) | {"action_model": None}
    assert parse_framework(config).action_model == {"type": "MLP"}


def test_what_is_written_is_stronger_than_a_frameworks_defaults(toy):
    section = toy.configuration(GR00T) | {"name": "PI05"}
    defaults = parse_framework(section | {"action_model": {}}).action_model
    written = parse_framework(section | {"action_model": {"adaptive_norm": False}}).action_model
    assert (defaults["adaptive_norm"], written["adaptive_norm"]) == (True, False)


def test_keys_of_one_framework_are_its_own_arguments(toy):
    section = toy.configuration(OFT) | {"query_token": "🔍", "prompt": "go {lang}"}
    config = parse_framework(section)
    assert (config.own, config.prompt) == ({"query_token": "🔍"}, "go {lang}")


# --- step 2: what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def no_backbone(monkeypatch):
    """Fails when a backbone is loaded."""

    def refuse(*path, **options):
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr(build_module, "load_vlm", refuse)


REFUSED = {
    "framework": ({"name": "GROOT"}, "did you mean 'GR00T'"),
    "key": ({"acton_model": {}}, "did you mean 'action_model'"),
    "head": ({"action_model": {"type": "MPL"}}, "did you mean 'MLP'"),
    "argument of the head": (
        {"action_model": {"type": "MLP", "num_querys": 2}},
        "did you mean 'num_queries'",
    ),
    "head of another framework": (
        {"action_model": {"type": "FlowMatching"}},
        "framework.name to one of .*GR00T.*action_model.type to 'MLP'",
    ),
    "framework of another head": (
        {"name": "GR00T"},
        "framework.name to one of .*OFT.*action_model.type to 'FlowMatching'",
    ),
    "backbone's key": ({"vlm": {"base_vllm": "x"}}, "did you mean 'base_vlm'"),
    "two backbones": ({"vlm": {"base_vlm": "x", "projector": {"type": "MLP"}}}, "remove one or the other"),
    "a third of a backbone": (
        {"vlm": {"projector": {"type": "MLP"}}},
        "vision_backbone, llm_backbone are missing",
    ),
    "prompt": ({"prompt": "{lnag}"}, "did you mean 'lang'"),
    "robots": ({"embodiments": ["a", "b"]}, "MLPHead has no encoders of its own"),
    "number of robots": (
        {"action_model": {"type": "MLP", "num_embodiments": 3}},
        "num_embodiments is 3, framework.embodiments names 1 robots",
    ),
    "action width": ({"max_action_dim": 2}, "framework.max_action_dim is 2"),
    "state width": ({"max_state_dim": 1}, "framework.max_state_dim is 1"),
    "shared key": ({"frezee_projector": True}, "did you mean 'freeze_projector'"),
    "vlm as text": ({"vlm": "Qwen/Qwen2.5-VL-3B-Instruct"}, "framework.vlm is a section"),
    "head as text": ({"action_model": "MLP"}, "framework.action_model is a section"),
    "true as text": (
        {"freeze_vlm_backbone": "false"},
        "freeze_vlm_backbone takes true or false, got 'false'",
    ),
    "number as text": ({"max_action_dim": "32"}, "max_action_dim takes a whole number"),
    "list as text": ({"embodiments": "bridge"}, "embodiments takes a list"),
    "a robot twice": ({"embodiments": ["a", "a"]}, "names one twice"),
    "mapping of nothing": (
        {"name_mapping": {"vlm": "model"}},
        "needs framework.pretrained_name_or_path",
    ),
    "no horizon": ({"action_horizon": None}, "framework.action_horizon"),
    "half a horizon": ({"action_horizon": 2.5}, "framework.action_horizon"),
    "horizon of zero": ({"action_horizon": 0}, "framework.action_horizon"),
    "horizon in the head": (
        {"action_model": {"type": "MLP", "horizon": 4}},
        "'horizon' is set from framework.action_horizon",
    ),
    "argument of the constructor": ({"prepare": 1}, "takes no argument 'prepare'"),
    "part of the inference model": ({"inference_model": {"acton_model": {}}}, "did you mean 'action_model'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_configuration_is_refused_before_the_backbone_is_loaded(toy, no_backbone, what):
    change, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):  # a RegistryError is one
        build_framework(toy.configuration(OFT) | change, **toy.sizes)


@pytest.mark.parametrize(
    ("loading", "message"),
    [
        ({"atn_implementation": "sdpa"}, "did you mean 'attn_implementation'"),
        ({"dtype": "bf16"}, "framework.vlm.dtype is 'bf16'"),
        ({"hidden_states": "raw"}, "final or residual"),
    ],
    ids=["key", "dtype", "hidden states"],
)
def test_a_wrong_way_to_load_the_backbone_is_refused_before_it_is_loaded(toy, no_backbone, loading, message):
    config = toy.configuration(OFT)
    with pytest.raises(ValueError, match=message):
        build_framework(config | {"vlm": config["vlm"] | loading}, **toy.sizes)


@pytest.mark.parametrize("name", ["PI0", "PI05"])
def test_a_head_of_the_other_pi_is_refused_before_the_backbone_is_loaded(toy, no_backbone, name):
    head = {"type": "ActionExpert", "adaptive_norm": name == "PI0"}
    config = toy.configuration(OFT) | {"name": name, "action_model": head}
    with pytest.raises(ValueError, match=f"framework.name is {'PI05' if name == 'PI0' else 'PI0'}"):
        build_framework(config, **toy.sizes)


def test_a_head_is_refused_by_its_own_rules(toy):
    with pytest.raises(ValueError, match="must divide the horizon 4"):
        toy.build(OFT, num_queries=3)


def test_a_prompt_with_a_state_needs_a_dataset_with_one(toy, no_backbone):
    config = toy.configuration(OFT) | {"prompt": "{lang} {state}"}
    with pytest.raises(ValueError, match="the dataset has none"):
        build_framework(config, action_dim=toy.D, state_dim=0)


@pytest.mark.parametrize(
    ("inference", "message"),
    [
        ({"action_model": {"type": "FlowMatchingInferense"}}, "did you mean 'FlowMatchingInference'"),
        ({"acton_model": {}}, "framework.inference_model.*did you mean 'action_model'"),
        ({"action_model": {"type": "MLP"}}, "GR00T provides 'last'"),
        ({"action_model": {"hidden_size": 64}}, "must have the weights of the head that is trained"),
        ({"action_model": {"type": "Transformer", "dropout": 0.0}}, "Transformer.* takes no argument"),
        ({"action_model": None}, "is a section of what differs"),
        ({"vlm": {"dtype": "bfloat"}}, "inference_model.vlm.dtype.*did you mean 'bfloat16'"),
        ({"vlm": {"attn_implementation": "flash_attention"}}, "did you mean 'flash_attention_"),
    ],
    ids=["type", "part", "reads", "shapes", "other head", "empty", "dtype", "attention"],
)
def test_a_wrong_inference_model_is_refused_before_training(toy, inference, message):
    with pytest.raises(ValueError, match=message):
        toy.fresh(GR00T, changes={"inference_model": inference})


# --- step 3: what is assembled --------------------------------------------------------------------------------------


def test_the_three_steps_are_what_build_framework_does(toy):
    config = parse_framework(toy.configuration(GR00T))
    check_fit(config, **toy.sizes)
    torch.manual_seed(0)
    stepwise, at_once = assemble(config, **toy.sizes), toy.fresh(GR00T)
    assert stepwise.config == at_once.config
    assert all(torch.equal(a, b) for a, b in zip(stepwise.parameters(), at_once.parameters(), strict=True))


def test_arguments_of_the_head_are_checked_once(toy, monkeypatch):
    checked, check = [], build_module.check_arguments
    count = lambda what, *given, **more: checked.append(what) or check(what, *given, **more)
    monkeypatch.setattr(build_module, "check_arguments", count)
    monkeypatch.setattr("vla_bench.registry.check_arguments", count)
    toy.fresh(OFT)
    assert [what for what in checked if "MLP" in what] == ["framework.action_model 'MLP'"]


def test_preparation_is_made_once(toy, monkeypatch):
    made, prepare = [], build_module.Prepare
    monkeypatch.setattr(build_module, "Prepare", lambda *a, **k: made.append(prepare(*a, **k)) or made[-1])
    assert toy.fresh(OFT).prepare is made[0] and len(made) == 1


def test_a_checkpoint_keeps_the_section_as_it_was_written(toy):
    written = toy.configuration(OFT) | {"name": "QwenOFT", "strict_mapping": True, "prompt": None}
    kept = build_framework(written, **toy.sizes).config
    assert kept == written | {"name": "OFT", **toy.sizes}
    assert json.loads(json.dumps(kept)) == kept


def test_frozen_components_do_not_train(toy):
    frozen = {"freeze_vision_backbone": True, "freeze_vla_head": True}
    model = toy.fresh(GR00T, changes=frozen)
    assert any(p.requires_grad for p in model.component("llm_backbone"))
    assert not any(p.requires_grad for p in model.component("vision_backbone"))
    assert not any(p.requires_grad for p in model.action_model.parameters())


@pytest.fixture
def foreign(toy, tmp_path):
    """A model, and the configuration that loads its weights under other names."""
    source = toy.fresh(GR00T)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    names = {"vlm.model": "backbone.net", "action_model": "head"}
    theirs = {}
    for name, weight in source.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix + "."))
        theirs[names[ours] + name.removeprefix(ours)] = weight.clone()
    save_file(theirs, tmp_path / "model.safetensors")
    return source, {"pretrained_name_or_path": str(tmp_path), "name_mapping": names}


def test_weights_of_others_are_loaded_by_prefix(toy, foreign, capsys):
    source, loading = foreign
    model = toy.fresh(GR00T, changes=loading)
    np.testing.assert_array_equal(toy.predict(model, toy.examples), toy.predict(source, toy.examples))
    assert "loaded" in capsys.readouterr().out


def test_weights_of_others_can_be_frozen(toy, foreign):
    model = toy.fresh(GR00T, changes=foreign[1] | {"freeze_vla_head": True})
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"action_model"}


def test_a_prefix_that_weights_of_others_lack_is_named(toy, foreign):
    with pytest.raises(ValueError, match="head"):
        toy.fresh(GR00T, changes=foreign[1] | {"name_mapping": {"action_model": "heda"}})


# --- a model wider than the robot -----------------------------------------------------------------------------------


@pytest.fixture
def wide(toy):
    """A model with four more action dimensions and three more state dimensions than the robot."""
    widths = {"max_action_dim": toy.D + 4, "max_state_dim": toy.S + 3}
    return toy.fresh(("paligemma", "GR00T"), changes=widths)


def test_the_head_has_the_models_width(toy, wide):
    assert (wide.action_model.action_dim, wide.action_model.state_dim) == (toy.D + 4, toy.S + 3)


def test_actions_are_padded_to_the_models_width(toy, wide):
    assert wide.prepare(toy.examples)["actions"].shape == (3, toy.T, toy.D + 4)


def test_numbers_that_no_robot_sent_stay_out_of_the_loss(toy, wide):
    batch, rows = wide.prepare(toy.examples), 3 * wide.action_model.repeats
    given = {"noise": torch.randn(rows, toy.T, toy.D + 4), "time": torch.full((rows,), 0.0)}
    before = wide(batch, **given)["action_loss"]
    batch["actions"][..., toy.D :] = 9.0
    torch.testing.assert_close(wide(batch, **given)["action_loss"], before)


def test_predictions_have_the_robots_width(toy, wide):
    noise = torch.randn(3, toy.T, toy.D + 4)
    predicted = wide.predict_action(toy.examples, noise=noise)["normalized_actions"]
    assert predicted.shape == (3, toy.T, toy.D)


# --- several robots -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_robots(toy):
    """A model of two robots, and the samples as each of them sends them."""
    known = ["bridge", "libero"]
    model = toy.fresh(GR00T, changes={"embodiments": known})
    return model, *([e | {"dataset": name} for e in toy.examples] for name in known)


def test_robots_have_encoders_of_their_own(toy, two_robots):
    model, first, second = two_robots
    assert np.abs(toy.predict(model, first) - toy.predict(model, second)).max() > 1e-3


def test_robots_can_be_mixed_in_a_batch(toy, two_robots):
    model, first, second = two_robots
    mixed = toy.predict(model, [first[0], second[1], first[2]])
    np.testing.assert_allclose(mixed[1], toy.predict(model, second)[1], atol=1e-5)


# --- modules --------------------------------------------------------------------------------------------------------


def test_building_knows_no_framework_by_its_module():
    assert not {"framework", "gr00t", "pi0"} & {name for name in vars(build_module) if name.islower()}
    assert not any(
        isinstance(value, type) and issubclass(value, Framework) for value in vars(build_module).values()
    )


def test_heads_declare_what_a_framework_asks():
    for name in HEADS.names():
        head = HEADS.get(name)
        assert issubclass(head, ActionHead) and head.reads in ("queries", "last", "layers", "cache", "tokens")
