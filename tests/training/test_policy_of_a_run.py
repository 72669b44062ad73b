"""What a policy takes from a run: its scales, its cameras, and nothing that was changed since."""

import json
import shutil

import numpy as np
import pytest
import torch

from vla_bench.serving.policy import Policy
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train


@pytest.fixture
def policy(straight) -> Policy:
    return Policy.from_pretrained(straight.folder)


def test_the_policy_gives_the_same_actions_for_the_same_seed(policy, observation):
    physical = policy.predict(observation(), seed=3)
    assert physical.shape == (4, 3) and physical.dtype == np.float64
    np.testing.assert_array_equal(policy.predict(observation(), seed=3), physical)


def test_the_policy_unnormalises_exactly(straight, policy, observation):
    physical = policy.predict(observation(), seed=3)
    statistics = json.loads((straight.folder / "dataset_statistics.json").read_text())["toy"]
    low, high = (np.array(statistics["action"][key]) for key in ("min", "max"))
    mean, std = (np.array(statistics["state"][key]) for key in ("mean", "std"))
    given = observation()
    state = ((np.array(given["state"]) - mean) / std).astype(np.float32)
    generator = torch.Generator().manual_seed(3)
    sample = {**given, "state": state, "dataset": "toy"}
    raw = policy.framework.predict_action([sample], generator=generator)["normalized_actions"][0]
    np.testing.assert_allclose(physical, low + (raw.astype(np.float64) + 1) / 2 * (high - low), atol=1e-6)


def test_a_policy_in_bfloat16_is_served_in_bfloat16(config):
    run = train(config("--framework.inference_model.vlm.dtype bfloat16"))
    assert {p.dtype for p in Policy.from_pretrained(run).framework.vlm.parameters()} == {torch.bfloat16}


def test_a_policy_refuses_what_it_was_not_trained_on(policy, observation):
    images = observation()["image"]
    for change, message in [
        ({"image": images[:1]}, "in this order: front, wrist"),
        ({"image": [images[0], images[1].resize((64, 64))]}, "'wrist' is (64, 64)"),
        ({"state": [0.1, 0.2, 0.3]}, "expected [2]: x, y"),
        ({"state": None}, "the policy reads x, y"),
        ({"imgae": images}, "unknown key 'imgae'"),
    ]:
        with pytest.raises(ValueError) as error:
            policy.predict(observation(**change), seed=0)
        assert message in str(error.value)


@pytest.fixture
def copied(straight, tmp_path):
    return shutil.copytree(straight.folder, tmp_path / "copy")


@pytest.mark.parametrize("file", ["framework.json", "vlm/tokenizer_config.json"])
def test_the_fingerprint_covers_all_that_a_policy_is_loaded_from(policy, copied, file):
    assert Policy.from_pretrained(copied).fingerprint == policy.fingerprint
    path = latest_checkpoint(copied) / file
    (latest_checkpoint(copied) / "manifest.json").unlink()  # the change is meant
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": "Please {lang}"}))
    assert Policy.from_pretrained(copied).fingerprint != policy.fingerprint


def test_a_policy_refuses_statistics_that_are_not_its_own(copied):
    path = copied / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    statistics["toy"]["action"]["mean"][1] += 1e-6
    path.write_text(json.dumps(statistics))
    with pytest.raises(ValueError, match="restore the file of the original run"):
        Policy.from_pretrained(copied)


def test_a_policy_without_its_statistics_is_refused(copied):
    (copied / "dataset_statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match="dataset_statistics.json"):
        Policy.from_pretrained(copied)
