"""A policy of version 0.1.0 is loaded and predicts what it predicted then."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_bench.serving.policy import Policy

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"


@pytest.fixture(scope="module")
def policy():
    return Policy.from_pretrained(FIXTURES / "runs" / "llava", checkpoint=3)


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "llava_expected.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def observation(expected):
    image = Image.fromarray(expected["image"])
    return {"image": [image], "lang": expected["lang"].item(), "state": expected["state"]}


def test_a_checkpoint_of_version_0_1_predicts_the_same_actions(policy, observation, expected):
    assert np.abs(policy.predict(observation, seed=0) - expected["step3"]).max() < 1e-6


def test_a_checkpoint_of_version_0_1_attends_to_the_same(policy, observation, expected):
    assert np.abs(policy.attention(observation).images[0] - expected["attention"]).max() < 1e-6


def test_a_checkpoint_of_version_0_1_keeps_its_fingerprint(policy):
    assert policy.fingerprint == "890b98089d95d9e1"  # as in its evaluation's fingerprint.json


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image": []}, "has 0 images, the policy sees 1 cameras"),
        ({"image": [np.zeros((32, 32, 3), np.uint8)]}, "'top' is a ndarray, expected a PIL image"),
        ({"image": [Image.new("RGB", (64, 32))]}, r"'top' is \(64, 32\) \(width, height\), expected \(32, 32\)"),
        ({"state": [0.1]}, r"has the shape \[1\], expected \[2\]: row, column"),
        ({"images": []}, "unknown key 'images'"),
    ],
)  # fmt: skip
def test_an_observation_that_does_not_fit_is_refused(policy, observation, change, named):
    with pytest.raises(ValueError, match=named):
        policy.predict({**observation, **change}, seed=0)
