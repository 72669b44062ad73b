"""A run on a stream: the same wherever the files are, and bit for bit the same after an interruption."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.data.layout import Layout
from vla_bench.data.writer import LeRobotWriter
from vla_bench.training.data import DataSettings, open_data
from vla_bench.training.imitation import train


@pytest.fixture(scope="module")
def root(home, tmp_path_factory):
    """Eight episodes in four files, and the settings of the toy."""
    root, rng, layout = (
        tmp_path_factory.mktemp("stream") / "toy",
        np.random.default_rng(0),
        Layout(("x", "y")),
    )
    cameras = {"front": (32, 32)}
    options = {"cameras": cameras, "state": layout, "action": layout, "episodes_per_file": 2}
    with LeRobotWriter(root, fps=10, **options) as writer:
        for length in (5, 6, 7, 5, 6, 7, 5, 6):
            numbers = rng.normal(size=(length, 2))
            images = {"front": rng.integers(0, 255, (length, 32, 32, 3), np.uint8)}
            writer.add_episode(images=images, state=numbers, action=numbers, task="close the box")
    return root


def streamed(config, root, cache, url, **more):
    place = f"file://{root}" if url else str(root)
    options = {"datasets.vla_data.streaming": "true", "datasets.vla_data.buffer_size": "14", **more}
    words = [f"--datasets.vla_data.root {place}", *(f"--{key} {value}" for key, value in options.items())]
    return config(" ".join([*words, f"--datasets.vla_data.cache {cache}"] if url else words))


def weights(run):
    return load_file(run / "checkpoints/step_000006/model.safetensors")


def test_a_streamed_run_goes_on_bit_for_bit_and_is_the_same_from_a_url(config, root, tmp_path, losses):
    broken = train(streamed(config, root, tmp_path / "cache", url=True, run_id="broken"))
    straight = shutil.copytree(broken, tmp_path / "straight")
    shutil.rmtree(broken / "checkpoints/step_000006")
    train(load_config(broken, "--trainer.resume true"))
    here = train(streamed(config, root, tmp_path / "cache", url=False, run_id="here"))
    for other in (broken, here):
        assert losses(other) == losses(straight)
        assert all(torch.equal(weights(other)[name], value) for name, value in weights(straight).items())


def test_the_data_of_a_stream_are_those_of_the_folder(root, tmp_path):
    url = DataSettings(f"file://{root}", streaming=True, buffer_size=14, cache=str(tmp_path), held_out=0.25)
    here = DataSettings(str(root), streaming=True, buffer_size=14, held_out=0.25)
    ours, theirs = open_data(url, 4, seed=0), open_data(here, 4, seed=0)
    assert ours.held_out_episodes() == theirs.held_out_episodes() == [6, 7]  # the last ones
    assert {n: s["action"].to_dict() for n, s in ours.statistics.items()} == {
        n: s["action"].to_dict() for n, s in theirs.statistics.items()
    }
    rows = lambda data: [data.order(0).row_at(position) for position in range(90)]
    assert rows(ours) == rows(theirs)
    assert sorted(rows(ours)[: len(ours.train)]) == list(range(len(ours.train)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "s3://a"}, "set datasets.vla_data.streaming to true"),
        ({"root": "s3://a", "streaming": True}, "datasets.vla_data.cache must name a folder"),
        ({"mixture": [{"dataset": "a"}], "streaming": True}, "a mixture needs all of its files"),
        ({"root": "a", "buffer_size": 0}, "datasets.vla_data.buffer_size must be at least 1"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_before_anything_is_opened(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataSettings(**settings)
