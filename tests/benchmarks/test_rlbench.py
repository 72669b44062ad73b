"""RLBench against a STAND-IN of its public interface, which nobody here has run."""

import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from vla_bench.benchmarks.rlbench import ACTION, CAMERAS, STATE, RLBench, planned_pose


class InvalidActionError(Exception):
    pass


class CameraConfig:
    def __init__(self, image_size=(128, 128)):
        self.image_size, self.rgb, self.depth = image_size, True, True

    def set_all(self, value):
        self.rgb = self.depth = value


class Task:
    """`get_task`: variations, descriptions, and a scene that is drawn with the global generators."""

    def __init__(self, cls, config):
        self.cls, self.config, self.poses = cls, config, []

    def variation_count(self):
        return 7

    def set_variation(self, number):
        self.variation = number

    def observation(self):
        rgb = {f"{camera}_rgb": None for camera in CAMERAS}
        for camera in CAMERAS:
            config = self.config[f"{camera}_camera"]
            if config.rgb:
                rgb[f"{camera}_rgb"] = np.full((*config.image_size, 3), len(self.poses), np.uint8)
        return SimpleNamespace(gripper_pose=np.array([0.3, 0, 1, *self.place]), gripper_open=1.0, **rgb)

    def reset(self):
        self.place = [random.random(), *np.random.rand(3)]
        return [f"open drawer {self.variation}", "another wording"], self.observation()

    def step(self, action):
        assert (
            action.shape == (8,) and abs(np.linalg.norm(action[3:7]) - 1) < 1e-6 and action[7] in (0.0, 1.0)
        )
        if action[2] < 0:
            raise InvalidActionError("no path")
        self.poses.append(action)
        return self.observation(), float(len(self.poses) == 2), len(self.poses) == 2


class Environment:
    def __init__(self, action_mode, obs_config, headless):
        self.mode, self.config, self.headless, self.running = action_mode, obs_config, headless, False

    def launch(self):
        self.running = True

    def get_task(self, cls):
        return Task(cls, self.config)

    def shutdown(self):
        self.running = False


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    modules = {
        "environment": {"Environment": Environment},
        "observation_config": {"CameraConfig": CameraConfig, "ObservationConfig": lambda **given: given},
        "action_modes": {},
        "action_modes.action_mode": {"MoveArmThenGripper": lambda arm, gripper: (arm, gripper)},
        "action_modes.arm_action_modes": {"EndEffectorPoseViaPlanning": lambda: "planned"},
        "action_modes.gripper_action_modes": {"Discrete": lambda: "discrete"},
        "utils": {"name_to_task_class": lambda name: f"class of {name}"},
        "backend": {},
        "backend.exceptions": {"InvalidActionError": InvalidActionError},
    }
    monkeypatch.setitem(sys.modules, "rlbench", ModuleType("rlbench"))
    for name, members in modules.items():
        module = ModuleType(f"rlbench.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def start(seed=9, **arguments):
    env = RLBench(tasks=["open_drawer"], image_size=32, **arguments).make("open_drawer", seed)
    return env, env.reset()


def pose(z=1.0, opening=1.0):
    return np.array([0.3, 0, z, 0, 0, 2.0, 0, opening])


def test_the_arm_is_moved_by_planning_and_only_the_asked_cameras_are_drawn():
    env, seen = start(cameras=["wrist", "front"])
    simulator = env.simulator.env
    assert simulator.mode == ("planned", "discrete") and simulator.headless and simulator.running
    assert len(seen["image"]) == 2 and seen["image"][0].size == (32, 32)
    drawn = [camera for camera in CAMERAS if simulator.config[f"{camera}_camera"].rgb]
    assert sorted(drawn) == ["front", "wrist"]
    assert not any(simulator.config[f"{camera}_camera"].depth for camera in CAMERAS)
    env.close()
    env.benchmark.close()
    assert not simulator.running


def test_a_scene_is_its_seed_and_the_callers_generators_go_on_as_before():
    random.seed(1)
    np.random.seed(1)
    undisturbed = (random.random(), np.random.rand())
    random.seed(1)
    np.random.seed(1)
    first = start(9)[1]
    assert (random.random(), np.random.rand()) == undisturbed
    again, other = start(9)[1], start(16)[1]
    assert first["state"].tolist() == again["state"].tolist() != other["state"].tolist()
    assert first["lang"] == other["lang"] == "open drawer 2" and start(10)[1]["lang"] == "open drawer 3"


def test_success_is_a_reward_of_one_and_ends_the_episode():
    env, _ = start()
    told = [env.step(pose()) for _ in range(2)]
    assert [(step.success, step.done) for step in told] == [(False, False), (True, True)]


def test_a_pose_that_cannot_be_planned_moves_nothing_and_costs_an_action():
    env, _ = start(max_steps=3)
    told = [env.step(pose(z=-1.0)) for _ in range(3)]
    assert [(step.success, step.done) for step in told] == [(False, False), (False, False), (False, True)]
    assert env.simulator.scene.poses == []


def test_a_quaternion_has_length_one_and_its_real_part_behind():
    told = planned_pose(np.array([1, 2, 3, 0, 0, 0, 5.0, 0.2]))
    assert told.tolist() == [1, 2, 3, 0, 0, 0, 1, 0.0]
    assert ACTION.names[3:7] == ("qx", "qy", "qz", "qw") and STATE.rotation == "quaternion_xyzw"


@pytest.mark.parametrize("opening, told", [(1.0, 1.0), (0.51, 1.0), (0.5, 0.0), (0.0, 0.0)])
def test_one_opens_the_gripper(opening, told):
    assert planned_pose(pose(opening=opening))[7] == told


def test_the_state_is_the_pose_and_the_gripper():
    state = start()[1]["state"]
    assert state.shape == (8,) and state[:3].tolist() == [0.3, 0, 1] and state[7] == 1.0
