"""The recording that the documentation shows: small, successful, and of a policy that looks somewhere."""

from pathlib import Path

import numpy as np
import pytest

from vla_bench.evaluation.rollout import Recording

PATH = Path(__file__).parents[2] / "nbs" / "viz" / "recording.npz"


@pytest.fixture(scope="module")
def recording():
    return Recording.load(PATH)


def test_the_file_is_small():
    assert PATH.stat().st_size < 200_000


def test_the_episode_succeeded(recording):
    assert recording.success


def test_every_frame_has_its_state_and_attention(recording):
    count = len(recording.frames)
    assert recording.frames.shape == (count, 1, 96, 96, 3)
    assert len(recording.states) == len(recording.attention) == len(recording.word_attention) == count
    assert len(recording.actions) == count - 1


def test_the_attention_is_trained(recording):
    """An untrained policy spreads its attention evenly; this one has a clear maximum in its first frame."""
    first = recording.attention[0]
    assert first.max() > 3 * first.mean()


def test_saving_and_loading_keeps_every_array(recording, tmp_path):
    recording.save(tmp_path / "again.npz")
    again = Recording.load(tmp_path / "again.npz")
    assert all(np.array_equal(vars(again)[name], value) for name, value in vars(recording).items())
    assert [path.name for path in tmp_path.iterdir()] == ["again.npz"]
