"""ManiSkill's cubes: a planner as whoever acts, and for real where ManiSkill is installed."""

from types import SimpleNamespace

import numpy as np
import pytest

from vla_bench.benchmarks import maniskill_cubes as module
from vla_bench.benchmarks.maniskill_cubes import (
    ACTION,
    CONTROL_RATE,
    CUBE_TASKS,
    STATE,
    ManiSkillCubes,
    PlannedEpisode,
    plan_episode,
    record,
)
from vla_bench.data.episode_plan import open_source
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.registry import RegistryError


class Episode:
    """Done at the third step."""

    def __init__(self, success):
        self.success, self.actions = success, []

    def reset(self):
        return {}

    def step(self, action):
        self.actions.append(action)
        over = len(self.actions) == 3
        return SimpleNamespace(success=over and self.success, done=over)


def planned(monkeypatch, solve, success=True):
    monkeypatch.setattr(module, "import_module", lambda name: SimpleNamespace(solveStackCube=solve))
    episode = Episode(success)
    return episode, plan_episode(episode, SimpleNamespace(task="stack-cube", env="behind"))


@pytest.mark.parametrize("success", [True, False])
def test_a_planner_is_stopped_when_the_episode_is_over(success, monkeypatch):
    def solve(env, vis):
        assert env.unwrapped == "behind" and vis is False
        env.reset(seed=4)
        for i in range(10):
            env.step(np.full(8, i))

    episode, told = planned(monkeypatch, solve, success)
    assert told is success and [action[0] for action in episode.actions] == [0, 1, 2]


def test_a_plan_that_ends_too_early_is_no_success(monkeypatch):
    _, told = planned(monkeypatch, lambda env, vis: env.step(np.zeros(8)))
    assert told is False


def test_an_error_of_a_planner_is_not_hidden(monkeypatch):
    def solve(env, vis):
        raise ZeroDivisionError("a plan")

    with pytest.raises(ZeroDivisionError):
        planned(monkeypatch, solve)


def test_a_planner_that_is_not_installed_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("no", name="mplib")

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(
        RegistryError, match=r"planning needs 'mplib': pip install \"vla_bench\[maniskill\]\""
    ):
        plan_episode(Episode(True), SimpleNamespace(task="stack-cube", env=None))


def test_what_a_planner_steps_are_float64_actions():
    episode = Episode(True)
    PlannedEpisode(episode, None).step(np.float32([0.1] * 8))
    assert episode.actions[0].dtype == np.float64


def test_planned_episodes_are_a_dataset_and_replay_to_the_same_success(maniskill_installed, tmp_path):
    report = record(tmp_path / "demo", ["push-cube"], episodes=1, image_size=32)
    data = LeRobotDataset(tmp_path / "demo")
    assert (report["episodes"], report["frames"]) == (1, len(data)) and data.fps == CONTROL_RATE
    assert (data.action_layout, data.state_layout) == (ACTION, STATE)
    detail = open_source(tmp_path / "demo").details[0]
    assert detail["success"] is True and detail["benchmark_task"] == "push-cube"
    benchmark = ManiSkillCubes(tasks=["push-cube"], image_size=32)
    env = benchmark.make("push-cube", int(detail["seed"]))
    first = env.reset()
    np.testing.assert_allclose(first["state"], data[0]["state"], atol=1e-6)
    simulator = env.simulator.env
    assert simulator.control_freq == CONTROL_RATE
    joints = [joint.name for joint in simulator.agent.robot.active_joints]
    assert len(joints) == 9 and simulator.action_space.shape == (8,)
    told = [env.step(np.float64(data[i]["action"][0]), observe=False) for i in range(len(data))]
    assert told[-1].success and not any(step.success for step in told[:-1])
    benchmark.close()


def test_every_task_knows_where_the_cube_shall_be(maniskill_installed):
    goals = {}
    for task in CUBE_TASKS:
        benchmark = ManiSkillCubes(tasks=[task], image_size=32)
        env = benchmark.make(task, 3)
        seen = env.reset()
        goals[task] = seen["state"][9:]
        assert seen["lang"] == CUBE_TASKS[task][1] and np.asarray(seen["image"][0]).std() > 5
        env.close()
        benchmark.close()
    assert goals["stack-cube"][2] == pytest.approx(0.06, abs=2e-3) and abs(goals["push-cube"][2]) < 0.01
    assert goals["push-cube"][0] > goals["pull-cube"][0] and goals["pick-cube"][2] > 0
