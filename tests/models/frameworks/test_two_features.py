"""Two features at once, on a ragged batch: draws × padding, an own vision encoder × cameras × masks, decoding × masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.frameworks.build import build_framework

MASKS = (np.array([True, False]), np.array([False, True]), None)  # of the samples' cameras


def masked(examples):
    return [
        e | ({} if mask is None else {"image_mask": mask}) for e, mask in zip(examples, MASKS, strict=True)
    ]


# --- repeated draws × prompts and chunks of different length -----------------------------------------------------------


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "paligemma"])
def test_a_loss_of_two_draws_is_the_mean_of_the_losses_of_each(toy, backbone):
    model = toy.build((backbone, "GR00T"))
    batch = model.prepare(masked(toy.examples))
    assert (batch["inputs"]["attention_mask"] == 0).any() and batch["action_is_pad"].any()
    noise, time = torch.randn(6, toy.T, toy.D), torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2, 0.6])
    together = float(model(batch, noise=noise, time=time)["action_loss"].detach())
    model.action_model.repeats = 1
    each = [
        model(batch, noise=noise[rows], time=time[rows])["action_loss"] for rows in (slice(0, 3), slice(3, 6))
    ]
    assert together == pytest.approx(float(sum(each).detach()) / 2, rel=1e-5)
    assert abs(float((each[0] - each[1]).detach())) > 1e-3


def test_each_sample_of_a_ragged_batch_weighs_by_its_valid_actions(toy):
    """Not each sample alike, and not each step of the chunk alike."""
    model = toy.build(("qwen2_5_vl", "GR00T"))
    model.action_model.repeats = 1
    noise, time = torch.randn(3, toy.T, toy.D), torch.tensor([0.1, 0.9, 0.4])
    batch = model.prepare(toy.examples)
    valid = (~batch["action_is_pad"]).sum(1)
    assert valid.tolist() == [4, 3, 2]
    alone = [
        model([e], noise=noise[i : i + 1], time=time[i : i + 1])["action_loss"]
        for i, e in enumerate(toy.examples)
    ]
    expected = float((torch.stack(alone) * valid).sum().detach()) / float(valid.sum())
    assert float(model(batch, noise=noise, time=time)["action_loss"].detach()) == pytest.approx(
        expected, rel=1e-4
    )


# --- System 1's own vision encoder × two cameras × masks ---------------------------------------------------------------


@pytest.fixture(scope="module")
def dual(toy, tmp_path_factory):
    """A framework with a vision encoder of its own."""
    folder = tmp_path_factory.mktemp("dino") / "dinov2"
    write_tiny_component("dinov2", folder, image_size=32)
    return toy.build(
        ("qwen2_5_vl", "GR00T"), changes={"vision_backbone": {"type": "DINOv2", "path": str(folder)}}
    )


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize("camera", [0, 1])
def test_the_own_encoder_sees_each_camera_of_each_sample_unless_it_is_masked(toy, dual, sample, camera):
    batch = dual.prepare(masked(toy.examples))
    before = toy.predict(dual, batch)
    batch["pixels"][sample, camera] = batch["pixels"][sample, camera].flip(-1) + 1.0
    change = np.abs(toy.predict(dual, batch) - before).max(axis=(1, 2))
    seen = MASKS[sample] is None or MASKS[sample][camera]
    assert (change[sample] > 1e-5) == seen
    assert np.delete(change, sample).max() < 1e-6


def test_the_own_encoders_pixels_are_those_of_each_camera(toy, dual):
    pixels = dual.prepare(toy.examples)["pixels"]
    for i, example in enumerate(toy.examples):
        for camera, image in enumerate(example["image"]):
            alone = dual.vision_encoder.pixels([image])
            torch.testing.assert_close(pixels[i, camera], alone[0])


def test_with_an_own_encoder_a_sample_alone_is_the_sample_in_a_batch(toy, dual):
    examples = masked(toy.examples)
    together = toy.predict(dual, examples)
    for i, example in enumerate(examples):
        alone = dual.predict_action([example], noise=toy.noise[i : i + 1])["normalized_actions"]
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


# --- decoding × masked cameras × prompts of different length -----------------------------------------------------------


@pytest.fixture(scope="module", params=["FAST-FAST", "OpenVLA-Bins"])
def speaking(request, toy):
    """A framework whose actions are tokens of the language model."""
    name, head = request.param.split("-")
    config = {
        "name": name,
        "vlm": {"base_vlm": str(toy.home / "qwen2_5_vl")},
        "action_horizon": toy.T,
        "action_model": {"type": head, "first_token_id": 0},
    }
    torch.manual_seed(0)
    model = build_framework(config, action_dim=toy.D, state_dim=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def half_masked(toy):
    return masked([{key: value for key, value in e.items() if key != "state"} for e in toy.examples])


def repaint(examples, sample, camera):
    """The samples with another image at one camera of one sample."""
    changed = [dict(e, image=list(e["image"])) for e in examples]
    changed[sample]["image"][camera] = Image.new("RGB", (64, 64), "red")
    return changed


@pytest.mark.parametrize("sample, camera", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_tokens_are_learned_from_the_cameras_that_are_not_masked(speaking, half_masked, sample, camera):
    loss = lambda examples: float(speaking([examples[sample]])["action_loss"].detach())
    change = abs(loss(repaint(half_masked, sample, camera)) - loss(half_masked))
    assert (change > 1e-6) == (MASKS[sample] is None or bool(MASKS[sample][camera]))


def test_tokens_are_generated_without_the_masked_cameras(speaking, half_masked):
    hidden = repaint(repaint(half_masked, 0, 1), 1, 0)
    prompts = [speaking.prepare(examples)["inputs"] for examples in (half_masked, hidden)]
    ours, theirs = (speaking.generate(inputs) for inputs in prompts)
    assert torch.equal(ours, theirs) and len({tuple(row) for row in ours.tolist()}) > 1


def test_tokens_generated_in_a_batch_are_those_generated_alone(speaking, half_masked):
    together = speaking.generate(speaking.prepare(half_masked)["inputs"])
    for row, example in zip(together, half_masked, strict=True):
        alone = speaking.generate(speaking.prepare([example])["inputs"])[0]
        assert row[row >= 0].tolist() == alone[alone >= 0].tolist()


def test_the_tokens_generated_are_the_likeliest_under_the_loss(speaking, half_masked):
    """Any other first token has a higher loss: decoding and training read the same prompt through the same mask."""
    inputs = speaking.prepare(half_masked[:1])["inputs"]
    found = int(speaking.generate(inputs)[0, 0])
    allowed = speaking.token_ids.tolist() + ([] if speaking.stop is None else [speaking.stop])
    one = torch.ones(1, 1, dtype=torch.bool)
    loss = lambda token: float(speaking.vlm.answer_loss(inputs, torch.tensor([[token]]), one).detach())
    assert all(loss(token) >= loss(found) - 1e-6 for token in allowed[:: max(1, len(allowed) // 8)])
