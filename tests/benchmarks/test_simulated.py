"""What every adapter shares: when an episode ends, and whose simulator runs it."""

import numpy as np
import pytest

from vla_bench.benchmarks.simulated import SUCCESS_RULES, SimulatedBenchmark, Simulator, check_sizes
from vla_bench.data.layout import Layout


class Script(Simulator):
    """Succeeds at the steps that its task names."""

    def __init__(self, task, log):
        self.task, self.log = task, log

    def reset(self, scene):
        self.count = 0
        self.log.append(("reset", scene))

    def step(self, action):
        self.count += 1
        return str(self.count) in self.task

    def frames(self):
        self.log.append("frames")
        return [np.full((4, 4, 3), self.count, np.uint8)]

    def state(self):
        return np.array([float(self.count)])

    def close(self):
        self.log.append(("close", self.task))


class Scripts(SimulatedBenchmark):
    action, max_steps, spec = Layout(("a", "b")), 5, None

    def __init__(self, rule):
        self.success_rule, self._tasks, self.log = rule, ["24", "5", "-"], []

    def instruction(self, task):
        return f"succeed at {task}"

    def open_simulator(self, task):
        self.log.append(("open", task))
        return Script(task, self.log)

    def scene(self, seed):
        return seed % 3


def play(rule, task):
    env, told = Scripts(rule).make(task, 0), []
    env.reset()
    while not env.done:
        step = env.step(np.zeros(2), observe=False)
        told.append((step.success, step.done))
    return told


@pytest.mark.parametrize(
    "rule, task, steps, success",
    [
        ("ever", "24", 2, True),
        ("ever", "5", 5, True),
        ("ever", "-", 5, False),
        ("last_step", "24", 5, False),
        ("last_step", "5", 5, True),
        ("last_step", "-", 5, False),
    ],
)
def test_the_rule_decides_when_an_episode_ends_and_as_what(rule, task, steps, success):
    told = play(rule, task)
    assert (len(told), told[-1]) == (steps, (success, True))
    assert not any(done for _, done in told[:-1])


def test_every_rule_is_explained():
    assert set(SUCCESS_RULES) == {"ever", "last_step"} and all(SUCCESS_RULES.values())


def test_the_simulator_is_asked_for_images_only_when_somebody_looks():
    benchmark = Scripts("ever")
    env = benchmark.make("-", 7)
    first = env.reset()
    assert first["state"].tolist() == [0.0] and first["lang"] == "succeed at -"
    assert env.step([0, 0], observe=False).observation is None
    seen = env.step([0, 0]).observation
    assert np.asarray(seen["image"][0]).max() == 2 and seen["state"].tolist() == [2.0]
    assert benchmark.log == [("open", "-"), ("reset", 1), "frames", "frames"]


def test_a_simulator_is_closed_for_another_task_and_kept_for_the_same():
    benchmark = Scripts("ever")
    for task in ("24", "24", "5"):
        benchmark.make(task, 0).close()
    benchmark.close()
    assert benchmark.log == [("open", "24"), ("close", "24"), ("open", "5"), ("close", "5")]


def test_an_episode_of_two_environments_at_once_has_two_simulators():
    benchmark = Scripts("ever")
    one, other = benchmark.make("24", 0), benchmark.make("24", 1)
    assert one.simulator is not other.simulator
    one.close()
    other.close()
    assert benchmark.log == [("open", "24"), ("open", "24"), ("close", "24")]


@pytest.mark.parametrize("size", [8, (16, 8), (16,), (16, 16, 16)])
def test_sizes_that_nobody_could_see_are_refused(size):
    with pytest.raises(ValueError, match="16 pixels or more"):
        check_sizes("scripts", ["top"], ["top"], size, 1)


@pytest.mark.parametrize("cameras, steps", [([], 5), (["top"], 0)])
def test_an_episode_without_cameras_or_steps_is_refused(cameras, steps):
    with pytest.raises(ValueError, match="scripts needs a camera"):
        check_sizes("scripts", cameras, ["top"], 32, steps)
