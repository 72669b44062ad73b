"""MetaWorld in absolute terms: which way up an image is, what an action does, what a demonstration holds."""

import zlib

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import (
    CAMERAS,
    MetaWorld,
    Simulator,
    demonstrate,
    expert,
    instruction_of,
    record,
)

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
