"""A setting of a framework reaches what it controls, and values go where they belong: not only shapes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.heads.head import ActionHead
from vla_bench.registry import HEADS

PAIR = ("qwen2_5_vl", "GR00T")


class Probe(ActionHead):
    """Keeps what it is given; its chunk counts 0, 1, 2, … over time and dimensions, plus the noise."""

    reads, embodiment_specific = "last", True

    def __init__(self, sizes):
        super().__init__(sizes)
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

    def loss(self, features, actions, is_pad, noise=None, time=None):
        self.seen.append((features, actions, is_pad, noise, time, self.training))
        return {"action_loss": self.weight.sum(), "other": self.weight.sum() + 2}

    def draw_noise(self, batch, generator=None, device="cpu"):
        return torch.randn(batch, self.horizon, self.action_dim, generator=generator)

    def sample(self, features, noise=None):
        self.seen.append((features, noise, self.training, torch.is_grad_enabled()))
        return torch.arange(self.horizon * self.action_dim).reshape(self.horizon, self.action_dim) + noise


@pytest.fixture
def build(toy, monkeypatch):
    """A framework with that head, and with changes of its section."""
    monkeypatch.setattr(HEADS, "classes", dict(HEADS.classes))
    HEADS.register("Probe")(Probe)

    def build(**changes):
        section = toy.configuration(PAIR) | {"action_model": {"type": "Probe"}} | changes
        return build_framework(section, **toy.sizes)

    return build


def count(rows, columns, width):
    """The first `columns` of each row of 0, 1, 2, … in rows of `width`."""
    return np.arange(rows * width).reshape(rows, width)[:, :columns]


@pytest.mark.parametrize("wider", [0, 1, 5])
def test_a_model_wider_than_the_robot_returns_the_robots_own_dimensions(build, toy, wider):
    model = build(**({"max_action_dim": toy.D + wider} if wider else {}))
    noise = torch.zeros(3, toy.T, toy.D + wider)
    predicted = model.predict_action(toy.examples, noise=noise)["normalized_actions"]
    np.testing.assert_array_equal(predicted, np.stack([count(toy.T, toy.D, toy.D + wider)] * 3))
    assert predicted.dtype == np.float32


def test_actions_and_states_come_first_and_zeros_behind_them(build, toy):
    model = build(max_action_dim=toy.D + 2, max_state_dim=toy.S + 1)
    batch = model.prepare(toy.examples)
    for i, example in enumerate(toy.examples):
        np.testing.assert_array_equal(batch["actions"][i, :, : toy.D], example["action"])
        np.testing.assert_array_equal(batch["state"][i, : toy.S], example["state"])
        np.testing.assert_array_equal(batch["action_is_pad"][i], example["action_is_pad"])
    assert not batch["actions"][..., toy.D :].any() and not batch["state"][:, toy.S :].any()


def test_the_head_is_given_the_batch_and_the_noise_and_time_as_they_are(build, toy):
    model = build()
    batch = model.prepare(toy.examples)
    noise, time = torch.randn(3, toy.T, toy.D), torch.tensor([0.1, 0.5, 0.9])
    losses = model.train()(batch, noise=noise, time=time)
    features, actions, is_pad, given_noise, given_time, training = model.action_model.seen[0]
    assert torch.equal(actions, batch["actions"]) and torch.equal(is_pad, batch["action_is_pad"])
    assert torch.equal(features.state, batch["state"]) and features.embodiment is None
    assert torch.equal(features.mask.bool(), batch["inputs"]["attention_mask"].bool())
    assert given_noise is noise and given_time is time and training
    assert {name: float(value.detach()) for name, value in losses.items()} == {
        "action_loss": 0.0,
        "other": 2.0,
    }


def test_samples_and_their_batch_are_the_same(build, toy):
    model = build()
    noise = torch.randn(3, toy.T, toy.D)
    model(toy.examples, noise=noise), model(model.prepare(toy.examples), noise=noise)
    (ours, *rest), (theirs, *others) = model.action_model.seen
    assert torch.equal(ours.hidden, theirs.hidden) and torch.equal(rest[0], others[0])


def test_noise_comes_from_the_generator_that_is_given(build, toy):
    model = build()
    drawn = torch.randn(3, toy.T, toy.D, generator=torch.Generator().manual_seed(8))
    generator = torch.Generator().manual_seed(8)
    predicted = model.predict_action(toy.examples, generator=generator)["normalized_actions"]
    np.testing.assert_allclose(predicted, count(toy.T, toy.D, toy.D) + drawn.numpy(), rtol=1e-6)


def test_a_prediction_is_made_in_evaluation_mode_without_gradients(build, toy):
    model = build().train()
    model.vlm.eval()
    model.predict_action(toy.examples)
    features, _, training, with_gradient = model.action_model.seen[0]
    assert not training and not with_gradient and not features.hidden.requires_grad
    assert model.training and model.action_model.training and not model.vlm.training


def test_the_index_of_a_robot_is_its_place_in_the_list(build, toy):
    model = build(embodiments=["zeta", "alpha", "beta"])
    examples = [
        e | {"dataset": name} for e, name in zip(toy.examples, ("beta", "zeta", "alpha"), strict=True)
    ]
    assert model.prepare(examples)["embodiment"].tolist() == [2, 0, 1]
    model(examples)
    assert model.action_model.seen[0][0].embodiment.tolist() == [2, 0, 1]


def prompts_of(model, examples):
    """What the backbone reads, without control tokens."""
    batch = model.prepare(examples)["inputs"]
    tokenizer = model.prepare.vlm.processor.tokenizer
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]


def test_the_prompt_of_the_section_is_what_the_backbone_reads(build, toy):
    plain = prompts_of(build(), toy.examples)
    asked = prompts_of(build(prompt="now {lang} with care"), toy.examples)
    for before, after, words in zip(plain, asked, toy.words, strict=True):
        assert words in before and "now" not in before.replace(words, "")
        assert after == before.replace(words, f"now {words} with care")


def test_a_prompt_may_hold_the_state_as_bins(build, toy):
    states = [(-1.0, 1.0), (0.0, -0.5), (-1.01, 0.5)]
    examples = [e | {"state": np.float32(state)} for e, state in zip(toy.examples, states, strict=True)]
    for text, bins in zip(
        prompts_of(build(prompt="{state}: {lang}"), examples), ("0 255", "128 64", "-1 192")
    ):
        assert f"{bins}: " in text


def test_instructions_are_rewritten_as_the_framework_wants_and_kept_so(build, toy, monkeypatch):
    plain = prompts_of(build(), toy.examples)
    model = build()
    model.prepare.preprocess_instruction = lambda lang: lang.replace("the", "a")
    assert prompts_of(model, toy.examples) == [text.replace(" the", " a") for text in plain]
    assert model.prepare(toy.examples)["lang"] == [words.replace("the", "a") for words in toy.words]


def test_a_mask_of_cameras_is_each_samples_own(build, toy):
    masks = [np.array([True, False]), None, np.array([False, True])]
    examples = [
        e | ({} if mask is None else {"image_mask": mask})
        for e, mask in zip(toy.examples, masks, strict=True)
    ]
    found = build().prepare(examples)["inputs"]["image_mask"]
    assert found.tolist() == [[True, False], [True, True], [False, True]]
    assert "image_mask" not in build().prepare(toy.examples)["inputs"]


@pytest.mark.parametrize("hidden", ["first", "second"])
def test_a_masked_camera_is_not_seen_and_the_other_is(toy, hidden):
    """Whatever the hidden camera shows, in a batch with samples that show both."""
    model = toy.build(PAIR)
    place = ("first", "second").index(hidden)
    mask = np.arange(2) != place
    black, example = Image.new("RGB", (64, 64)), toy.examples[0]

    def prediction(camera):
        images = [black if i == camera else image for i, image in enumerate(example["image"])]
        batch = [toy.examples[1], example | {"image": images, "image_mask": mask}]
        return model.predict_action(batch, noise=toy.noise[:2])["normalized_actions"][1]

    np.testing.assert_allclose(prediction(place), prediction(None), atol=1e-6)
    assert np.abs(prediction(1 - place) - prediction(None)).max() > 1e-5


def test_old_names_of_modules_are_those_of_today(build, monkeypatch):
    model = build()
    monkeypatch.setattr(type(model), "renamed_parameters", {"qwen": "vlm"})
    assert model.qwen is model.vlm
    with pytest.raises(AttributeError, match="nothing"):
        model.nothing  # noqa: B018
    weights = {name.replace("vlm.", "qwen.", 1): value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.action_model.weight += 1
    model.load_state_dict(weights)
    assert float(model.action_model.weight.detach()) == 0 and any(
        name.startswith("qwen.") for name in weights
    )
