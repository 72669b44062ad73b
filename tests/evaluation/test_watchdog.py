"""A simulator that hangs: its episode is tried once more, and then counts neither as a success nor as a failure."""

import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest

from vla_bench.benchmarks.point import POINT_INSTRUCTIONS, PointReach
from vla_bench.evaluation import workers
from vla_bench.evaluation.report import load_evaluations, report_text, success_rows
from vla_bench.evaluation.rollout import EvaluationSettings, prediction_seed, read_episodes
from vla_bench.evaluation.workers import EpisodeSpec, ProcessWorker, WorkerError, WorkerTimeout, ready

TIMEOUT = 0.5  # seconds; a step of `point` takes less than a millisecond
TASK, SEED = "reach-blue", 902


def stop_all():
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGSTOP)


@pytest.fixture
def hanging(state_policy):
    """A policy that stops the simulators when it is asked for a prediction of one episode, at most so many times."""

    def build(times, prediction=0, seeds=(SEED,)):
        policy = state_policy(PointReach())
        when = {prediction_seed(seed, prediction) for seed in seeds}
        policy.stopped = 0

        def predict(observation, *, seed, predict=policy.predict):
            if seed in when and observation["lang"] == POINT_INSTRUCTIONS[TASK] and policy.stopped < times:
                policy.stopped += 1
                stop_all()
            return predict(observation, seed=seed)

        policy.predict = predict
        return policy

    return build


@pytest.fixture
def run(run_evaluation):
    return lambda out, policy=None, **more: run_evaluation(out, policy, **{"step_timeout_s": TIMEOUT, **more})


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("prediction", [0, 2])
def test_one_that_hangs_once_changes_no_number(
    num_envs, prediction, tmp_path, run, run_evaluation, files, hanging
):
    policy = hanging(1, prediction)
    run(tmp_path / "hung", policy, num_envs=num_envs)
    run_evaluation(tmp_path / "healthy")
    assert policy.stopped == 1
    assert files(tmp_path / "hung") == files(tmp_path / "healthy")
    assert not multiprocessing.active_children()


@pytest.fixture
def recorded(tmp_path, run, hanging):
    """An evaluation in which one simulator hangs both times, and its summary."""
    policy = hanging(2)
    summary = run(tmp_path, policy, videos_per_task=3)
    assert policy.stopped == 2
    return tmp_path, summary


def test_one_that_hangs_twice_is_recorded_as_an_error(recorded):
    records = read_episodes(recorded[0] / "episodes.jsonl")
    (hung,) = [record for record in records if "error" in record]
    assert (hung["task"], hung["seed"]) == (TASK, SEED) and len(records) == 12
    assert hung["error"] == "the simulator did not answer within 2 s after step 0, 2 times in a row"


def test_an_error_is_neither_a_success_nor_a_failure(recorded):
    out, summary = recorded
    others = [record for record in read_episodes(out / "episodes.jsonl") if "error" not in record]
    successes = sum(record["success"] for record in others)
    assert (summary["successes"], summary["episodes"], summary["errors"]) == (successes, 11, 1)
    assert summary["success_rate"] == successes / 11
    assert summary["per_task"][TASK]["errors"] == 1 and summary["per_task"][TASK]["episodes"] == 5
    assert "errors" not in summary["per_task"]["reach-red"]


def test_an_error_is_reported_beside_the_rate(recorded):
    lines = report_text(recorded[0]).splitlines()
    told = [line for line in lines if "1 without an outcome: the simulator failed" in line]
    assert len(told) == 2 and told[0].split()[0] == TASK and told[1].split()[0] == "all"
    rows = success_rows(next(iter(load_evaluations(recorded[0]).values())))
    assert [row.get("errors") for row in rows] == [None, 1, 1]


def test_an_error_has_no_recording(recorded):
    names = {path.name for path in (recorded[0] / "videos").iterdir()}
    assert names == {f"{task}_{i}.npz" for task in POINT_INSTRUCTIONS for i in range(3)} - {f"{TASK}_2.npz"}


def test_an_error_is_tried_anew_by_the_next_evaluation(
    recorded, run, state_policy, run_evaluation, files, tmp_path
):
    policy = state_policy(PointReach())
    summary = run(recorded[0], policy)
    run_evaluation(tmp_path / "healthy")
    assert 0 < policy.calls == next(r["predictions"] for r in read_episodes(recorded[0] / "episodes.jsonl")
                                    if (r["task"], r["seed"]) == (TASK, SEED))  # fmt: skip
    assert summary == json.loads((tmp_path / "healthy" / "summary.json").read_text())
    assert files(recorded[0]) == files(tmp_path / "healthy")


def test_when_every_episode_hangs_there_is_no_rate(tmp_path, run, hanging):
    policy = hanging(99, seeds=range(900, 903))
    summary = run(tmp_path, policy, tasks=[TASK], episodes=1, num_envs=1)
    assert (summary["success_rate"], summary["confidence_interval"], summary["errors"]) == (
        None,
        [0.0, 1.0],
        1,
    )
    assert "-%" in report_text(tmp_path)


def test_what_happens_is_said(tmp_path, run, hanging, capsys):
    run(tmp_path, hanging(2))
    said = capsys.readouterr().err
    assert "did not answer within 2 s in reach-blue seed 902" in said
    assert said.index("tried once more") < said.index("recorded as an error")


@pytest.fixture
def worker():
    one = ProcessWorker(PointReach(), 0, TIMEOUT)
    yield one
    one.close()


@pytest.mark.parametrize(
    "request_", [EpisodeSpec(TASK, 0, 1), np.zeros((3, 2))], ids=["a new scene", "actions"]
)
def test_both_kinds_of_request_are_watched(worker, request_):
    worker.send(EpisodeSpec(TASK, 0, 1))
    worker.receive()
    os.kill(worker.process.pid, signal.SIGSTOP)
    worker.send(request_)
    assert ready([worker]) == [worker]
    with pytest.raises(WorkerTimeout, match="simulator 0 did not answer within .* in reach-blue seed 1"):
        worker.receive()


def test_a_stopped_process_does_not_keep_close_waiting(worker):
    worker.send(EpisodeSpec(TASK, 0, 1))
    worker.receive()
    os.kill(worker.process.pid, signal.SIGSTOP)
    worker.close()
    assert worker.process.exitcode == -signal.SIGKILL


def test_an_answer_that_waited_for_a_slow_policy_is_not_late(worker):
    worker.send(EpisodeSpec(TASK, 0, 1))
    assert worker.connection.poll(60)
    worker.deadline = 0.0  # the policy was busy for longer than the watchdog allows
    assert ready([worker]) == [worker] and worker.receive().steps == 0


def test_a_process_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(workers, "START_TIMEOUT_S", 0.0)
    one = ProcessWorker(PointReach(), 4)
    with pytest.raises(WorkerError, match="simulator 4 did not answer within 0 s in reach-blue seed 1"):
        one.send(EpisodeSpec(TASK, 0, 1))
    one.restart()
    one.close()


def test_infinity_waits_for_ever():
    one = ProcessWorker(PointReach(), 0, math.inf)
    one.send(EpisodeSpec(TASK, 0, 1))
    assert one.time_left() is None and one.receive().steps == 0
    one.close()


@pytest.mark.parametrize(
    "count, seconds, expected", [(1, None, None), (1, 9.0, 9.0), (2, None, 120.0), (2, 9.0, 9.0)]
)
def test_who_is_watched(count, seconds, expected):
    opened = workers.open_workers(PointReach(), count, seconds)
    found = [each.step_timeout_s if isinstance(each, ProcessWorker) else None for each in opened]
    for each in opened:
        each.close()
    assert found == [expected] * count


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "10", True, [1]])
def test_a_time_out_that_cannot_be_meant_is_refused(seconds):
    with pytest.raises(ValueError, match=r"evaluation\.step_timeout_s must be more than 0 seconds"):
        EvaluationSettings(step_timeout_s=seconds)
