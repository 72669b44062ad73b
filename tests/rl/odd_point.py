"""The benchmark `point` with simulators that die or whose success is no number; of its own, for worker processes."""

import os
import signal
from pathlib import Path

from vla_bench.benchmarks.benchmark import Step
from vla_bench.benchmarks.point import PointEnvironment, PointReach


class OddEnvironment(PointEnvironment):
    """Misbehaves in its fifth step."""

    def __init__(self, benchmark: "OddPoint", task: str, seed: int):
        self.benchmark = benchmark
        super().__init__(task, seed, benchmark.max_steps)

    def step(self, action, *, observe=True) -> Step:
        step = super().step(action, observe=observe)
        if self.steps != 5 or self.seed != self.benchmark.seed:
            return step
        if self.benchmark.fault == "not a number":
            return Step(step.observation, float("nan"), True)
        mark = Path(self.benchmark.folder, f"{len(os.listdir(self.benchmark.folder))}")
        if len(os.listdir(self.benchmark.folder)) < self.benchmark.times:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step


class OddPoint(PointReach):
    """Misbehaves in the scenes of one seed, where it dies so many times at most."""

    def __init__(self, fault: str, seed: int, folder: str | Path = "", times: int = 99):
        super().__init__(max_steps=13)
        self.fault, self.seed, self.folder, self.times = fault, seed, folder, times

    def make(self, task, seed):
        return OddEnvironment(self, task, seed)
