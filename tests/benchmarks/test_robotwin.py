"""RoboTwin 2.0 against a STAND-IN of its classes' public interface, which nobody here has run."""

import sys
from types import ModuleType

import numpy as np
import pytest
import yaml

from vla_bench.benchmarks.robotwin import (
    ACTION,
    FOLDER_VARIABLE,
    RoboTwinClean,
    RoboTwinRandomized,
    SolvableSeeds,
    config_file,
)

TASK = "lift_pot"


class StandIn:
    """`envs.lift_pot.lift_pot`: setup_demo, get_obs, take_action, an expert that solves even seeds."""

    log: list = []

    def setup_demo(self, now_ep_num, seed, is_test, **arguments):
        assert is_test is True
        self.seed, self.arguments, self.count, self.eval_success = seed, arguments, 0, False
        StandIn.log.append(("setup", seed, now_ep_num))

    def play_once(self):
        StandIn.log.append(("expert", self.seed))
        self.plan_success = self.seed % 2 == 0
        return {"info": {"{A}": f"pot {self.seed}"}}

    def check_success(self):
        return True

    def set_instruction(self, instruction):
        self.instruction = instruction

    def get_obs(self):
        StandIn.log.append("look")
        views = {
            name: {"rgb": np.full((240, 320, 3), i, np.uint8)}
            for i, name in enumerate(("head_camera", "left_camera", "right_camera"))
        }
        return {"observation": views, "joint_action": {"vector": np.arange(14) + self.count}, "endpose": {}}

    def take_action(self, action, action_type):
        assert action.shape == (14,) and action_type == "qpos"
        self.count += 1
        self.eval_success = self.eval_success or self.count == 3  # it stays true

    def close_env(self, clear_cache=False):
        StandIn.log.append("close")


@pytest.fixture(autouse=True, params=["task_config", "env_cfg/task_config"])
def stand_in(request, tmp_path, monkeypatch):
    StandIn.log = []
    configs = tmp_path / request.param
    for folder in (configs, tmp_path / "envs", tmp_path / "description/utils", tmp_path / "arms/aloha"):
        folder.mkdir(parents=True)
    demo = {"embodiment": ["aloha"], "camera": {"head_camera_type": "D435"}, "clear_cache_freq": 5}
    files = {"demo_clean": demo, "demo_randomized": {**demo, "domain_randomization": {"random_light": True}}}
    files |= {
        "_embodiment_config": {"aloha": {"file_path": "arms/aloha"}},
        "_eval_step_limit": {TASK: 5, "open_laptop": 700},
    }
    files |= {"_camera_config": {"D435": {"h": 240, "w": 320}}}
    for name, content in files.items():
        (configs / f"{name}.yml").write_text(yaml.safe_dump(content))
    (tmp_path / "arms/aloha/config.yml").write_text("arm: 6\n")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    task, wording = ModuleType(f"envs.{TASK}"), ModuleType("generate_episode_instructions")
    task.lift_pot = StandIn
    wording.generate_episode_descriptions = lambda name, told, number: [
        {kind: [f"{kind} {i}: lift {told[0]['{A}']}" for i in range(3)] for kind in ("seen", "unseen")}
    ]
    for module in (ModuleType("envs"), task, wording):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return configs


def play(benchmark, seed):
    env, told = benchmark.make(TASK, seed), []
    first = env.reset()
    while not env.done:
        told.append(env.step(np.zeros(14), observe=False).success)
    return env, first, told


def test_configurations_are_found_where_they_lie(stand_in):
    assert config_file("demo_clean") == stand_in / "demo_clean.yml"


def test_an_episode_is_the_solvable_seed_of_its_number():
    benchmark = RoboTwinClean(tasks=[TASK])
    env = benchmark.make(TASK, 50_001)
    env.reset()
    seeds = [entry[1] for entry in StandIn.log if entry[0] == "expert"]
    assert seeds == [100_000, 100_001, 100_002] and env.simulator.env.seed == 100_002
    env.close()
    StandIn.log.clear()
    benchmark.make(TASK, 50_000).reset()
    assert ("setup", 100_000, 0) in StandIn.log and not any(entry[0] == "expert" for entry in StandIn.log)


def test_every_scene_is_closed_before_the_next_is_set_up():
    benchmark = RoboTwinClean(tasks=[TASK])
    play(benchmark, 3)[0].close()
    benchmark.close()
    setups = sum(entry[0] == "setup" for entry in StandIn.log if isinstance(entry, tuple))
    assert StandIn.log.count("close") == setups and StandIn.log[-1] == "close"


def test_success_stays_and_ends_the_episode():
    assert play(RoboTwinClean(tasks=[TASK]), 0)[2] == [False, False, True]


def test_the_limit_is_that_of_the_file():
    assert play(RoboTwinClean(tasks=[TASK], max_steps=2), 0)[2] == [False, False]
    benchmark = RoboTwinClean()
    assert [benchmark.limit(task) for task in sorted(benchmark.tasks())] == [
        5,
        700,
    ] and benchmark.max_steps == 700


def test_a_step_that_nobody_looks_at_is_not_drawn():
    env = RoboTwinClean(tasks=[TASK]).make(TASK, 0)
    env.reset()
    before = StandIn.log.count("look")
    env.step(np.zeros(14), observe=False)
    assert StandIn.log.count("look") == before
    seen = env.step(np.zeros(14)).observation
    assert StandIn.log.count("look") == before + 1  # images and state of one look
    assert seen["state"].tolist() == (np.arange(14) + 2).tolist() and ACTION.names[6] == "left_gripper"


def test_three_cameras_are_shown_in_the_asked_order_and_size():
    benchmark = RoboTwinClean(tasks=[TASK], cameras=["right_camera", "head_camera"], image_size=32)
    images = [np.asarray(image) for image in benchmark.make(TASK, 0).reset()["image"]]
    assert [int(image.max()) for image in images] == [2, 0] and images[0].shape == (32, 32, 3)


def test_the_instruction_is_worded_by_the_seed():
    first, again = (play(RoboTwinClean(tasks=[TASK]), 0)[1]["lang"] for _ in range(2))
    assert first == again and first.startswith("unseen") and first.endswith("lift pot 100000")
    seen = RoboTwinClean(tasks=[TASK], wording="seen").make(TASK, 0).reset()["lang"]
    assert seen.startswith("seen")


def test_the_robots_files_and_the_randomisation_reach_the_scene(tmp_path):
    env = RoboTwinRandomized(tasks=[TASK]).make(TASK, 0)
    env.reset()
    told = env.simulator.env.arguments
    assert told["left_robot_file"] == told["right_robot_file"] == str(tmp_path / "arms/aloha")
    assert told["left_embodiment_config"] == {"arm": 6} and told["dual_arm_embodied"] is True
    assert told["domain_randomization"] == {"random_light": True} and told["eval_mode"] is True
    assert (told["head_camera_h"], told["head_camera_w"], told["task_config"]) == (
        240,
        320,
        "demo_randomized",
    )


def test_a_planner_that_solves_nothing_is_told_after_a_bounded_number_of_scenes():
    seeds = SolvableSeeds(TASK, lambda seed: {"seed": seed} if seed == 100_049 else None)
    assert seeds[0] == (100_049, {"seed": 100_049})
    with pytest.raises(ValueError, match="solved 1 of 100 scenes; is its planner installed"):
        seeds[1]
