"""What a model sees of a robot, number by number, and how its answer becomes motion again."""

import numpy as np
import pytest
from PIL import Image

from vla_bench.data.action_modes import encode_actions, encode_state, encoding_to_dict, make_encoding
from vla_bench.data.layout import Layout, PolicySpec
from vla_bench.data.normalize import Normalizer, compute_statistics
from vla_bench.data.parts import Part
from vla_bench.data.transforms import NO_TRANSFORMS, Crop, ImageTransforms
from vla_bench.data.view import ModelView, Widths, model_dims, pad_sample, robot_dims, spec_view

ARM = Part("arm", ("j0", "j1"), "joint")
TURN = Part("turn", ("r0", "r1", "r2"), "rotation", rotation="axis_angle")
ENCODING = make_encoding((ARM, TURN), (TURN, ARM), "delta", "rotation_6d")
RNG = np.random.default_rng(0)
ACTIONS, STATES = RNG.normal(size=(4, 5)), RNG.normal(size=(3, 5))
SCALES = {
    "action": Normalizer(compute_statistics(RNG.normal(size=(50, 8))), "min_max"),
    "state": Normalizer(compute_statistics(RNG.normal(size=(50, 8))), "mean_std"),
}
PLAIN = {
    "action": Normalizer(compute_statistics(RNG.normal(size=(50, 5))), "min_max"),
    "state": Normalizer(compute_statistics(RNG.normal(size=(50, 5))), "mean_std"),
}


def image(value=100, size=(6, 4)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 0))


def test_an_empty_view_changes_nothing():
    view = ModelView()
    assert (view.actions(ACTIONS, None) == ACTIONS.astype(np.float32)).all()
    assert view.actions(ACTIONS, STATES).dtype == view.state(STATES).dtype == np.float32
    assert (view.state(STATES) == STATES.astype(np.float32).reshape(-1)).all()
    assert (view.physical(ACTIONS, None) == ACTIONS).all() and view.physical(
        ACTIONS, None
    ).dtype == np.float64
    sample = {"image": [image()], "lang": "go", "state": 3}
    assert view.shaped(sample, 5) == sample


def test_actions_are_encoded_from_the_last_state_and_then_scaled():
    view = ModelView(SCALES, ENCODING)
    expected = SCALES["action"].normalize(encode_actions(ENCODING, ACTIONS, STATES[-1]))
    np.testing.assert_array_equal(view.actions(ACTIONS, STATES), expected)
    np.testing.assert_allclose(view.physical(expected, STATES), ACTIONS, atol=1e-5)
    assert np.abs(view.physical(expected, STATES[:1]) - ACTIONS).max() > 0.1


def test_states_of_the_history_are_each_encoded_scaled_and_joined():
    expected = np.concatenate([SCALES["state"].normalize(encode_state(ENCODING, each)) for each in STATES])
    np.testing.assert_array_equal(ModelView(SCALES, ENCODING).state(STATES), expected)


@pytest.mark.parametrize("scaled", [set(), {"action"}, {"state"}, {"action", "state"}])
def test_each_field_has_its_own_scale_or_none(scaled):
    view = ModelView({name: PLAIN[name] for name in scaled})
    for name, values, found in (
        ("action", ACTIONS, view.actions(ACTIONS, STATES)),
        ("state", STATES, view.state(STATES)),
    ):
        expected = PLAIN[name].normalize(values) if name in scaled else values.astype(np.float32)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    back = view.physical(view.actions(ACTIONS, STATES), STATES)
    np.testing.assert_allclose(back, ACTIONS, atol=1e-5)


WIDE = Widths(action=7, state=6, images=3)


def wide(**change) -> dict:
    sample = {
        "image": [image(1), image(2)],
        "action": np.arange(10, dtype=np.float32).reshape(2, 5),
        "state": np.float32([1, 2, 3, 4]),
        "lang": "go",
    } | change
    return {key: value for key, value in sample.items() if value is not None}


def test_a_sample_is_padded_with_zeros_black_and_masks():
    sample = wide()
    found = pad_sample(sample, WIDE, 5)
    assert found["action"].tolist() == [[0, 1, 2, 3, 4, 0, 0], [5, 6, 7, 8, 9, 0, 0]]
    assert found["action_mask"].tolist() == [True] * 5 + [False] * 2
    assert found["state"].tolist() == [1, 2, 3, 4, 0, 0] and found["state"].dtype == np.float32
    assert [each.getpixel((0, 0)) for each in found["image"]] == [(1, 0, 0), (2, 0, 0), (0, 0, 0)]
    assert found["image"][2].size == (6, 4) and found["image_mask"].tolist() == [True, True, False]
    assert found["lang"] == "go" and set(sample) == {"image", "action", "state", "lang"}


def test_a_mask_of_images_goes_on():
    found = pad_sample(wide(image_mask=np.array([False, True])), WIDE, 5)
    assert found["image_mask"].tolist() == [False, True, False]


def test_only_what_is_added_is_masked():
    found = pad_sample(wide(), Widths(5, 4, 2), 5)
    assert "action_mask" not in found and "image_mask" not in found
    assert found["action"].shape == (2, 5) and found["state"].shape == (4,) and len(found["image"]) == 2
    served = pad_sample(wide(action=None, state=None), WIDE, 5)
    assert (
        "action" not in served
        and "state" not in served
        and served["action_mask"].tolist() == [True] * 5 + [False] * 2
    )


def test_a_prompt_holds_the_instruction():
    assert ModelView(prompt="arm: {lang}!").shaped(wide(), 5)["lang"] == "arm: go!"
    found = ModelView(prompt="arm: {lang}", widths=WIDE).shaped(wide(), 5)
    assert found["lang"] == "arm: go" and len(found["image"]) == 3


def test_an_observation_is_seen_as_in_evaluation():
    crop = ImageTransforms((Crop(0.5),))
    noise = Image.fromarray(RNG.integers(0, 255, (8, 8, 3), np.uint8))
    view = ModelView(PLAIN, transforms=crop, prompt="arm: {lang}", widths=Widths(5, 20, 2))
    found = view.see({"image": [noise], "lang": "go", "dataset": "toy"}, STATES, 5)
    assert (np.asarray(found["image"][0]) == np.asarray(crop.eval([noise])[0])).all() and len(
        found["image"]
    ) == 2
    np.testing.assert_array_equal(found["state"][:15], view.state(STATES))
    assert (found["lang"], found["dataset"], len(found["state"])) == ("arm: go", "toy", 20)
    assert "state" not in view.see({"image": [noise], "lang": "go"}, None, 5)


def spec(**change) -> PolicySpec:
    values = {
        "action": Layout(("a", "b", "c", "d", "e")), "state": Layout(("v", "w", "x", "y", "z")), "cameras": ("front",),
        "image_size": (4, 6), "horizon": 4, "control_rate": 10.0, "normalization": {}, "dataset": "toy",
        "statistics_hash": "",
    }  # fmt: skip
    return PolicySpec(**{**values, **change})


def test_a_checkpoints_view_is_what_its_specification_says():
    assert spec_view(spec(), PLAIN) == ModelView(PLAIN)
    told = spec(
        encoding=encoding_to_dict(ENCODING), image_transforms=[{"type": "crop", "fraction": 0.5}], prompt="p {lang}",
        observation_steps=3, observation_stride=2, widths=(7, 6, 3),
    )  # fmt: skip
    expected = ModelView(SCALES, ENCODING, ImageTransforms((Crop(0.5),)), (-4, -2, 0), "p {lang}", WIDE)
    assert spec_view(told, SCALES) == expected and expected.transforms != NO_TRANSFORMS


@pytest.mark.parametrize(
    "change, message",
    [({"encoding": {"modes": []}}, "^here: the encoding of the actions is incomplete"), ({"image_transforms": [{"type": "crp"}]}, "^here: image_transforms")],
)  # fmt: skip
def test_an_entry_of_a_checkpoint_that_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        spec_view(spec(**change), PLAIN, "here")
    with pytest.raises(ValueError, match="^policy.json"):
        spec_view(spec(**change), PLAIN)


def test_so_many_numbers_has_a_robot_and_its_model():
    action, state = Layout(("a", "b")), Layout(("x", "y", "z"))
    assert robot_dims(None, action, state) == (2, 3)
    assert robot_dims(None, action, state, 4) == (2, 12) and robot_dims(None, action, None, 4) == (2, 0)
    assert robot_dims(ENCODING, action, state, 2) == (8, 16) and robot_dims(ENCODING, action, None, 2) == (
        8,
        0,
    )
    assert model_dims(spec()) == (5, 5) and model_dims(spec(observation_steps=3)) == (5, 15)
    assert model_dims(spec(encoding=encoding_to_dict(ENCODING))) == (8, 8)
    assert model_dims(spec(widths=(9, 40, 3))) == (9, 40)
