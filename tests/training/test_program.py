"""The training as a program, in each form that the field types."""

import os
import subprocess
import sys
from pathlib import Path

from vla_bench.training.checkpoint import list_checkpoints

ROOT = Path(__file__).parents[2]
FILE = "vla_bench/training/imitation.py"
LAUNCH = "launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


def program(*words) -> subprocess.CompletedProcess:
    """A program of this environment, in the repository's folder."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [Path(sys.executable).parent / words[0], *words[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)


def test_help_says_what_it_takes():
    said = program("python", "-m", "vla_bench.training.imitation", "--help")
    assert said.returncode == 0 and said.stderr == ""
    for word in ("usage:", "--config_yaml", "Train a framework on demonstrations.", "--trainer.seed 1"):
        assert word in said.stdout


def test_accelerate_launches_the_file_which_prints_the_run_folder(home, tmp_path):
    words = ["--run_root_dir", tmp_path, "--trainer.max_train_steps", "1", "--trainer.warmup_steps", "0"]
    ended = program(
        "accelerate",
        *LAUNCH.split(),
        "vla_bench/training/imitation.py",
        "--config_yaml",
        home / "toy.yaml",
        *words,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout == f"{tmp_path}/run\n"
    assert "vlm: vision encoder" in ended.stderr and "Traceback" not in ended.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_000001"]
