"""SimplerEnv's Google robot against a STAND-IN of the original package's public interface, which nobody here has run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_bench.benchmarks.simpler_google import (
    ACTION,
    APPLE,
    DRAWERS,
    GOOGLE_TASKS,
    SimplerGoogleMatching,
    SimplerGoogleVariants,
    StickyGripper,
    google_action,
    matching_scenes,
    variant_scenes,
)
from vla_bench.data.rotations import convert_rotation


class StandIn:
    """What `build_maniskill2_env` returns: observations, five returned values, instructions, closedness."""

    built: list = []

    def __init__(self, name, **build):
        assert build["obs_mode"] == "rgbd" and build["control_mode"] == "delta_pose_of_google_robot_static"
        self.name, self.build, self.actions, self.unwrapped = name, build, [], self
        self.agent = SimpleNamespace(get_gripper_closedness=lambda: np.float32(0.25))
        self.closed = False
        StandIn.built.append(self)

    def observation(self):
        turn = Rotation.from_euler("z", np.pi / 2).as_quat()[[3, 0, 1, 2]]
        tool = np.concatenate([[1.0, 2.0, 0.5], turn])
        base = np.concatenate([[1.0, 0.0, 0.0], turn])
        rgb = np.full((512, 640, 3), len(self.actions), np.uint8)
        return {
            "image": {"overhead_camera": {"rgb": rgb}},
            "agent": {"base_pose": np.float32(base)},
            "extra": {"tcp_pose": np.float32(tool)},
        }

    def reset(self, options):
        self.options = options
        return self.observation(), {}

    def step(self, action):
        assert action.shape == (7,)
        self.actions.append(action)
        done = len(self.actions) == 3  # and undone again at the fourth
        return self.observation(), 0.0, done, False, {}

    def get_language_instruction(self):
        return "open top drawer" if len(self.actions) < 2 else "place apple into top drawer"

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    StandIn.built = []
    builder = ModuleType("simpler_env.utils.env.env_builder")
    builder.build_maniskill2_env = StandIn
    builder.get_robot_control_mode = lambda robot, policy: f"delta_pose_of_{robot}"
    real2sim = ModuleType("mani_skill2_real2sim")
    real2sim.ASSET_DIR = Path("data")
    for name in ("simpler_env", "simpler_env.utils", "simpler_env.utils.env"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, builder.__name__, builder)
    monkeypatch.setitem(sys.modules, real2sim.__name__, real2sim)


def test_an_episode_is_built_as_the_original_program_builds_it():
    env = SimplerGoogleMatching(tasks=["open_top_drawer"]).make("open_top_drawer", 36 + 1)
    env.reset()
    (built,) = StandIn.built
    assert built.name == "OpenTopDrawerCustomInScene-v0"
    wanted = {"robot": "google_robot_static", "sim_freq": 513, "control_freq": 3, "max_episode_steps": 113}
    wanted |= {"scene_name": "dummy_drawer", "station_name": "mk_station_recolor", "urdf_version": None}
    wanted |= {"rgb_overlay_path": "data/real_inpainting/open_drawer_a1.png", "shader_dir": "rt"}
    assert wanted.items() <= built.build.items()
    robot = built.options["robot_init_options"]
    assert robot["init_xy"].tolist() == [0.765, -0.182]
    half = (np.pi - 0.02) / 2
    np.testing.assert_allclose(robot["init_rot_quat"], [np.cos(half), 0, 0, np.sin(half)], atol=1e-12)
    assert built.options["obj_init_options"]["init_xy"].tolist() == [0, 0]


def test_move_near_is_told_the_number_of_its_episode():
    SimplerGoogleVariants(tasks=["move_near"]).make("move_near", 59).reset()
    (built,) = StandIn.built
    assert built.options["obj_init_options"] == {"episode_id": 59} and built.build["rgb_overlay_path"] is None


def test_every_episode_has_an_environment_of_its_own_and_the_last_one_is_closed():
    benchmark = SimplerGoogleMatching(tasks=["move_near"])
    for seed in (0, 1):
        env = benchmark.make("move_near", seed)
        env.reset()
        env.close()
    benchmark.close()
    assert len(StandIn.built) == 2 and all(built.closed for built in StandIn.built)


def test_the_last_step_decides_and_the_instruction_may_change():
    benchmark = SimplerGoogleMatching(tasks=[APPLE], image_size=32, max_steps=4)
    env, told, said = benchmark.make(APPLE, 0), [], []
    said.append(env.reset()["lang"])
    while not env.done:
        step = env.step(np.zeros(7))
        told.append(step.success)
        said.append(step.observation["lang"])
    assert told == [False, False, True, False]
    assert said == ["open top drawer"] * 2 + ["place apple into top drawer"] * 3
    assert np.asarray(step.observation["image"][0]).shape == (32, 32, 3)


def test_the_state_is_of_the_base_with_the_real_part_behind():
    env = SimplerGoogleMatching(tasks=["move_near"], image_size=32).make("move_near", 0)
    np.testing.assert_allclose(env.reset()["state"], [2, 0, 0.5, 0, 0, 0, 1, 0.25], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_rotation_is_a_rotation_vector(seed):
    euler = np.random.default_rng(seed).uniform(-0.5, 0.5, 3)
    told = google_action(np.array([1, 2, 3, *euler, 1.0]), StickyGripper())
    np.testing.assert_allclose(told[3:6], convert_rotation(euler, "euler_xyz", "axis_angle"))
    assert told[:3].tolist() == [1, 2, 3] and ACTION.rotation == "euler_xyz"


def test_a_closing_gripper_closes_for_fifteen_actions_whatever_is_asked():
    gripper = StickyGripper()
    told = [gripper(opening) for opening in [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 1]]
    assert told[0] == 0 and told[1:16] == [1.0] * 15
    assert told[16] == 0.0 and told[17:] == [-1.0, -1.0]


def test_a_small_change_is_passed_on_and_not_repeated():
    gripper = StickyGripper()
    assert [round(gripper(opening), 6) for opening in (0.8, 0.5, 0.5, 0.9)] == [0.0, 0.3, 0.0, -0.4]


def test_an_episode_begins_with_a_gripper_that_does_not_stick():
    env = SimplerGoogleMatching(tasks=["move_near"], image_size=32).make("move_near", 0)
    for _ in range(2):
        env.reset()
        for opening in (1.0, 0.0):
            env.step(np.array([0, 0, 0, 0, 0, 0, opening]), observe=False)
    assert [[action[6] for action in built.actions] for built in StandIn.built] == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize("task", GOOGLE_TASKS)
@pytest.mark.parametrize("scenes", [matching_scenes, variant_scenes])
def test_no_episode_is_listed_twice(task, scenes):
    listed = [repr(scene) for scene in scenes(task)]
    assert len(set(listed)) == len(listed)


def test_matching_has_a_photograph_and_four_paints_and_variants_have_neither():
    for task in GOOGLE_TASKS:
        matched, varied = matching_scenes(task), variant_scenes(task)
        assert all("rgb_overlay_path" in scene.build for scene in matched)
        assert len({scene.build["urdf_version"] for scene in matched}) == 4
        assert not any(scene.build.keys() & {"rgb_overlay_path", "urdf_version"} for scene in varied)
        traced = task in DRAWERS or task == APPLE
        assert all((scene.build.get("shader_dir") == "rt") == traced for scene in matched + varied)
