"""MetaWorld in absolute terms: which way up an image is, what an action does, what a demonstration holds."""

import json
import os
import sys
import zlib
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest

from vla_bench.benchmarks import metaworld as metaworld_module
from vla_bench.benchmarks.metaworld import (
    CAMERAS,
    TASKS,
    MetaWorld,
    Simulator,
    demonstrate,
    expert,
    instruction_of,
    main,
    record,
)
from vla_bench.registry import RegistryError

TASK, SIZE = "drawer-open-v3", (24, 40)  # height and width differ
SOME = ("gripperPOV", "corner2", "topview")  # not in MetaWorld's order


@pytest.fixture(scope="module")
def simulator():
    one = Simulator(TASK, CAMERAS, SIZE)
    yield one
    one.close()


@pytest.fixture(scope="module")
def benchmark():
    one = MetaWorld(tasks=[TASK], cameras=SOME, image_size=SIZE, max_steps=3)
    yield one
    one.close()


def test_every_image_is_upright_and_not_mirrored(simulator):
    """A camera whose own upward direction points to the floor is turned by half a circle, no other one is."""
    import mujoco

    simulator.reset(3)
    shown, data = simulator.frames(), simulator.env.data
    renderer = simulator.renderer
    for camera, image in zip(CAMERAS, shown, strict=True):
        renderer.update_scene(data, camera)
        upwards = data.cam_xmat[simulator.env.model.camera(camera).id].reshape(3, 3)[2, 1]
        raw = renderer.render()
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, raw[::-1, ::-1] if upwards < -0.1 else raw)
    flags = renderer.scene.flags
    assert not flags[mujoco.mjtRndFlag.mjRND_SHADOW] and not flags[mujoco.mjtRndFlag.mjRND_REFLECTION]


def test_the_second_corner_camera_stands_where_the_published_datasets_have_it(simulator):
    np.testing.assert_allclose(simulator.env.model.camera("corner2").pos, [0.75, 0.075, 0.7])


def test_images_come_in_the_order_of_the_cameras_asked_for(simulator, benchmark):
    simulator.reset(3)
    by_name = dict(zip(CAMERAS, simulator.frames(), strict=True))
    seen = benchmark.make(TASK, 3).reset()
    assert len(seen["image"]) == 3
    for camera, image in zip(SOME, seen["image"], strict=True):
        assert image.size == (40, 24)
        np.testing.assert_array_equal(np.asarray(image), by_name[camera])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_action_moves_the_hand_along_its_axis_by_a_centimetre_a_step(simulator, axis, sign):
    simulator.reset(3)
    before = simulator.state()
    action = np.zeros(4)
    action[axis] = sign
    for _ in range(8):
        simulator.step(action)
    moved = simulator.state()[:3] - before[:3]
    assert 0.025 < sign * moved[axis] < 0.08 and np.abs(np.delete(moved, axis)).max() < 0.01


def test_a_positive_last_action_closes_the_gripper(simulator):
    simulator.reset(3)
    opening = [simulator.state()[3]]
    for effort in (1, -1):
        for _ in range(20):
            simulator.step(np.array([0, 0, 0, effort]))
        opening.append(simulator.state()[3])
    assert opening[0] > 0.95 and opening[1] < 0.6 and opening[2] > opening[1] + 0.2


def test_the_state_is_where_the_hand_is(simulator):
    simulator.reset(3)
    simulator.step(np.array([1.0, -1.0, 0.5, 1.0]))
    assert simulator.state().shape == (4,)
    np.testing.assert_array_equal(simulator.state()[:3], simulator.env.get_endeff_pos())


def test_an_action_is_clipped_to_one(simulator):
    found = []
    for action in ([3.0, -2.0, 0.3, -7.0], [1.0, -1.0, 0.3, -1.0], [0.9, -1.0, 0.3, -1.0]):
        simulator.reset(3)
        found.append(simulator.step(np.array(action))[0].tobytes())
    assert found[0] == found[1] != found[2]


def test_an_episode_shows_the_scene_of_its_own_seed(benchmark, simulator):
    states = {}
    for seed in (4, 5, 4):
        episode = benchmark.make(TASK, seed)
        seen = episode.reset()
        states.setdefault(seed, []).append([np.asarray(image).tobytes() for image in seen["image"]])
        np.testing.assert_array_equal(seen["state"], (simulator.reset(seed), simulator.state())[1])
        assert seen["lang"] == "open the drawer"
        episode.close()
    assert states[4][0] == states[4][1] != states[5][0]


def test_an_episode_ends_with_its_last_step_and_begins_anew(benchmark):
    episode = benchmark.make(TASK, 4)
    first = episode.reset()["state"]
    steps = [episode.step(np.array([1.0, 1, -1, 1]), observe=i == 1) for i in range(3)]
    assert [step.done for step in steps] == [False, False, True] and not any(step.success for step in steps)
    assert [step.observation is None for step in steps] == [True, False, True]
    assert not np.array_equal(steps[1].observation["state"], first)
    with pytest.raises(RuntimeError, match="over"):
        episode.step(np.zeros(4))
    np.testing.assert_array_equal(episode.reset()["state"], first)
    assert not episode.step(np.zeros(4)).done
    episode.close()


def test_an_episode_that_was_not_reset_cannot_be_stepped(benchmark):
    episode = benchmark.make(TASK, 4)
    with pytest.raises(RuntimeError, match="never reset"):
        episode.step(np.zeros(4))
    episode.close()


def test_an_episode_ends_with_its_first_success(simulator):
    """As the simulator reports it, at whichever step."""
    benchmark = MetaWorld(tasks=[TASK], image_size=SIZE)
    episode, act = benchmark.make(TASK, 3), expert(TASK)
    episode.reset()
    observation = simulator.reset(3)
    for _ in range(200):
        action = act(observation)
        observation, success = simulator.step(action)
        step = episode.step(action, observe=False)
        assert (step.success, step.done) == (success, success)
        if success:
            break
    assert success and 20 < episode.steps < 200
    episode.close()
    benchmark.close()


def test_a_simulator_is_used_again_for_the_same_task_only():
    benchmark = MetaWorld(tasks=[TASK, "door-open-v3"], image_size=SIZE)
    episode = benchmark.make(TASK, 1)
    used = episode.simulator
    episode.close()
    again = benchmark.make(TASK, 2)
    assert again.simulator is used and benchmark._idle is None
    again.close()
    other = benchmark.make("door-open-v3", 1)
    assert other.simulator.task == "door-open-v3" and benchmark._idle is None
    other.close()
    benchmark.close()
    assert benchmark._idle is None


@pytest.mark.parametrize("noise, extra", [(0.1, 5), (0.0, 0), (0.3, 2)])
def test_a_demonstration_holds_what_the_expert_wanted_and_replays(simulator, noise, extra):
    """Row t is what was seen before action t; what was executed is action t and noise; it ends `extra` after success."""
    demo = demonstrate(simulator, 11, noise=noise, extra_steps=extra, render=False)
    rng, act = np.random.default_rng([11, zlib.crc32(TASK.encode())]), expert(TASK)
    observation, successes = simulator.reset(11), []
    for state, action in zip(demo.state, demo.action, strict=True):
        np.testing.assert_array_equal(state, np.float32(simulator.state()))
        wanted = act(observation)
        np.testing.assert_array_equal(action, np.float32(wanted))
        assert np.abs(action).max() <= 1
        observation, success = simulator.step(wanted + noise * rng.normal(size=4))
        successes.append(success)
    assert successes.index(True) + 1 + extra == len(demo.action)
    assert (demo.task, demo.seed, demo.images) == (TASK, 11, {})


def test_an_expert_that_runs_out_of_time_gives_no_demonstration(simulator):
    whole = len(demonstrate(simulator, 11, extra_steps=0, render=False).action)
    assert demonstrate(simulator, 11, extra_steps=0, render=False, max_steps=whole - 1) is None
    assert len(demonstrate(simulator, 11, extra_steps=0, render=False, max_steps=whole).action) == whole
    assert (
        len(demonstrate(simulator, 11, extra_steps=9, render=False, max_steps=whole + 2).action) == whole + 2
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A dataset of two tasks in an order of their own, through two cameras, from scene 3 on, and its report."""
    out = tmp_path_factory.mktemp("recorded") / "data"
    tasks = ["drawer-open-v3", "drawer-close-v3"]
    cameras = ("gripperPOV", "corner2")
    report = record(out, tasks, episodes=1, image_size=24, cameras=cameras, first_seed=3, show_progress=False)
    return out, report


def test_a_recording_holds_the_demonstrations_of_the_seeds_asked_for(recorded, simulator):
    import pyarrow.parquet as parquet

    out, report = recorded
    demo = demonstrate(simulator, 3, render=False)
    rows = [
        row
        for path in sorted((out / "data").rglob("*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]
    first = [row for row in rows if row["episode_index"] == 0]
    np.testing.assert_array_equal(np.float32([row["action"] for row in first]), demo.action)
    np.testing.assert_array_equal(np.float32([row["observation.state"] for row in first]), demo.state)
    assert (report["episodes"], report["frames"], report["failed_seeds"]) == (2, len(rows), {})
    assert [row["timestamp"] for row in first[:3]] == pytest.approx([0, 1 / 80, 2 / 80])


def test_a_recording_has_the_cameras_the_rate_and_the_instructions(recorded):
    from vla_bench.data.lerobot import LeRobotDataset

    out, report = recorded
    data = LeRobotDataset(out, horizon=4)
    first, last = data[0], data[len(data) - 1]
    assert len(data) == report["frames"]
    assert (first["lang"], last["lang"]) == ("open the drawer", "close the drawer")
    simulators = [
        Simulator(task, ("gripperPOV", "corner2"), (24, 24)) for task in ("drawer-open-v3", "drawer-close-v3")
    ]
    simulators[0].reset(3)
    for image, frame in zip(first["image"], simulators[0].frames(), strict=True):
        assert np.abs(np.asarray(image).astype(int) - frame).mean() < 12  # a video loses a little
    for one in simulators:
        one.close()


def test_a_recorder_leaves_nothing_beside_its_dataset(recorded):
    out, _ = recorded
    assert [path.name for path in out.parent.iterdir()] == ["data"]
    with pytest.raises(FileExistsError, match="exists; choose another"):
        record(out, ["drawer-open-v3"], episodes=1, show_progress=False)


def test_what_the_recorder_did_not_write_is_not_deleted(tmp_path):
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "thesis.tex").write_text("chapter one")
    with pytest.raises(FileExistsError, match="not written by the recorder"):
        record(tmp_path / "data", ["drawer-open-v3"], episodes=1, show_progress=False)
    assert (tmp_path / "data.partial" / "thesis.tex").read_text() == "chapter one"


@pytest.mark.parametrize(
    "task, words",
    [
        ("drawer-open-v3", "open the drawer"),
        ("window-close-v3", "close the window"),
        ("button-press-v3", "press the button"),
        ("button-press-wall-v3", "press the button behind the wall"),
        ("pick-place-v3", "pick up the object and place it at the goal"),
        ("door-unlock-v3", "unlock the door"),
    ],
)
def test_a_task_has_this_instruction(task, words):
    assert instruction_of(task) == words == MetaWorld(tasks=[task]).instruction(task)


@pytest.mark.parametrize(
    "arguments",
    [{"max_steps": 0}, {"max_steps": 501}, {"image_size": 15}, {"image_size": (96, 15)}, {"image_size": (96,)},
     {"cameras": ()}, {"cameras": ("corner2", "corner9")}, {"tasks": ["drawer-open"]}],
    ids=str,
)  # fmt: skip
def test_what_metaworld_does_not_have_is_refused(arguments):
    with pytest.raises(ValueError, match="metaworld"):
        MetaWorld(**arguments)


def test_the_bounds_themselves_are_allowed():
    assert MetaWorld(max_steps=500, image_size=16).spec.image_size == (16, 16)
    assert MetaWorld(max_steps=1, image_size=(16, 40)).spec.max_steps == 1


def test_what_metaworld_declares():
    spec = MetaWorld(cameras=("corner", "gripperPOV"), image_size=(32, 48)).spec
    assert (spec.cameras, spec.image_size, spec.control_rate, spec.max_steps) == (
        ("corner", "gripperPOV"), (32, 48), 80.0, 500)  # fmt: skip
    assert (spec.action.kind, spec.action.frame, spec.action.gripper) == ("delta", "world", "positive_closes")
    assert (spec.state.kind, spec.state.frame, spec.state.gripper) == ("absolute", "world", "positive_opens")
    assert spec.action.names == ("dx", "dy", "dz", "gripper") and spec.state.names == (
        "x",
        "y",
        "z",
        "opening",
    )
    assert set(spec.version) == {"metaworld", "mujoco"} and len(MetaWorld().tasks()) == 50


# --- what is set in the simulator, and what a demonstration has when nothing is said ---------------------------------


def test_the_observation_for_experts_holds_the_scene_twice_and_its_goal(simulator):
    """Two frames of a hand that stands still, then where to go; scenes of other seeds have other goals."""
    goals = []
    for seed in (3, 4):
        observation = simulator.reset(seed)
        assert observation.shape == (39,)
        np.testing.assert_array_equal(observation[:18], observation[18:36])
        np.testing.assert_array_equal(observation[:4], simulator.state())
        np.testing.assert_allclose(observation[36:], simulator.env._target_pos)
        goals.append(observation[36:])
    assert np.abs(goals[0] - goals[1]).max() > 1e-3 and np.abs(goals[0]).max() > 0.1


@pytest.mark.parametrize("size", [(16, 16), (600, 800)])
def test_an_image_may_be_smaller_or_larger_than_mujocos_own(size):
    one = Simulator(TASK, ("corner2",), size)
    one.reset(3)
    (image,) = one.frames()
    quality = one.env.model.vis
    assert image.shape == (*size, 3) and image.std() > 10 and image.flags["C_CONTIGUOUS"]
    assert quality.quality.offsamples == 0
    assert quality.global_.offheight >= 480 and quality.global_.offwidth >= 640
    one.close()
    assert one.renderer is None


def test_a_simulator_that_is_still_open_is_closed_at_exit():
    one = Simulator(TASK, ("corner2",), (16, 16))
    one.reset(1)
    one.frames()
    kept = [other for other in metaworld_module.OPEN if other is not one]
    assert len(kept) < len(metaworld_module.OPEN)
    metaworld_module.OPEN.difference_update(kept)
    metaworld_module.close_simulators()
    metaworld_module.OPEN.update(kept)
    assert one.renderer is None


def test_an_episode_may_be_closed_twice(benchmark):
    episode = benchmark.make(TASK, 4)
    used = episode.simulator
    episode.close()
    episode.close()
    assert episode.simulator is None and benchmark._idle is used


def test_a_demonstration_has_this_noise_and_these_steps_when_nothing_is_said(simulator):
    plain = demonstrate(simulator, 11, render=False)
    said = demonstrate(simulator, 11, render=False, noise=0.1, extra_steps=5, max_steps=500)
    np.testing.assert_array_equal(plain.action, said.action)
    assert plain.action.dtype == plain.state.dtype == np.float32


class Fake:
    """A simulator that need not be there."""

    made = []

    def __init__(self, task, cameras, image_size):
        self.task, self.closed = task, False
        Fake.made.append((self, cameras, image_size))

    def close(self):
        self.closed = True


@pytest.fixture
def scripted(monkeypatch):
    """Demonstrations whose success is told by seed; the list says what was asked for."""
    Fake.made.clear()
    asked = []

    def script(fails):
        def demonstrate(simulator, seed, *, noise, render=True):
            asked.append((seed, noise, render))
            return None if fails(seed) else (simulator.task, seed, render)

        monkeypatch.setattr(metaworld_module, "Simulator", Fake)
        monkeypatch.setattr(metaworld_module, "demonstrate", demonstrate)
        return asked

    return script


def test_the_first_successful_seeds_are_demonstrated_and_the_others_told(scripted):
    """Each seed is tried without images first."""
    asked, failed = scripted(lambda seed: seed in (6, 8)), {"other": [1]}
    benchmark = SimpleNamespace(cameras=("corner",), image_size=(16, 24))
    found = list(metaworld_module._successes(benchmark, TASK, 3, 5, 0.25, failed))
    assert found == [(TASK, seed, True) for seed in (5, 7, 9)] and failed == {"other": [1], TASK: [6, 8]}
    assert asked == [
        (seed, 0.25, render)
        for seed in range(5, 10)
        for render in (False, True)
        if seed not in (6, 8) or not render
    ]
    ((simulator, *how),) = Fake.made
    assert simulator.closed and how == [("corner",), (16, 24)]


@pytest.mark.parametrize("good, fails", [(0, 10), (1, 10), (3, 10), (4, 12), (6, 18)])
def test_an_expert_may_fail_ten_times_and_thrice_as_often_as_it_succeeds(scripted, good, fails):
    """One failure more, and the recorder gives up with the numbers."""
    benchmark = SimpleNamespace(cameras=("corner",), image_size=(16, 24))
    scripted(lambda seed: seed >= good and seed < good + fails)
    assert len(list(metaworld_module._successes(benchmark, TASK, good + 1, 0, 0.5, {}))) == good + 1
    scripted(lambda seed: seed >= good)
    named = f"{TASK}: the expert failed on {fails + 1} of {good + fails + 1} seeds with noise 0.5"
    with pytest.raises(ValueError, match=named):
        list(metaworld_module._successes(benchmark, TASK, good + 1, 0, 0.5, {}))
    assert all(simulator.closed for simulator, *_ in Fake.made)


class Writer:
    """A dataset that keeps what it is given."""

    def __init__(self, root):
        self.root, self.episodes = root, []
        root.mkdir()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_episode(self, **episode):
        self.episodes.append(episode)


@pytest.fixture
def recorder(monkeypatch):
    """`record` with a fake simulator and a fake dataset: what is asked of each."""
    seen = {"writers": [], "successes": []}

    def writer(root, spec, *, version, robot_type):
        assert robot_type == "sawyer"
        seen["writers"].append((Writer(root), spec, version))
        return seen["writers"][-1][0]

    def successes(benchmark, task, episodes, first_seed, noise, failed):
        seen["successes"].append((benchmark, task, episodes, first_seed, noise))
        failed.setdefault(task, []).append(99)
        for seed in range(first_seed, first_seed + episodes):
            rows = np.full((seed + 1, 4), seed, np.float32)
            yield metaworld_module.Demonstration(task, seed, {"corner": f"images {seed}"}, rows, rows + 0.5)

    monkeypatch.setattr(metaworld_module, "open_writer", writer)
    monkeypatch.setattr(metaworld_module, "_successes", successes)
    return seen


def test_each_argument_of_the_recorder_reaches_what_it_controls(recorder, tmp_path):
    out, tasks = tmp_path / "data", ["drawer-open-v3", "door-close-v3"]
    more = {
        "episodes": 2,
        "image_size": 40,
        "cameras": ("corner", "topview"),
        "noise": 0.3,
        "first_seed": 4,
        "version": "v2.1",
    }
    report = record(out, tasks, **more, show_progress=False)
    ((writer, spec, version),) = recorder["writers"]
    assert (version, spec.cameras, spec.image_size) == ("v2.1", ("corner", "topview"), (40, 40))
    benchmark = recorder["successes"][0][0]
    assert benchmark.spec == spec
    assert recorder["successes"] == [(benchmark, task, 2, 4, 0.3) for task in tasks]
    told = [
        (e["task"], e["images"], len(e["action"]), e["action"][0, 0] - e["state"][0, 0])
        for e in writer.episodes
    ]
    assert told == [
        (words, {"corner": f"images {seed}"}, seed + 1, 0.5)
        for words in ("open the drawer", "close the door")
        for seed in (4, 5)
    ]
    assert report.pop("seconds") > 0
    assert report == {"episodes": 4, "frames": 2 * (5 + 6), "failed_seeds": {task: [99] for task in tasks}}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_the_recorder_is_not_told_has_these_values(recorder, tmp_path, capsys):
    record(tmp_path / "data", [TASK])
    ((_, spec, version),) = recorder["writers"]
    assert (version, spec.cameras, spec.image_size) == ("v3.0", ("corner2",), (96, 96))
    ((benchmark, *asked),) = recorder["successes"]
    assert asked == [TASK, 25, 0, 0.1] and benchmark.spec == spec
    assert "25/25" in capsys.readouterr().err
    record(tmp_path / "quiet", [TASK], episodes=1, show_progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("episodes", [0, -1])
def test_a_recording_has_an_episode(recorder, tmp_path, episodes):
    with pytest.raises(ValueError, match=f"episodes must be at least 1, got {episodes}"):
        record(tmp_path / "data", [TASK], episodes=episodes)
    assert recorder["writers"] == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [(), ("dataset",)])
def test_an_interrupted_recording_is_begun_again(recorder, tmp_path, left, capsys):
    partial = tmp_path / "data.partial"
    partial.mkdir()
    for name in left:
        (partial / name).mkdir()
        (partial / name / "half").touch()
    record(tmp_path / "data", [TASK], episodes=1, show_progress=False)
    assert "an interrupted recording in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and not list((tmp_path / "data").iterdir())


def test_a_dataset_says_how_it_was_recorded(tmp_path):
    for version in ("v3.0", "v2.1"):
        benchmark = MetaWorld(tasks=[TASK], cameras=("corner", "topview"), image_size=(16, 24))
        writing = {"version": version, "robot_type": "sawyer"}
        with metaworld_module.open_writer(tmp_path / version, benchmark.spec, **writing) as writer:
            pixels = np.zeros((2, 16, 24, 3), np.uint8)
            rows = np.zeros((2, 4), np.float32)
            writer.add_episode(
                images={"corner": pixels, "topview": pixels}, state=rows, action=rows, task="go"
            )
        info = json.loads((tmp_path / version / "meta/info.json").read_text())
        assert (info["codebase_version"], info["fps"], info["robot_type"]) == (version, 80, "sawyer")
        cameras = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
        assert [key.rsplit(".")[-1] for key in cameras] == ["corner", "topview"]
        assert all(info["features"][key]["shape"][:2] == [16, 24] for key in cameras)


PARSED = {
    "tasks": [TASK], "out": "o", "episodes": 25, "cameras": ["corner2"], "image_size": 96, "noise": 0.1,
    "first_seed": 0, "version": "v3.0",
}  # fmt: skip


@pytest.mark.parametrize(
    "words, change",
    [
        ([], {}),
        (["--episodes", "3"], {"episodes": 3}),
        (["--cameras", "corner", "topview"], {"cameras": ["corner", "topview"]}),
        (["--image_size", "40"], {"image_size": 40}),
        (["--noise", "0.5"], {"noise": 0.5}),
        (["--first_seed", "7"], {"first_seed": 7}),
        (["--version", "v2.1"], {"version": "v2.1"}),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize(
    "failed", [{}, {TASK: [3, 5], "door-open-v3": [1]}], ids=["no seed failed", "some failed"]
)
def test_the_program_hands_each_word_on_and_tells_what_was_recorded(
    words, change, failed, monkeypatch, capsys
):
    seen = []
    report = {"episodes": 4, "frames": 321, "seconds": 12.4, "failed_seeds": failed}
    monkeypatch.setattr(metaworld_module, "record", lambda **options: seen.append(options) or report)
    main(["record", "--tasks", TASK, "--out", "o", *words])
    assert seen == [PARSED | change]
    told = "seeds: drawer-open-v3 [3, 5], door-open-v3 [1]" if failed else "no seed"
    assert (
        capsys.readouterr().out == f"4 demonstrations, 321 frames, 12 s in o; the expert failed on {told}\n"
    )


@pytest.mark.parametrize(
    "words", [[], ["record", "--out", "o"], ["record", "--tasks", TASK], ["record", "--tasks", "--out", "o"]]
)
def test_what_the_program_has_to_be_told(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert "are required" in said or "expected at least one argument" in said


def test_the_program_lists_every_task_with_its_instruction(capsys):
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[task, instruction_of(task)] for task in TASKS]
    assert len(lines) == 50 and len({instruction_of(task) for task in TASKS}) == 50


# --- a machine that lacks something -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, checked", [(None, True), ("egl", True), ("EGL", True), ("osmesa", False), ("glfw", False)]
)
def test_egl_is_asked_for_unless_another_way_to_render_is(asked, checked, monkeypatch):
    loaded = []
    monkeypatch.setattr(metaworld_module.ctypes, "CDLL", loaded.append)
    if asked is None:
        monkeypatch.delenv("MUJOCO_GL", raising=False)
    else:
        monkeypatch.setenv("MUJOCO_GL", asked)
    metaworld, mujoco = metaworld_module.load_simulator()
    assert (metaworld.__name__, mujoco.__name__) == ("metaworld", "mujoco")
    assert os.environ["MUJOCO_GL"] == (asked or "egl") and loaded == ["libEGL.so.1"] * checked


def test_a_machine_without_egl_is_told_what_to_install(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(metaworld_module.ctypes, "CDLL", missing)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(
        OSError, match="libEGL.so.1 is missing: rendering needs EGL.*apt-get install .*libegl1"
    ):
        metaworld_module.load_simulator()


@pytest.mark.parametrize("error", [RuntimeError, ImportError])
def test_a_renderer_that_cannot_be_made_is_told_the_same(error, simulator, monkeypatch):
    import mujoco

    def broken(*given):
        raise error("no device")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(OSError, match=r"MuJoCo cannot render here \(no device\): rendering needs EGL"):
        metaworld_module.open_renderer(simulator.env.model, (16, 16))


@pytest.mark.parametrize("missing", ["metaworld", "mujoco"])
def test_a_package_that_is_missing_is_named_with_how_to_install_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        RegistryError, match=f"benchmark 'metaworld' needs '{missing}': .*pip install.*metaworld"
    ):
        metaworld_module.load_simulator()

    def version(name):
        if name == missing:
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metaworld_module, "version", version)
    with pytest.raises(RegistryError, match=f"needs '{missing}': .*pip install.*metaworld"):
        metaworld_module.installed_versions()
