"""Detectors at their edges: short episodes, few dimensions, and what must not look across episodes."""

import warnings

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
    episode_of,
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
    same_cameras,
    some,
    spelt_twice,
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


@pytest.mark.parametrize(
    "count, most, expected",
    [(0, 5, ""), (5, 5, "0, 1, 2, 3, 4"), (6, 5, "0, 1, 2, 3, 4 and 1 more"), (9, 2, "0, 1 and 7 more")],
)
def test_the_first_few_of_many(count, most, expected):
    assert some(iter(range(count)), most) == expected
    assert most != 5 or some(range(count)) == expected


def test_a_finding_is_one_line():
    assert str(Finding("note", "name", "text", (3,))) == "note    name: text"
    assert str(Finding("warning", "name", "text")) == "warning name: text"


def test_rows_belong_to_episodes():
    starts = np.array([0, 3, 4, 9])
    assert episode_of(np.array([8, 0, 3, 2, 4]), starts).tolist() == [0, 1, 2]
    assert (
        episode_of(np.array([2, 3]), starts).tolist() == [0, 1]
        and episode_of(np.array([], int), starts).size == 0
    )


def test_changes_are_differences_within_an_episode():
    values = np.array([[5.0, 1], [7, 1], [4, 9], [0, 0]])
    assert changes(values, np.array([0, 2, 4])).tolist() == [[0, 0], [2, 0], [0, 0], [-4, -9]]
    assert has_before(np.array([0, 2, 4])).tolist() == [False, True, False, True]


def texts(findings) -> list[str]:
    return [str(finding) for finding in findings]


WALK = np.cumsum(np.random.default_rng(7).normal(size=(1000, 4)), axis=0)
ALONE = np.array([0, 1000])


def test_a_dead_dimension_is_told_with_its_value_and_a_rare_move_with_its_range():
    values = WALK.copy()
    values[:, 1] = 2.5
    values[:, 2] = 1.0
    values[[3, 500], 2] = -4, 7
    assert texts(dead_dimensions(values, tuple("abcd"), "action")) == [
        "warning dead dimension: action 'b' is always 2.5",
        "warning dead dimension: action 'c' is 1 in 98% of the frames, its range is -4 to 7: the mode q99 cannot scale it",
    ]


@pytest.mark.parametrize("rows, found", [(9, False), (10, True), (40, True)])
def test_a_dimension_hangs_from_a_second_on(rows, found):
    values = WALK.copy()
    values[500 : 501 + rows, 2] = values[500, 2]
    expected = f"state 'c' hangs for up to {rows / RATE:.1f} s while others move, in episodes {{episodes}}"
    starts = np.array([0, 400, 1000])
    findings = frozen_dimensions(values, starts, tuple("abcd"), "state", RATE)
    assert [(f.text, f.episodes) for f in findings] == ([(expected, (1,))] if found else [])
    assert (
        frozen_dimensions(values, starts, tuple("abcd"), "state", RATE, seconds=rows / RATE) != []
    ) is True


def test_a_hang_while_nothing_else_moves_is_none():
    values = WALK.copy()
    values[500:531] = values[500]
    assert frozen_dimensions(values, ALONE, tuple("abcd"), "state", RATE) == []
    values[515:531, 0] += np.arange(16)  # exactly half of the time another one moves
    assert frozen_dimensions(values, ALONE, tuple("abcd"), "state", RATE) == []
    values[514:531, 0] += np.arange(17)
    assert len(frozen_dimensions(values, ALONE, tuple("abcd"), "state", RATE)) == 3


@pytest.mark.parametrize("count, found", [(9, False), (10, True)])
@pytest.mark.parametrize("end", [0, -1])
def test_a_dimension_is_clipped_from_one_frame_of_a_hundred_on(count, found, end):
    values = np.random.default_rng(0).normal(size=(1000, 2))
    bound = np.sort(values[:, 0])[end]
    values[100 : 101 + count, 0] = bound
    findings = texts(clipped_dimensions(values, ALONE, ("a", "b"), "action"))
    share = f"{count / 1000:.0%}"
    text = f"warning clipped dimension: action 'a' stays at {bound:g}, the end of its range, in {share} of the frames"
    assert findings == ([text] if found else [])


def test_both_ends_are_told_and_their_frames_added():
    values = np.random.default_rng(0).normal(size=(1000, 2))
    low, high = values[:, 0].min(), values[:, 0].max()
    values[100:121, 0], values[300:331, 0] = low, high
    (finding,) = clipped_dimensions(values, ALONE, ("a", "b"), "state")
    assert (
        finding.text == f"state 'a' stays at {low:g} or {high:g}, the end of its range, in 5% of the frames"
    )


@pytest.mark.parametrize("levels, found", [(19, False), (20, True)])
def test_so_few_values_are_no_clipping(levels, found):
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.integers(0, levels, 1000), rng.normal(size=1000)]).astype(float)
    values[100:121, 0] = levels - 1
    assert (clipped_dimensions(values, ALONE, ("a", "b"), "state") != []) == found


def test_copies_and_multiples_are_told_by_name():
    values = np.column_stack([WALK[:, 0], WALK[:, 1], WALK[:, 0], -3 * WALK[:, 1] + 1, np.zeros(1000)])
    assert texts(duplicated_dimensions(values, tuple("abcde"), "state")) == [
        "warning duplicated dimension: state 'c' is a copy of 'a'",
        "note    duplicated dimension: state 'd' is proportional to 'b'",
    ]
    values[:, 2] += 0.01 * np.random.default_rng(0).normal(size=1000)
    assert [f.severity for f in duplicated_dimensions(values, tuple("abcde"), "state")] == ["note", "note"]


def time(steps: int = 40, episodes: int = 2, rate: float = 12.5) -> tuple:
    frames = np.tile(np.arange(steps), episodes)
    return frames / rate, frames, np.arange(episodes + 1) * steps, rate


def of_time(change=lambda times, frames: None) -> list[str]:
    times, frames, starts, rate = time()
    change(times, frames)
    return [(f.severity, f.name, f.text, f.episodes) for f in time_findings(times, frames, starts, rate)]


def test_sound_time_stamps_have_no_finding_whenever_they_begin():
    def later(times, frames):
        times += 17.5

    assert of_time() == [] and of_time(later) == []


def test_time_that_stands_still_or_runs_back_is_told_with_its_episode():
    def still(times, frames):
        times[[45, 50]] = times[[44, 49]]

    expected = "2 time stamps are not later than the one before, in episodes {episodes}"
    assert of_time(still)[0] == ("error", "time stamps", expected, (1,))


@pytest.mark.parametrize(
    "factor, told", [(1.0099, None), (1.0102, "12.37"), (0.9902, None), (0.9898, "12.63"), (2, "6.25")]
)
def test_another_rate_is_told_from_one_percent_on(factor, told):
    times, frames, starts, rate = time(30)
    found = [f.text for f in time_findings(times * factor, frames, starts, rate)]
    assert found == ([] if told is None else [f"they run at {told} Hz, info.json says 12.5 Hz"])


@pytest.mark.parametrize("gap, lost", [(1.45, None), (1.55, 1), (3.0, 2), (3.9, 3)])
def test_missing_frames_are_counted(gap, lost):
    def change(times, frames):
        times[50:80] += (gap - 1) / 12.5

    found = [
        text for _, name, text, episodes in of_time(change) if name == "dropped frames" and episodes == (1,)
    ]
    assert found == (
        [] if lost is None else [f"{lost} frames are missing between others, in episodes {{episodes}}"]
    )


def test_frames_are_counted_from_0_in_each_episode():
    def change(times, frames):
        frames[40:] += 1

    assert of_time(change) == [
        ("error", "time stamps", "frame_index does not count from 0 in episodes {episodes}", (1,))
    ]


@pytest.mark.parametrize("drift, found", [(0.49, False), (0.51, True)])
def test_a_drift_is_told_from_half_a_frame_on(drift, found):
    def change(times, frames):
        times[40:] += np.linspace(0, drift / 12.5, 40)

    text = f"they drift from 12.5 Hz by up to {drift / 12.5:.3g} s, in episodes {{episodes}}"
    assert of_time(change) == ([("warning", "time stamps", text, (1,))] if found else [])


@pytest.mark.parametrize("count, found", [(49, False), (50, True), (51, True)])
def test_rows_repeat_from_one_of_twenty_on(count, found):
    values = WALK.copy()
    for row in range(1, 2 * count, 2):
        values[500 - 100 + row] = values[500 - 100 + row - 1]
    text = f"{count / 1000:.0%} of the rows repeat the one before: recorded faster than the robot reports?"
    findings = repeated_frames(values, np.array([0, 400, 1000]), RATE)
    assert [(f.severity, f.text, f.episodes) for f in findings] == (
        [("warning", text, (1,))] if found else []
    )


@pytest.mark.parametrize("rest, found", [(9, True), (10, False), (30, False)])
def test_a_long_rest_is_no_repetition(rest, found):
    values = WALK.copy()
    for begin in range(0, 1000, 40):
        values[begin : begin + rest + 1] = values[begin]
    assert (repeated_frames(values, ALONE, RATE) != []) == found
    assert (
        repeated_frames(values, ALONE, RATE, seconds=5) != []
        and repeated_frames(values, ALONE, RATE, share=0.9) == []
    )


@pytest.mark.parametrize("rest, found", [(9, False), (10, True), (15, True)])
def test_idle_frames_are_those_of_a_second_without_motion(rest, found):
    values = np.cumsum(np.ones((100, 1)), axis=0)
    values[50 : 51 + rest] = values[50]
    expected = np.zeros(100, bool)
    expected[51 : 51 + rest] = found
    assert idle_frames(values, np.array([0, 100]), RATE).tolist() == expected.tolist()
    motion = np.ones((100, 1))
    motion[51 : 51 + rest] = 0
    assert idle_frames(motion, np.array([0, 100]), RATE, relative=True).tolist() == expected.tolist()


@pytest.mark.parametrize("slow, found", [(0.019, True), (0.021, False)])
def test_a_fiftieth_of_brisk_motion_is_none(slow, found):
    motion = np.ones((100, 2))
    motion[20:60] = slow, 0
    assert idle_frames(motion, np.array([0, 100]), RATE, relative=True).any() == found


def test_idle_stretches_tell_how_many_episodes_begin_and_end_so():
    starts, idle = np.array([0, 20, 40, 60]), np.zeros(60, bool)
    idle[1:5] = idle[21:25] = idle[35:40] = True
    (finding,) = idle_stretches(idle, starts)
    assert finding.episodes == (0, 1) and finding.text == (
        "in 22% of the frames nothing moves for a second or more; 2 of 3 episodes begin so, 1 end so; episodes {episodes}"
    )
    for count, found in ((2, False), (3, True), (4, True)):
        idle = np.zeros(60, bool)
        idle[10 : 10 + count] = True
        assert (idle_stretches(idle, starts) != []) == found
    assert idle_stretches(np.array([True]), np.array([0, 1])) != []  # an episode of one frame


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("far, found", [(0.9, False), (1.1, True)])
def test_an_outlier_lies_further_outside_than_the_range_is_wide(side, far, found):
    values = np.column_stack([np.linspace(0, 1, 1000), np.zeros(1000)])
    values[700, 0] = 0.5 + side * (0.49 + far * 0.98)
    findings = outlier_episodes(values, np.array([0, 400, 1000]), ("a", "b"), "state")
    q01, q99 = np.quantile(values[:, 0], [0.01, 0.99])
    text = f"state 'a' reaches {values[700, 0]:.4g}, 98% of the frames lie in {q01:.4g} to {q99:.4g}; episodes {{episodes}}"
    assert [(f.severity, f.text, f.episodes) for f in findings] == (
        [("warning", text, (1,))] if found else []
    )
    assert (outlier_episodes(values, ALONE, ("a", "b"), "state", ranges=0.5) != []) is True


@pytest.mark.parametrize("length, found", [(185, True), (180, False), (56, False), (54, True)])
def test_an_odd_length_is_six_times_the_spread_away(length, found):
    """All others are alike, so the spread is its least, 0.1: a factor of exp(0.6) = 1.82."""
    starts = np.cumsum([0, 100, 100, length, 100, 100])
    findings = outlier_lengths(starts, 12.5)
    text = f"{length / 12.5:.3g} s long, the median is 8 s: episodes {{episodes}}"
    assert [(f.severity, f.name, f.text, f.episodes) for f in findings] == (
        [("warning", "outlier episodes", text, (2,))] if found else []
    )
    assert outlier_lengths(np.delete(starts, -1), 12.5) == []  # of four episodes none is odd


def test_the_spread_of_lengths_is_their_own_where_it_is_larger():
    lengths = np.round(100 * np.exp([-0.4, -0.2, 0, 0.2, 0.4, 1.1])).astype(int)
    assert outlier_lengths(np.cumsum([0, *lengths]), RATE) == []
    assert outlier_lengths(np.cumsum([0, *lengths]), RATE, times=2) != []


STATE = np.sin(np.arange(300) / 9) + 0.3 * np.sin(np.arange(300) / 2.3)
LIVES = np.array([0, 150, 300])


@pytest.mark.parametrize("off, expected", [(0.0, "absolute"), (0.4, "absolute"), (0.6, "")])
def test_an_action_is_absolute_within_half_a_deviation_of_the_next_state(off, expected):
    action = np.append(STATE[1:], 0) + off * STATE.std()
    assert looks_like(action, STATE, LIVES) == expected


def test_an_action_is_relative_where_it_goes_with_the_change():
    change = np.append(np.diff(STATE), 0)
    assert looks_like(change, STATE, LIVES) == "relative"
    assert looks_like(100 * change, STATE, LIVES) == "relative"  # correlated by more than 0.9
    assert looks_like(-change, STATE, LIVES) == ""
    noise = np.random.default_rng(0).normal(size=300) * change.std()
    assert looks_like(change + noise, STATE, LIVES) == "relative"  # by more than 0.5, and small
    assert looks_like(100 * (change + noise), STATE, LIVES) == ""  # so, and far larger than the state


@pytest.mark.parametrize("count, expected", [(3, ""), (4, "absolute")])
def test_of_so_few_frames_nothing_is_told(count, expected):
    state = STATE[:count]
    assert looks_like(np.append(state[1:], 0), state, np.array([0, count])) == expected


def test_what_stands_still_is_neither():
    change = np.append(np.diff(STATE), 0)
    for action, state in ((np.zeros(300), STATE), (change, np.ones(300))):
        assert looks_like(action, state, LIVES) == ""


def kind_of(absolute: int, relative: int, other: int, declared="unknown", mode="absolute") -> list[str]:
    """The finding for so many dimensions of each kind."""
    rng = np.random.default_rng(0)
    total = absolute + relative + other
    state = np.column_stack([STATE] * total)
    following, change = np.append(STATE[1:], 0), np.append(np.diff(STATE), 0)
    columns = [following] * absolute + [change] * relative + [20 * rng.normal(size=300) for _ in range(other)]
    names = tuple(f"d{i}" for i in range(total))
    layouts = Layout(names, kind=declared), Layout(names)
    return texts(action_kind(np.column_stack(columns), state, LIVES, layouts, mode))


def test_the_kind_of_most_dimensions_is_told():
    assert kind_of(2, 0, 2) == [] == kind_of(1, 1, 0)  # half of them is not most
    assert kind_of(1, 0, 3) == [] == kind_of(0, 1, 3) == kind_of(0, 0, 3)
    assert kind_of(2, 0, 1) == ["note    kind of action: 2 of 3 dimensions look absolute"]
    assert kind_of(1, 3, 0) == ["note    kind of action: 3 of 4 dimensions look relative"]


def test_the_kind_is_compared_with_what_is_declared():
    says = "error   kind of action: 3 of 3 dimensions look"
    assert kind_of(3, 0, 0, "absolute") == [] == kind_of(0, 3, 0, "delta")
    assert kind_of(3, 0, 0, "delta") == [f"{says} absolute, the dataset declares 'delta'"]
    assert kind_of(0, 3, 0, "absolute") == [f"{says} relative, the dataset declares 'absolute'"]


@pytest.mark.parametrize("mode", ["delta", "relative"])
@pytest.mark.parametrize("declared", ["delta", "absolute", "unknown"])
def test_relative_twice_is_an_error_whatever_is_declared(mode, declared):
    assert kind_of(0, 3, 0, declared, mode) == [
        f"error   actions relative twice: 3 of 3 dimensions look relative already, and the configuration makes them "
        f"relative once more ({mode})"
    ]
    assert kind_of(3, 0, 0, "absolute", mode) == []


def hand(sign: float, lengths=(60, 60, 60), odd=()) -> tuple:
    """A gripper's command of ±1 and an opening that follows within half a second; `odd` episodes the other way."""
    starts = np.cumsum([0, *lengths])
    command, opening = np.zeros((starts[-1], 1)), np.zeros((starts[-1], 1))
    for number, (a, b) in enumerate(zip(starts, starts[1:])):
        own = np.where(np.arange(b - a) // 15 % 2, 1.0, -1.0)
        command[a:b, 0] = own
        own = np.concatenate([[own[0]] * 5, own[:-5]]) if b - a > 5 else own
        opening[a:b, 0] = 0.02 * (sign * (-1 if number in odd else 1) * own + 1)
    return command, opening, starts


def gripper(sign, declared="unknown", state="unknown", **more) -> list[tuple]:
    command, opening, starts = hand(sign, **more)
    layouts = Layout(("gripper",), gripper=declared), Layout(("gripper",), gripper=state)
    found = gripper_findings(command, opening, starts, layouts, RATE)
    return [(f.severity, f.name, f.text, f.episodes) for f in found]


@pytest.mark.parametrize(
    "sign, says, other", [(1, "positive_opens", "positive_closes"), (-1, "positive_closes", "positive_opens")]
)
def test_the_sign_of_a_gripper_is_told_and_compared(sign, says, other):
    name = "gripper sign"
    assert gripper(sign) == [("note", name, f"its numbers say {says}", ())]
    assert gripper(sign, "none") == [("note", name, f"its numbers say {says}", ())]
    assert gripper(sign, says) == []
    assert gripper(sign, other) == [
        ("error", name, f"the dataset declares {other}, its numbers say {says}", ())
    ]
    does = "opens" if sign > 0 else "closes"
    text = f"a positive command {does} it, but not in episodes {{episodes}}"
    assert gripper(sign, says, odd=(1,)) == [("error", name, text, (1,))]
    assert gripper(sign, state="positive_closes") == []  # the state has no opening then


@pytest.mark.parametrize("length, found", [(10, False), (60, True)])
def test_episodes_shorter_than_a_second_tell_no_sign(length, found):
    assert (gripper(1, lengths=(length,) * 3) != []) == found


def test_the_sign_of_two_grippers_or_of_none_is_not_told():
    command, opening, starts = hand(1)
    two, one, none = Layout(("left_gripper", "right_gripper")), Layout(("gripper",)), Layout(("elbow",))
    for layouts, action, state in (
        ((two, one), np.tile(command, 2), opening),
        ((none, one), command, opening),
        ((one, none), command, opening),
    ):
        assert gripper_findings(action, state, starts, layouts, RATE) == []


def test_two_ranges_of_one_gripper_are_told_with_the_rarer_episodes():
    starts = np.array([0, 10, 20, 30])
    command = np.where(np.arange(30) % 2, 1.0, -1.0)[:, None]
    layout = Layout(("gripper",))
    assert gripper_ranges(command, starts, layout) == []
    command[10:20] = command[10:20] > 0
    (finding,) = gripper_ranges(command, starts, layout)
    text = "action 'gripper' runs from -1 to 1, but from 0 to 1 in episodes {episodes}"
    assert (finding.severity, finding.name, finding.text, finding.episodes) == (
        "error",
        "gripper range",
        text,
        (1,),
    )
    command[20:30] = command[20:30] > 0
    (finding,) = gripper_ranges(command, starts, layout)
    assert finding.text == "action 'gripper' runs from 0 to 1, but from -1 to 1 in episodes {episodes}"
    assert finding.episodes == (0,)


def stale(name: str, change: float, **more) -> list[str]:
    """What is said when a stored statistic is off by a part of the second dimension's range, which is 10."""
    values = np.column_stack([np.linspace(0, 1, 200), np.linspace(-3, 7, 200)])
    stored = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": [200],
    }
    stored[name] = stored[name] + np.array([0, 10 * change])
    return texts(stale_statistics(stored | more, values, ("a", "b"), "file: action"))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "name, slack", [("min", 0.005), ("max", 0.005), ("mean", 0.005), ("std", 0.02 + 0.5 / 200)]
)
def test_a_statistic_is_off_from_a_part_of_the_range_on(name, slack, sign):
    assert stale(name, 0.99 * slack * sign) == []
    (line,) = stale(name, 1.01 * slack * sign)
    assert (
        line.startswith(f"error   statistics: file: action {name} of 'b' is ") and ", the data say " in line
    )


def test_other_shapes_and_counts_of_statistics_are_told():
    assert stale("min", 0, mean=[1.0]) == [
        "error   statistics: file: action has 1 numbers for mean, the data have 2"
    ]
    assert stale("min", 0, count=[199]) == [
        "error   statistics: file: action counts 199 frames, there are 200"
    ]
    assert stale("min", 0, count=200) == [] == stale("min", 0, count=[200, 200])
    (line,) = stale("min", 0, max=[float("nan"), 7.0])
    assert line.startswith("error   statistics: file: action max of 'a' is nan")
    values = np.ones((5, 1))
    assert stale_statistics({}, values, ("a",), "file") == []


TASKS = {4: "open", 0: "task_1", 7: "<what> it", 2: " ", 9: "OPEN!", 5: "never"}


def test_instructions_are_told_with_their_episodes():
    used, starts = np.repeat([4, 0, 7, 2, 9], 3), np.arange(0, 16, 3)
    found = instruction_findings(TASKS, used, starts, told=5)
    assert [(f.severity, f.text, f.episodes) for f in found] == [
        ("error", "no instruction: ' '; episodes {episodes}", (3,)),
        ("warning", "placeholder: 'task_1'; episodes {episodes}", (1,)),
        ("warning", "unfilled template: '<what> it'; episodes {episodes}", (2,)),
        ("warning", "written in more than one way: 'open'", ()),
        ("error", "info.json counts 5 tasks, the file of tasks has 6", ()),
        ("note", "no frame has the instruction 'never'", ()),
    ]
    assert {f.name for f in found} == {"instructions"}
    assert instruction_findings({4: "open"}, np.full(3, 4), np.array([0, 3]), told=1) == []
    assert instruction_findings({4: "open"}, np.full(3, 4), np.array([0, 3])) == []
    (gone,) = instruction_findings({}, np.full(3, 4), np.array([0, 3]))
    assert gone.text.startswith("no instruction: ''")


def test_spellings_are_compared_without_case_and_marks():
    assert spelt_twice(["a b", "A  B.", "a-b", "ab", "", " "]) == ["a b"]
    assert spelt_twice(["a", "b"]) == []


def film(count=40, step=2.0, seed=0) -> np.ndarray:
    """Images that change by `step` on average from one to the next."""
    ground = np.random.default_rng(seed).integers(0, 100, (32, 32, 3))
    return (ground + np.round(step * np.arange(count)).astype(int)[:, None, None, None]).astype(np.uint8)


def stuttering(count: int) -> np.ndarray:
    frames = film()
    for row in range(1, 2 * count, 2):
        frames[row] = frames[row - 1]
    return frames


@pytest.mark.parametrize("count, found", [(7, False), (8, True), (12, True)])
def test_a_camera_repeats_from_a_fifth_of_its_images_on(count, found):
    findings = image_findings(stuttering(count), np.ones(40, bool), "front")
    text = f"camera 'front' repeats {count / 39:.0%} of its images while the robot moves, in episodes {{episodes}}"
    assert [(f.severity, f.name, f.text) for f in findings] == (
        [("warning", "repeated images", text)] if found else []
    )
    assert image_findings(stuttering(count), np.zeros(40, bool), "front") == []


@pytest.mark.parametrize("moving, found", [(4, False), (5, True)])
def test_so_little_motion_tells_nothing(moving, found):
    moves = np.zeros(40, bool)
    moves[1 : 2 * moving : 2] = True
    assert (image_findings(stuttering(10), moves, "front") != []) == found


@pytest.mark.parametrize("spread, found", [(2, True), (4, False)])
def test_a_camera_of_one_colour_is_told(spread, found):
    frames = np.full((6, 32, 32, 3), 100, np.uint8)
    frames[:, ::2] += np.uint8(2 * spread)
    findings = image_findings(frames, np.zeros(6, bool), "top")
    text = "camera 'top' shows one colour, in episodes {episodes}"
    assert [(f.severity, f.name, f.text) for f in findings] == ([("error", "images", text)] if found else [])
    frames[3] = film(1)[0]  # one image of something is enough
    assert image_findings(frames, np.zeros(6, bool), "top") == []


def test_one_image_alone_repeats_nothing():
    assert image_findings(film(1), np.ones(1, bool), "front") == []


def test_cameras_that_show_the_same_are_told_by_pair():
    one, two = film(4), film(4, seed=1)
    text = "cameras 'a' and 'c' show the same"
    (finding,) = same_cameras({"a": one, "b": two, "c": one, "d": film(4)[:, :16]})
    assert (finding.severity, finding.name, finding.text) == ("warning", "images", text)
    nearly = one.astype(int)
    nearly[:, ::2] += 1
    assert same_cameras({"a": one, "b": (nearly + 1).astype(np.uint8)}) == []
    nearly = one.astype(int)
    nearly[:, ::4] += 1
    assert len(same_cameras({"a": one, "b": nearly.astype(np.uint8)})) == 1


def test_a_gripper_that_rests_in_an_episode_tells_nothing_of_it_and_warns_of_nothing():
    command, opening, starts = hand(1)
    layouts = Layout(("gripper",)), Layout(("gripper",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (command, opening):
            kept = values[:60].copy()
            values[:60] = 0.5
            (finding,) = gripper_findings(command, opening, starts, layouts, RATE)
            assert finding.text == "its numbers say positive_opens"
            values[:60] = kept
        command[:] = 1.0
        assert gripper_findings(command, opening, starts, layouts, RATE) == []
