"""Runs of six steps on a dataset of random images with a tiny VLM, and what a policy of them sees."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.state import PartialState
from PIL import Image

from vla_bench.config import Config, load_config
from vla_bench.data.layout import Layout
from vla_bench.data.writer import LeRobotWriter
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics

HEADS = {
    "OFT": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
    "GR00T": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    "OpenVLA": {"type": "Bins", "first_token_id": 0},
    "PI05": {"type": "ActionExpert", "hidden_size": 32, "intermediate_size": 64, "num_heads": 4},
}
LENGTHS = (9, 7, 8, 6, 9, 7)  # frames per episode
ACTION = Layout(("dx", "dy", "gripper"), kind="delta", frame="world", units="m", gripper="positive_closes")
STATE = Layout(("x", "y"), frame="world", units="m")
SMALL = {"image_size": 32, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32, "vision_layers": 1}
TRAINER = {
    "max_train_steps": 6,
    "per_device_batch_size": 4,
    "learning_rate": {"base": 1e-3, "vlm": 1e-4},
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "num_workers": 0,
    "log_interval": 1,
    "eval_interval": 1000,
    "save_interval": 3,
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a dataset of random images, `toy`, a tiny VLM, `tiny`, and a configuration, `toy.yaml`."""
    home = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    cameras = {"front": (32, 32), "wrist": (32, 32)}
    with LeRobotWriter(home / "toy", fps=10, cameras=cameras, state=STATE, action=ACTION) as writer:
        for frames in LENGTHS:
            images = {name: rng.integers(0, 255, (frames, 32, 32, 3), np.uint8) for name in cameras}
            action = (rng.normal(size=(frames, 3)) * [0.01, 0.1, 1.0] + [0.5, 0.0, 0.0]).astype(np.float32)
            state = rng.normal(size=(frames, 2)).astype(np.float32)
            writer.add_episode(images=images, state=state, action=action, task="close the box")
    write_tiny("qwen2_5_vl", home / "tiny", corpus=["close the box"], **SMALL)
    configuration(home, home / "runs").save(home / "toy.yaml")
    return home


def configuration(home: Path, runs: Path, overrides: str = "", framework: str = "OFT") -> Config:
    """Six steps on the toy data; every step logged."""
    augmented = {"held_out": 0.3, "shift_pixels": 2, "state_noise": 0.02}
    tree = {
        "run_root_dir": str(runs),
        "run_id": "run",
        "seed": 0,
        "framework": {
            "name": framework,
            "vlm": {"base_vlm": str(home / "tiny")},
            "action_horizon": 4,
            "action_model": HEADS[framework],
        },
        "datasets": {"vla_data": {"root": str(home / "toy"), **augmented}},
        "trainer": TRAINER,
    }
    return load_config(tree, overrides)


@pytest.fixture
def config(home, tmp_path) -> Callable[..., Config]:
    """`config(overrides, framework)`: the configuration of a run in a folder of this test, `run` unless it says so."""
    return lambda overrides="", framework="OFT": configuration(home, tmp_path, overrides, framework)


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[tuple[int, float, float]]]:
    """Step, loss and gradient norm of each logged step of a run."""

    def read(run: Path) -> list[tuple[int, float, float]]:
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]

    return read


@pytest.fixture(scope="session", params=["OFT", "GR00T"])
def straight(request, home, losses) -> SimpleNamespace:
    """An uninterrupted run of each framework; its `folder` is only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        options = f"--run_id straight_{request.param}"
        run = train(configuration(home, home / "runs", options, request.param))
    return SimpleNamespace(framework=request.param, folder=run, losses=losses(run))


@pytest.fixture
def observation() -> Callable[..., dict]:
    """`observation(**change)`: what the toy's robot sees."""

    def seen(**change) -> dict:
        rng = np.random.default_rng(7)
        images = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(2)]
        return {"image": images, "lang": "close the box", "state": [0.5, -0.5], **change}

    return seen


def _child(function: Callable, rank: int, processes: int, environ: dict[str, str], pipe: Any) -> None:
    """Runs a function as a launcher would: the process knows its number, and where the others meet."""
    os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    PartialState._reset_state()
    try:
        pipe.send((True, function()))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)


@pytest.fixture(scope="session")
def launched() -> Callable[..., list]:
    """`launched(function, processes, environ)`: what a function returns in each of the processes of a launch.

    They are forks of this one, so they need not import anything. One that fails ends all.
    """

    def launch(function: Callable, processes: int = 2, environ: dict[str, str] | None = None) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        fork, started = multiprocessing.get_context("fork"), []
        for rank in range(processes):
            ours, theirs = fork.Pipe(duplex=False)
            arguments = function, rank, processes, {**meeting, **(environ or {})}, theirs
            child = fork.Process(target=_child, args=arguments, daemon=False)
            child.start()
            theirs.close()
            started.append((child, ours))
        answers: dict[int, Any] = {}
        try:
            while len(answers) < processes:
                waiting = {pipe: rank for rank, (_, pipe) in enumerate(started) if rank not in answers}
                ready = multiprocessing.connection.wait(list(waiting), timeout=120)
                assert ready, f"processes {sorted(waiting.values())} of {processes} wait for each other"
                for pipe in ready:
                    fine, answer = pipe.recv()
                    assert fine, f"process {waiting[pipe]} of {processes}:\n{answer}"
                    answers[waiting[pipe]] = answer
        finally:
            for child, _ in started:
                child.kill() if len(answers) < processes else child.join(timeout=30)
        return [answers[rank] for rank in range(processes)]

    return launch
