"""SimplerEnv's WidowX tasks: conventions against formulas of their own, and for real where ManiSkill is installed."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_bench.benchmarks.simpler_bridge import (
    BRIDGE_TASKS,
    CAMERAS,
    CONTROL_RATE,
    EPISODES,
    SimplerBridgeEver,
    SimplerBridgeLastStep,
    bridge_state,
    controller_action,
)
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate, run_episode

TASKS = [task for task in BRIDGE_TASKS if "eggplant" not in task]  # those of the reduced assets
SMALL = {"image_size": (48, 64)}


def axis(angle, which):
    """An elementary rotation, written out."""
    c, s = np.cos(angle), np.sin(angle)
    i, j = [(1, 2), (2, 0), (0, 1)][which]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


@pytest.mark.parametrize("seed", range(20))
def test_the_controller_is_told_the_rotation_that_the_data_mean(seed):
    roll, pitch, yaw = np.random.default_rng(seed).uniform(-1, 1, 3)
    meant = axis(yaw, 2) @ axis(pitch, 1) @ axis(roll, 0)  # about fixed axes: the first one acts first
    told = controller_action(np.array([1, 2, 3, roll, pitch, yaw, 1]))
    a, b, c = told[3:6]
    np.testing.assert_allclose(axis(a, 0) @ axis(b, 1) @ axis(c, 2), meant, atol=1e-12)
    assert told[:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("given, told", [(1.0, 1.0), (0.51, 1.0), (0.5, -1.0), (0.0, -1.0), (-0.3, -1.0)])
def test_the_gripper_is_cut_at_one_half(given, told):
    assert controller_action(np.array([0, 0, 0, 0, 0, 0, given]))[6] == told


def test_a_state_counts_the_rotation_from_a_hand_that_points_down():
    down = Rotation.from_matrix(axis(np.pi / 2, 1))
    for turned in (Rotation.identity(), Rotation.from_euler("xyz", [0.1, -0.2, 0.3])):
        x, y, z, w = (turned * down).as_quat()
        state = bridge_state(np.array([1.0, 2, 3]), np.array([w, x, y, z]), np.array([0.026, 0.026]))
        np.testing.assert_allclose(state, [1, 2, 3, *turned.as_euler("xyz"), 0, 0.5], atol=1e-12)


@pytest.mark.parametrize("fingers, opening", [(0.037, 1.0), (0.04, 1.0), (0.015, 0.0), (0.01, 0.0)])
def test_the_opening_is_between_0_and_1(fingers, opening):
    assert bridge_state(np.zeros(3), np.array([0.7, 0, 0.7, 0]), np.full(2, fingers))[7] == opening


def test_24_seeds_in_a_row_are_the_24_episodes():
    benchmark = SimplerBridgeLastStep()
    for first in (0, 7, 50000):
        assert sorted(map(benchmark.scene, range(first, first + EPISODES))) == list(range(EPISODES))


def test_an_episode_has_60_actions_and_the_eggplants_120():
    benchmark = SimplerBridgeLastStep()
    assert [benchmark.limit(task) for task in BRIDGE_TASKS] == [60, 60, 60, 120]
    assert [SimplerBridgeLastStep(max_steps=80).limit(task) for task in BRIDGE_TASKS] == [60, 60, 60, 80]


@pytest.fixture(scope="module")
def bridge(maniskill_installed):
    benchmark = SimplerBridgeEver(tasks=TASKS, **SMALL)
    yield benchmark
    benchmark.close()


def actions(seed, steps):
    rng = np.random.default_rng(seed)
    low, high = [-0.02, -0.02, -0.03, -0.1, -0.1, -0.1, 0], [0.02, 0.02, 0.01, 0.1, 0.1, 0.1, 1]
    return rng.uniform(low, high, (steps, 7))


def play(benchmark, task, seed, steps=8, observe=True):
    """All that can be seen of some actions."""
    env = benchmark.make(task, seed)
    first = env.reset()
    seen = [first["state"].tobytes(), first["image"][0].tobytes()]
    for i, action in enumerate(actions(3, steps)):
        step = env.step(action, observe=observe or i == steps - 1)
    seen += [step.observation["state"].tobytes(), step.observation["image"][0].tobytes(), step.success]
    env.close()
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_is_its_number_whatever_ran_before(task, bridge):
    bridge.close()
    fresh = play(bridge, task, 24 + 6)
    other = play(bridge, task, 7, steps=20)  # leaves the arm among the objects
    assert play(bridge, task, 6) == fresh and play(bridge, task, 6, observe=False) == fresh
    assert other[1] != fresh[1]  # another episode is another scene


@pytest.mark.parametrize("task", TASKS)
def test_every_task_shows_its_objects_and_says_what_to_do(task, bridge):
    env = bridge.make(task, 0)
    seen = env.reset()
    image = np.asarray(seen["image"][0])
    assert image.shape == (48, 64, 3) and image.std() > 20
    assert seen["lang"] == env.simulator.env.get_language_instruction()[0] == BRIDGE_TASKS[task].lang
    assert np.abs(seen["state"][3:6]).max() < 0.1 and seen["state"][7] > 0.95
    env.close()


def test_the_declared_rate_limit_and_camera_are_the_simulators(bridge):
    env = bridge.make("widowx_carrot_on_plate", 0)
    simulator = env.simulator.env
    assert simulator.control_freq == CONTROL_RATE
    assert list(simulator._sensors) == [CAMERAS[0]]
    env.close()
    from mani_skill.utils.registration import REGISTERED_ENVS

    limits = {task: REGISTERED_ENVS[known.name].max_episode_steps for task, known in BRIDGE_TASKS.items()}
    assert limits == {task: known.max_steps for task, known in BRIDGE_TASKS.items()}


@pytest.mark.parametrize("axis_of_hand", [0, 1, 2])
def test_an_action_moves_the_hand_by_metres(axis_of_hand, bridge):
    env = bridge.make("widowx_stack_cube", 0)
    before = env.reset()["state"]
    action = np.array([0.0] * 6 + [1.0])
    action[axis_of_hand] = 0.02
    for _ in range(4):
        after = env.step(action).observation["state"]
    moved = after[:3] - before[:3]
    assert 0.05 < moved[axis_of_hand] < 0.1 and np.abs(np.delete(moved, axis_of_hand)).max() < 0.02, moved
    env.close()


def test_the_controllers_target_turns_as_the_data_mean_it(bridge):
    """In ManiSkill 3.0.1 the three numbers are Euler angles; a rotation vector in their place misses by degrees."""
    env = bridge.make("widowx_stack_cube", 0)
    env.reset()
    arm = env.simulator.env.agent.controller.controllers["arm"]
    read = lambda: Rotation.from_quat(arm._target_pose.q[0].numpy()[[1, 2, 3, 0]])
    before, angles = read(), [0.3, 0.4, -0.5]
    env.step(np.array([0, 0, 0, *angles, 1.0]), observe=False)
    turned = read() * before.inv()
    assert (turned * Rotation.from_euler("xyz", angles).inv()).magnitude() < 1e-5
    env.close()


def test_a_number_above_one_half_opens_the_gripper(bridge):
    env, openings = bridge.make("widowx_stack_cube", 0), []
    env.reset()
    for number in (0.0, 1.0):
        for _ in range(5):
            step = env.step(np.array([0, 0, 0, 0, 0, 0, number]))
        openings.append(step.observation["state"][7])
    assert openings[0] < 0.1 and openings[1] > 0.9, openings
    env.close()


class Replay:
    """A policy that repeats recorded actions, whatever it sees."""

    fingerprint = "replay"

    def __init__(self, spec, recorded):
        layout = dataclasses.asdict(spec.action)
        rest = (4, spec.control_rate, {"action": "none"}, "bridge", "0" * 16)
        self.spec = PolicySpec(type(spec.action)(**layout), None, spec.cameras, spec.image_size, *rest)
        self.recorded, self.asked = recorded, 0

    def predict(self, observation, *, seed):
        assert observation["image"][0].size == (64, 48)
        chunk = self.recorded[self.asked : self.asked + 4]
        self.asked += 4
        return chunk


def test_a_rollout_runs_through_the_evaluation(bridge, tmp_path):
    recorded, settings = actions(5, 12), EvaluationSettings(max_steps=12, n_action_steps=4)
    lines = [
        run_episode(Replay(bridge.spec, recorded), bridge, "widowx_carrot_on_plate", 3, settings)
        for _ in range(2)
    ]
    assert lines[0][0] == lines[1][0] and lines[0][0]["steps"] == 12
    frames, actions_done = lines[0][1].frames, lines[0][1].actions
    assert frames.shape == (13, 1, 48, 64, 3) and (frames == lines[1][1].frames).all()
    np.testing.assert_array_equal(actions_done, recorded)
    assert (frames[0] != frames[12]).any()


def test_an_evaluation_says_by_which_rule_it_counted(maniskill_installed, tmp_path):
    benchmark = SimplerBridgeLastStep(tasks=TASKS[:1], max_steps=4, **SMALL)
    settings = EvaluationSettings(benchmark="simpler_bridge", episodes=2, n_action_steps=4)
    summary = evaluate(Replay(benchmark.spec, actions(1, 8)), benchmark, settings, tmp_path)
    assert summary["episodes"] == 2 and summary["fingerprint"]["benchmark"]["max_steps"] == 4
    assert "last_step: no episode ends before its last step" in (tmp_path / "summary.json").read_text()
    benchmark.close()
