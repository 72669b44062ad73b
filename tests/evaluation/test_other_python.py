"""A simulator in an environment of its own: the same episodes, and clear words where it cannot start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation import other_python
from vla_bench.evaluation.other_python import BenchmarkElsewhere
from vla_bench.evaluation.rollout import evaluate
from vla_bench.evaluation.workers import EpisodeError, EpisodeSpec, open_workers

CONFIG, CONTEXT = {"type": "point"}, {"image_size": (32, 32)}
RED = EpisodeSpec("reach-red", 0, 900)


def environment(folder, packages):
    """A virtual environment that sees the packages of this one, or none; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if packages:
        (site,) = Path(folder).glob("lib/python*/site-packages")
        here = [path for path in sys.path if path.endswith("site-packages")]
        (site / "others.pth").write_text("\n".join(here))
    return str(Path(folder) / "bin" / "python")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return environment(tmp_path_factory.mktemp("environment"), packages=True)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_the_episodes_are_those_of_one_environment(
    num_envs, python, run_evaluation, state_policy, settings, files, tmp_path
):
    here = run_evaluation(tmp_path / "here", videos_per_task=1)
    asked = settings(videos_per_task=1, num_envs=num_envs, python=python)
    there = evaluate(state_policy(PointReach()), None, asked, tmp_path / "there", show_progress=False)
    assert there == here and files(tmp_path / "there") == files(tmp_path / "here")


def test_a_worker_runs_the_other_program_and_is_started_anew(python):
    (worker,) = open_workers(BenchmarkElsewhere(python, CONFIG, CONTEXT), 1)
    worker.send(RED)
    first = worker.receive().observation["state"]
    program = Path(f"/proc/{worker.process.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    with pytest.raises(EpisodeError, match="simulator 0 was killed by signal 9 in reach-red seed 900"):
        worker.receive()
    worker.restart()
    worker.send(RED)
    again = worker.receive().observation["state"]
    last = worker.process
    worker.close()
    assert program == python and (first == again).all() and last.exitcode == 0


def test_a_frozen_simulator_is_ended(python):
    (worker,) = open_workers(BenchmarkElsewhere(python, CONFIG, CONTEXT), 1, step_timeout_s=60.0)
    worker.send(RED)
    worker.receive()
    os.kill(worker.process.pid, signal.SIGSTOP)
    worker.restart()
    worker.send(RED)
    assert worker.receive().steps == 0
    worker.close()


def test_an_environment_sees_none_of_the_packages_of_this_one(tmp_path, capfd):
    bare = environment(tmp_path / "bare", packages=False)
    with pytest.raises(
        ValueError, match="evaluation.python: .* ended with exit code 1; .*needs vla_bench of the same"
    ):
        BenchmarkElsewhere(bare, CONFIG, CONTEXT)
    assert "No module named" in capfd.readouterr().err


def test_another_version_of_this_package_is_refused(python, monkeypatch, capfd):
    monkeypatch.setattr(other_python.vla_bench, "__version__", "99.0")
    with pytest.raises(ValueError, match="ended with exit code 1"):
        BenchmarkElsewhere(python, CONFIG, CONTEXT)
    assert "the evaluation 99.0; install the same" in capfd.readouterr().err


@pytest.mark.parametrize(
    "config, message",
    [
        ({"type": "point", "tasks": ["reach-rod"]}, "says ValueError: .*'reach-red'"),
        ({"type": "poind"}, "says RegistryError: .*'point'"),
    ],
    ids=["task", "benchmark"],
)
def test_what_the_benchmark_refuses_over_there_is_said_here(config, message, python):
    with pytest.raises(ValueError, match=message):
        BenchmarkElsewhere(python, config, CONTEXT)
