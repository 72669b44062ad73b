"""One episode at a time in a worker: what it answers, how it ends, and what is said when it dies."""

import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation import workers
from vla_bench.evaluation.workers import (
    EpisodeError,
    EpisodeRunner,
    EpisodeSpec,
    Failure,
    LocalWorker,
    ProcessWorker,
    SceneError,
    StepResult,
    WorkerError,
    open_workers,
    result_of,
)

RED, BLUE = EpisodeSpec("reach-red", 0, 3), EpisodeSpec("reach-blue", 1, 4)
STAY = np.zeros((3, 2))


@pytest.fixture
def runner():
    return EpisodeRunner(PointReach(max_steps=8))


def test_a_new_episode_begins_at_step_zero_with_its_own_scene(runner):
    first = runner.start(RED)
    assert (first.steps, first.success, first.done) == (
        0,
        False,
        False,
    ) and first.frames == first.states == []
    runner.advance(STAY)
    second = runner.start(BLUE)
    assert second.steps == 0 and second.observation["lang"] == "go to the blue square"
    np.testing.assert_array_equal(
        second.observation["state"], PointReach().make("reach-blue", 4).reset()["state"]
    )


def test_steps_are_counted_over_several_requests(runner):
    runner.start(RED)
    assert [runner.advance(STAY).steps for _ in range(3)] == [3, 6, 8]


def test_actions_behind_the_end_are_not_executed(runner):
    runner.start(RED)
    result = runner.advance(np.zeros((20, 2)))
    assert (result.steps, result.done, result.success, result.observation) == (8, True, False, None)


def test_an_episode_that_goes_on_says_what_to_act_on_next(runner):
    start = runner.start(RED).observation["state"]
    result = runner.advance(np.full((3, 2), 0.25))
    assert not result.done and result.frames == result.states == []
    np.testing.assert_array_equal(result.observation["state"], start + 1.5)


def test_recorded_steps_are_those_just_made(runner):
    first = runner.start(EpisodeSpec("reach-red", 0, 3, record=True))
    assert len(first.frames) == len(first.states) == 1
    result = runner.advance(np.full((3, 2), 0.25))
    np.testing.assert_array_equal(result.states, [first.states[0] + 0.5 * step for step in (1, 2, 3)])
    for frame, state in zip(result.frames, result.states, strict=True):
        row, column = np.round(state).astype(int)
        assert frame.shape == (1, 32, 32, 3) and frame[0, row, column].tolist() == [255, 255, 255]


def test_anything_else_than_an_episode_or_actions_is_refused(runner):
    with pytest.raises(TypeError, match="takes an EpisodeSpec or an array of actions, got list"):
        runner.answer([0.0, 0.0])


def test_a_worker_in_this_process_answers_what_was_sent_last(runner):
    worker = LocalWorker(PointReach())
    for spec in (RED, BLUE):
        worker.send(spec)
        assert worker.receive().observation["lang"].endswith(f"{spec.task.removeprefix('reach-')} square")
    worker.close()
    assert worker.runner.env is None


@pytest.mark.parametrize("count", [0, -1])
def test_no_worker_at_all_is_refused(count):
    with pytest.raises(ValueError, match=f"num_envs must be at least 1, got {count}"):
        open_workers(PointReach(), count)


@pytest.fixture
def process():
    """Starts a worker process of a benchmark; it is closed afterwards."""
    made = []

    def start(benchmark, **more):
        made.append(ProcessWorker(benchmark, **more))
        return made[-1]

    yield start
    for worker in made:
        worker.close()


def test_a_worker_process_leaves_by_itself_and_is_started_anew(process):
    worker = process(PointReach(), number=3, step_timeout_s=200.0)
    worker.send(RED)
    reply = worker.receive()
    assert (reply.steps, reply.observation["lang"]) == (0, "go to the red square")
    worker.send(STAY)
    assert worker.allowed_s == 600.0 and 0 < worker.time_left() <= 600  # 200 s for each of three actions
    assert worker.receive().steps == 3
    first = worker.process
    assert first.daemon and first.name == "simulator 3"
    worker.restart()
    assert first.exitcode == -9 and worker.process is not first
    worker.send(BLUE)
    assert worker.allowed_s == 200.0
    assert worker.receive().observation["lang"] == "go to the blue square"
    worker.connection.close()
    worker.process.join(60)
    assert worker.process.exitcode == 0  # nobody had to kill it


def test_a_worker_that_fails_goes_on_and_one_that_is_killed_is_named(process):
    worker = process(PointReach(), number=2)
    worker.send(EpisodeSpec("reach-green", 0, 67))
    with pytest.raises(WorkerError, match="simulator 2 raised ValueError: .* in reach-green seed 67"):
        worker.receive()
    worker.send(RED)
    assert worker.receive().steps == 0
    os.kill(worker.process.pid, signal.SIGTERM)
    worker.process.join()
    with pytest.raises(
        WorkerError, match="simulator 2 was killed by signal 15 in reach-red seed 3; its messages"
    ):
        worker.send(STAY)
        worker.receive()


def test_a_worker_that_ends_by_itself_is_named_with_its_exit_code(process, monkeypatch):
    worker = process(PointReach())
    monkeypatch.setattr(worker, "process", SimpleNamespace(exitcode=5, join=lambda seconds: None))
    assert str(worker._died()).startswith("simulator 0 ended with exit code 5 in starting; ")
    monkeypatch.undo()  # the process itself is closed afterwards


def test_a_result_that_says_nothing_is_one_after_a_reset():
    result = StepResult(None)
    assert (result.success, result.done, result.steps, result.frames, result.states) == (
        False,
        False,
        0,
        [],
        [],
    )
    assert StepResult(None).frames is not result.frames and not EpisodeSpec("reach-red", 0, 1).record


@pytest.mark.parametrize("frozen", [RED, Failure("it broke", "", False)], ids=["EpisodeSpec", "Failure"])
def test_what_a_worker_is_told_and_answers_stays_as_it_was(frozen):
    """Both may be put into a set, and nobody changes one."""
    assert len({frozen, pickle.loads(pickle.dumps(frozen))}) == 1
    name = next(iter(vars(frozen)))
    with pytest.raises(AttributeError):
        setattr(frozen, name, "other")


class Watched(PointReach):
    """Writes down what is made and closed."""

    def __init__(self, done=None):
        super().__init__(max_steps=8)
        self.done = [] if done is None else done

    def make(self, task, seed):
        if task == "boom":
            raise ValueError("no such\nscene")
        env = super().make(task, seed)
        self.done.append(("make", task))
        env.close = lambda: self.done.append(("close", task))
        return env

    def close(self):
        self.done.append(("close", "benchmark"))


def test_an_episode_is_closed_before_the_next_and_the_benchmark_at_the_end():
    benchmark = Watched()
    runner = EpisodeRunner(benchmark)
    for spec in (RED, BLUE):
        runner.start(spec)
    runner.close()
    runner.close()
    red, blue = RED.task, BLUE.task
    assert benchmark.done == [
        ("make", red), ("close", red), ("make", blue), ("close", blue), ("close", "benchmark"), ("close", "benchmark")
    ]  # fmt: skip


def test_a_worker_in_this_process_is_closed_and_begun_anew():
    """Also when what has failed fails again while it is closed."""
    benchmark = Watched()
    worker = LocalWorker(benchmark)
    worker.send(RED)
    worker.restart()
    assert benchmark.done == [("make", RED.task), ("close", RED.task), ("close", "benchmark")]
    assert worker.runner.env is None
    worker.send(BLUE)
    worker.runner.env.close = lambda: 1 / 0
    worker.restart()
    worker.send(BLUE)
    assert worker.receive().steps == 0
    worker.close()
    assert benchmark.done[-1] == ("close", "benchmark") and worker.runner.env is None


def caught(error, cause=None):
    """The failure for an error that is being handled."""
    try:
        raise error from cause
    except Exception as handled:
        return Failure.of(handled)


@pytest.mark.parametrize(
    "error, cause, line, hopeless",
    [
        (RuntimeError("the\n  physics   exploded"), None, "RuntimeError: the physics exploded", False),
        (ValueError("x" * 500), None, f"ValueError: {'x' * 288}", False),
        (ModuleNotFoundError("no physx"), None, "ModuleNotFoundError: no physx", True),
        (ImportError("too old"), None, "ImportError: too old", True),
        (SceneError("hidden"), ValueError("no scene"), "ValueError: no scene", True),
        (SceneError("alone"), None, "SceneError: alone", True),
        (RuntimeError("outer"), ValueError("inner"), "RuntimeError: outer", False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_failure_is_one_line_and_says_whether_another_try_would_help(error, cause, line, hopeless):
    failure = caught(error, cause)
    assert (failure.error, failure.hopeless) == (line, hopeless)
    assert (
        failure.trace.startswith(("Traceback", type(cause).__name__))
        and type(error).__name__ in failure.trace
    )
    kind = WorkerError if hopeless else EpisodeError
    with pytest.raises(WorkerError) as raised:
        result_of(failure, "simulator 3", "reach-red seed 7")
    assert (
        type(raised.value) is kind and str(raised.value) == f"simulator 3 raised {line} in reach-red seed 7"
    )
    if not hopeless:
        assert (raised.value.what, raised.value.trace) == (f"raised {line}", failure.trace)


def test_a_benchmark_that_refuses_a_scene_is_hopeless():
    worker = LocalWorker(Watched())
    worker.send(EpisodeSpec("boom", 0, 5))
    with pytest.raises(
        WorkerError, match="^the simulator raised ValueError: no such scene in boom seed 5$"
    ) as raised:
        worker.receive()
    assert type(raised.value) is WorkerError


def test_the_times_that_are_allowed():
    assert (workers.STEP_TIMEOUT_S, workers.START_TIMEOUT_S) == (120.0, 600.0)


def test_actions_are_allowed_their_time_each_and_a_scene_once(process):
    worker = process(PointReach(), step_timeout_s=50.0)
    for request, seconds in ((RED, 50.0), (STAY[:1], 50.0), (STAY[:2], 100.0), (STAY, 150.0)):
        worker.send(request)
        assert worker.allowed_s == seconds and seconds - 20 < worker.time_left() <= seconds
        worker.receive()
    worker.deadline = 0.0  # long ago
    assert worker.time_left() == 0.0


def test_a_worker_does_not_hear_an_interrupt_and_leaves_by_itself(process):
    """Ctrl-C reaches every process of a terminal; what becomes of the episode is the parent's to say."""
    worker = process(PointReach())
    worker.send(RED)
    worker.receive()
    os.kill(worker.process.pid, signal.SIGINT)
    worker.send(STAY)
    assert worker.receive().steps == 3
    worker.close()
    assert worker.process.exitcode == 0


def test_a_worker_whose_parent_is_gone_closes_its_benchmark_and_ends_well(process, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    closing = importlib.import_module("faulty_point").ClosingPoint(tmp_path / "closed")
    worker = process(closing)
    worker.send(RED)
    worker.connection.close()  # with an answer on its way
    worker.process.join(60)
    assert worker.process.exitcode == 0 and (tmp_path / "closed").exists()


@pytest.mark.parametrize("with_file", [True, False])
def test_a_benchmark_of_a_notebook_cannot_be_imported_by_another_process(with_file, monkeypatch):
    main = ModuleType("__main__")
    if with_file:
        main.__file__ = "program.py"
    own = type("Own", (PointReach,), {"__module__": "__main__"})
    main.Own = own
    monkeypatch.setitem(sys.modules, "__main__", main)
    if with_file:
        assert workers._importable(own()).__class__ is own
    else:
        with pytest.raises(
            ValueError, match=r"cannot import Own \(it lives in a notebook\); .*with num_envs=1"
        ):
            workers._importable(own())
    benchmark = PointReach()
    assert workers._importable(benchmark) is benchmark


class Open(PointReach):
    """Holds something that cannot be pickled."""

    def __init__(self, held):
        super().__init__()
        self.held = held


@pytest.mark.parametrize(
    "held, named",
    [(lambda: None, "lambda"), (threading.Lock(), "lock"), ((i for i in ()), "generator")],
    ids=["a", "b", "c"],
)
def test_a_benchmark_that_cannot_be_pickled_is_named_with_the_reason(held, named):
    with pytest.raises(ValueError, match=f"worker processes cannot import Open \\(.*{named}"):
        open_workers(Open(held), 2)
    (worker,) = open_workers(Open(held), 1)
    assert isinstance(worker, LocalWorker)


@pytest.mark.parametrize(
    "left", [[None, None, None], [5.0, None, 9.0], [5.0, 0.0, 9.0], [0.0, None, 0.0], [3600.0, 0.05, None]]
)
@pytest.mark.parametrize("answered", [(), (0,), (1, 2)])
def test_those_are_ready_that_have_answered_or_are_out_of_time(left, answered):
    """Also where some may take for ever, and some time passes before one of them is out of it."""
    if not answered and left in ([None] * 3, [5.0, None, 9.0]):
        return  # nobody would ever be ready, or not for seconds
    pipes, began = [multiprocessing.Pipe() for _ in left], time.monotonic()
    remains = lambda seconds: None if seconds is None else max(0.0, began + seconds - time.monotonic())
    busy = [
        SimpleNamespace(connection=ours, time_left=lambda seconds=seconds: remains(seconds))
        for (ours, _), seconds in zip(pipes, left, strict=True)
    ]
    for i in answered:
        pipes[i][1].send("done")
    found = [busy.index(each) for each in workers.ready(busy)]
    at_once = sorted({*answered, *(i for i, seconds in enumerate(left) if seconds == 0)})
    assert found == (at_once or [1]) and time.monotonic() - began < 3


def test_a_simulator_is_gone_before_another_is_started_in_its_place(process, monkeypatch):
    worker, events = process(PointReach()), []
    gone = worker.process
    told = {name: lambda name=name: events.append(name) for name in ("kill", "join")}
    monkeypatch.setattr(worker, "process", SimpleNamespace(**told))
    monkeypatch.setattr(worker, "connection", SimpleNamespace(close=lambda: events.append("close")))
    monkeypatch.setattr(worker, "open", lambda: events.append("open"))
    worker.restart()
    assert events == ["kill", "join", "close", "open"]
    monkeypatch.undo()
    assert worker.process is gone
