"""A run that is killed, or loses its power, at any byte that it writes leaves a folder from which it goes on.

What a run does to its folder is recorded: every file that it makes, every byte, every rename, removal and fsync, over a
restart, three checkpoints, the removal of old ones and the rows of the log. A prefix of that recording is what a killed
process leaves. After a loss of power what was not forced to the disk may be missing too. `VLA_BENCH_CASES` is the number
of places that are tried, 40 without it; `make resume` tries a thousand.
"""

import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.files import checkpoint_step
from vla_bench.training.checkpoint import check_checkpoint, list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics
from vla_bench.training.run import find_resume, save, set_up

CASES = int(os.environ.get("VLA_BENCH_CASES", "40"))
KEPT = ["step_000006", "step_000008"]
OPTIONS = "--trainer.save_interval 2 --trainer.keep_last 2 --trainer.max_train_steps 8 --trainer.schedule wsd"


class Recorder:
    """What happens in a folder, in order: ("file" | "folder", path), ("write", path, offset, bytes), ("cut", path, size),
    ("rename", path, path), ("remove", path), ("sync", path)."""

    def __init__(self, folder: Path):
        self.folder, self.done, self.active = folder, [], True
        self.seen = self.content()
        sys.addaudithook(self.hear)

    def content(self) -> dict[str, bytes | None]:
        """Path to bytes of all files; None for a folder."""
        paths = sorted(self.folder.rglob("*"))
        return {str(p.relative_to(self.folder)): p.read_bytes() if p.is_file() else None for p in paths}

    def look(self) -> None:
        """Notes what has changed since the last look."""
        self.active = False  # this reads, too
        now = self.content()
        self.active = True
        self.done += [("remove", name) for name in sorted(self.seen.keys() - now.keys(), reverse=True)]
        for name, data in now.items():
            if name not in self.seen:
                self.done.append(("folder" if data is None else "file", name))
            before = self.seen.get(name) or b""
            if data is None or data == before:
                continue
            common = len(before) if data.startswith(before) else 0
            if common < len(before):
                self.done.append(("cut", name, 0))
            self.done.append(("write", name, common, data[common:]))
        self.seen = now

    def name(self, path) -> str | None:
        path = Path(os.fsdecode(path)).absolute()
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else None

    def hear(self, event: str, arguments: tuple) -> None:
        """Before Python opens, renames or removes something."""
        if not self.active or event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        if event == "os.rename" and (source := self.name(arguments[0])):
            self.look()
            target = self.name(arguments[1])
            self.done.append(("rename", source, target))
            moved = lambda name: name == source or name.startswith(f"{source}/")
            self.seen = {
                target + name.removeprefix(source) if moved(name) else name: data
                for name, data in self.seen.items()
                if name != target
            }
        elif event in ("open", "os.remove", "os.rmdir", "os.mkdir"):
            path, within = arguments[0], event != "open" and arguments[-1] != -1  # of a folder that is open
            if within or (isinstance(path, (str, bytes)) and self.name(path)):
                self.look()


@pytest.fixture(scope="module")
def recorded(home, tmp_path_factory) -> SimpleNamespace:
    """A run with a checkpoint at step 2 that goes on to step 8; its folder before, and what was done to it."""
    folder = tmp_path_factory.mktemp("recorded").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        whole = train(
            load_config(home / "toy.yaml", f"--run_root_dir {folder} {OPTIONS} --trainer.keep_last 9")
        )
        whole.rename(folder / "whole")
        run = shutil.copytree(folder / "whole", folder / "run")
        for checkpoint in list_checkpoints(run)[1:]:
            shutil.rmtree(checkpoint)
        load_config(run, OPTIONS).save(run / "config.yaml")
        before = shutil.copytree(run, folder / "before")
        recorder = Recorder(run)
        real = os.fsync

        def fsync(handle: int) -> None:
            if name := recorder.name(os.readlink(f"/proc/self/fd/{handle}")):
                recorder.look()
                recorder.done.append(("sync", name))
            real(handle)

        patch.setattr(os, "fsync", fsync)
        train(load_config(run, "--trainer.resume true"))
        recorder.look()
        recorder.active = False
    return SimpleNamespace(before=before, done=recorder.done, after=run, whole=folder / "whole")


def replay(operations: list[tuple], folder: Path) -> dict[str, int]:
    """Does to a folder what was done; returns the files that are not on the disk, and how many bytes of them are."""
    loose: dict[str, int] = {}
    for kind, name, *rest in operations:
        path = folder / name
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.touch()
            loose[name] = 0
        elif kind == "write":
            offset, data = rest
            loose.setdefault(name, offset)
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(data)
        elif kind == "cut":
            os.truncate(path, rest[0])
        elif kind == "rename":
            os.replace(path, folder / rest[0])
            moved = lambda other, name=name: other == name or other.startswith(f"{name}/")
            loose = {
                rest[0] + n.removeprefix(name) if moved(n) else n: size
                for n, size in loose.items()
                if n != rest[0]
            }
        elif kind == "remove":
            path.rmdir() if path.is_dir() else path.unlink()
            loose.pop(name, None)
        elif kind == "sync":
            loose.pop(name, None)
    return loose


def place(done: list[tuple], rng: random.Random) -> list[tuple]:
    """What was done until a byte: any byte with the same chance, or, half of the time, any deed with the same chance."""
    sizes = [len(each[3]) if each[0] == "write" else 0 for each in done]
    if rng.random() < 0.5:
        number = rng.choices(range(len(done)), sizes)[0]
    else:
        number = rng.randrange(len(done))
    prefix, last = done[:number], done[number]
    if last[0] == "write":
        kind, name, offset, data = last
        prefix = [*prefix, (kind, name, offset, data[: rng.randrange(len(data))])]
    return prefix


def lose_power(
    done: list[tuple], rng: random.Random
) -> tuple[list[tuple], Callable[[Path, dict[str, int]], None]]:
    """Of what was done only a part is left that ends after the last fsync; and what becomes of bytes that were not forced."""
    forced = max((number for number, each in enumerate(done) if each[0] == "sync"), default=-1)
    left = done[: rng.randint(forced + 1, len(done))]

    def damage(folder: Path, loose: dict[str, int]) -> None:
        for name, size in loose.items():
            path = folder / name
            end = path.stat().st_size
            os.truncate(path, rng.randint(size, end))
            if rng.random() < 0.5:  # the length is there, the bytes are not
                os.truncate(path, end)

    return left, damage


def stands(done: list[tuple], forced: bool) -> int:
    """The newest step whose checkpoint has its name, or has it for sure after a loss of power."""
    steps = [2]
    for number, each in enumerate(done):
        if each[0] == "rename" and Path(each[2]).name.startswith("step_"):
            if not forced or ("sync", "checkpoints") in done[number:]:
                steps.append(checkpoint_step(Path(each[2])))
    return steps[-1]


def assert_usable(folder: Path, least: int) -> None:
    newest = find_resume(load_config(folder), folder, "true")  # compares every byte
    assert newest is not None and checkpoint_step(newest) >= least
    for checkpoint in list_checkpoints(folder):
        check_checkpoint(checkpoint, resume=True)
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [step for step in steps if step <= checkpoint_step(newest)] == list(
        range(1, checkpoint_step(newest) + 1)
    )


def test_the_recording_ends_where_the_run_did(recorded, tmp_path):
    folder = shutil.copytree(recorded.before, tmp_path / "run")
    assert replay(recorded.done, folder) == {}
    content = lambda run: {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert content(folder) == content(recorded.after)
    assert [path.name for path in list_checkpoints(folder)] == KEPT
    kinds = [each[0] for each in recorded.done]
    renamed = [each[2] for each in recorded.done if each[0] == "rename" and "checkpoints/step_" in each[2]]
    assert [Path(name).name for name in renamed] == ["step_000004", "step_000006", "step_000008"]
    assert kinds.count("sync") > 40 and kinds.count("remove") > 20


@pytest.mark.parametrize("case", range(CASES))
def test_a_run_that_is_killed_at_any_byte_goes_on(recorded, tmp_path, case):
    rng = random.Random(case)
    done = place(recorded.done, rng)
    killed = shutil.copytree(recorded.before, tmp_path / "killed")
    replay(done, killed)
    assert_usable(killed, least=stands(done, forced=False))
    dark = shutil.copytree(recorded.before, tmp_path / "dark")
    left, damage = lose_power(done, rng)
    damage(dark, replay(left, dark))
    assert_usable(dark, least=stands(done, forced=True))
    if case % 20 == 0:
        goes_on(killed, recorded)
        goes_on(dark, recorded)


def goes_on(folder: Path, recorded: SimpleNamespace) -> None:
    """To the same weights as the run that was not interrupted, and with nothing half written left over."""
    place = f"--trainer.resume true --run_root_dir {folder.parent} --run_id {folder.name}"
    load_config(folder, place).save(folder / "config.yaml")
    train(load_config(folder))
    ours, theirs = (
        load_file(run / "checkpoints/step_000008/model.safetensors") for run in (folder, recorded.whole)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert [name for name in left if name.startswith(".")] == [] and left[-1] == KEPT[-1]


SIZES = [0, 1, 700, 20_000, 60_000, 100_000]


@pytest.mark.parametrize("size", SIZES)
def test_the_system_kills_a_process_in_the_middle_of_a_file(config, size):
    """No recording: the kernel ends a process at the byte with which a file becomes too large."""
    run = set_up(config("--trainer.keep_last 1"))
    run.step = 2
    save(run)
    run.step = 4
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    hidden = [path.name for path in (run.folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert hidden == [".step_000004.tmp"]
    folder = run.folder
    del run
    assert find_resume(load_config(folder), folder, "true").name == "step_000002"
    set_up(load_config(folder, "--trainer.resume true"))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000002"]
