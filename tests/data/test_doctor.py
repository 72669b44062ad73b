"""Each fault on a dataset that has it, and on one that only looks so, both written on the spot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_bench.data import doctor
from vla_bench.data.detectors import Finding
from vla_bench.data.doctor import (
    brisk_frames,
    card_text,
    contact_sheet,
    counted,
    distributions,
    episode_lengths,
    examine,
    facts,
    findings_table,
    instruction_table,
    main,
    open_recording,
    sampled_images,
    table,
    traces,
    write_card,
)
from vla_bench.data.layout import Layout
from vla_bench.data.writer import LeRobotWriter

RATE = 10
NAMES = ("shoulder", "elbow", "wrist", "gripper")
TASKS = ("put the cup on the plate", "open the drawer")
AS_RECORDED = lambda episode, state, action: (state, action)


def movement(rng, length):
    """State and action of one smooth episode: targets are the next state, a positive command closes."""
    t = np.linspace(0, length / 60, length + 1)
    noise = 0.002 * rng.normal(size=(length + 1, 3))
    joints = np.sin(np.outer(t, rng.uniform(3, 9, 3)) + rng.uniform(0, 6, 3)) + noise
    close = np.where((t > 0.4 * t[-1]) & (t < 0.8 * t[-1]), 1.0, -1.0)
    opening = np.convolve(np.pad(0.04 * (close < 0), (4, 0), mode="edge"), np.ones(5) / 5, "valid")
    return np.column_stack([joints, opening])[:-1], np.column_stack([joints[1:], close[:-1]])


def film(state):
    """A soft dot that moves with the joints, on a textured ground."""
    ground = np.random.default_rng(5).uniform(40, 90, (32, 32))
    x, y = (16 + 12 * state[:, d, None, None] for d in (0, 1))
    dot = np.exp(-((np.arange(32) - x) ** 2 + (np.arange(32)[:, None] - y) ** 2) / 18)  # [T, 32, 32]
    return np.stack([ground + dot * gain for gain in (150, 80, 20)], axis=-1).astype(np.uint8)


def write(
    root,
    spoil=AS_RECORDED,
    *,
    kind="absolute",
    gripper="positive_closes",
    tasks=TASKS,
    images=lambda state: {"front": film(state)},
    length=60,
    episodes=10,
    version="v3.0",
    state=True,
):
    rng = np.random.default_rng(1)
    layouts = {"state": Layout(NAMES) if state else None, "action": Layout(NAMES, kind=kind, gripper=gripper)}
    cameras = {name: (32, 32) for name in images(np.zeros((1, 4)))}
    with LeRobotWriter(root, fps=RATE, cameras=cameras, version=version, **layouts) as writer:
        for episode in range(episodes):
            seen, done = spoil(episode, *movement(rng, length))
            own = {"images": images(seen), "state": seen if state else None, "action": done}
            writer.add_episode(**own, task=tasks[episode % len(tasks)])
    return root


def dead(episode, state, action):
    action[:, 1] = 0.25
    return state, action


def hanging(episode, state, action):
    if episode == 3:
        state[20:45, 2] = state[20, 2]
    return state, action


def resting(episode, state, action):
    """A demonstrator who pauses: the whole arm stands still, for half a second less than counts in the sum."""
    if episode == 3:
        state[20:40], action[20:40] = state[20], action[20]
    return state, action


def clipped(episode, state, action):
    action[:, 0] = action[:, 0].clip(-0.7, 0.7)
    return state, action


def copied(episode, state, action):
    state[:, 2] = state[:, 0]
    return state, action


def doubled(episode, state, action):
    rows = np.arange(len(state)) // 2 * 2
    return state[rows], action[rows]


def waiting(episode, state, action):
    state[:25], action[:25] = state[25], action[25]
    return state, action


def jumping(episode, state, action):
    if episode == 4:
        state[30, 1] = 55.0
    return state, action


def aborted(episode, state, action):
    return (state[:5], action[:5]) if episode == 6 else (state, action)


def relative(episode, state, action):
    action[:, :3] -= state[:, :3]
    return state, action


def other_sign(episode, state, action):
    if episode in (2, 9):
        action[:, 3] *= -1
    return state, action


def other_range(episode, state, action):
    if episode == 7:
        action[:, 3] = action[:, 3] > 0
    return state, action


def stuttering(state):
    return {"front": film(state)[np.arange(len(state)) // 2 * 2]}


def black(state):
    return {"front": film(state), "wrist": np.zeros((len(state), 32, 32, 3), np.uint8)}


def the_same(state):
    return {"front": film(state), "side": film(state)}


def two_views(state):
    return {"front": film(state), "side": film(state)[:, ::-1, ::-1]}


# the fault; how it is written; what is found; how it is examined
FAULTS = {
    "dead": ({"spoil": dead}, "warning", "dead dimension", {}),
    "frozen": ({"spoil": hanging}, "warning", "frozen dimension", {}),
    "clipped": ({"spoil": clipped}, "warning", "clipped dimension", {}),
    "duplicated": ({"spoil": copied}, "warning", "duplicated dimension", {}),
    "repeated rows": ({"spoil": doubled}, "warning", "repeated frames", {}),
    "idle": ({"spoil": waiting}, "warning", "idle stretches", {}),
    "a jump": ({"spoil": jumping}, "warning", "outlier episodes", {}),
    "an aborted episode": ({"spoil": aborted}, "warning", "outlier episodes", {}),
    "relative twice": (
        {"spoil": relative, "kind": "delta"},
        "error",
        "actions relative twice",
        {"action_mode": "relative"},
    ),
    "relative twice, unknown kind": (
        {"spoil": relative, "kind": "unknown"},
        "error",
        "actions relative twice",
        {"action_mode": "delta"},
    ),
    "declared absolute": ({"spoil": relative}, "error", "kind of action", {}),
    "declared delta": ({"kind": "delta"}, "error", "kind of action", {}),
    "two gripper signs": ({"spoil": other_sign}, "error", "gripper sign", {}),
    "the other gripper sign": ({"gripper": "positive_opens"}, "error", "gripper sign", {}),
    "two gripper ranges": ({"spoil": other_range}, "error", "gripper range", {}),
    "a placeholder": ({"tasks": ("put it there", "task_0")}, "warning", "instructions", {}),
    "a template": ({"tasks": ("put it there", "put it on the <place>")}, "warning", "instructions", {}),
    "one text twice": ({"tasks": ("Put it there.", "put it there")}, "warning", "instructions", {}),
    "stuttering images": ({"images": stuttering}, "warning", "repeated images", {"videos": True}),
    "a black camera": ({"images": black}, "error", "images", {"videos": True}),
    "one camera twice": ({"images": the_same}, "warning", "images", {"videos": True}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_no_other(tmp_path, name):
    how, severity, expected, options = FAULTS[name]
    found = examine(write(tmp_path / "data", **how), **options)
    assert {(finding.severity, finding.name) for finding in found} == {(severity, expected)}
    assert all(
        "\n" not in str(finding) and "{" not in finding.text.replace("{verb}", "") for finding in found
    )


SOUND = {
    "as recorded": ({}, {"videos": True}),
    "v2.1": ({"version": "v2.1"}, {"videos": True}),
    "one pause of the whole arm": ({"spoil": resting}, {}),
    "relative, declared so": ({"spoil": relative, "kind": "delta"}, {}),
    "absolute, to be made relative": ({}, {"action_mode": "relative"}),
    "two cameras": ({"images": two_views}, {"videos": True}),
    "without a state": ({"state": False}, {}),
    "the number of a task in words": ({"tasks": ("Task 3 is to open it", "open the test tube")}, {}),
    "one episode": ({"episodes": 1, "tasks": TASKS[:1]}, {}),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_dataset_has_no_finding(tmp_path, name):
    how, options = SOUND[name]
    assert examine(write(tmp_path / "data", **how), **options) == []


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return {v: write(tmp_path_factory.mktemp("sound") / v, version=v) for v in ("v3.0", "v2.1")}


@pytest.fixture(params=["v3.0", "v2.1"])
def copy(sound, request, tmp_path):
    return Path(shutil.copytree(sound[request.param], tmp_path / request.param))


def rewrite(root, column, change):
    """Changes a column of every parquet file of the data."""
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        place, kind = table.schema.get_field_index(column), table.schema.field(column)
        values = change(np.array(table[column].to_pylist()), np.array(table["episode_index"].to_pylist()))
        pq.write_table(table.set_column(place, kind, pa.array(values.tolist(), kind.type)), path)


def names(findings):
    return {finding.name for finding in findings}


def test_dropped_frames_are_found_in_their_episode(copy):
    shift = lambda times, episodes: times + np.where((episodes == 2) & (times > 3), 0.4, 0)
    rewrite(copy, "timestamp", shift)
    found = examine(copy)
    assert names(found) == {"dropped frames"} and found[0].severity == "error"
    assert found[0].episodes == (2,) and found[0].text == "4 frames are missing between others, in episode 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda times, _: times / 3, "they run at 30 Hz, info.json says 10 Hz"),
        (
            lambda times, e: np.where((e == 5) & (times > 2), times - 1, times),
            "not later than the one before",
        ),
        (lambda times, _: times * 1.009, "they drift from 10 Hz"),
    ],
)
def test_wrong_time_stamps_are_found(copy, change, message):
    rewrite(copy, "timestamp", change)
    found = examine(copy)
    assert names(found) <= {"time stamps", "dropped frames"}
    assert message in " ".join(finding.text for finding in found)


def test_statistics_that_stayed_behind_are_found(copy):
    rewrite(copy, "action", lambda action, _: action - [0, 0.5, 0, 0])
    found = [finding for finding in examine(copy) if finding.name == "statistics"]
    files = ["meta/episodes_stats.jsonl: action of episode 0 min"]
    if copy.name == "v3.0":
        files = [
            "meta/stats.json: action min",
            "meta/episodes/chunk-000/file-000.parquet: action of episode 0 min",
        ]
    assert len(found) == len(files) and {finding.severity for finding in found} == {"error"}
    for finding, file in zip(found, files):
        assert finding.text.startswith(file) and "'elbow'" in finding.text


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"action": 3}', '{"action": {"min": {}}}', '{"action": {"mean": ["a"]}}']
)
def test_damaged_statistics_are_a_finding_that_names_the_file(sound, tmp_path, content):
    copy = shutil.copytree(sound["v3.0"], tmp_path / "data")
    (copy / "meta/stats.json").write_text(content)
    found = examine(copy)
    assert [(f.severity, f.name) for f in found] == [("error", "statistics")]
    assert "meta/stats.json" in found[0].text and "\n" not in str(found[0])


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"episode_index": 0}', '{"episode_index": 99, "stats": {"action": {}}}']
)
def test_damaged_lines_of_statistics_are_a_finding_that_names_the_file(sound, tmp_path, line):
    copy = shutil.copytree(sound["v2.1"], tmp_path / "data")
    with (copy / "meta/episodes_stats.jsonl").open("a") as file:
        file.write(line)
    found = examine(copy)
    assert [(f.severity, f.name) for f in found] == [("error", "statistics")]
    assert "episodes_stats.jsonl" in found[0].text and "\n" not in str(found[0])


def test_what_the_columns_tell_is_told_when_a_video_is_broken(tmp_path):
    root = write(tmp_path / "data", dead)
    for path in root.rglob("*.mp4"):
        path.write_bytes(b"no video")
    assert [f.name for f in examine(root, videos=True)] == ["unreadable", "dead dimension"]


def test_statistics_of_more_frames_are_found(sound, tmp_path):
    copy = shutil.copytree(sound["v3.0"], tmp_path / "data")
    stats = json.loads((copy / "meta/stats.json").read_text())
    stats["action"]["count"] = [700]
    (copy / "meta/stats.json").write_text(json.dumps(stats))
    assert [f.text for f in examine(copy)] == ["meta/stats.json: action counts 700 frames, there are 600"]


def test_a_wrong_number_of_tasks_is_found(copy):
    info = json.loads((copy / "meta/info.json").read_text())
    info["total_tasks"] = 9
    (copy / "meta/info.json").write_text(json.dumps(info))
    assert "info.json counts 9 tasks, the file of tasks has 2" in " ".join(f.text for f in examine(copy))


def test_an_empty_instruction_is_an_error(sound, tmp_path):
    copy = shutil.copytree(sound["v2.1"], tmp_path / "data")
    lines = [{"task_index": 0, "task": TASKS[0]}, {"task_index": 1, "task": " "}]
    (copy / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = examine(copy)
    assert {f.severity for f in found} == {"error"}
    assert names(found) <= {"instructions", "unreadable"}


def test_findings_come_worst_first_with_the_datasets_own_episodes(tmp_path):
    everything = lambda e, s, a: other_sign(e, *hanging(e, *dead(e, s, a)))
    root = write(tmp_path / "data", everything, tasks=("put it there", "task_0"))
    found = examine(root)
    assert [f.severity for f in found] == sorted(
        (f.severity for f in found), key=("error", "warning", "note").index
    )
    assert next(f for f in found if f.name == "gripper sign").episodes == (2, 9)
    assert next(f for f in found if f.name == "frozen dimension").text.endswith("in episode 3")


@pytest.mark.parametrize("damage", ["nothing there", "no info", "a broken file"])
def test_what_cannot_be_opened_is_one_finding(tmp_path, sound, damage):
    root = tmp_path / "data"
    if damage != "nothing there":
        shutil.copytree(sound["v3.0"], root)
        (root / "meta/info.json").unlink() if damage == "no info" else None
        next((root / "data").rglob("*.parquet")).write_bytes(b"PAR1") if damage == "a broken file" else None
    found = examine(root)
    assert [(f.severity, f.name) for f in found] == [("error", "unreadable")] and "\n" not in str(found[0])


def run(capsys, *words):
    try:
        main(list(map(str, words)))
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out.splitlines()


def test_the_program_prints_a_line_for_each_finding_and_exits_by_severity(capsys, tmp_path, sound):
    warned = write(tmp_path / "warned", dead)
    faulty = write(tmp_path / "faulty", relative)
    assert run(capsys, sound["v3.0"]) == (0, [f"{sound['v3.0']}: 0 errors, 0 warnings, 0 notes"])
    status, lines = run(capsys, warned)
    assert status == 0 and lines == [
        "warning dead dimension: action 'elbow' is always 0.25",
        f"{warned}: 0 errors, 1 warning, 0 notes",
    ]
    assert run(capsys, warned, "--strict")[0] == 1
    status, lines = run(capsys, faulty, "--action_mode", "relative")
    assert status == 1 and lines[0].startswith(
        "error   actions relative twice: 3 of 3 dimensions look relative already"
    )


def test_the_card_shows_what_was_found(tmp_path, sound):
    root = write(tmp_path / "data", waiting)
    found = examine(root)
    card = write_card(root, tmp_path / "card", found, videos=True)
    text = card.read_text()
    assert "| warning | idle stretches | in 42% of the frames nothing moves" in text
    assert "| put the cup on the plate | 5 |" in text and "## Findings: 1 warning" in text
    pictures = [line.split("(")[1].split(")")[0] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 4 and all((card.parent / name).stat().st_size > 2000 for name in pictures)


def test_no_image_is_decoded_unless_asked_for(sound, tmp_path, capsys):
    root = shutil.copytree(sound["v3.0"], tmp_path / "data")
    for path in root.rglob("*.mp4"):
        path.write_bytes(b"")
    recording = open_recording(root)
    assert len(recording.columns["action"]) == 600
    assert examine(root) == []
    status, _ = run(capsys, root, "--card", tmp_path / "card")
    assert status == 0 and (tmp_path / "card/card.md").is_file()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Episodes of 3, 40, 35 and 31 frames, two cameras of other shapes, two numbers, four tasks of which two are alike."""
    root, rng = tmp_path_factory.mktemp("short") / "short", np.random.default_rng(2)
    layouts = {"state": Layout(("a", "b")), "action": Layout(("a", "b"), "delta", gripper="unknown")}
    cameras = {"wide": (16, 32), "tall": (32, 16)}
    with LeRobotWriter(root, fps=12.5, cameras=cameras, robot_type="toy", **layouts) as writer:
        for number, length in enumerate((3, 40, 35, 31)):
            levels = (5 * np.arange(length) + 10)[:, None, None, None]
            films = {
                n: np.tile(levels + 20 * c, (1, *size, 3)).astype(np.uint8)
                for c, (n, size) in enumerate(cameras.items())
            }
            state = np.cumsum(rng.normal(size=(length, 2)), axis=0)
            state[10:29] = state[10] if number == 1 else state[10:29]
            action = np.diff(state, axis=0, append=state[-1:])
            writer.add_episode(images=films, state=state, action=action, task=f"task of {number // 2}")
    return open_recording(root)


STARTS = [0, 3, 43, 78, 109]


def test_a_recording_is_its_dataset_as_arrays(short):
    assert short.starts.tolist() == STARTS and short.places == {0: 0, 1: 1, 2: 2, 3: 3}
    assert [(what, names) for what, _, names in short.vectors] == [
        ("action", ("a", "b")),
        ("state", ("a", "b")),
    ]
    for what, values, _ in short.vectors:
        assert values is short.columns[what]
    assert short.info["robot_type"] == "toy" and short.keys == {
        "action": "action",
        "state": "observation.state",
    }
    assert np.flatnonzero(short.idle).tolist() == list(range(14, 32))


def test_idle_frames_are_told_from_the_actions_where_there_is_no_state(short):
    for kind, expected in (("delta", list(range(13, 31))), ("absolute", list(range(14, 31)))):
        blind = open_recording(short.dataset.root, state_key=None)
        layout = Layout(("a", "b"), kind)
        blind.dataset._table = replace(blind.dataset._table, action_layout=layout)
        assert np.flatnonzero(blind.idle).tolist() == expected
        assert [what for what, _, _ in blind.vectors] == ["action"]


def test_images_are_sampled_from_the_middle_of_episodes(short):
    found = [
        (place, (rows.start, rows.stop), {n: f.shape for n, f in films.items()})
        for place, rows, films in sampled_images(short)
    ]
    assert [(place, rows) for place, rows, _ in found] == [
        (0, (0, 3)),
        (1, (8, 38)),
        (2, (45, 75)),
        (3, (78, 108)),
    ]
    assert found[1][2] == {"wide": (30, 16, 32, 3), "tall": (30, 32, 16, 3)}
    few = [(place, rows.start, rows.stop) for place, rows, _ in sampled_images(short, episodes=2, length=5)]
    assert few == [(0, 0, 3), (3, 91, 96)]
    _, rows, films = list(sampled_images(short, 2, 5))[1]
    for film, more in zip(films.values(), (0, 20)):
        levels = film.astype(int).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(levels, 5 * (np.arange(rows.start, rows.stop) - 78) + 10 + more, atol=3)


def test_brisk_frames_move_three_tenths_of_the_usual_most(short):
    state = short.columns["state"]
    motion = np.abs(np.diff(state, axis=0, prepend=state[:1]))
    motion[STARTS[:-1]] = 0
    expected = (motion > 0.3 * np.quantile(motion, 0.95, axis=0)).any(1)
    assert brisk_frames(short).tolist() == expected.tolist() and 0.2 < expected.mean() < 0.9


def test_a_histogram_holds_every_number_of_each_dimension(short):
    figure = distributions(short)
    axes = [axis for part in figure.subfigs for axis in part.axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == ["action a", "action b", "state a", "state b"]
    columns = [column for _, values, _ in short.vectors for column in values.T]
    for axis, column in zip(axes, columns, strict=True):
        counts, edges = np.histogram(column, bins=50)
        assert [bar.get_height() for bar in axis.patches] == counts.tolist() and axis.get_yscale() == "log"
        assert axis.patches[0].get_x() == pytest.approx(edges[0])


def test_traces_show_the_episodes_that_are_asked_for_at_the_range_of_all(short):
    for asked, chosen in (
        ([3, 1], [3, 1]),
        ([9, 2], [2]),
        ([], [0, 1, 2, 3]),
        ([0, 1, 2, 3, 0], [0, 1, 2, 3]),
    ):
        axes = traces(short, asked).axes
        titles = [f"{what}, episode {number}" for what in ("action", "state") for number in chosen]
        assert [axis.get_title() for axis in axes] == titles
        for axis, (what, number) in zip(axes, [(w, n) for w in ("action", "state") for n in chosen]):
            values = short.columns[what]
            rows = values[STARTS[number] : STARTS[number + 1]]
            expected = (rows - values.min(0)) / (values.max(0) - values.min(0))
            for line, column in zip(axis.lines, expected.T, strict=True):
                np.testing.assert_allclose(line.get_ydata(), column, atol=1e-12)
            (grey,) = axis.collections
            assert len(grey.get_paths()) == (number == 1)
        assert [bool(axis.get_legend()) for axis in axes] == ([True] + [False] * (len(chosen) - 1)) * 2


def test_a_trace_of_what_never_changes_is_zero(short):
    still = replace(short)
    values = short.columns["action"].copy()
    values[:, 1] = 7
    still.__dict__["columns"] = {**short.columns, "action": values}
    assert (traces(still, [2]).axes[0].lines[1].get_ydata() == 0).all()


def test_lengths_are_seconds_and_idle_ones(short):
    (axis,) = episode_lengths(short).axes
    moving, idle = axis.containers
    np.testing.assert_allclose([bar.get_height() for bar in moving], np.diff(STARTS) / 12.5)
    np.testing.assert_allclose([bar.get_height() for bar in idle], [0, 18 / 12.5, 0, 0])
    assert [bar.get_x() + bar.get_width() / 2 for bar in moving] == pytest.approx([0, 1, 2, 3])
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("episode", "seconds")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["moving", "idle"]


def test_a_sheet_shows_four_frames_of_each_camera_and_episode(short):
    sheet = np.asarray(contact_sheet(short, episodes=2)).astype(int)
    assert sheet.shape == (
        64 + 244 + 64 + 244,
        496,
        3,
    )  # two episodes of two cameras: 60 and 240 high, 4 between
    top, rows = 0, {0: np.linspace(0, 2, 4).round() + 0, 3: np.linspace(0, 29, 4).round() + 0}
    for place, numbers in rows.items():
        for more, height in ((0, 60), (20, 240)):
            for column, number in enumerate(numbers):
                tile = sheet[top + 2 : top + 2 + height, 2 + 124 * column : 122 + 124 * column]
                assert abs(tile.mean() - (5 * number + 10 + more)) < 3, (place, column)
            assert (sheet[top : top + 2] == 255).all() and (
                sheet[top + 2 + height : top + 4 + height] == 255
            ).all()
            top += height + 4


def test_a_table_is_markdown_on_one_line_per_row():
    assert table(["a", "b"], [("x | y", "two\nlines"), ("1", "2")]) == (
        "| a | b |\n| --- | --- |\n| x \\| y | two lines |\n| 1 | 2 |"
    )


def test_the_facts_of_a_dataset(short):
    assert facts(short) == {
        "format": "LeRobot v3.0, robot toy",
        "episodes": "4, 109 frames, 0.1 minutes at 12.5 Hz",
        "cameras": "wide, tall",
        "action": "2 (a, b)",
        "state": "2 (a, b)",
        "kind of action": "delta, gripper unknown",
        "idle": "17% of the frames",
    }


def test_instructions_are_counted_by_episode(short):
    head = "| instruction | episodes |\n| --- | --- |\n"
    assert instruction_table(short) == head + "| task of 0 | 2 |\n| task of 1 | 2 |"
    assert instruction_table(short, most=1) == head + "| task of 0 | 2 |\n| and 1 more |  |"


def test_numbers_of_findings_are_told_in_words():
    assert counted({"note": 1, "error": 2}) == "2 errors, 1 note" and counted({}) == ""
    assert counted({"error": 1, "warning": 0, "note": 3}) == "1 error, 0 warnings, 3 notes"


FINDINGS = [Finding("error", "one", "what | is", (1,)), Finding("note", "two", "text")]


def test_a_card_holds_all_that_was_found(short):
    assert findings_table(FINDINGS) == (
        "|  | finding | what was seen |\n| --- | --- | --- |\n| error | one | what \\| is |\n| note | two | text |"
    )
    text = card_text(short, FINDINGS, {"A caption": "a.png"})
    assert text == "\n\n".join([
        "# short", table(["", ""], facts(short).items()), "## Findings: 1 error, 1 note", findings_table(FINDINGS),
        "## Instructions", instruction_table(short), "## Pictures", "![A caption](a.png)\n\n*A caption*",
    ]) + "\n"  # fmt: skip
    assert "## Findings: none\n\n## Instructions" in card_text(short, [], {})


def test_a_card_is_written_with_its_pictures(short, tmp_path):
    for videos, names in ((False, set()), (True, {"images.jpg"})):
        card = write_card(short.dataset.root, tmp_path / f"a/{videos}", FINDINGS, videos=videos)
        assert card == tmp_path / f"a/{videos}/card.md"
        pictures = {"distributions.png", "traces.png", "lengths.png"} | names
        assert {path.name for path in card.parent.iterdir()} == {"card.md"} | pictures
        assert all(f"]({name})" in card.read_text() for name in pictures)


def test_the_program_gives_its_words_to_the_examination(short, capsys, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(doctor, "examine", lambda root, **options: asked.append((root, options)) or FINDINGS)
    words = [
        short.dataset.root,
        "--action_mode",
        "delta",
        "--videos",
        "--action_key",
        "b",
        "--state_key",
        "c",
        "--follow_links",
    ]
    status, lines = run(capsys, *words)
    assert asked == [
        (
            str(short.dataset.root),
            {
                "action_mode": "delta",
                "videos": True,
                "action_key": "b",
                "state_key": "c",
                "follow_links": True,
            },
        )
    ]
    assert status == 1 and lines == [
        *map(str, FINDINGS),
        f"{short.dataset.root}: 1 error, 0 warnings, 1 note",
    ]
    run(capsys, short.dataset.root)
    plain = {
        "action_mode": "absolute",
        "videos": False,
        "follow_links": False,
        "action_key": "action",
        "state_key": "observation.state",
    }
    assert asked[1][1] == plain
    status, lines = run(capsys, short.dataset.root, "--card", tmp_path / "card")
    assert lines[-1] == f"wrote {tmp_path / 'card/card.md'}"
    monkeypatch.setattr(doctor, "examine", lambda root, **options: [Finding("error", "unreadable", "it")])
    status, lines = run(capsys, short.dataset.root, "--card", tmp_path / "none")
    assert status == 1 and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "gone")])
    assert end.value.code == 2 and "gone: no such folder" in capsys.readouterr().err


def test_the_columns_that_are_examined_are_those_that_are_asked_for(tmp_path):
    root = write(tmp_path / "data", dead)
    assert [f.name for f in examine(root)] == ["dead dimension"]
    assert examine(root, action_key="observation.state") != examine(root)
    assert "dead dimension" not in names(examine(root, action_key="observation.state"))
    assert [f.text for f in examine(root, state_key="action")][0].startswith("action 'elbow' is always")
    assert {"state 'elbow' is always 0.25"} <= {f.text for f in examine(root, state_key="action")}


def test_a_fault_of_images_is_told_once_per_camera_with_all_its_episodes(tmp_path):
    found = examine(write(tmp_path / "data", images=black, episodes=3), videos=True)
    assert [(f.severity, f.text, f.episodes) for f in found] == [
        ("error", "camera 'wrist' shows one colour, in episodes 0, 1, 2", (0, 1, 2))
    ]


def test_a_camera_that_repeats_images_is_told_once_however_many_it_repeats(tmp_path):
    """Every episode repeats another part of its images."""
    parts = iter([8, 10, 12, 14, 16, 18])

    def stuttering_more(state):
        rows = np.arange(len(state))
        if len(state) > 1:  # not what asks for the names of the cameras
            odd = rows[1 : 2 * next(parts) : 2]
            rows[odd] = odd - 1
        return {"front": film(state)[rows]}

    found = examine(write(tmp_path / "data", images=stuttering_more, episodes=3, length=30), videos=True)
    (finding,) = [finding for finding in found if finding.name == "repeated images"]
    assert finding.episodes == (0, 1, 2) and finding.text.endswith("in episodes 0, 1, 2")


@pytest.mark.parametrize("write_dataset", ["v21", "v30"])
def test_a_dataset_without_images_is_examined(make, tmp_path, write_dataset, capsys):
    features = {name: feature for name, feature in make.PLAIN.items() if name != make.TOP}
    constant = {"action": make.counting(3), "observation.state": lambda row: [float(row), row / 2, 0.5]}
    root = getattr(make, write_dataset)(tmp_path / "arm", features=features, extra=constant, lengths=(20, 30))
    found = {finding.name: finding for finding in examine(root, videos=True)}
    assert found["no images"].severity == "warning" and "unreadable" not in found
    assert "dim_2" in found["dead dimension"].text
    main([str(root), "--videos", "--card", str(tmp_path / "card")])
    assert "| cameras | none |" in (tmp_path / "card/card.md").read_text()


def test_images_of_depth_are_left_out_and_told(make, tmp_path):
    depth = make.camera(info={"video.is_depth_map": True})
    root = make.v30(
        tmp_path / "arm", features=make.PLAIN | {"observation.images.depth": depth}, lengths=(20,)
    )
    found = examine(root, videos=True)
    assert [f.text for f in found if f.name == "not RGB"] == [
        "observation.images.depth holds depth, and is not looked at"
    ]
    assert open_recording(root).dataset.cameras == ("top",)


def test_a_state_that_modality_json_puts_together_is_examined(make, tmp_path):
    features = {"action": make.vector(3), "joints": make.vector(3), make.TOP: make.camera()}
    extra = {"action": make.counting(3), "joints": make.counting(3)}
    spans = {"state": {"arm": {"start": 0, "end": 2, "original_key": "joints"}}}
    root = make.v21(tmp_path / "arm", features=features, extra=extra, modality=spans)
    assert open_recording(root).columns["state"].shape == (11, 2)


def test_links_are_followed_only_when_told(make, tmp_path, capsys):
    root = make.v21(tmp_path / "arm", lengths=(20, 30))
    path = next(root.glob("data/*/*.parquet"))
    path.rename(tmp_path / "elsewhere.parquet")
    path.symlink_to(tmp_path / "elsewhere.parquet")
    assert examine(root)[0].name == "unreadable"
    assert "unreadable" not in {finding.name for finding in examine(root, follow_links=True)}
    with pytest.raises(SystemExit):
        main([str(root)])
    main([str(root), "--follow_links", "--card", str(tmp_path / "card")])
    assert (tmp_path / "card/card.md").is_file()
