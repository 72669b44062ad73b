"""A simulator that raises or dies: its episode is tried once more, and then counts neither as success nor as failure."""

import importlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.report import report_text
from vla_bench.evaluation.rollout import evaluate, read_episodes
from vla_bench.evaluation.workers import WorkerError

TASK, SEED = "reach-blue", 902
RAISES = {
    "raises": "raised RuntimeError: the physics exploded",
    "raises ValueError": "raised ValueError: a joint is out of its range",
}
DIES = {"exits": "ended with exit code 3", "is killed": "was killed by signal 9"}
FAULTS = [
    ("raises", "make"),
    ("raises", "reset"),
    ("raises ValueError", "step"),
    ("exits", "reset"),
    ("is killed", "step"),
]
ENVS = [(1, None), (1, 30.0), (2, None)]  # in this process, in one of its own, in two


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Builds a `FaultyPoint` that counts in a folder of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # worker processes get this path, too
    module = importlib.import_module("faulty_point")

    def build(fault, where, **more):
        folder = tmp_path / "faults" / str(len(list(tmp_path.glob("faults/*"))))
        folder.mkdir(parents=True)
        return module.FaultyPoint(folder, fault, where, **more)

    return build


@pytest.fixture
def run(state_policy, settings):
    """Evaluates on a benchmark."""

    def run(out, benchmark, policy=None, **changes):
        policy = policy or state_policy(benchmark)
        return evaluate(policy, benchmark, settings(**changes), out, show_progress=False)

    return run


def possible(fault, envs):
    """Whether a fault can be survived: a process that dies takes all that is in it along."""
    return fault in RAISES or envs != (1, None)


CASES = [(*fault, *envs) for fault in FAULTS for envs in ENVS if possible(fault[0], envs)]
CASES = [case for case in CASES if case[2:] != (1, 30.0) or case[0] == "is killed"]  # which costs less


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The folder of an evaluation in which nothing fails; filled by the first test that needs it."""
    return tmp_path_factory.mktemp("healthy")


@pytest.mark.parametrize("fault, where, num_envs, step_timeout_s", CASES)
def test_one_that_fails_once_changes_no_number(
    fault, where, num_envs, step_timeout_s, tmp_path, faulty, run, files, healthy
):
    if not (healthy / "summary.json").exists():
        run(healthy, PointReach())
    benchmark = faulty(fault, where, times=1)
    run(tmp_path / "out", benchmark, num_envs=num_envs, step_timeout_s=step_timeout_s)
    assert benchmark.failures() == 1
    assert files(tmp_path / "out") == files(healthy)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("fault, where", FAULTS)
def test_one_that_fails_twice_is_recorded_the_same_for_any_number_of_environments(
    fault, where, tmp_path, faulty, run, files
):
    written = []
    for num_envs, seconds in (
        envs for envs in (ENVS if where == "step" else ENVS[::2]) if possible(fault, envs)
    ):
        benchmark, out = faulty(fault, where), tmp_path / f"{num_envs}_{seconds}"
        run(out, benchmark, num_envs=num_envs, step_timeout_s=seconds)
        assert benchmark.failures() == 2
        written.append(files(out))
    assert all(each == written[0] for each in written)
    lines = [json.loads(line) for line in written[0]["episodes.jsonl"].splitlines()]
    (lost,) = [line for line in lines if "error" in line]
    assert (lost["task"], lost["seed"], lost["success"]) == (TASK, SEED, False) and len(lines) == 12
    after = 4 if where == "step" else 0  # it looked again after four actions, and failed in the seventh
    expected = (RAISES | DIES)[fault]
    assert lost["error"] == f"the simulator {expected} after step {after}, 2 times in a row"


@pytest.fixture
def lost(tmp_path, faulty, run):
    """An evaluation with one episode whose simulator dies twice, and its summary."""
    return tmp_path / "out", run(tmp_path / "out", faulty("is killed", "step"), num_envs=2, videos_per_task=3)


def test_an_episode_without_an_outcome_counts_neither_way(lost, healthy, run):
    out, summary = lost
    others = [record for record in read_episodes(out / "episodes.jsonl") if "error" not in record]
    successes = sum(record["success"] for record in others)
    assert (summary["successes"], summary["episodes"], summary["errors"]) == (successes, 11, 1)
    told = [
        line for line in report_text(out).splitlines() if "1 without an outcome: the simulator failed" in line
    ]
    assert [line.split()[0] for line in told] == [TASK, "all"]


def test_the_next_evaluation_tries_it_anew(lost, run, tmp_path, files):
    run(lost[0], PointReach(), videos_per_task=3)
    run(tmp_path / "whole", PointReach())
    assert files(lost[0]) == files(tmp_path / "whole")
    assert len(list((lost[0] / "videos").iterdir())) == 6


def test_two_kinds_of_failure_are_both_told(tmp_path, faulty, run, state_policy):
    benchmark = faulty("raises", "reset", times=1)
    policy = state_policy(benchmark)

    def predict(observation, *, seed, predict=policy.predict):
        if benchmark.failures() == 1 and policy.calls == 0:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return predict(observation, seed=seed)

    policy.predict = predict
    run(tmp_path / "out", benchmark, policy, tasks=[TASK], episodes=3, step_timeout_s=30.0, first_seed=902)
    first = read_episodes(tmp_path / "out" / "episodes.jsonl")[0]
    assert first["error"] == (
        "the simulator raised RuntimeError: the physics exploded after step 0, then was killed by signal 9 after step 0"
    )


def test_what_happens_is_said(tmp_path, faulty, run, capsys):
    run(tmp_path / "out", faulty("raises", "step"), num_envs=1)
    said = capsys.readouterr().err
    assert "the simulator raised RuntimeError: the physics exploded in reach-blue seed 902" in said
    assert said.index("tried once more") < said.index("recorded as an error")
    assert said.count("Traceback") == 1 and "faulty_point.py" in said


HOPELESS = {
    ("lacks a package", "make"): "ModuleNotFoundError: No module named 'physx'",
    ("lacks a package", "reset"): "ModuleNotFoundError: No module named 'physx'",
    ("raises ValueError", "make"): "ValueError: a joint is out of its range",
}


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("fault, where", HOPELESS)
def test_a_benchmark_that_cannot_be_used_stops_at_once_in_one_line(
    fault, where, num_envs, tmp_path, faulty, run, state_policy
):
    benchmark = faulty(fault, where, seeds=range(900, 906), task=None)
    policy = state_policy(benchmark)
    with pytest.raises(WorkerError) as caught:
        run(tmp_path / "out", benchmark, policy, num_envs=num_envs)
    assert HOPELESS[fault, where] in str(caught.value) and "\n" not in str(caught.value)
    assert policy.calls == 0 and benchmark.failures() <= num_envs
    assert not (tmp_path / "out" / "episodes.jsonl").exists() and not multiprocessing.active_children()


def test_a_process_that_does_not_get_ready_stops_it_at_once(tmp_path, faulty, run):
    with pytest.raises(
        WorkerError, match="simulator 0 ended with exit code 3 in reach-red seed 900.*; 0 of 12"
    ):
        run(tmp_path / "out", faulty("exits", "start"), num_envs=2)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_envs", [1, 2])
def test_when_no_scene_is_ever_shown_it_stops_after_two_episodes(
    num_envs, tmp_path, faulty, run, state_policy
):
    benchmark = faulty("raises", "reset", seeds=range(900, 906), task=None)
    policy = state_policy(benchmark)
    with pytest.raises(
        WorkerError, match="the physics exploded .*; no simulator has shown a scene; 2 of 12 episodes"
    ):
        run(tmp_path / "out", benchmark, policy, num_envs=num_envs)
    assert policy.calls == 0 and 4 <= benchmark.failures() <= 3 + num_envs
    assert all("error" in record for record in read_episodes(tmp_path / "out" / "episodes.jsonl"))


def test_an_error_of_the_policy_is_not_the_simulators(tmp_path, run, state_policy):
    policy = state_policy(PointReach())

    def predict(observation, *, seed):
        policy.calls += 1
        raise RuntimeError("out of memory")

    policy.predict = predict
    with pytest.raises(RuntimeError, match="^out of memory$"):
        run(tmp_path, PointReach(), policy, num_envs=2)
    assert policy.calls == 1


@pytest.mark.parametrize(
    "changes", [{"episodes": 2}, {"tasks": [TASK]}, {"tasks": [TASK], "episodes": 4}], ids=str
)
def test_a_smaller_plan_in_the_same_folder_counts_only_its_own_episodes(changes, tmp_path, run, state_policy):
    run(tmp_path / "both", PointReach())
    before = sorted((tmp_path / "both" / "episodes.jsonl").read_text().splitlines())
    policy = state_policy(PointReach())
    smaller = run(tmp_path / "both", PointReach(), policy, **changes)
    alone = run(tmp_path / "alone", PointReach(), **changes)
    assert smaller == alone and policy.calls == 0
    assert sorted((tmp_path / "both" / "episodes.jsonl").read_text().splitlines()) == before
    assert report_text(tmp_path / "both") == report_text(tmp_path / "alone").replace("alone", "both")


def test_a_smaller_plan_leaves_the_errors_of_others_alone(lost, run, state_policy):
    policy = state_policy(PointReach())
    summary = run(lost[0], PointReach(), policy, tasks=["reach-red"])
    assert "errors" not in summary and policy.calls == 0
    assert sum("error" in record for record in read_episodes(lost[0] / "episodes.jsonl")) == 1


def test_once_a_scene_was_shown_any_number_of_episodes_may_be_lost(tmp_path, faulty, run):
    """The simulator works; some of its scenes do not."""
    summary = run(tmp_path / "out", faulty("raises", "reset", seeds=(902, 903, 904)))
    assert (summary["errors"], summary["episodes"]) == (3, 9)
