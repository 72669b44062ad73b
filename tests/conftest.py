"""One torch thread, no network, and this environment's programs, for every test and every process that it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@pytest.fixture(scope="session", autouse=True)
def own_code(tmp_path_factory):
    """What these tests import is not remembered as code that a person trusts."""
    os.environ["VLA_BENCH_TRUSTED_CODE"] = str(tmp_path_factory.mktemp("own_code") / "trusted.txt")


@pytest.fixture
def as_in_0_1(monkeypatch):
    """Backbones compute with transformers' own modules, as version 0.1 did, so that its numbers come back bit for bit."""
    from vla_bench.models.backbones import vlm

    for name in ("multiply_patches", "attend_by_length", "remember_positions", "shorten_norms"):
        monkeypatch.setattr(vlm, name, lambda model: None)


@pytest.fixture(scope="session")
def server():
    """Runs notebooks and programs in copies of a process that has imported torch: see `notebook_server.py`."""
    command = [sys.executable, str(Path(__file__).with_name("notebook_server.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], text=True, **pipes) as process:

        def ask(request: dict) -> dict:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()
