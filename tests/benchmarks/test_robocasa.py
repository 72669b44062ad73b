"""RoboCasa365 against a STAND-IN of its Gym wrapper's public interface, which nobody here has run."""

import sys
from types import ModuleType

import numpy as np
import pytest

from vla_bench.benchmarks.benchmark import check_policy
from vla_bench.benchmarks.robocasa import ACTION, CAMERAS, STATE, RoboCasa, flat_state, named_action
from vla_bench.data.layout import PolicySpec

SIZES = {"base_position": 3, "base_rotation": 4, "end_effector_position_relative": 3}
SIZES |= {"end_effector_rotation_relative": 4, "gripper_qpos": 2}


class StandIn:
    """`robocasa/<Task>`: named observations and actions, success that comes and goes."""

    def __init__(self, name, **build):
        self.name, self.build, self.count, self.actions = name, build, 0, []

    def observation(self):
        height, width = self.build["camera_heights"], self.build["camera_widths"]
        seen = {
            f"video.{camera}": np.full((height, width, 3), i, np.uint8) for i, camera in enumerate(CAMERAS)
        }
        seen |= {
            f"state.{part}": np.full(size, i, np.float32) for i, (part, size) in enumerate(SIZES.items())
        }
        return seen | {"annotation.human.task_description": f"close the drawer, scene {self.seed}"}

    def reset(self, seed):
        self.seed, self.count = seed, 0
        return self.observation(), {}

    def step(self, action):
        assert {name: len(part) for name, part in action.items()} == {
            "action.end_effector_position": 3,
            "action.end_effector_rotation": 3,
            "action.gripper_close": 1,
            "action.base_motion": 4,
            "action.control_mode": 1,
        }
        self.count += 1
        self.actions.append(action)
        return self.observation(), 0.0, False, False, {"success": 10 <= self.count < 15 or self.count >= 20}

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    sets = {"atomic_seen": ["CloseDrawer"], "composite_seen": ["MakeTea"], "composite_unseen": ["Wash"]}
    registry, tools = (
        ModuleType("robocasa.utils.dataset_registry"),
        ModuleType("robocasa.utils.dataset_registry_utils"),
    )
    registry.TASK_SET_REGISTRY = {**sets, "pretrain_only": ["Dance"]}
    tools.get_task_horizon = {"CloseDrawer": 40, "MakeTea": 900, "Wash": 500}.__getitem__
    gym = ModuleType("gymnasium")
    gym.make = StandIn
    modules = [registry, tools, gym, *map(ModuleType, ("robocasa", "robocasa.utils", "robocasa.wrappers"))]
    for module in [*modules, ModuleType("robocasa.wrappers.gym_wrapper")]:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("vla_bench.benchmarks.robocasa.prepare_rendering", lambda: None)
    versions = lambda benchmark, packages, hint: dict.fromkeys(packages, "1")
    monkeypatch.setattr("vla_bench.benchmarks.robocasa.package_versions", versions)


def test_the_tasks_are_the_target_fifty_and_their_limits_those_of_the_registry():
    benchmark = RoboCasa()
    assert benchmark.tasks() == ["CloseDrawer", "MakeTea", "Wash"]
    assert [benchmark.limit(task) for task in benchmark.tasks()] == [40, 900, 500]
    assert benchmark.spec.max_steps == 900 and RoboCasa(max_steps=60).limit("MakeTea") == 60
    with pytest.raises(ValueError, match="did you mean 'CloseDrawer'"):
        RoboCasa(tasks=["CloseDrawr"])


def test_the_numbers_of_an_action_reach_the_parts_of_their_names():
    """In the data the base comes first; the wrapper's own flattening begins with the arm."""
    named = named_action(np.arange(12.0))
    told = {name: part.tolist() for name, part in named.items()}
    assert told["action.base_motion"] == [0, 1, 2, 3] and told["action.control_mode"] == [4]
    assert told["action.end_effector_position"] == [5, 6, 7]
    assert told["action.end_effector_rotation"] == [8, 9, 10] and told["action.gripper_close"] == [11]
    assert ACTION.names[4] == "control_mode" and ACTION.gripper == "positive_closes"


def test_the_state_is_in_the_order_of_the_data_with_the_real_part_behind():
    env = RoboCasa(tasks=["CloseDrawer"], image_size=32).make("CloseDrawer", 5)
    seen = env.reset()
    assert seen["state"].tolist() == [0] * 3 + [1] * 4 + [2] * 3 + [3] * 4 + [4] * 2
    assert STATE.names[3:7] == ("base_qx", "base_qy", "base_qz", "base_qw")
    assert seen["lang"] == "close the drawer, scene 5"
    assert [int(np.asarray(image).max()) for image in seen["image"]] == [0, 1, 2]


def test_an_observation_without_a_part_is_refused():
    with pytest.raises(ValueError, match="has no 'state.base_position'"):
        flat_state({"state.base_positions": np.zeros(3)})


def test_success_is_looked_at_every_sixteen_actions():
    """Done from the 10th to the 14th and from the 20th on: the official program sees the second, after the 32nd."""
    env, count = RoboCasa(tasks=["CloseDrawer"], image_size=32).make("CloseDrawer", 0), 0
    env.reset()
    while not env.done:
        step, count = env.step(np.zeros(12), observe=False), count + 1
    assert (count, step.success) == (32, True)
    env = RoboCasa(tasks=["CloseDrawer"], image_size=32, max_steps=22).make("CloseDrawer", 0)
    env.reset()
    told = [env.step(np.zeros(12), observe=False).success for _ in range(22)]
    assert told == [False] * 21 + [True]  # and at the end


def test_the_environment_is_built_for_the_split_and_the_size():
    env = RoboCasa(tasks=["CloseDrawer"], image_size=(48, 64), split="target").make("CloseDrawer", 0)
    built = env.simulator.env
    assert built.name == "robocasa/CloseDrawer" and built.build["split"] == "target"
    assert (built.build["camera_heights"], built.build["camera_widths"]) == (48, 64)


def test_a_policy_in_the_simulators_own_order_is_refused():
    spec = RoboCasa(image_size=64).spec
    fields = (spec.cameras, (64, 64), 8, 20.0, {"action": "min_max"}, "robocasa", "0" * 16)
    check_policy(PolicySpec(ACTION, STATE, *fields), spec)
    names = (*ACTION.names[5:12], *ACTION.names[:5])
    flat = type(ACTION)(names, ACTION.kind, ACTION.frame, ACTION.units, ACTION.rotation, ACTION.gripper)
    with pytest.raises(ValueError, match="action names is"):
        check_policy(PolicySpec(flat, STATE, *fields), spec)
