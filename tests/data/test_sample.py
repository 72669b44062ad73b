"""Each rule of a sample, broken alone, is one line that names the sample and the key."""

import numpy as np
import pytest
from PIL import Image

from vla_bench.data.sample import Sample, check_images, check_sample


def image(mode="RGB") -> Image.Image:
    return Image.new(mode, (4, 3))


def sample(**change) -> dict:
    """A sample with every key; two cameras, three steps, five numbers of an action, two of a state."""
    found = {
        "image": [image(), image()],
        "image_mask": np.array([True, False]),
        "lang": "go",
        "action": np.zeros((3, 5), np.float32),
        "action_is_pad": np.array([False, False, True]),
        "action_mask": np.array([True] * 4 + [False]),
        "state": np.zeros(2, np.float32),
        "future": [image()] * 4,
        "future_is_pad": np.zeros(4, bool),
        "dataset": "toy",
        "origin": "toy episode 0",
    }
    found |= change
    return {key: value for key, value in found.items() if value is not None}


def test_the_keys_are_these():
    assert set(Sample.__annotations__) == set(sample())


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_sample_fits(training):
    check_sample(sample(), training=training)


OPTIONAL = ["image_mask", "action_mask", "state", "future", "future_is_pad", "dataset", "origin"]


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_key_that_may_be_left_out(key):
    check_sample(sample(**{key: None}), training=True)


def test_an_observation_needs_no_action():
    check_sample(sample(action=None, action_is_pad=None))
    check_sample(sample(action=None, action_mask=None))


def f32(*shape) -> np.ndarray:
    return np.zeros(shape, np.float32)


def spoilt(array: np.ndarray, value: float) -> np.ndarray:
    array.reshape(-1)[-1] = value
    return array


BROKEN = [
    ({"image": None}, "'image' must be a non-empty list"),
    ({"image": []}, "'image' must be a non-empty list"),
    ({"image": image()}, "'image' must be a non-empty list"),
    ({"image": (image(), image())}, "'image' must be a non-empty list"),
    ({"image": [image(), image("L")]}, "'image'[1] must be an RGB PIL image, got L"),
    ({"image": [image("RGBA"), image()]}, "'image'[0] must be an RGB PIL image, got RGBA"),
    ({"image": [image(), np.zeros((3, 4, 3))]}, "'image'[1] must be an RGB PIL image, got ndarray"),
    ({"lang": None}, "'lang' must be a non-empty instruction, got None"),
    ({"lang": " \n"}, "'lang' must be a non-empty instruction"),
    ({"lang": 3}, "'lang' must be a non-empty instruction, got 3"),
    ({"action": f32(15)}, "'action' must be a float32 array with 2 axes, got float32 [15]"),
    ({"action": np.zeros((3, 5))}, "'action' must be a float32 array with 2 axes, got float64 [3, 5]"),
    ({"action": [[0.0] * 5] * 3}, "'action' must be a float32 array with 2 axes, got list"),
    ({"action": spoilt(f32(3, 5), np.nan)}, "'action' holds values that are not finite"),
    ({"action": spoilt(f32(3, 5), -np.inf)}, "'action' holds values that are not finite"),
    ({"state": f32(1, 2)}, "'state' must be a float32 array with 1 axes, got float32 [1, 2]"),
    ({"state": np.zeros(2, int)}, "'state' must be a float32 array with 1 axes, got int64 [2]"),
    ({"state": spoilt(f32(2), np.inf)}, "'state' holds values that are not finite"),
    ({"image_mask": np.ones(3, bool)}, "'image_mask' must say for each of 2 cameras"),
    ({"image_mask": np.ones(2, int)}, "'image_mask' must be a bool array with 1 axes"),
    ({"image_mask": np.ones((1, 2), bool)}, "'image_mask' must be a bool array with 1 axes"),
    ({"action_mask": np.ones(3, bool)}, "'action_mask' must say for each of 5 numbers of an action"),
    ({"future_is_pad": np.ones(3, bool)}, "'future_is_pad' must say for each of 4 later images"),
    ({"future": []}, "future: 'image' must be a non-empty list"),
    ({"future": [image("L")] * 4}, "future: 'image'[0] must be an RGB PIL image, got L"),
    ({"imgae": 1}, "unknown key 'imgae'; a sample has image, image_mask, lang"),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change, message", BROKEN, ids=lambda value: str(value)[:30])
def test_a_broken_rule_is_named(change, message, training):
    with pytest.raises(ValueError) as error:
        check_sample(sample(**change), training=training)
    assert str(error.value).startswith("toy episode 0: ") and message in str(error.value)
    with pytest.raises(ValueError, match="^sample: "):
        check_sample(sample(**change, origin=None), training=training)


OF_TRAINING = [
    ({"action": None}, "'action' is missing; training needs it"),
    ({"action_is_pad": None}, "'action_is_pad' is missing; training needs it"),
    ({"action_is_pad": np.zeros(3, int)}, "'action_is_pad' must be a bool array with 1 axes"),
    ({"action_is_pad": np.zeros((1, 3), bool)}, "'action_is_pad' must be a bool array with 1 axes"),
    ({"action_is_pad": np.zeros(2, bool)}, "'action' has 3 steps but 'action_is_pad' has 2"),
    ({"action_is_pad": np.ones(3, bool)}, "every action is padding, so the sample teaches nothing"),
]


@pytest.mark.parametrize("change, message", OF_TRAINING, ids=lambda value: str(value)[:30])
def test_training_has_rules_of_its_own(change, message):
    check_sample(sample(**change))
    with pytest.raises(ValueError) as error:
        check_sample(sample(**change), training=True)
    assert str(error.value) == f"toy episode 0: {message}" or message in str(error.value)


def test_images_alone_are_named_by_what_is_given():
    check_images([image()], "here")
    with pytest.raises(ValueError, match="^here: 'image'"):
        check_images([image("P")], "here")
