"""The benchmark `point` with a fault in one of its scenes; a module of its own, so that worker processes can import it."""

import os
import signal
from pathlib import Path

from vla_bench.benchmarks.point import PointEnvironment, PointReach


def misbehave(fault: str) -> None:
    """Raises, dies, or is killed."""
    match fault:
        case "raises":
            raise RuntimeError("the physics\nexploded")
        case "raises ValueError":
            raise ValueError("a joint is out of its range")
        case "lacks a package":
            raise ModuleNotFoundError("No module named 'physx'", name="physx")
        case "exits":
            os._exit(3)
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)


class FaultyEnvironment(PointEnvironment):
    """Misbehaves in `reset`, or in its seventh step."""

    def __init__(self, benchmark: "FaultyPoint", task: str, seed: int):
        self.benchmark, self.ready = benchmark, False
        super().__init__(task, seed, benchmark.max_steps)
        self.ready = True

    def reset(self) -> dict:
        if self.ready and self.benchmark.where == "reset":
            self.benchmark.fail(self.task, self.seed)
        return super().reset()

    def step(self, action, *, observe=True):
        if self.benchmark.where == "step" and self.steps == 6:
            self.benchmark.fail(self.task, self.seed)
        return super().step(action, observe=observe)


class FaultyPoint(PointReach):
    """Misbehaves so many times, in the scenes of some seeds. `folder` counts how often, over all processes."""

    def __init__(
        self, folder, fault, where, *, times=99, seeds=(902,), task="reach-blue"
    ):  # None: in every task
        super().__init__()
        self.folder, self.fault, self.where = Path(folder), fault, where
        self.times, self.seeds, self.task = times, seeds, task

    def failures(self) -> int:
        """How often it has misbehaved."""
        return len(list(self.folder.iterdir()))

    def fail(self, task, seed):
        """Misbehaves if it is time."""
        meant = seed in self.seeds and self.task in (task, None)
        if meant and self.failures() < self.times:
            (self.folder / f"{os.getpid()}_{self.failures()}").touch()
            misbehave(self.fault)

    def make(self, task, seed):
        if self.where == "make":
            self.fail(task, seed)
        return FaultyEnvironment(self, task, seed)

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.where == "start":
            self.fail(self.task, self.seeds[0])


class ClosingPoint(PointReach):
    """Leaves a file when it is closed."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def close(self):
        Path(self.path).touch()
