"""Frameworks whose actions are tokens: FAST and OpenVLA."""

import numpy as np
import pytest

from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.fast import FAST
from vla_bench.models.frameworks.openvla import OpenVLA
from vla_bench.models.frameworks.token_framework import TokenFramework

HEADS = {"FAST": "FAST", "OpenVLA": "Bins"}


@pytest.fixture(params=HEADS)
def wide(request, toy):
    """A framework that is wider than the robot."""
    head = {"type": HEADS[request.param], "first_token_id": 0}
    config = {
        "name": request.param,
        "vlm": {"base_vlm": str(toy.home / "qwen2_5_vl")},
        "action_horizon": toy.T,
    }
    config |= {"action_model": head, "max_action_dim": toy.D + 2}
    return build_framework(config, action_dim=toy.D, state_dim=0)


@pytest.fixture
def stateless(toy):
    """The samples without a state."""
    return [{key: value for key, value in e.items() if key != "state"} for e in toy.examples]


def test_the_codes_of_padded_actions_mean_the_padded_actions(wide, stateless):
    batch = wide.prepare(stateless)
    decoded = wide.codec.decode([[int(code) for code in row if code >= 0] for row in batch["codes"]])
    valid = ~batch["action_is_pad"].numpy()
    assert np.abs(decoded - batch["actions"].numpy())[valid].max() < 0.2


def test_the_loss_has_a_gradient(wide, stateless):
    wide(stateless)["action_loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in wide.parameters())


def test_predictions_have_the_robots_width(toy, wide, stateless):
    assert toy.predict(wide, stateless).shape == (3, toy.T, toy.D)


def test_tokens_and_codes_are_each_others_inverse(wide, stateless):
    codes = wide.prepare(stateless)["codes"]
    tokens, valid = wide.answer(codes)
    tokens = tokens.masked_fill(~valid, -1)
    if wide.stop is not None:
        tokens = tokens.masked_fill(tokens == wide.stop, -1)
    assert wide.codes(tokens) == [[int(code) for code in row if code >= 0] for row in codes]


def test_openvla_is_not_a_fast():
    assert issubclass(OpenVLA, TokenFramework) and not issubclass(OpenVLA, FAST)
