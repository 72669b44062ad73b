"""A policy that needs no network, and a checkpoint of version 0.1.0."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_bench.data.layout import Layout, PolicySpec

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"


class ToyPolicy:
    """Its actions say which observation and which seed they are for; it computes for `seconds`."""

    fingerprint = "toy"
    spec = PolicySpec(
        action=Layout(("brightness", "seed")),
        state=Layout(("x",)),
        cameras=("top",),
        image_size=(16, 24),
        horizon=4,
        control_rate=10.0,
        normalization={"action": "min_max", "state": "min_max"},
        dataset="toy",
        statistics_hash="0" * 16,
    )

    def __init__(self, seconds: float = 0.0, batch_size: int = 4):
        self.seconds, self.batch_size, self.batches = seconds, batch_size, []

    def group(self, observation):
        return len(observation["lang"])

    def predict_batch(self, observations, seeds):
        self.batches.append(len(seeds))
        time.sleep(self.seconds)
        found = []
        for observation, seed in zip(observations, seeds):
            level = float(np.asarray(observation["image"][0], np.float64).mean() + observation["state"][0])
            found.append(np.tile([level, float(seed)], (4, 1)))
        return found


def toy_observation(brightness: int = 10, state: float = 0.25, lang: str = "up"):
    return {"image": [Image.new("RGB", (24, 16), (brightness,) * 3)], "lang": lang, "state": [state]}


@pytest.fixture
def toy():
    """The class, and a function that makes observations for it."""
    return ToyPolicy, toy_observation


@pytest.fixture(scope="session")
def run():
    return RUN


@pytest.fixture(scope="module")
def llava_observation():
    with np.load(RUN.parents[1] / "llava_expected.npz") as file:
        image, lang, state = Image.fromarray(file["image"]), file["lang"].item(), file["state"]
    return {"image": [image], "lang": lang, "state": state}
