"""Detectors at their edges: short episodes, few dimensions, and what must not look across episodes."""

import numpy as np
import pytest

from vla_bench.data.detectors import (
    Finding,
    action_kind,
    by_severity,
    changes,
    clipped_dimensions,
    dead_dimensions,
    duplicated_dimensions,
    frozen_dimensions,
    gripper_findings,
    gripper_ranges,
    has_before,
    idle_frames,
    idle_stretches,
    image_findings,
    instruction_findings,
    looks_like,
    matched_dimensions,
    outlier_episodes,
    outlier_lengths,
    repeated_frames,
    stale_statistics,
    stretches,
    time_findings,
)
from vla_bench.data.layout import Layout

RATE = 10


def everything(values, starts):
    """Every detector of columns, on action and state alike."""
    names = tuple(f"j{d}" for d in range(values.shape[1]))
    layouts = Layout(names), Layout(names)
    frames = np.concatenate([np.arange(n) for n in np.diff(starts)])
    return [
        *dead_dimensions(values, names, "state"),
        *frozen_dimensions(values, starts, names, "state", RATE),
        *clipped_dimensions(values, starts, names, "state"),
        *duplicated_dimensions(values, names, "state"),
        *time_findings(frames / RATE, frames, starts, RATE),
        *repeated_frames(values, starts, RATE),
        *idle_stretches(idle_frames(values, starts, RATE), starts),
        *outlier_episodes(values, starts, names, "state"),
        *outlier_lengths(starts, RATE),
        *action_kind(values, values, starts, layouts),
        *gripper_findings(values, values, starts, layouts, RATE),
        *gripper_ranges(values, starts, layouts[0]),
    ]


@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 1], [3, 1, 40], [1] * 50])
@pytest.mark.parametrize("dims", [1, 3])
def test_the_shortest_datasets_are_examined_without_an_error(lengths, dims):
    rng, starts = np.random.default_rng(0), np.cumsum([0, *lengths])
    for values in (rng.normal(size=(starts[-1], dims)), np.zeros((starts[-1], dims))):
        with np.errstate(all="raise"):
            assert all(isinstance(finding, Finding) for finding in everything(values, starts))


def test_nothing_is_seen_across_two_episodes():
    """Episodes that begin where the one before ended repeat no frame, hang nowhere and lose no time."""
    rng = np.random.default_rng(1)
    values = np.cumsum(rng.normal(size=(200, 3)), axis=0)
    values[np.arange(10, 200, 10)] = values[np.arange(9, 199, 10)]
    starts = np.arange(0, 201, 10)
    assert repeated_frames(values, starts, RATE) == []
    assert len(repeated_frames(values, np.array([0, 200]), RATE)) == 1
    assert (changes(values, starts)[starts[:-1]] == 0).all() and has_before(starts).sum() == 180


@pytest.mark.parametrize("seed", range(20))
def test_stretches_are_those_of_a_loop(seed):
    holds = np.random.default_rng(seed).random(50) < 0.6
    expected, begin = [], None
    for place, value in enumerate([*holds, False]):
        if value and begin is None:
            begin = place
        elif not value and begin is not None:
            expected.append((begin, place))
            begin = None
    assert list(zip(*(edge.tolist() for edge in stretches(holds)))) == expected


def test_a_joint_hangs_only_while_others_move():
    rng, starts = np.random.default_rng(2), np.array([0, 100])
    moving = np.cumsum(rng.normal(size=(100, 3)), axis=0)
    hangs, rests, short = moving.copy(), moving.copy(), moving.copy()
    hangs[30:45, 1], rests[30:45], short[30:38, 1] = hangs[30, 1], rests[30], short[30, 1]
    found = lambda values: [f.text for f in frozen_dimensions(values, starts, "abc", "state", RATE)]
    assert found(hangs) == ["state 'b' hangs for up to 1.4 s while others move, in episodes {episodes}"]
    assert found(rests) == found(short) == found(moving) == []


def test_a_gripper_may_rest_and_reach_its_ends():
    rng, starts = np.random.default_rng(3), np.array([0, 300])
    arm = np.cumsum(rng.normal(size=(300, 2)), axis=0)
    opening = np.clip(1.5 * np.sin(np.arange(300) / 10), -1, 1)[:, None]
    values = np.concatenate([arm, opening], axis=1)
    names = ("x", "y", "gripper")
    assert clipped_dimensions(values, starts, names, "action") == []
    assert len(clipped_dimensions(values, starts, ("x", "y", "z"), "action")) == 1
    assert frozen_dimensions(values, starts, names, "state", RATE) == []


def test_two_values_are_no_clipping():
    values = np.stack([np.arange(200) % 7, np.arange(200) // 20 % 2], axis=1).astype(float)
    assert clipped_dimensions(values, np.array([0, 200]), ("a", "b"), "action") == []


@pytest.mark.parametrize(
    ("offset", "scale", "severity"), [(0, 1, "warning"), (1, 1, "note"), (0, -2, "note")]
)
def test_copies_and_multiples_are_told_apart(offset, scale, severity):
    a = np.random.default_rng(4).normal(size=500)
    values = np.stack([a, offset + scale * a, a**3], axis=1)
    assert [f.severity for f in duplicated_dimensions(values, "abc", "state")] == [severity]


@pytest.mark.parametrize("noise", [0, 0.01])
@pytest.mark.parametrize("gain", [1.0, 5.0, 0.2])
def test_relative_actions_are_recognised_at_any_gain(noise, gain):
    rng, starts = np.random.default_rng(5), np.array([0, 400, 800])
    state = np.concatenate([np.sin(np.arange(400) / 30 + phase) for phase in (0, 2)])
    state = state + 0.0005 * rng.normal(size=800)
    following = np.concatenate([state[1:400], state[399:400], state[401:], state[-1:]])
    relative = gain * (following - state) + noise * gain * 0.03 * rng.normal(size=800)
    assert looks_like(relative, state, starts) == "relative"
    assert looks_like(following, state, starts) == "absolute"
    assert looks_like(rng.normal(size=800), state, starts) == ""
    assert looks_like(np.zeros(800), state, starts) == ""


def test_dimensions_are_matched_by_name_before_place():
    action, state = Layout(("y", "x", "gripper")), Layout(("x", "y", "z", "gripper"))
    assert matched_dimensions(action, state) == [(0, 1), (1, 0)]
    assert matched_dimensions(Layout(("dx", "dy")), Layout(("x", "y"))) == [(0, 0), (1, 1)]
    assert matched_dimensions(Layout(("a",)), Layout(("x", "y"))) == []


def test_idle_needs_a_second_without_motion():
    starts = np.array([0, 100])
    values = np.cumsum(np.ones((100, 1)), axis=0)
    values[40:55] = values[40]
    values[70:76] = values[70]
    assert np.flatnonzero(idle_frames(values, starts, RATE)).tolist() == list(range(41, 55))
    assert not idle_frames(np.ones((100, 1)), starts, RATE, relative=True).any()


@pytest.mark.parametrize("field", ["min", "max", "mean", "std"])
def test_each_statistic_is_compared(field):
    values = np.random.default_rng(6).normal(size=(300, 2)).astype(np.float32)
    true = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0, ddof=1)}
    stored = {name: value.tolist() for name, value in true.items()} | {"count": [300]}
    assert stale_statistics(stored, values, "ab", "here") == []
    stored[field][1] += 0.5
    assert stale_statistics(stored, values, "ab", "here")[0].text.startswith(f"here {field} of 'b' is ")
    stored[field][1] = float("nan")
    assert stale_statistics(stored, values, "ab", "here")[0].text.startswith(f"here {field} of 'b' is nan")


@pytest.mark.parametrize("text", ["task_1", "Task 3", "default", "N/A", "todo", "...", "12", "test", "None"])
def test_placeholders_are_no_instructions(text):
    found = instruction_findings({0: text}, np.zeros(5, int), np.array([0, 5]))
    assert [f.severity for f in found] == ["warning"] and found[0].text.startswith("placeholder")


@pytest.mark.parametrize(
    "text",
    ["pick up 3 blocks", "test the switch", "none of the cups may fall", "Öffne die Schublade", "打开抽屉"],
)
def test_ordinary_instructions_are_let_pass(text):
    assert instruction_findings({0: text}, np.zeros(5, int), np.array([0, 5])) == []


@pytest.mark.parametrize(
    "text", ["pick the {object}", "put it on <place>", "move [something]", "open %s", "go to $target"]
)
def test_unfilled_templates_are_found(text):
    found = instruction_findings({0: text}, np.zeros(5, int), np.array([0, 5]))
    assert [f.text.partition(":")[0] for f in found] == ["unfilled template"]


def test_a_still_image_is_none_while_the_robot_rests():
    film = np.random.default_rng(7).integers(0, 255, (20, 16, 16, 3), np.uint8)
    frozen = np.concatenate([film[:8], np.repeat(film[8:9], 12, axis=0)])
    moves = np.ones(20, bool)
    assert [f.name for f in image_findings(frozen, moves, "top")] == ["repeated images"]
    moves[9:] = False
    assert image_findings(frozen, moves, "top") == image_findings(film, np.ones(20, bool), "top") == []


def test_findings_are_sorted_by_severity_and_otherwise_stay():
    given = [Finding(s, n, "") for s, n in (("note", "a"), ("error", "b"), ("warning", "c"), ("error", "d"))]
    assert [f.name for f in by_severity(given)] == ["b", "d", "c", "a"]
