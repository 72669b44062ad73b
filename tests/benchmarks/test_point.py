"""The benchmark that needs no simulator: absolute values of its scenes, its images and its outcome."""

import numpy as np
import pytest

from vla_bench.benchmarks.point import COLOURS, PointReach, draw_table


def environment(task="reach-red", seed=3, **arguments):
    one = PointReach(**arguments).make(task, seed)
    return one, one.reset()


def test_a_seed_has_this_scene():
    one, seen = environment()
    assert one.squares["reach-red"].tolist() == [28, 28] and one.squares["reach-blue"].tolist() == [20, 12]
    assert seen["state"].tolist() == [20, 28]


def test_the_dot_and_the_squares_never_share_a_cell():
    for seed in range(60):
        one, _ = environment(seed=seed)
        places = {tuple(place) for place in (one.position, *one.squares.values())}
        assert len(places) == 3 and all(value in (4, 12, 20, 28) for place in places for value in place)


def test_the_same_seed_is_the_same_scene_for_both_tasks():
    red, blue = environment("reach-red")[1], environment("reach-blue")[1]
    assert np.array_equal(red["image"][0], blue["image"][0]) and np.array_equal(red["state"], blue["state"])
    assert (red["lang"], blue["lang"]) == ("go to the red square", "go to the blue square")


def test_the_image_shows_each_thing_where_it_is():
    one, seen = environment()
    pixels = np.asarray(seen["image"][0]).astype(int)
    shown = {(255, 255, 255): one.position} | {COLOURS[task]: place for task, place in one.squares.items()}
    for colour, (row, column) in shown.items():
        block = np.argwhere((pixels == colour).all(-1))
        assert block.mean(0).tolist() == [row, column] and len(block) == 9
    assert (pixels == 30).all(-1).sum() == 32 * 32 - 27


def test_what_lies_at_an_edge_is_cut_off_there():
    pixels = np.asarray(draw_table({(9, 9, 9): np.array([0.0, 31.0])}))
    assert np.argwhere((pixels == 9).all(-1)).tolist() == [[0, 30], [0, 31], [1, 30], [1, 31]]


def test_a_later_thing_covers_an_earlier_one():
    here = np.array([5.0, 5.0])
    assert np.asarray(draw_table({(1, 1, 1): here, (2, 2, 2): here}))[5, 5].tolist() == [2, 2, 2]


@pytest.mark.parametrize("action, moved", [((0.5, -0.25), (1.0, -0.5)), ((3, -1), (2, -2)), ((0, 0), (0, 0))])
def test_an_action_moves_row_and_column_by_two_pixels_at_most(action, moved):
    one, seen = environment()
    step = one.step(np.array(action))
    assert (step.observation["state"] - seen["state"]).tolist() == list(moved)


def test_the_dot_stays_on_the_table():
    one, _ = environment()
    for _ in range(20):
        step = one.step(np.array([-1.0, 1.0]))
    assert step.observation["state"].tolist() == [0, 31]


@pytest.mark.parametrize("away, success", [((2.0, 0.0), True), ((0.0, -2.0), True), ((2.0, 2.0), True),
                                           ((2.01, 0.0), False), ((0.0, 2.01), False)])  # fmt: skip
def test_success_is_to_be_within_two_pixels_of_the_named_square(away, success):
    for task, other in (("reach-red", "reach-blue"), ("reach-blue", "reach-red")):
        one, _ = environment(task)
        one.squares[task], one.squares[other] = np.array([12.0, 20.0]), np.array([28.0, 4.0])
        one.position = one.squares[task] + away
        step = one.step(np.zeros(2))
        assert (step.success, step.done) == (success, success)
        one.position = one.squares[other] + away
        assert not one.step(np.zeros(2)).success


def test_an_episode_ends_with_its_last_step():
    one, _ = environment(max_steps=3)
    one.squares["reach-red"] = one.position + 20
    assert [one.step(np.zeros(2)).done for _ in range(3)] == [False, False, True]


def test_nothing_is_drawn_when_nobody_looks():
    one, _ = environment()
    assert one.step(np.zeros(2), observe=False).observation is None


def test_a_reset_puts_everything_back():
    one, seen = environment(max_steps=3)
    for _ in range(2):
        one.step(np.ones(2))
    again = one.reset()
    assert np.array_equal(again["state"], seen["state"]) and one.steps == 0


def test_a_state_that_was_handed_out_does_not_move():
    one, seen = environment()
    before = seen["state"].copy()
    one.step(np.ones(2))
    assert np.array_equal(seen["state"], before)


@pytest.mark.parametrize("arguments", [{"cameras": ("front",)}, {"cameras": ("top", "top")}, {"image_size": (32, 64)},
                                       {"tasks": ["reach-green"]}], ids=str)  # fmt: skip
def test_what_it_does_not_have_is_refused(arguments):
    with pytest.raises(ValueError, match="point has"):
        PointReach(**arguments)


def test_what_it_declares():
    spec = PointReach(max_steps=17, tasks=["reach-blue"]).spec
    assert (spec.name, spec.cameras, spec.image_size, spec.control_rate, spec.max_steps) == (
        "point", ("top",), (32, 32), 10.0, 17)  # fmt: skip
    assert (spec.action.kind, spec.state.kind) == ("delta", "absolute")
    assert spec.action.names == spec.state.names == ("row", "column")
    assert (PointReach().spec.max_steps, PointReach().tasks()) == (40, ["reach-red", "reach-blue"])
    assert PointReach(tasks=["reach-blue"]).tasks() == ["reach-blue"]
