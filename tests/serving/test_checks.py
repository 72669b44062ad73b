"""What comes over the wire against the policy's specification, in every spelling; what leaves against what it promises."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vla_bench.data.layout import spec_from_dict
from vla_bench.serving.checks import (
    by_field,
    check_actions,
    flat,
    handshake,
    images_from,
    message_from,
    numbers_from,
    observation_from,
    wire_names,
)
from vla_bench.serving.protocol import pack, unpack

IMAGE = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)


@pytest.fixture
def spec(toy):
    return toy[0].spec


def message(**more):
    return {"observation/image": IMAGE, "observation/state": [0.5], "prompt": "up", **more}


@pytest.mark.parametrize(
    "name", ["observation/image", "observation/top", "observation/images/top", "images/top", "top", "image"]
)
@pytest.mark.parametrize("state", ["observation/state", "state"])
@pytest.mark.parametrize("lang", ["prompt", "task_description", "lang"])
def test_every_spelling_is_the_same_observation(spec, name, state, lang):
    found = observation_from({name: IMAGE, state: np.array([0.5]), lang: "up"}, spec)
    assert np.array_equal(np.asarray(found["image"][0]), IMAGE)
    assert (found["lang"], found["state"].tolist()) == ("up", [0.5])


def test_nested_and_flat_are_the_same(spec):
    nested = {"observation": {"images": {"top": IMAGE}, "state": [0.5]}, "prompt": "up"}
    assert flat(nested).keys() == {"observation/images/top", "observation/state", "prompt"}
    assert np.array_equal(np.asarray(observation_from(nested, spec)["image"][0]), IMAGE)


def test_a_path_that_is_there_twice_is_named():
    with pytest.raises(ValueError, match="'a/b' is there twice"):
        flat({"a/b": 1, "a": {"b": 2}})


def test_channels_may_come_first(spec):
    found = observation_from(message() | {"observation/image": np.moveaxis(IMAGE, -1, 0)}, spec)
    assert np.array_equal(np.asarray(found["image"][0]), IMAGE)


def test_a_square_of_three_pixels_is_read_as_it_is():
    """[3, 3, 3] may be either; it is rows, columns, channels, as the specification says."""
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(np.asarray(images_from(image, "top", (3, 3), 1)[0]), image)


def test_a_name_of_the_clients_own_is_read(spec):
    found = by_field({"cam0": IMAGE, "state": [0.5], "lang": "up"}, spec, {"cam0": "top"})
    assert found["top"][0] == "cam0"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"observation/depth": 1}, "unknown field 'observation/depth'"),
        ({"image": IMAGE}, "'observation/image' and 'image' are the same field"),
        ({"observation/image": IMAGE[:8]}, "uint8 [8, 24, 3], expected uint8 [16, 24, 3]"),
        ({"observation/image": IMAGE.astype(np.float32)}, "'observation/image' is float32"),
        ({"observation/image": "png"}, "'observation/image' is str"),
        ({"observation/state": [0.5, 1.0]}, "'observation/state' is float64 [2], expected [1] numbers: x"),
        ({"observation/state": ["0.5"]}, "'observation/state' must hold numbers alone"),
        ({"observation/state": [True]}, "'observation/state' must hold numbers alone"),
        ({"observation/state": [float("inf")]}, "'observation/state': x is inf"),
        ({"prompt": " "}, "'prompt' must be an instruction"),
        ({"prompt": "a" * 2001}, "1 to 2000 characters"),
        ({"image_mask": np.zeros(2, bool)}, "'image_mask' must be bool [1]"),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_does_not_fit_is_named(spec, change, named):
    with pytest.raises(ValueError) as told:
        observation_from({**message(), **change}, spec)
    assert named in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("missing", ["observation/image", "observation/state", "prompt"])
def test_what_is_missing_is_named(spec, missing):
    left = {key: value for key, value in message().items() if key != missing}
    with pytest.raises(ValueError, match="the observation has no '"):
        observation_from(left, spec)


def test_a_policy_without_a_state_ignores_one(spec):
    blind = replace(spec, state=None, normalization={"action": "min_max"})
    assert "state" not in observation_from(message(), blind)


def test_an_observation_comes_back_from_the_wire(spec, fuzz):
    settings, _ = fuzz
    images = arrays.arrays(np.uint8, (16, 24, 3))
    numbers = st.floats(allow_nan=False, allow_infinity=False)

    @settings
    @given(images, numbers, st.text(min_size=1).filter(str.strip))
    def back(image, number, lang):
        sent = observation_from({"image": image, "state": [number], "lang": lang}, spec)
        found = observation_from(unpack(pack(message_from(sent, spec), images="png")), spec)
        assert np.array_equal(np.asarray(found["image"][0]), image)
        assert (found["lang"], found["state"].tolist()) == (lang, [number])

    back()


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_numbers_of_every_kind_become_float64(dtype):
    found = numbers_from(np.array([[1, 2]], dtype), "state", ["x", "y"], 1)
    assert found.dtype == np.float64 and found.tolist() == [1, 2]


@pytest.mark.parametrize("odd", [np.zeros((4, 2), complex), np.zeros((4, 2), int), np.zeros((4, 3)), [[0.0, 0.0]] * 4, None,
                                 np.full((4, 2), -np.inf)], ids=["complex", "int", "shape", "list", "none", "inf"])  # fmt: skip
def test_actions_that_are_not_as_promised_do_not_leave(spec, odd):
    with pytest.raises(ValueError, match="the policy (promises|returned)"):
        check_actions(odd, spec)


def test_the_handshake_carries_the_specification(spec):
    told = unpack(pack(handshake(spec, "toy", 4)))
    assert spec_from_dict(told["policy"], "here") == spec and told["batch_size"] == 4
    assert told["observation"] == {field: names[0] for field, names in wire_names(spec).items()}


def test_a_camera_at_the_wrist_is_told_apart(spec):
    told = handshake(replace(spec, cameras=("front", "left_wrist")), "toy")
    assert (told["n_external_cameras"], told["needs_wrist_camera"]) == (1, True)
