"""Every action mode is exactly undone, over chunk boundaries and padding, and never done twice."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_bench.data.action_modes import (
    MODES,
    action_statistics,
    decode_actions,
    encode_actions,
    encode_state,
    encoding_from_dict,
    encoding_to_dict,
    make_encoding,
)
from vla_bench.data.lerobot import window
from vla_bench.data.normalize import Normalizer
from vla_bench.data.parts import Part
from vla_bench.data.robots import known_robots, read_robot
from vla_bench.data.rotations import ROTATIONS, convert_rotation, read_rotation

CASES = int(os.environ.get("VLA_BENCH_CASES", "20"))
STARTS = [0, 9, 10, 31]  # three episodes, one of a single frame

POSITION = Part("eef_position", ("x", "y", "z"), "position", unit="m")
ROTATION = Part("eef_rotation", ("rx", "ry", "rz"), "rotation", rotation="axis_angle")
YAW = Part("base_yaw", ("yaw",), "angle", unit="rad")
ARM = Part("arm", ("j0", "j1"), "joint", unit="rad")
GRIPPER = Part("gripper", ("gripper",), "gripper", gripper="positive_opens")
ACTION = (POSITION, ROTATION, YAW, ARM, GRIPPER)
QUATERNION = replace(ROTATION, dims=("qw", "qx", "qy", "qz"), rotation="quaternion_wxyz")
FINGERS = replace(GRIPPER, dims=("left", "right"))
STATE = (FINGERS, ARM, QUATERNION, YAW, POSITION)  # in another order than the action


def episodes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions [N, 10] and states [N, 12] of a robot whose hand and base turn all the way round."""
    rng, count = np.random.default_rng(seed), STARTS[-1]
    place = rng.uniform(-1, 1, (count, 3))
    turns = Rotation.random(count, seed).as_rotvec()
    yaw = rng.uniform(-np.pi, np.pi, (count, 1))
    arm = rng.uniform(-6, 6, (count, 2))  # beyond half a turn: joints do not wrap
    actions = np.concatenate([place, turns, yaw, arm, rng.integers(0, 2, (count, 1))], axis=1)
    quaternions = Rotation.random(count, seed + 1).as_quat()[:, [3, 0, 1, 2]]
    rest = rng.uniform(-1, 1, (count, 8))
    states = np.concatenate([rest[:, :4], quaternions, rest[:, 4:]], axis=1)
    return actions, states


def chunks(actions: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.repeat(STARTS[1:], np.diff(STARTS))
    found = [window(frame, int(end), horizon) for frame, end in enumerate(ends)]
    return actions[np.stack([rows for rows, _ in found])], np.stack([pad for _, pad in found])


@pytest.mark.parametrize("case", range(CASES))
def test_decoding_undoes_encoding_for_every_chunk_of_every_episode(case):
    rng = np.random.default_rng(case)
    modes = {part.name: str(rng.choice(MODES)) for part in ACTION if part is not GRIPPER}
    encoding = make_encoding(ACTION, STATE, modes, str(rng.choice(["", *ROTATIONS])))
    actions, states = episodes(case)
    found, _ = chunks(actions, horizon=int(rng.integers(1, 25)))
    seen = encode_actions(encoding, found, states).astype(np.float32)
    assert np.abs(decode_actions(encoding, seen, states) - found).max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_one_chunk_and_many_take_the_same_path(mode):
    encoding = make_encoding(ACTION, STATE, mode, "rotation_6d")
    actions, states = episodes(0)
    found, _ = chunks(actions, horizon=7)
    together = encode_actions(encoding, found, states)
    for frame in range(len(found)):
        alone = encode_actions(encoding, found[frame], states[frame])
        np.testing.assert_array_equal(alone, together[frame])
        np.testing.assert_array_equal(
            decode_actions(encoding, alone, states[frame]),
            decode_actions(encoding, together, states)[frame],
        )


def test_what_was_not_normalised_by_others_survives_normalisation_too():
    encoding = make_encoding(ACTION, STATE, "relative", "rotation_6d")
    actions, states = episodes(3)
    found, is_pad = chunks(actions, horizon=6)
    seen = encode_actions(encoding, found, states)
    statistics = action_statistics(encoding, [(actions, states, STARTS)], horizon=6)
    np.testing.assert_allclose(statistics.q99, np.quantile(seen[~is_pad], 0.99, axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, seen[~is_pad].std(0), rtol=1e-9)
    normalizer = Normalizer(statistics, "min_max")
    scaled = normalizer.normalize(seen)
    assert np.abs(scaled[~is_pad]).max() <= 1 + 1e-6
    back = decode_actions(encoding, normalizer.unnormalize(scaled), states)
    assert np.abs(back - found).max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_hand_near_half_a_turn_comes_back_as_the_same_rotation(mode):
    rng = np.random.default_rng(0)
    hand = np.array([np.pi, 0, 0]) + 0.02 * rng.normal(size=(50, 8, 3))  # pointing down, as LIBERO's
    encoding = make_encoding((ROTATION,), (ROTATION,), mode, "rotation_6d")
    back = decode_actions(encoding, encode_actions(encoding, hand, hand[:, 0]), hand[:, 0])
    apart = read_rotation(hand, "axis_angle").inv() * read_rotation(back, "axis_angle")
    assert apart.magnitude().max() < 1e-6


def test_a_yaw_across_the_seam_is_a_small_step_and_a_joint_is_not():
    encoding = make_encoding((YAW, ARM), (YAW, ARM), "relative")
    seen = encode_actions(encoding, np.array([[-3.1, -3.1, 0]]), np.array([3.1, 3.1, 0]))[0]
    np.testing.assert_allclose(seen, [2 * np.pi - 6.2, -6.2, 0])


def test_padding_is_standing_still_in_delta_mode():
    encoding = make_encoding(ACTION, STATE, "delta")
    actions, states = episodes(0)
    found, is_pad = chunks(actions, horizon=12)
    seen = encode_actions(encoding, found, states)[is_pad][:, :9]
    np.testing.assert_allclose(seen, 0, atol=1e-12)


def test_the_state_is_rewritten_and_not_made_relative():
    encoding = make_encoding(ACTION, STATE, "relative", "axis_angle")
    _, states = episodes(0)
    seen = encode_state(encoding, states)
    np.testing.assert_array_equal(seen[:, :4], states[:, :4])
    np.testing.assert_allclose(
        seen[:, 4:7], convert_rotation(states[:, 4:8], "quaternion_wxyz", "axis_angle")
    )


@pytest.mark.parametrize("name", known_robots())
def test_what_a_robot_declares_as_a_change_is_not_made_relative_again(name):
    robot = read_robot(name)
    for part in robot.action:
        if part.reference == "delta":
            with pytest.raises(ValueError, match=f"'{part.name}'.*are changes already: leave it absolute"):
                make_encoding(robot.action, robot.state, {part.name: "relative"})


@pytest.mark.parametrize("name", ["aloha", "robotwin_aloha"])
def test_joints_of_a_shipped_robot_are_relative_and_back(name):
    robot = read_robot(name)
    encoding = make_encoding(robot.action, robot.state, "relative")
    rng = np.random.default_rng(0)
    found, states = rng.normal(size=(9, 20, 14)), rng.normal(size=(9, 14))
    seen = encode_actions(encoding, found, states)
    np.testing.assert_array_equal(seen[..., [6, 13]], found[..., [6, 13]])  # grippers
    np.testing.assert_allclose(seen[..., :6], found[..., :6] - states[:, None, :6])
    np.testing.assert_allclose(decode_actions(encoding, seen, states), found, atol=1e-12)


def test_an_encoding_read_from_a_checkpoint_is_the_same():
    encoding = make_encoding(ACTION, STATE, "delta", "rotation_6d_rows")
    assert encoding_from_dict(json.loads(json.dumps(encoding_to_dict(encoding)))) == encoding


def test_an_edited_encoding_is_refused():
    content = encoding_to_dict(make_encoding((POSITION,), (POSITION,), "relative"))
    content["action"][0]["reference"] = "delta"
    with pytest.raises(ValueError, match="are changes already"):
        encoding_from_dict(content)
