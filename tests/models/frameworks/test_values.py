"""A setting of a framework reaches what it controls, and values go where they belong: not only shapes."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vla_bench.models.features import Features
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.head import ActionHead
from vla_bench.registry import FRAMEWORKS, HEADS

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


# --- where it is computed, what is asked for, what is written ------------------------------------------------------------

RUNS = {
    "loss": lambda model, batch: model.train()(batch)["action_loss"].detach().numpy(),
    "actions": lambda model, batch: model.predict_action(batch)["normalized_actions"],
    "maps": lambda model, batch: np.stack([each.images[0] for each in model.attention_maps(batch)]),
}


@pytest.mark.parametrize("name", ["OFT", "GR00T", "PI0", "PI05"])
@pytest.mark.parametrize("what", RUNS)
def test_a_batch_is_computed_where_it_lies_whatever_the_default_device_is(toy, pi, name, what):
    """The default is one that holds no numbers: what is made without saying where would have none."""
    model = pi.build(name) if name.startswith("PI") else toy.build(("paligemma", name))
    batch = model.prepare((pi if name.startswith("PI") else toy).examples)
    torch.manual_seed(1)
    here = RUNS[what](model, batch)
    torch.manual_seed(1)
    with torch.device("meta"):
        np.testing.assert_array_equal(RUNS[what](model, batch), here)


def test_noise_is_drawn_where_the_features_are(toy):
    features = Features(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool, device="meta"))
    noise = toy.build(PAIR).draw_noise(features, None)
    assert noise.shape == (2, toy.T, toy.D) and noise.device.type == "meta"


def test_maps_are_made_in_evaluation_mode_without_gradients_from_the_noise_that_is_given(toy, monkeypatch):
    model, seen = toy.build(PAIR).train(), []
    attention = model.action_model.attention
    monkeypatch.setattr(
        model.action_model,
        "attention",
        lambda features, noise: (
            seen.append((torch.is_grad_enabled(), model.training, noise)) or attention(features, noise)
        ),
    )
    model.attention_maps(toy.examples, generator=torch.Generator().manual_seed(8))
    ((with_gradient, training, noise),) = seen
    assert not with_gradient and not training and model.training
    assert torch.equal(noise, torch.randn(3, toy.T, toy.D, generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_head_that_says_where_it_looks_it_is_the_prompts_last_token(build, toy, side):
    """The mean over layers and attention heads, of the last token that is no padding."""
    model = build().eval()
    model.prepare.vlm.processor.tokenizer.padding_side = side
    batch = model.prepare(toy.examples)
    with torch.no_grad():
        found = model.prompt_attention(batch, None).numpy()
        layers = [each.float().numpy() for each in model.vlm(batch["inputs"], attention=True).attention]
    for b, mask in enumerate(batch["inputs"]["attention_mask"].numpy()):
        rows = [layer[b, :, np.flatnonzero(mask)[-1]] for layer in layers]
        np.testing.assert_allclose(found[b], np.mean(rows, axis=(0, 1)), atol=1e-6)


def test_a_sample_that_cannot_be_trained_on_is_named(build, toy):
    bare = [{key: value for key, value in e.items() if not key.startswith("action")} for e in toy.examples]
    with pytest.raises(
        ValueError, match="^toy episode 0 frame 7: training needs 'action' and 'action_is_pad'"
    ):
        build()(bare)
    assert build().predict_action(bare)["normalized_actions"].shape == (3, toy.T, toy.D)


@pytest.mark.parametrize("call", ["forward", "predict_action"])
def test_robots_with_different_actions_need_a_head_that_masks_them(build, toy, call):
    mixed = [e | {"action_mask": np.arange(toy.D) < 2 + i % 2} for i, e in enumerate(toy.examples)]
    with pytest.raises(
        ValueError, match="^toy episode 0 frame 7: some robots lack numbers .* head Probe predicts"
    ):
        getattr(build(), call)(mixed)
    getattr(toy.build(PAIR), call)(mixed)
    getattr(build(), call)(toy.examples)


def test_the_mask_of_each_robots_actions_reaches_the_head(build, toy, monkeypatch):
    monkeypatch.setattr(Probe, "masks_actions", True)
    mixed = [e | {"action_mask": np.arange(toy.D) < 1 + i} for i, e in enumerate(toy.examples)]
    model = build()
    model(mixed)
    assert model.action_model.seen[0][0].action_mask.tolist() == [
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]


def test_the_blocks_to_shard_are_those_of_the_backbone_and_of_the_head(toy, pair):
    model = toy.build(pair)
    ours, heads = model.vlm.layer_classes(), model.action_model.layer_classes()
    assert ours and model.fsdp_classes() == ours | heads and bool(heads) == (pair[1] == "GR00T")
    with pytest.raises(AttributeError, match=r"here it is fsdp_classes\(\)"):
        model.get_fsdp_wrapping_policy()


def test_a_framework_says_itself_how_it_runs_its_backbone(toy):
    model = toy.build(PAIR)
    with pytest.raises(NotImplementedError):
        Framework.features(model, {})
    assert model.stored() == {}


def test_a_head_that_does_not_fit_is_answered_with_all_that_would(toy):
    reads = {name: FRAMEWORKS.get(name).reads for name in FRAMEWORKS.names()}
    fits = [name for name, each in reads.items() if each == "last"]
    assert fits and len(set(reads.values())) > 2
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"OFT provides 'queries', FlowMatchingHead reads 'last'; set framework.name to one of {fits}, or"
        ),
    ):
        toy.build(("qwen2_5_vl", "OFT"), type="FlowMatching")


def test_saving_makes_the_folder_and_may_be_repeated(toy, tmp_path):
    model = toy.build(PAIR)
    for _ in range(2):
        model.save_pretrained(tmp_path / "a" / "b")
    loaded = Framework.from_pretrained(tmp_path / "a" / "b")
    np.testing.assert_array_equal(toy.predict(loaded, toy.examples), toy.predict(model, toy.examples))
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert names == {"model.safetensors", "framework.json", "vlm"}  # and nothing of a head that has no files


def test_the_files_of_a_head_are_saved_with_it(build, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Probe, "assets", True)
    monkeypatch.setattr(
        Probe, "save_assets", lambda self, folder: folder.mkdir() or (folder / "own.json").touch()
    )
    build().save_pretrained(tmp_path)
    assert [path.name for path in (tmp_path / "action_model").iterdir()] == ["own.json"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_robot_of_each_sample_is_its_own_in_any_order(build, toy, place):
    """A batch turned round is the batch turned round: nothing belongs to a place in it."""
    model = build(embodiments=["zeta", "alpha", "beta"])
    names = ("beta", "zeta", "alpha")
    examples = [e | {"dataset": name} for e, name in zip(toy.examples, names, strict=True)]
    turned = examples[place:] + examples[:place]
    model(turned)
    features, actions, *_ = model.action_model.seen[0]
    index = [["zeta", "alpha", "beta"].index(e["dataset"]) for e in turned]
    assert features.embodiment.tolist() == index
    np.testing.assert_array_equal(actions, np.stack([e["action"] for e in turned]))
    np.testing.assert_array_equal(features.state, np.stack([e["state"] for e in turned]))
