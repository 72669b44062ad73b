"""One episode at a time in a worker: what it answers, how it ends, and what is said when it dies."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.workers import (
    EpisodeRunner,
    EpisodeSpec,
    LocalWorker,
    ProcessWorker,
    WorkerError,
    open_workers,
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
