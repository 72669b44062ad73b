"""What every framework promises, on two backbones each."""

import json
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vla_bench.models.features import Features
from vla_bench.models.frameworks.framework import Framework, evaluating
from vla_bench.models.frameworks.gr00t import GR00T
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.registry import FRAMEWORKS

# --- gradients ------------------------------------------------------------------------------------------------------


def test_every_parameter_is_trainable(toy, pair):
    model = toy.build(pair)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == []  # lm_head is tied


def test_every_trainable_parameter_receives_a_finite_gradient(toy, pair):
    model = toy.build(pair)
    model(toy.examples)["action_loss"].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} >= {"vlm", "action_model"}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert [n for n, p in trained.items() if not p.grad.isfinite().all()] == []


def test_one_batch_can_be_overfitted(toy, pair):
    model = toy.fresh(pair)
    examples = [e | {"action": np.tile(e["action"][:1], (toy.T, 1))} for e in toy.examples]
    batch = model.prepare(examples)
    error = lambda: float(np.abs(toy.predict(model, batch) - batch["actions"].numpy()).mean())
    before = error()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(batch)["action_loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert error() < 0.25 * before, (before, error())


# --- padding --------------------------------------------------------------------------------------------------------


def test_alone_or_in_a_padded_batch_the_same_prediction(toy, pair):
    model = toy.build(pair)
    batch = model.prepare(toy.examples)
    assert (batch["inputs"]["attention_mask"] == 0).any(), "nothing was padded, so nothing would be tested"
    together = toy.predict(model, batch)
    for i, example in enumerate(toy.examples):
        alone = model.predict_action([example], noise=toy.noise[i : i + 1])["normalized_actions"]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_the_padding_side_does_not_matter(toy, pair):
    model = toy.build(pair)
    tokenizer = model.prepare.vlm.processor.tokenizer
    sides = {}
    for tokenizer.padding_side in ("left", "right"):
        batch = model.prepare(toy.examples)
        sides[tokenizer.padding_side] = toy.predict(model, batch), batch["inputs"]["attention_mask"]
    assert not torch.equal(sides["left"][1], sides["right"][1])
    np.testing.assert_allclose(sides["left"][0], sides["right"][0], atol=1e-5)


def test_changing_a_padded_token_changes_nothing(toy, pair):
    model = toy.build(pair)
    batch = model.prepare(toy.examples)
    before, loss = toy.predict(model, batch), toy.loss_at(model, batch, 0.5)
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    other = ids[0][mask[0] == 1][-1]
    assert (ids[mask == 0] != other).all()
    ids[mask == 0] = other
    np.testing.assert_allclose(toy.predict(model, batch), before, atol=1e-6)
    assert toy.loss_at(model, batch, 0.5) == pytest.approx(loss, abs=1e-6)


def test_changing_a_valid_token_changes_the_prediction(toy, pair):
    model = toy.build(pair)
    batch = model.prepare(toy.examples)
    before = toy.predict(model, batch)
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    ids[0, mask[0].nonzero()[-1]] = ids[1][mask[1] == 1][-2]
    assert np.abs(toy.predict(model, batch)[0] - before[0]).max() > 1e-5


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "paligemma"])
def test_a_dropped_attention_mask_would_be_noticed(toy, backbone, monkeypatch):
    model = toy.build((backbone, "GR00T"))
    together = toy.predict(model, toy.examples)
    honest = model.features
    ignored = lambda batch: Features(honest(batch).hidden, torch.ones_like(honest(batch).mask))
    monkeypatch.setattr(model, "features", ignored)
    assert np.abs(toy.predict(model, toy.examples) - together).max() > 1e-4


@pytest.fixture
def padded_actions(toy):
    """The samples, with other numbers where an action is padding."""
    assert toy.examples[1]["action_is_pad"].any()
    far = [np.where(e["action_is_pad"][:, None], 50.0, e["action"]).astype(np.float32) for e in toy.examples]
    return [e | {"action": action} for e, action in zip(toy.examples, far)]


def test_padded_actions_do_not_change_the_loss(toy, pair, padded_actions):
    # At t = 0 the noisy chunk of flow matching is noise alone; later it holds the padded actions as input, as in GR00T.
    model = toy.build(pair)
    batch, other = model.prepare(toy.examples), model.prepare(padded_actions)
    assert not torch.equal(batch["actions"], other["actions"])
    assert toy.loss_at(model, other, 0.0) == pytest.approx(toy.loss_at(model, batch, 0.0), abs=1e-6)


def test_actions_that_are_not_padding_would_change_the_loss(toy, pair, padded_actions):
    model = toy.build(pair)
    counted = [e | {"action_is_pad": np.zeros(toy.T, bool)} for e in padded_actions]
    assert toy.loss_at(model, model.prepare(counted), 0.0) > 10


# --- what is read ---------------------------------------------------------------------------------------------------

CHANGES = {
    "first camera": lambda e: {"image": [Image.new("RGB", (64, 64)), e["image"][1]]},
    "second camera": lambda e: {"image": [e["image"][0], Image.new("RGB", (64, 64))]},
    "order of the cameras": lambda e: {"image": e["image"][::-1]},
    "instruction": lambda e: {"lang": "press the button from the top"},
    "state": lambda e: {"state": e["state"] + 1},
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_input_has_an_effect(toy, pair, what):
    model, example = toy.build(pair), toy.examples[0]
    changed = example | CHANGES[what](example)
    assert np.abs(toy.predict(model, [changed]) - toy.predict(model, [example])).max() > 1e-5


def test_no_vocabulary_logits_are_computed(toy, pair):
    model, calls = toy.build(pair), []
    model.vlm.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    model(toy.examples)["action_loss"].backward()
    toy.predict(model, toy.examples)
    model.attention_maps(toy.examples)
    assert calls == []
    inputs = model.prepare(toy.examples)["inputs"]
    model.vlm.lm_loss(inputs, inputs["input_ids"])
    assert calls == [1]  # the counter counts


def test_a_loss_in_bfloat16_is_computed_in_float32(toy, pair):
    model = toy.build(pair)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(toy.examples)["action_loss"]
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_loss_in_bfloat16_stays_near(toy, pair):
    model = toy.build(pair)
    batch = model.prepare(toy.examples)
    full = toy.loss_at(model, batch, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        half = toy.loss_at(model, batch, 0.3)
    assert half == pytest.approx(full, rel=0.05)


# --- evaluation mode ------------------------------------------------------------------------------------------------


class Counting(nn.Dropout):
    """Counts how often its mode is set."""

    switched = 0

    def __setattr__(self, name, value):
        if name == "training" and "training" in self.__dict__:
            type(self).switched += 1
        super().__setattr__(name, value)


def test_prediction_switches_no_mode_that_is_already_right(monkeypatch):
    monkeypatch.setattr(Counting, "switched", 0)
    module = nn.Sequential(Counting(), nn.Sequential(Counting()))
    module.train()
    assert Counting.switched == 2  # the counter counts
    module.eval()
    Counting.switched = 0
    with evaluating(module):
        assert not any(each.training for each in module.modules())
    assert Counting.switched == 0


def test_a_frozen_part_that_is_kept_in_evaluation_mode_comes_back_as_it_was(toy, pair):
    model = toy.build(pair)
    model.train()
    model.vlm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    toy.predict(model, toy.examples)
    model.attention_maps(toy.examples)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_part_that_was_left_in_training_mode_is_evaluated_too(toy):
    model = toy.build(("qwen2_5_vl", "GR00T"), dropout=0.5).eval()
    expected = toy.predict(model, toy.examples)
    model.action_model.train()
    np.testing.assert_array_equal(toy.predict(model, toy.examples), expected)
    assert model.action_model.training and not model.training


def test_modes_come_back_after_an_error():
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(ZeroDivisionError), evaluating(module):
        raise ZeroDivisionError
    assert [each.training for each in module.modules()] == [True, True, False]


def test_predicting_ignores_dropout(toy, pair):
    model = toy.build(pair, **({"dropout": 0.5} if pair[1] == "GR00T" else {}))
    model.eval()
    expected = toy.predict(model, toy.examples)
    model.train()
    np.testing.assert_array_equal(toy.predict(model, toy.examples), expected)
    assert all(module.training for module in model.modules())


# --- where it looks -------------------------------------------------------------------------------------------------


def test_attention_maps_have_a_number_for_each_token_of_an_image(toy, pair):
    maps = toy.build(pair).attention_maps(toy.examples, generator=torch.Generator().manual_seed(0))
    assert [[m.shape for m in found.images] for found in maps] == [[toy.grids[pair[0]]] * 2] * 3
    assert all(m.dtype == np.float32 for found in maps for m in found.images)
    assert np.abs(maps[0].images[0] - maps[0].images[1]).max() > 0  # not one number for everything


def test_attention_maps_have_a_share_for_each_word(toy, pair):
    maps = toy.build(pair).attention_maps(toy.examples, generator=torch.Generator().manual_seed(0))
    assert [[word for word, _ in found.words] for found in maps] == [e["lang"].split() for e in toy.examples]


def test_attention_maps_are_shares_of_one(toy, pair):
    for found in toy.build(pair).attention_maps(toy.examples, generator=torch.Generator().manual_seed(0)):
        shares = [*(m for image in found.images for m in image.ravel()), *(share for _, share in found.words)]
        assert min(shares) >= 0 and 0.1 < sum(shares) <= 1 + 1e-5


def test_images_of_different_sizes_have_maps_of_different_sizes(toy):
    model = toy.build(("qwen2_5_vl", "OFT"))
    example = toy.examples[0] | {"image": [Image.new("RGB", (64, 32)), Image.new("RGB", (64, 64))]}
    assert [m.shape for m in model.attention_maps([example])[0].images] == [(1, 2), (2, 2)]


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(toy, pair, tmp_path):
    """A model away from its base model, and its checkpoint, with the base model gone."""
    base = shutil.copytree(toy.home / pair[0], tmp_path / "base")
    model = toy.fresh(pair, changes={"vlm": {"base_vlm": str(base)}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(base)
    return model, tmp_path / "saved"


def test_loaded_without_network_or_base_model_it_predicts_the_same(toy, saved, monkeypatch):
    model, folder = saved

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = Framework.from_pretrained(folder)
    assert type(loaded) is type(model) and not loaded.training
    np.testing.assert_array_equal(toy.predict(loaded, toy.examples), toy.predict(model, toy.examples))


def test_a_loaded_model_trains_the_same_parameters(saved):
    model, folder = saved
    trained = lambda each: {name: p.requires_grad for name, p in each.named_parameters()}
    assert trained(Framework.from_pretrained(folder)) == trained(model)


def test_a_loaded_model_has_tied_embeddings(saved):
    language = Framework.from_pretrained(saved[1]).vlm.model
    assert language.get_output_embeddings().weight is language.get_input_embeddings().weight


def test_saving_a_loaded_model_writes_the_same_bytes(saved, tmp_path):
    Framework.from_pretrained(saved[1]).save_pretrained(tmp_path / "again")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (saved[1], tmp_path / "again")]
    assert weights[0] == weights[1]


def test_a_checkpoint_holds_the_section_and_no_pickle(saved, pair):
    folder = saved[1]
    assert json.loads((folder / "framework.json").read_text())["name"] == pair[1]
    kinds = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja", ".txt"}, kinds


def without(weights: dict, name: str) -> dict:
    return {n: w for n, w in weights.items() if n != name}


@pytest.mark.parametrize("fault", ["missing", "stranger", "shape"])
def test_weights_that_do_not_fit_are_named(toy, pair, tmp_path, fault):
    toy.build(pair).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(n for n in weights if n.startswith("action_model."))
    changed = {
        "missing": without(weights, name),
        "stranger": weights | {"stranger": torch.zeros(1)},
        "shape": weights | {name: torch.zeros(7)},
    }
    save_file(changed[fault], tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="stranger" if fault == "stranger" else name):
        Framework.from_pretrained(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="framework.json"):
        Framework.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_framework_is_refused(toy, tmp_path):
    toy.build(("qwen2_5_vl", "OFT")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a OFT, not a GR00T"):
        GR00T.from_pretrained(tmp_path)


DAMAGES = {
    "": "is not JSON",
    "{": "is not JSON",
    "[]": "holds a list, expected an object",
    "a text where a number belongs": "'action_dim' is '4', expected a whole number",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_section_is_refused(toy, tmp_path, damage):
    toy.build(("qwen2_5_vl", "OFT")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "framework.json").read_text())
    text = json.dumps({**written, "action_dim": "4"}) if damage.startswith("a text") else damage
    (tmp_path / "framework.json").write_text(text)
    with pytest.raises(ValueError, match=f"framework.json:? {DAMAGES[damage]}"):
        Framework.from_pretrained(tmp_path)


# --- the inference model --------------------------------------------------------------------------------------------


@pytest.fixture
def with_inference_head(toy, tmp_path):
    """A checkpoint whose policy is used with another head than it is trained with."""
    other = {"inference_model": {"action_model": {"type": "FlowMatchingInference"}}}
    toy.fresh(("qwen2_5_vl", "GR00T"), changes=other).save_pretrained(tmp_path)
    return tmp_path


def test_an_inference_head_predicts_the_same(toy, with_inference_head):
    trained, used = (Framework.from_pretrained(with_inference_head, inference=i) for i in (False, True))
    assert type(trained.action_model) is FlowMatchingHead
    assert type(used.action_model) is FlowMatchingInferenceHead
    np.testing.assert_allclose(toy.predict(used, toy.examples), toy.predict(trained, toy.examples), atol=1e-5)


def test_an_inference_head_does_not_train(toy, with_inference_head):
    with pytest.raises(ValueError, match="FlowMatchingInference"):
        Framework.from_pretrained(with_inference_head, inference=True)(toy.examples)


def test_without_an_inference_model_the_policy_is_used_as_it_was_trained(toy, tmp_path):
    toy.fresh(("qwen2_5_vl", "GR00T")).save_pretrained(tmp_path)
    assert type(Framework.from_pretrained(tmp_path, inference=True).action_model) is FlowMatchingHead


# --- a head that does not fit ---------------------------------------------------------------------------------------


def test_a_broken_framework_of_a_package_hides_no_other_error(toy, monkeypatch):
    get = type(FRAMEWORKS).get

    def broken(registry, name):
        if registry is FRAMEWORKS and name == "PI":
            raise RuntimeError("boom")
        return get(registry, name)

    monkeypatch.setattr(type(FRAMEWORKS), "get", broken)
    with pytest.raises(ValueError, match="OFT provides 'queries'"):
        toy.build(("qwen2_5_vl", "OFT"), type="FlowMatching")
