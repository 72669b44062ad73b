"""A run that is killed, or asked to stop, in any step ends as the one that nobody interrupted, to the last bit, in any mode.

With `VLA_BENCH_CASES` (`make resume`) every step from 1 to 10, both signals and every mode; without it a case of each mode.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.data.order import row_at
from vla_bench.training import imitation
from vla_bench.training.checkpoint import latest_checkpoint, list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.loop import AugmentedView

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
MODES = {  # processes, environment
    "one": (1, {}),
    "ddp": (2, {}),
    "fsdp2": (2, FSDP),
    "zero2": (2, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
    "zero3": (2, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
}
STEPS = 10
KILL, TERM = signal.SIGKILL, signal.SIGTERM
EVERY = [(mode, number, step) for mode in MODES for number in (KILL, TERM) for step in range(1, STEPS + 1)]
SOME = [("one", KILL, 8), ("ddp", KILL, 5), ("fsdp2", TERM, 5), ("zero3", KILL, 7)]
CASES = EVERY if "VLA_BENCH_CASES" in os.environ else SOME
OPTIONS = "--trainer.max_train_steps 10 --trainer.save_interval 3 --trainer.warmup_steps 2"
LIMIT_S = 120


def _rank(function: Callable, rank: int, processes: int, environment: dict[str, str], log: Path) -> None:
    """One process of a launch, until it ends by itself, by an error or by a signal."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout = sys.stderr = log.open("a")
    PartialState._reset_state()
    function(rank)


def launch(function: Callable[[int], object], mode: str, log: Path) -> list[int]:
    """What each process of a mode exits with; those that wait for one that is gone are killed after a while."""
    processes, environment = MODES[mode]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**meeting, "ACCELERATE_USE_CPU": "true", **environment}
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_rank, args=(function, rank, processes, environment, log))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT_S)
    hanging = [number for number, rank in enumerate(ranks) if rank.is_alive()]
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not hanging, f"processes {hanging} did not end within {LIMIT_S} s: {log.read_text()[-2000:]}"
    return [rank.exitcode for rank in ranks]


def interrupt(number: int, step: int, told: range) -> Callable[[int], None]:
    """Makes the processes that are told get a signal in a step, between the batch and the gradient."""

    def patch(rank: int) -> None:
        clean = imitation.update

        def update(run, batches):
            if run.step == step - 1 and rank in told:
                os.kill(os.getpid(), number)
            return clean(run, batches)

        imitation.update = update

    return patch


def state(run: Path) -> dict:
    """All that a run learned and all that it would go on with; of the rows of the log what does not tell a time."""
    folder = latest_checkpoint(run)
    trainer = torch.load(folder / "trainer/optimizer.pt", weights_only=True)
    moments = {f"{i}.{k}": v for i, own in trainer["optimizer"]["state"].items() for k, v in own.items()}
    progress = json.loads((folder / "trainer/progress.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untimed = [
        {k: v for k, v in row.items() if k not in ("data_s", "step_s", "samples_per_s")} for row in rows
    ]
    return {
        "tensors": {**load_file(folder / "model.safetensors"), **moments},
        "optimizer": [{k: v for k, v in group.items() if k != "params"} for group in trainer["optimizer"]["param_groups"]],
        "schedule": trainer["scheduler"],
        "generators": json.loads((folder / "trainer/rng.json").read_text()),
        "place": {key: value for key, value in progress.items() if key not in ("config", "data")},
        "rows": untimed,
    }  # fmt: skip


def assert_same(found: dict, expected: dict) -> None:
    ours, theirs = found.pop("tensors"), expected.pop("tensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    for what in expected:
        assert found[what] == expected[what], what


@pytest.fixture(scope="module")
def uninterrupted(home, tmp_path_factory) -> Callable[[str], Path]:
    """The whole run of a mode, made once."""
    folder, made = tmp_path_factory.mktemp("uninterrupted"), {}

    def run(mode: str) -> Path:
        if mode not in made:
            if mode.startswith("zero"):
                pytest.importorskip("deepspeed")
            cfg = options(home, folder, mode)
            cfg.save(folder / f"{mode}.yaml")
            log = folder / f"{mode}.log"
            codes = launch(lambda rank: train(load_config(folder / f"{mode}.yaml")), mode, log)
            assert set(codes) == {0}, log.read_text()[-3000:]
            made[mode] = folder / mode
        return made[mode]

    return run


def options(home: Path, folder: Path, name: str):
    """The toy with a head that draws noise, four samples a step."""
    head = {"type": "FlowMatching", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    tree = load_config(home / "toy.yaml").to_dict()
    tree["framework"] |= {"name": "GR00T", "action_model": head}
    batch = 4 // MODES[name][0]
    words = f"--run_root_dir {folder} --run_id {name} {OPTIONS} --trainer.per_device_batch_size {batch}"
    return load_config(tree, f"{words} --trainer.resume auto")


@pytest.mark.parametrize("mode, number, step", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_a_run_that_is_interrupted_in_a_step_ends_as_if_nothing_had_been(
    home, tmp_path, uninterrupted, mode, number, step
):
    straight = uninterrupted(mode)
    cfg = options(home, tmp_path, mode)
    processes = MODES[mode][0]
    told = range(processes) if number == KILL else range(step % processes, step % processes + 1)
    patch, log = interrupt(number, step, told), tmp_path / "log"

    def begin(rank: int) -> None:
        patch(rank)
        train(cfg)

    codes = launch(begin, mode, log)
    stopped = -KILL if number == KILL else 0 if step == STEPS else 143
    assert codes == [stopped] * processes, log.read_text()[-3000:]
    left = [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path / mode)]
    saved = [3, 6, 9, 10] if number == TERM and step == STEPS else [3, 6, 9]
    done = step - 1 if number == KILL else step
    assert left == sorted({*(at for at in saved if at <= done), *([step] if number == TERM else [])})
    assert launch(lambda rank: train(cfg), mode, log) == [0] * processes, log.read_text()[-3000:]
    assert_same(state(tmp_path / mode), state(straight))


ELSEWHERE = [("one", "ddp"), ("ddp", "one"), ("fsdp2", "one"), ("zero3", "ddp")]


@pytest.mark.parametrize("before, after", ELSEWHERE if CASES is EVERY else ELSEWHERE[:1])
def test_a_run_that_goes_on_elsewhere_reads_the_same_samples_in_the_same_order(
    home, tmp_path, uninterrupted, before, after
):
    run = shutil.copytree(uninterrupted(before), tmp_path / after)
    for checkpoint in list_checkpoints(run)[1:]:
        shutil.rmtree(checkpoint)
    cfg, log = options(home, tmp_path, after), tmp_path / "log"
    tree = load_config(run).to_dict() | {"run_root_dir": str(tmp_path), "run_id": after}
    load_config(tree).save(run / "config.yaml")

    def go_on(rank: int) -> None:
        clean = AugmentedView.__getitem__

        def read(view, key):
            with (tmp_path / "read").open("a") as file:
                file.write(json.dumps(key) + "\n")
            return clean(view, key)

        AugmentedView.__getitem__ = read
        train(cfg)

    assert set(launch(go_on, after, log)) == {0}, log.read_text()[-3000:]
    counts = f"{MODES[before][0]} as number of processes there, {MODES[after][0]} here; the samples and their order"
    assert log.read_text().count(counts) == (MODES[before][0] != MODES[after][0])
    found = [tuple(json.loads(line)) for line in (tmp_path / "read").read_text().splitlines()]
    rows = json.loads((latest_checkpoint(run) / "trainer/progress.json").read_text())["rows"]
    assert sorted(found) == [(position, row_at(position, rows, 0)) for position in range(3 * 4, STEPS * 4)]
    steps = [row["step"] for row in state(run)["rows"] if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
