"""BEHAVIOR-1K against a STAND-IN of OmniGibson's public interface, which nobody here has run."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from vla_bench.benchmarks.behavior import ACTION, CAMERAS, Behavior

TASK = "make_pizza"


class Thing:
    is_system, exists = False, True

    def __init__(self):
        self.states, self.still = [], 0

    def load_state(self, state, serialized):
        assert serialized is False
        self.states.append(state)

    def keep_still(self):
        self.still += 1


class Scene:
    def __init__(self):
        self.log, self.robot = [], SimpleNamespace(model_name="R1Pro", pose=None)
        self.robot.set_position_orientation = lambda *pose: setattr(self.robot, "pose", pose)

    def object_registry(self, key, name):
        assert (key, name) == ("name", "robot_r1")
        return self.robot

    def write_task_metadata(self, key, data):
        self.log.append(key)

    def update_initial_file(self):
        self.log.append("update")

    def reset(self):
        self.log.append("reset")


class Environment:
    """`og.Environment`: nested observations with tensors of four channels, five returned values."""

    def __init__(self, configs):
        self.configs, self.scene, self.actions, self.closed = configs, Scene(), [], False
        self.task = SimpleNamespace(
            scene_name="house",
            activity_name=TASK,
            activity_definition_id=0,
            object_scope={"pizza": Thing(), "gone": None},
        )
        self.task.get_cached_activity_scene_filename = lambda **ids: (
            f"{ids['scene_model']}_{ids['activity_instance_id']}"
        )

    def get_obs(self):
        robot = {"proprio": torch.zeros(256)}
        for i, (camera, side) in enumerate((("zed", 720), ("left_realsense", 480), ("right_realsense", 480))):
            pixels = torch.full((side, side, 4), 10 * i + len(self.actions), dtype=torch.uint8)
            pixels[..., 3] = 255
            robot[f"robot_r1:{camera}_link:Camera:0"] = {"rgb": pixels}
        return {"robot_r1": robot}, {}

    def reset(self):
        return self.get_obs()

    def step(self, action, n_render_iterations):
        assert isinstance(action, torch.Tensor) and action.dtype == torch.float32 and action.shape == (23,)
        assert n_render_iterations == 1
        self.actions.append(action)
        return self.get_obs()[0], 0.0, False, False, {"done": {"success": len(self.actions) == 2}}

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    folder = tmp_path / f"json/house_task_{TASK}_instances"
    folder.mkdir(parents=True)
    pose = {"R1Pro": [{"position": [1, 2, 0], "orientation": [0, 0, 0, 1]}]}
    for i in (0, 7):
        (folder / f"house_{i}-tro_state.json").write_text(
            json.dumps({"pizza": {"at": i}, "robot_poses": pose})
        )
    gm, sim = SimpleNamespace(), SimpleNamespace(steps=0)
    sim.step_physics = lambda: setattr(sim, "steps", sim.steps + 1)
    modules = {
        "omnigibson": {"Environment": Environment, "sim": sim},
        "omnigibson.macros": {"gm": gm},
        "omnigibson.learning": {},
        "omnigibson.learning.utils": {},
        "omnigibson.learning.utils.eval_utils": {
            "PROPRIOCEPTION_INDICES": {"R1Pro": {"joint_qpos": 0, "eef": 1}},
            "generate_basic_environment_config": lambda task_name, task_cfg: {"task": {"name": task_name}},
        },
        "omnigibson.utils": {},
        "omnigibson.utils.asset_utils": {"get_task_instance_path": lambda scene: str(tmp_path)},
        "omnigibson.utils.python_utils": {"recursively_convert_to_torch": lambda content: content},
        "gello": {},
        "gello.robots": {},
        "gello.robots.sim_robot": {},
        "gello.robots.sim_robot.og_teleop_utils": {
            "load_available_tasks": lambda: {TASK: [{"scene_model": "house"}]},
            "generate_robot_config": lambda task_name, task_cfg: {"type": "R1Pro"},
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return gm, sim


def start(seed=0, **arguments):
    env = Behavior(tasks=[TASK], image_size=32, **arguments).make(TASK, seed)
    return env, env.reset()


def test_the_environment_is_the_challenges(stand_in):
    gm, _ = stand_in
    env, seen = start()
    configs = env.simulator.env.configs
    assert (gm.HEADLESS, gm.USE_GPU_DYNAMICS, gm.ENABLE_TRANSITION_RULES) == (True, False, True)
    assert configs["robots"] == [
        {"type": "R1Pro", "obs_modalities": ["proprio", "rgb"], "proprio_obs": ["joint_qpos", "eef"]}
    ]
    assert configs["task"]["include_obs"] is False and seen["lang"] == "make pizza" and "state" not in seen


def test_an_instance_is_loaded_and_comes_to_rest(stand_in):
    env, _ = start(50_007)
    inside = env.simulator.env
    assert (
        inside.task.object_scope["pizza"].states == [{"at": 7}]
        and inside.task.object_scope["pizza"].still == 25
    )
    assert inside.scene.robot.pose == ([1, 2, 0], [0, 0, 0, 1]) and stand_in[1].steps == 25
    assert inside.scene.log == ["robot_poses", "update", "reset"]


def test_an_instance_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="house_3-tro_state.json"):
        start(3)


def test_images_lose_their_fourth_channel_and_have_one_size():
    images = [np.asarray(image) for image in start()[1]["image"]]
    assert [image.shape for image in images] == [(32, 32, 3)] * 3
    assert [sorted({*image.ravel().tolist()}) for image in images] == [[0], [10], [20]]


def test_a_camera_may_be_asked_for_by_its_long_name():
    env, seen = start(cameras=[CAMERAS["right_wrist"], "head"])
    assert [int(np.asarray(image).max()) for image in seen["image"]] == [20, 0]


def test_the_chore_that_is_done_ends_the_episode():
    env, _ = start()
    told = [env.step(np.full(23, 0.1)) for _ in range(2)]
    assert [(step.success, step.done) for step in told] == [(False, False), (True, True)]
    assert int(np.asarray(told[1].observation["image"][0]).max()) == 2 and ACTION.dim == 23


def test_a_task_that_the_data_do_not_have_is_named_with_what_to_run():
    with pytest.raises(FileNotFoundError, match="have no task 'freeze_pies': git clone"):
        Behavior(tasks=["freeze_pies"]).make("freeze_pies", 0)
