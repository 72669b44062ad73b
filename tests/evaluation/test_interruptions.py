"""What is finished stays finished, and nothing is mixed up."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.rollout import read_episodes


class Killed:
    """An evaluation that was killed with three finished episodes, and handles on its simulator processes."""

    def __init__(self, out):
        command = [sys.executable, "-c", f"import conftest; conftest.evaluate_until_stuck({str(out)!r}, 3)"]
        self.out = out
        with subprocess.Popen(
            command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
        ) as process:
            line = process.stdout.readline()
            assert line, "it ended before it had three episodes"
            self.workers = [os.pidfd_open(pid) for pid in json.loads(line)]
            process.kill()
        self.kept = (out / "episodes.jsonl").read_bytes()


@pytest.fixture
def killed(tmp_path):
    one = Killed(tmp_path / "killed")
    yield one
    for worker in one.workers:
        os.close(worker)


def test_a_killed_evaluation_keeps_what_was_finished(killed):
    assert 3 <= len(killed.kept.splitlines()) < 12
    assert not (killed.out / "summary.json").exists()


def test_a_killed_evaluation_leaves_no_simulator_behind(killed):
    assert len(killed.workers) == 2
    for worker in killed.workers:
        assert select.select([worker], [], [], 20)[0]  # readable once the process has ended


def test_a_killed_evaluation_continues_to_the_same_result(killed, tmp_path, run_evaluation, files):
    run_evaluation(tmp_path / "whole")
    # and the line that was being written
    (killed.out / "episodes.jsonl").write_bytes(killed.kept + b'{"task": "reach-red", "epi')
    run_evaluation(killed.out)
    assert files(killed.out) == files(tmp_path / "whole")


def test_finished_episodes_are_not_run_again(killed, state_policy, run_evaluation):
    policy = state_policy(PointReach())
    run_evaluation(killed.out, policy)
    everything = read_episodes(killed.out / "episodes.jsonl")
    kept = read_episodes_of(killed.kept)
    assert policy.calls == sum(r["predictions"] for r in everything) - sum(r["predictions"] for r in kept)
    assert policy.calls > 0


def read_episodes_of(content):
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"n_action_steps": 5}, "protocol.n_action_steps is 5 now and was 4"),
        ({"first_seed": 0}, "protocol.first_seed is 0 now and was 900"),
        ({"max_steps": 39}, "protocol.max_steps is 39 now and was 40"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_protocol_does_not_continue(changes, named, tmp_path, state_policy, run_evaluation, files):
    run_evaluation(tmp_path)
    before, policy = files(tmp_path), state_policy(PointReach())
    with pytest.raises(ValueError, match=named):
        run_evaluation(tmp_path, policy, **changes)
    assert files(tmp_path) == before and policy.calls == 0


def test_other_weights_do_not_continue(tmp_path, state_policy, run_evaluation, files):
    run_evaluation(tmp_path)
    before, policy = files(tmp_path), state_policy(PointReach())
    policy.fingerprint = "other weights"
    with pytest.raises(ValueError, match="policy is 'other weights' now"):
        run_evaluation(tmp_path, policy)
    assert files(tmp_path) == before and policy.calls == 0
