"""A prompt that is read without gradients: transformers' numbers bit for bit, and its own way wherever more is asked."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones import qwen_reading
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.qwen_reading import is_plain
from vla_bench.models.backbones.tiny import write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny("qwen2_5_vl", tmp_path_factory.mktemp("tiny"), image_size=96)


@pytest.fixture
def vlm(base):
    return load_vlm(base).eval()


@pytest.fixture
def plans(monkeypatch):
    """Counts the plans that are made."""
    made, make = [], qwen_reading.prompt_plan
    monkeypatch.setattr(qwen_reading, "prompt_plan", lambda *args: made.append(args) or make(*args))
    return made


def images(seed, *sides):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in sides]


def both(vlm, inputs, extra=None):
    """The features without gradients, and those of transformers."""
    with torch.no_grad():
        assert is_plain(vlm, inputs)
        found = vlm(inputs, extra)
    with torch.no_grad():
        usual = vlm(inputs, extra, layers="last")
    return found, usual


def same(found, usual):
    assert found.hidden.equal(usual.hidden) and found.mask.equal(usual.mask)
    assert found.num_extra == usual.num_extra and found.hidden.dtype == usual.hidden.dtype


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("windows", [[0, 1], []], ids=["all patches", "windows"])
@pytest.mark.parametrize(
    "sides, texts",
    [
        ([[(96, 96)]], ["open the drawer"]),
        ([[(96, 64), (64, 128)]], ["go"]),
        ([[(96, 96)], [(64, 128)], [(96, 96)]], ["go", "open the drawer now", "press"]),
    ],
    ids=["one", "two images", "padding"],
)
def test_the_numbers_are_transformers_own(vlm, sides, texts, windows, extra):
    vlm.model.model.visual.fullatt_block_indexes = windows
    inputs = vlm.prepare([images(1, *row) for row in sides], texts)
    behind = torch.randn(len(texts), extra, vlm.hidden_size) if extra else None
    same(*both(vlm, inputs, behind))


def test_of_a_known_prompt_only_the_pixels_are_read_anew(vlm, plans):
    found = []
    for seed in range(3):
        inputs = vlm.prepare([images(seed, (96, 96))], ["open the drawer"])
        pair = both(vlm, inputs)
        same(*pair)
        found.append(pair[0].hidden)
    assert len(plans) <= 2  # the first batch is the processor's own
    assert not found[1].equal(found[2])


def test_a_prompt_that_is_changed_in_place_is_another_one(vlm, plans):
    inputs = vlm.prepare([images(0, (96, 96))], ["open the drawer"])
    both(vlm, inputs)
    inputs["attention_mask"][:, 0] = 0
    same(*both(vlm, inputs))
    inputs = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    same(*both(vlm, inputs))
    assert len(plans) == 3


def test_the_mask_is_the_callers(vlm):
    inputs = vlm.prepare([images(0, (96, 96))], ["go"])
    both(vlm, inputs)[0].mask.zero_()
    same(*both(vlm, inputs))


def test_weights_are_read_as_they_are_now(vlm):
    inputs = vlm.prepare([images(0, (96, 96))], ["go"])
    before, _ = both(vlm, inputs)
    with torch.no_grad():
        vlm.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(2)
        vlm.model.model.visual.blocks[0].mlp.down_proj.weight.mul_(2)
    after, usual = both(vlm, inputs)
    same(after, usual)
    assert not after.hidden.equal(before.hidden)


def test_in_half_precision_as_well(vlm):
    vlm.to(torch.bfloat16)
    inputs = vlm.prepare([images(0, (96, 96))], ["go"])
    same(*both(vlm, inputs, torch.randn(1, 2, vlm.hidden_size)))


def test_in_inference_mode_as_well_and_training_goes_on(vlm):
    with torch.inference_mode():
        inputs = vlm.prepare([images(0, (96, 96))], ["go"])
        found = vlm(inputs).hidden.clone()
    inputs = vlm.prepare([images(0, (96, 96))], ["go"])
    assert both(vlm, inputs)[1].hidden.equal(found)


@pytest.mark.parametrize("where", ["model", "visual", "language_model"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_what_would_be_passed_over_is_called(vlm, where, kind):
    inputs, called = vlm.prepare([images(0, (96, 96))], ["go"]), []
    module = vlm.model.model if where == "model" else vlm.model.model.get_submodule(where)
    getattr(module, kind)(lambda *_: called.append(where))
    with torch.no_grad():
        vlm(inputs)
    assert called == [where]


def test_a_hook_on_a_layer_is_called(vlm):
    inputs, called = vlm.prepare([images(0, (96, 96))], ["go"]), []
    vlm.model.model.language_model.layers[0].register_forward_hook(lambda *_: called.append(1))
    vlm.model.model.visual.blocks[0].attn.register_forward_hook(lambda *_: called.append(2))
    both(vlm, inputs)
    assert called == [2, 1, 2, 1]


@pytest.mark.parametrize("kind", ["gradients", "a masked camera", "no image", "eager", "another family"])
def test_whatever_else_is_asked_goes_the_old_way(vlm, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(qwen_reading, "prompt_plan", lambda *_: pytest.fail("read without transformers"))
    shown, texts = [images(0, (96, 96))], ["go"]
    if kind == "another family":
        vlm = load_vlm(write_tiny("qwen3_vl", tmp_path, image_size=96)).eval()
    if kind == "eager":
        vlm.model.set_attn_implementation("eager")
    inputs = vlm.prepare([[]] if kind == "no image" else shown, texts)
    if kind == "a masked camera":
        inputs["image_mask"] = torch.tensor([[False]])
    with torch.set_grad_enabled(kind == "gradients"):
        assert vlm(inputs).hidden.requires_grad == (kind == "gradients")


def test_nothing_is_kept_of_a_backbone_that_is_gone(base):
    vlm, known = load_vlm(base).eval(), len(qwen_reading._plans)
    both(vlm, vlm.prepare([images(0, (96, 96))], ["go"]))
    assert len(qwen_reading._plans) == known + 1
    del vlm
    gc.collect()
    assert len(qwen_reading._plans) <= known
