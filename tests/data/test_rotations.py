"""One rotation in seven forms: absolute numbers, each form against a matrix that is written down here."""

import numpy as np
import pytest

from vla_bench.data.rotations import (
    ROTATIONS,
    convert_rotation,
    read_rotation,
    wrap_angle,
    write_rotation,
)

COS, SIN = np.cos(0.5), np.sin(0.5)
# a turn of 0.5 rad about z after one of 0.3 rad about x: no two numbers of the matrix are alike
MATRIX = np.array([[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]]
)
HALF_Z, HALF_X = np.array([0, 0, np.sin(0.25), np.cos(0.25)]), np.array([np.sin(0.15), 0, 0, np.cos(0.15)])


def quaternion() -> np.ndarray:
    """The product of the two half turns by Hamilton's rule, x y z w."""
    (ax, ay, az, aw), (bx, by, bz, bw) = HALF_Z, HALF_X
    return np.array(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ]
    )


Q = quaternion()
ANGLE = 2 * np.arccos(Q[3])
WRITTEN = {
    "axis_angle": Q[:3] / np.sin(ANGLE / 2) * ANGLE,
    "euler_xyz": [0.3, 0.0, 0.5],
    "quaternion_xyzw": Q,
    "quaternion_wxyz": Q[[3, 0, 1, 2]],
    "rotation_6d": [*MATRIX[:, 0], *MATRIX[:, 1]],
    "rotation_6d_rows": [*MATRIX[0], *MATRIX[1]],
    "rotation_6d_interleaved": MATRIX[:, :2].reshape(-1),
}


def test_the_forms_have_so_many_numbers():
    assert ROTATIONS == {name: len(numbers) for name, numbers in WRITTEN.items()}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_form_is_read_and_written_as_its_definition_says(name):
    numbers = np.asarray(WRITTEN[name])
    np.testing.assert_allclose(read_rotation(numbers, name).as_matrix()[0], MATRIX, atol=1e-12)
    np.testing.assert_allclose(write_rotation(read_rotation(numbers, name), name)[0], numbers, atol=1e-12)


@pytest.mark.parametrize("source", WRITTEN)
@pytest.mark.parametrize("target", WRITTEN)
def test_every_form_becomes_every_other(source, target):
    values = np.tile(np.asarray(WRITTEN[source], np.float64), (2, 3, 1))
    found = convert_rotation(values, source, target)
    expected = np.tile(WRITTEN[target], (2, 3, 1))
    assert found.shape == expected.shape and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["rotation_6d", "rotation_6d_rows", "rotation_6d_interleaved"])
def test_what_a_model_predicts_becomes_the_nearest_rotation(name):
    """Two columns of any length and angle: the first keeps its direction, the second its side (Gram and Schmidt)."""
    first, second = np.array([0.0, 3, 0]), np.array([2.0, 1, 0])
    numbers = {
        "rotation_6d": [*first, *second],
        "rotation_6d_rows": [*first, *second],
        "rotation_6d_interleaved": np.stack([first, second], -1).reshape(-1),
    }[name]
    columns = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]]).T
    expected = columns.T if name.endswith("rows") else columns
    np.testing.assert_allclose(read_rotation(np.asarray(numbers), name).as_matrix()[0], expected, atol=1e-12)


@pytest.mark.parametrize("name", ["quaternion_xyzw", "quaternion_wxyz"])
def test_a_quaternion_is_written_with_a_real_part_that_is_not_negative(name):
    real = {"quaternion_xyzw": 3, "quaternion_wxyz": 0}[name]
    numbers = -np.asarray(WRITTEN[name])
    found = write_rotation(read_rotation(numbers, name), name)[0]
    assert found[real] > 0
    np.testing.assert_allclose(found, -numbers, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, count in ROTATIONS.items() if count > 3])
def test_a_row_of_zeros_is_named(name):
    rows = np.tile(np.asarray(WRITTEN[name], np.float64), (4, 1))
    rows[2:] = 0
    with pytest.raises(ValueError, match=f"row 2 is no {name}: all of its numbers are 0"):
        read_rotation(rows, name)
    rows[2:, 0] = 1e-3  # small, but a direction
    if name.startswith("quaternion"):
        assert len(read_rotation(rows, name)) == 4


@pytest.mark.parametrize("name", ["axis_angle", "euler_xyz"])
def test_three_zeros_are_no_turn(name):
    np.testing.assert_array_equal(read_rotation(np.zeros((1, 3)), name).as_matrix()[0], np.eye(3))


@pytest.mark.parametrize("call", [read_rotation, lambda values, name: write_rotation(None, name)])
def test_an_unknown_form_is_named_with_the_nearest(call):
    with pytest.raises(ValueError, match="unknown rotation 'rotation_6d_row'; did you mean 'rotation_6d_row"):
        call(np.zeros(6), "rotation_6d_row")


@pytest.mark.parametrize("shape", [(5,), (3, 2), (6, 1)])
def test_another_number_of_numbers_is_refused(shape):
    with pytest.raises(ValueError, match=rf"rotation_6d has 6 numbers, got an array of shape \[{shape[0]}"):
        read_rotation(np.ones(shape), "rotation_6d")


def test_the_same_form_keeps_every_bit():
    values = np.array([[3.0, 0.1, -7]])  # more than a whole turn: written anew it would be another number
    assert convert_rotation(values, "axis_angle", "axis_angle").tolist() == values.tolist()


def test_what_is_read_may_not_be_written_to():
    values = np.asarray(WRITTEN["quaternion_xyzw"])
    values.setflags(write=False)
    assert len(read_rotation(values, "quaternion_xyzw")) == 1


@pytest.mark.parametrize(
    "angle, expected",
    [
        (0.5, 0.5), (-0.5, -0.5), (np.pi, np.pi), (-np.pi, -np.pi), (3.5, 3.5 - 2 * np.pi),
        (-3.5, 2 * np.pi - 3.5), (7.0, 7 - 2 * np.pi), (20.0, 20 - 6 * np.pi), (-20.0, 6 * np.pi - 20),
    ],
)  # fmt: skip
def test_an_angle_goes_round(angle, expected):
    assert wrap_angle(np.array([angle]))[0] == pytest.approx(expected, abs=1e-12)
    assert abs(angle) > np.pi or wrap_angle(angle) == angle
