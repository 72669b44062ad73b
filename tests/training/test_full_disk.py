"""A full disk costs one line: what could not be written, how much was needed, and which checkpoint stands."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from vla_bench import files
from vla_bench.config import load_config
from vla_bench.files import NotWrittenError, append_jsonl
from vla_bench.training.checkpoint import check_checkpoint, list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.loop import MetricsLog, read_metrics
from vla_bench.training.run import save, set_up

CHECKPOINT = [
    "model.safetensors",
    "framework.json",
    "policy.json",
    "manifest.json",
    "vlm/config.json",
    "vlm/tokenizer.json",
    "trainer/optimizer.pt",
    "trainer/rng.json",
    "trainer/progress.json",
]
AT_THE_START = ["config.yaml", "dataset_statistics.json"]
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EIO]


@contextmanager
def largest_file(size: int):
    """Within, this process can write no file beyond `size` bytes, as on a disk with as little room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(monkeypatch, name: str, number: int) -> None:
    """The disk takes no file that ends in `name`."""
    real = files.sync

    def sync(path: Path) -> None:
        if str(path).endswith(name) or f".{Path(name).name}.{os.getpid()}." in str(path):
            raise OSError(number, os.strerror(number))
        real(path)

    monkeypatch.setattr(files, "sync", sync)


@pytest.fixture(scope="module")
def saved(home, tmp_path_factory):
    """A run with a checkpoint at step 3; and the bytes of each file of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("full")
        run = set_up(load_config(home / "toy.yaml", f"--run_root_dir {folder}"))
        run.step = 3
        save(run)
        run.step = 4
        yield run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_line_and_nothing_lost(error: Exception, what: str, before: dict[str, bytes], run) -> None:
    text = str(error)
    assert f"{what} could not be written: " in text and "\n" not in text
    assert "it needs " in text and "are free there" in text
    assert text.endswith("; step_000003 stands, and the run goes on from it")
    assert content(run.folder) == before
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step_000003"]
    check_checkpoint(list_checkpoints(run.folder)[0], resume=True)


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(saved, name):
    before = content(saved.folder)
    size = (saved.folder / "checkpoints/step_000003" / name).stat().st_size
    with largest_file(size - 1), pytest.raises(NotWrittenError) as error:
        save(saved)
    assert_one_line_and_nothing_lost(error.value, "checkpoints/step_000004", before, saved)
    assert os.strerror(errno.EFBIG) in str(error.value)


@pytest.mark.parametrize("number", FULL)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_any_file_of_a_checkpoint_may_be_the_one_that_finds_no_room(saved, monkeypatch, name, number):
    before = content(saved.folder)
    refused(monkeypatch, f"step_000004.tmp/{name}", number)
    with pytest.raises(NotWrittenError) as error:
        save(saved)
    assert_one_line_and_nothing_lost(error.value, "checkpoints/step_000004", before, saved)
    assert os.strerror(number) in str(error.value)


def test_what_a_checkpoint_needs_is_what_it_takes(saved, monkeypatch):
    monkeypatch.setattr(files, "size_text", str)
    with largest_file(1000), pytest.raises(NotWrittenError) as error:
        save(saved)
    needed = int(str(error.value).partition("it needs ")[2].partition(",")[0])
    sizes = {name: len(data) for name, data in content(saved.folder / "checkpoints/step_000003").items()}
    taken = sizes["model.safetensors"] + sizes["trainer/optimizer.pt"]
    assert needed < taken < needed + 60_000  # names and shapes stand beside the numbers


@pytest.mark.parametrize("size", [0, 1, 20])
def test_a_row_of_the_log_is_there_or_not(saved, size):
    path = saved.folder / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, loss=0.5)
    before = path.read_bytes()
    with largest_file(len(before) + size), pytest.raises(NotWrittenError) as error:
        log.write(2, loss=0.25)
    assert_one_line_and_nothing_lost(error.value, "metrics.jsonl", {**content(saved.folder)}, saved)
    assert path.read_bytes() == before
    log.write(2, loss=0.25)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    path.unlink()


@pytest.mark.parametrize("name", AT_THE_START)
@pytest.mark.parametrize("number", FULL)
def test_a_run_that_cannot_begin_leaves_no_folder(config, tmp_path, monkeypatch, name, number):
    refused(monkeypatch, name, number)
    with pytest.raises(NotWrittenError) as error:
        set_up(config())
    text = str(error.value)
    assert f"{name} could not be written: {os.strerror(number)} (it needs " in text
    assert text.endswith("there is no checkpoint yet") and "\n" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", AT_THE_START)
def test_a_run_that_cannot_go_on_keeps_what_it_has(config, monkeypatch, name):
    run = train(config("--trainer.max_train_steps 3"))
    before = content(run)
    refused(monkeypatch, name, errno.ENOSPC)
    with pytest.raises(NotWrittenError, match=f"{name} could not.*; step_000003 stands"):
        set_up(load_config(run, "--trainer.resume true"))
    after = content(run)
    assert {**after, "config.yaml": b""} == {**before, "config.yaml": b""}  # it says `resume` now, or not yet


def test_half_a_line_is_taken_back_when_the_disk_fills_in_its_middle(tmp_path):
    append_jsonl(tmp_path / "log.jsonl", {"step": 1})
    with largest_file(18), pytest.raises(NotWrittenError):
        append_jsonl(tmp_path / "log.jsonl", {"step": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


LIMITED = """
import resource, sys
from vla_bench.training import imitation, run

real = run.save_checkpoint
def save_checkpoint(folder, step, **given):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    return real(folder, step, **given)
run.save_checkpoint = save_checkpoint
imitation.main(sys.argv[1:])
"""


def test_the_program_says_it_in_one_line_and_fails(home, tmp_path, losses):
    command = [sys.executable, "-c", LIMITED, "--config_yaml", home / "toy.yaml"]
    command += ["--run_root_dir", tmp_path]
    child = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}
    )
    said = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
    assert child.returncode == 2 and "Traceback" not in child.stderr
    assert len(said) == 1 and "step_000006 could not be written: File too large (it needs " in said[0]
    assert said[0].endswith("step_000003 stands, and the run goes on from it")
    run = train(load_config(tmp_path / "run", "--trainer.resume true"))
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
