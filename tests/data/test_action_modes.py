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
    encoded_layout,
    encoding_from_dict,
    encoding_to_dict,
    make_encoding,
)
from vla_bench.data.lerobot import window
from vla_bench.data.normalize import Normalizer, compute_statistics
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


KIND_OF_PART = {
    "position": Part("position", ("p",), "position"),
    "rotation": Part("rotation", ("r0", "r1", "r2"), "rotation", rotation="axis_angle"),
    "joint": Part("joint", ("j",), "joint"),
    "angle": Part("angle", ("a",), "angle"),
    "velocity": Part("velocity", ("v",), "velocity"),
    "other": Part("other", ("o",), "other"),
    "gripper": Part("gripper", ("g",), "gripper", gripper="positive_opens"),
}


@pytest.mark.parametrize("kind", KIND_OF_PART)
@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_each_kind_becomes_these_numbers(kind, mode):
    """Two steps of 3 rad and -3 rad, measured from -2.5 rad: an angle goes round, a rotation turns, the rest subtract."""
    part = KIND_OF_PART[kind]
    if kind == "gripper" and mode != "absolute":
        with pytest.raises(ValueError, match="a gripper stays absolute"):
            make_encoding([part], [part], {"gripper": mode})
        return
    axis = np.array([0, 0, 1.0]) if kind == "rotation" else np.ones(1)
    encoding = make_encoding([part], [part], {part.name: mode})
    actions, state = np.outer([3.0, -3.0], axis), -2.5 * axis
    turn = 2 * np.pi if kind in ("rotation", "angle") else 0.0
    expected = {
        "absolute": [3.0, -3.0],
        "relative": [5.5 - turn, -0.5],
        "delta": [5.5 - turn, -6.0 + turn],
    }[mode]
    found = encode_actions(encoding, actions, state)
    np.testing.assert_allclose(found, np.outer(expected, axis), atol=1e-12)
    np.testing.assert_allclose(decode_actions(encoding, found, state), actions, atol=1e-12)


@pytest.mark.parametrize("mode", ["delta", "relative"])
def test_a_mode_for_all_leaves_grippers_as_they_are(mode):
    encoding = make_encoding(ACTION, STATE, mode)
    assert encoding.modes == (mode, mode, mode, mode, "absolute")
    assert make_encoding(ACTION, STATE).modes == ("absolute",) * 5
    assert make_encoding(ACTION, STATE, {"arm": mode}).modes == ("absolute",) * 3 + (mode, "absolute")


SAME = replace(POSITION, frame="base", reference="absolute")
REFUSED = [
    ({"arm": "relativ"}, ACTION, STATE, "unknown mode 'relativ'; did you mean 'relative'"),
    ({"amr": "delta"}, ACTION, STATE, "names 'amr', which is no part of the action; did you mean 'arm'"),
    ({"eef_position": "delta"}, [replace(SAME, reference="delta")], STATE, "are changes already"),
    ({"eef_position": "delta"}, [SAME], [ARM], "the state has no part of this name"),
    ({"eef_position": "delta"}, [SAME], [replace(SAME, kind="other")], "is position of 3 numbers, that of the state other of 3"),
    ({"eef_position": "delta"}, [SAME], [replace(SAME, dims=("x", "y"))], "position of 3 numbers, that of the state position of 2"),
    ({"eef_position": "delta"}, [SAME], [replace(SAME, unit="mm")], "its unit is 'm', that of the state 'mm'"),
    ({"eef_position": "delta"}, [SAME], [replace(SAME, frame="world")], "its frame is 'base', that of the state 'world'"),
    ({"eef_position": "delta"}, [SAME], [replace(SAME, reference="delta")], "its reference is 'absolute', that of the state 'delta'"),
    ({"eef_rotation": "delta"}, [replace(ROTATION, frame="base")], [replace(QUATERNION, frame="world")], "its frame is"),
]  # fmt: skip


@pytest.mark.parametrize("mode, action, state, message", REFUSED, ids=lambda value: str(value)[:30])
def test_an_encoding_that_cannot_be_is_refused(mode, action, state, message):
    with pytest.raises(ValueError) as error:
        make_encoding(action, state, mode)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "own, other",
    [
        (SAME, replace(SAME, unit="unknown")), (replace(SAME, frame="unknown"), SAME),
        (replace(ROTATION, unit="rad"), replace(QUATERNION, unit="1")),
    ],
)  # fmt: skip
def test_what_is_unknown_or_written_otherwise_fits(own, other):
    assert make_encoding([own], [other], {own.name: "delta"}).modes == ("delta",)


def test_an_unknown_rotation_of_the_model_is_refused():
    with pytest.raises(ValueError, match="unknown rotation 'rotation_6'; did you mean 'rotation_6d'"):
        make_encoding(ACTION, STATE, rotation="rotation_6")


def test_numbers_of_another_width_are_refused():
    encoding = make_encoding(ACTION, STATE, "relative", "rotation_6d")
    actions, state = np.zeros((4, 10)), np.ones(12)
    encoded = encode_actions(encoding, actions, state)
    assert encoded.shape == (4, 13)
    for call, message in (
        (
            lambda: encode_actions(encoding, actions[:, 1:], state),
            r"the action has the shape \[4, 9\], expected 10",
        ),
        (
            lambda: encode_actions(encoding, actions[0], state),
            r"the action has the shape \[10\], expected 10",
        ),
        (
            lambda: encode_actions(encoding, actions, state[1:]),
            r"the state has the shape \[11\], expected 12",
        ),
        (
            lambda: decode_actions(encoding, encoded[:, 1:], state),
            r"the model's action has the shape \[4, 12\]",
        ),
        (lambda: decode_actions(encoding, encoded, state[1:]), r"the state has the shape \[11\]"),
        (lambda: encode_state(encoding, state[1:]), r"the state has the shape \[11\]"),
        (
            lambda: encode_actions(encoding, actions, None),
            "'eef_position' is relative to the state, and there is no state",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    plain = make_encoding(ACTION, STATE)
    assert (encode_actions(plain, actions, None) == actions).all()


def test_the_layout_of_what_the_model_sees():
    encoding = make_encoding(ACTION, STATE, {"arm": "relative", "eef_position": "delta"}, "rotation_6d")
    action, state = encoded_layout(encoding), encoded_layout(encoding, "state")
    turned = tuple(f"eef_rotation_{i}" for i in range(6))
    assert action.names == ("x", "y", "z", *turned, "yaw", "j0", "j1", "gripper")
    assert state.names == ("left", "right", "j0", "j1", *turned, "yaw", "x", "y", "z")
    assert (action.kind, state.kind, action.rotation, state.rotation) == (
        "unknown",
        "absolute",
        *["rotation_6d"] * 2,
    )
    for mode, kind in (("absolute", "absolute"), ("delta", "delta"), ("relative", "delta")):
        assert encoded_layout(make_encoding(ACTION, STATE, mode)).kind == kind
    assert encoded_layout(make_encoding(ACTION, STATE)).names[3:6] == ("rx", "ry", "rz")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("horizon", [1, 4])
def test_statistics_are_those_of_all_chunks_without_their_padding(mode, horizon):
    encoding = make_encoding(ACTION, STATE, mode, "rotation_6d")
    tables, seen = [], []
    for seed in (0, 1):
        actions, states = episodes(seed)
        tables.append((actions, states, STARTS))
        found, is_pad = chunks(actions, horizon)
        seen.append(encode_actions(encoding, found, states)[~is_pad])
    expected = compute_statistics(seen)
    statistics = action_statistics(encoding, tables, horizon)
    for name in ("min", "max", "mean", "std", "q01", "q99"):
        np.testing.assert_allclose(vars(statistics)[name], vars(expected)[name], atol=1e-12)
    assert statistics.count == expected.count == sum(len(each) for each in seen)


def test_what_a_file_holds_is_plain():
    encoding = make_encoding(ACTION, STATE, {"arm": "delta"}, "rotation_6d")
    content = encoding_to_dict(encoding)
    assert (
        content["modes"] == ["absolute"] * 3 + ["delta", "absolute"] and content["rotation"] == "rotation_6d"
    )
    assert content["action"][3] == {
        "name": "arm", "dims": ["j0", "j1"], "kind": "joint", "unit": "rad", "frame": "unknown", "rotation": "none",
        "gripper": "none", "reference": "absolute",
    }  # fmt: skip
    assert encoding_from_dict(json.loads(json.dumps(content))) == encoding
    for key in ("action", "state", "modes", "rotation"):
        with pytest.raises(ValueError, match="the encoding of the actions is incomplete"):
            encoding_from_dict({k: v for k, v in content.items() if k != key})


@pytest.mark.parametrize("kind", [kind for kind in KIND_OF_PART if kind != "rotation"])
@pytest.mark.parametrize("mode", MODES)
def test_how_rotations_are_seen_is_nothing_to_other_parts(kind, mode):
    part = KIND_OF_PART[kind]
    mode = "absolute" if kind == "gripper" else mode
    plain, turned = (make_encoding([part], [part], {part.name: mode}, name) for name in ("", "rotation_6d"))
    actions, state = np.array([[0.5], [-0.3]]), np.array([0.1])
    encoded = encode_actions(turned, actions, state)
    assert encoded.tolist() == encode_actions(plain, actions, state).tolist()
    np.testing.assert_allclose(decode_actions(turned, encoded, state), actions, atol=1e-12)
    assert encode_state(turned, state).tolist() == [0.1] and encoded_layout(turned).names == part.dims
