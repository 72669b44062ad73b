"""GR00T with a vision encoder of its own, and its checkpoints of version 0.1."""

import numpy as np
import pytest
import torch

from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.frameworks.framework import Framework
from vla_bench.training.optim import freeze_modules, parameter_groups

GR00T = ("qwen2_5_vl", "GR00T")


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> dict:
    """The key that adds a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("dino") / "dinov2"
    write_tiny_component("dinov2", folder, image_size=32)
    return {"vision_backbone": {"type": "DINOv2", "path": str(folder)}}


@pytest.fixture
def dual(toy, dino):
    """A framework with a vision encoder, and a head that reads the last token alone."""
    model = toy.fresh(GR00T, changes=dino | {"action_model": {"type": "Transformer"}})
    with torch.no_grad():
        for parameter in model.vlm.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_the_prompts_last_token_stays_the_last(toy, dual):
    other = [e | {"lang": "close the window"} for e in toy.examples]
    assert np.abs(toy.predict(dual, toy.examples) - toy.predict(dual, other)).max() > 1e-4


def test_attention_maps_leave_the_own_patches_out(toy, dual):
    for found in dual.attention_maps(toy.examples):
        assert [m.shape for m in found.images] == [toy.grids["qwen2_5_vl"]] * 2
        assert found.images[0].sum() > 0


def test_workers_make_the_pixels(toy, dual):
    assert dual.prepare(toy.examples)["pixels"].shape == (3, 2, 3, 32, 32)


def test_a_masked_camera_is_not_seen(toy, dino):
    model = toy.build(GR00T, changes=dino)
    masked = [e | {"image_mask": np.array([True, False])} for e in toy.examples]
    repainted = [e | {"image": [e["image"][0], e["image"][0]]} for e in masked]
    np.testing.assert_array_equal(toy.predict(model, masked), toy.predict(model, repainted))


def test_freezing_the_vision_backbone_freezes_the_encoder_and_not_the_projection(toy, dino):
    model = toy.fresh(GR00T, changes=dino | {"freeze_vision_backbone": True})
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    assert model.vision_projection.weight.requires_grad


@pytest.mark.parametrize("section", [{"typ": "DINOv2"}, "DINOv2"])
def test_a_section_without_a_type_is_refused(toy, section):
    with pytest.raises(ValueError, match="framework.vision_backbone is a section"):
        toy.fresh(GR00T, changes={"vision_backbone": section})


# --- a checkpoint of version 0.1, whose encoder was called eyes -----------------------------------------------------


def test_an_old_checkpoint_predicts_what_it_did(version_0_1, as_in_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    generator = torch.Generator().manual_seed(2)
    found = model.predict_action(version_0_1.examples, generator=generator)["normalized_actions"]
    np.testing.assert_array_equal(found, version_0_1.expected["actions"])


def test_an_old_checkpoint_predicts_nearly_the_same_as_it_is_computed_today(version_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    generator = torch.Generator().manual_seed(2)
    found = model.predict_action(version_0_1.examples, generator=generator)["normalized_actions"]
    np.testing.assert_allclose(found, version_0_1.expected["actions"], atol=1e-5)


def test_an_old_checkpoint_looks_where_it_did(version_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    maps = model.attention_maps(version_0_1.examples, generator=torch.Generator().manual_seed(2))
    found = np.stack([m.images[0] for m in maps])
    np.testing.assert_allclose(found, version_0_1.expected["attention"], atol=1e-6)


def test_a_checkpoint_that_is_saved_again_has_the_present_names(version_0_1, tmp_path):
    model = Framework.from_pretrained(version_0_1.gr00t)
    model.save_pretrained(tmp_path)
    again = Framework.from_pretrained(tmp_path)
    assert {name.split(".")[0] for name in again.state_dict()} == {
        "vlm",
        "action_model",
        "vision_encoder",
        "vision_projection",
    }
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_parameters_keep_the_order_that_optimizer_states_count_on(version_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    first = list(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
    assert first == ["vlm", "action_model", "vision_encoder", "vision_projection"]


def test_an_old_configuration_may_name_modules_by_their_old_names(version_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    assert model.eyes is model.vision_encoder
    freeze_modules(model, "eyes")
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())


def test_rates_by_old_names_make_the_groups_of_before(version_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    old = parameter_groups(model, {"base": 1e-3, "eyes": 1e-4})
    new = parameter_groups(model, {"base": 1e-3, "vision_encoder": 1e-4})
    assert {group["name"] for group in old} == {"base", "base/no_decay", "eyes", "eyes/no_decay"}
    assert [group["params"] for group in old] == [group["params"] for group in new]


def test_a_name_that_never_was_is_no_attribute(version_0_1):
    model = Framework.from_pretrained(version_0_1.gr00t)
    with pytest.raises(AttributeError, match="ears"):
        model.ears  # noqa: B018


TURNS = {"hidden_size": 16, "num_heads": 2, "num_layers": 3, "num_future_tokens": 0}
TURNS |= {"attend_text_every_n_blocks": 2, "dropout": 0.0}


@pytest.mark.parametrize("encoder", [False, True], ids=["alone", "with a vision encoder"])
def test_a_head_that_takes_turns_is_told_which_tokens_are_an_image_s(toy, dino, encoder):
    model = toy.fresh(GR00T, changes=(dino if encoder else {}) | {"action_model": TURNS})
    batch = model.to_batch(toy.examples)
    features, prompt = model.read(batch), model.vlm.image_token_mask(batch["inputs"])
    own = features.image[:, : features.image.shape[1] - prompt.shape[1]]
    assert torch.equal(features.image[:, own.shape[1] :], prompt) and prompt.any() and not prompt.all()
    assert own.all() and bool(own.numel()) == encoder


def test_a_head_that_sees_both_at_once_is_told_nothing(toy):
    model = toy.build(GR00T)
    assert model.read(model.to_batch(toy.examples)).image is None
