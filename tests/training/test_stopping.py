"""SIGTERM and SIGUSR1 save and leave, and the run goes on as if nothing had been; Ctrl-C costs one line."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import load_config
from vla_bench.training import imitation, stopping
from vla_bench.training.checkpoint import latest_checkpoint, list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.run import set_up
from vla_bench.training.stopping import ECHO_S, STATUS, StopRequest, agreed, interruptible, stop_requests


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts what it puts into the background deaf to Ctrl-C, and every child inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(*signals: int, step: int, monkeypatch) -> None:
    """The process gets signals while it computes a step."""
    clean = imitation.update

    def update(run, batches):
        if run.step == step - 1:
            for each in signals:
                os.kill(os.getpid(), each)
        return clean(run, batches)

    monkeypatch.setattr(imitation, "update", update)


def assert_equal_runs(found: Path, expected: Path, losses) -> None:
    assert losses(found) == losses(expected)
    ours, theirs = (load_file(latest_checkpoint(run) / "model.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def names(run: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run)]


@pytest.fixture(params=[signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def stopped(request, config, straight, tmp_path, monkeypatch, capsys):
    """A run that got a signal in step 4: which, what it printed, its exit status."""
    with monkeypatch.context() as patch:
        send(request.param, step=4, monkeypatch=patch)
        with pytest.raises(SystemExit) as left:
            train(config("--trainer.num_workers 1", straight.framework))
    return request.param, capsys.readouterr(), left.value.code


def test_a_request_saves_the_step_and_leaves_with_its_status(stopped, tmp_path):
    number, said, status = stopped
    assert status == {signal.SIGTERM: 143, signal.SIGUSR1: 75}[number] == STATUS[number]
    assert names(tmp_path / "run") == ["step_000003", "step_000004"]
    line = f"{number.name}: stopped after step 4 of 6, which is saved; continue with --trainer.resume true\n"
    assert said.err.endswith(line) and said.err.count(number.name) == 1 and said.out == ""


@pytest.mark.parametrize("numbers", [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR1)])
def test_a_job_that_is_to_come_back_does_so_also_when_its_time_is_up(config, tmp_path, monkeypatch, numbers):
    send(*numbers, step=4, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit) as left:
        train(config())
    assert left.value.code == 75 and names(tmp_path / "run") == ["step_000003", "step_000004"]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(stopped, straight, tmp_path, losses):
    run = train(load_config(tmp_path / "run", "--trainer.resume true"))
    assert_equal_runs(run, straight.folder, losses)


def test_sigterm_at_a_step_that_is_saved_anyway_and_measured(config, tmp_path, monkeypatch):
    send(signal.SIGTERM, step=3, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit):
        train(config("--trainer.eval_interval 3"))
    assert names(tmp_path / "run") == ["step_000003"]
    assert '"eval/action_error"' in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_in_the_last_step_is_the_end_of_the_run(config, monkeypatch, number):
    send(number, step=6, monkeypatch=monkeypatch)
    assert names(train(config())) == ["step_000003", "step_000006"]


def test_afterwards_signals_do_what_they_did_before(config):
    before = [signal.getsignal(number) for number in STATUS]
    train(config("--trainer.max_train_steps 3"))
    assert [signal.getsignal(number) for number in STATUS] == before


def test_a_training_in_another_thread_needs_no_signals(config):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(config("--trainer.max_train_steps 3"))))
    thread.start()
    thread.join()
    assert names(found[0]) == ["step_000003"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_workers_leave_signals_to_the_training(config, number):
    run = set_up(config())
    stream = iter(imitation.make_loader(run.view, run.sampler(), run.framework.prepare, num_workers=1))
    batches = [next(stream)]
    for worker in stream._workers:
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    batches += [batch for batch in stream]
    assert len(batches) == 6


def test_workers_end_when_the_training_ends_them(config):
    run = set_up(config())
    stream = iter(imitation.make_loader(run.view, run.sampler(), run.framework.prepare, num_workers=1))
    next(stream)
    (worker,) = stream._workers
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_an_interrupted_cell_leaves_a_run_that_goes_on(config, straight, tmp_path, monkeypatch, losses):
    with monkeypatch.context() as patch:
        send(signal.SIGINT, step=5, monkeypatch=patch)
        with pytest.raises(KeyboardInterrupt):
            train(config("", straight.framework))
    assert names(tmp_path / "run") == ["step_000003"]
    run = train(load_config(tmp_path / "run", "--trainer.resume true"))
    assert_equal_runs(run, straight.folder, losses)


CHILD = """
import os, sys
from vla_bench.training import imitation

numbers, clean = [int(number) for number in sys.argv[1].split(",")], imitation.update
def update(run, batches):
    if run.step == 4:
        for number in numbers:
            os.kill(os.getpid(), number)
    return clean(run, batches)
imitation.update = update
imitation.main(sys.argv[2:])
"""


def child(home: Path, folder: Path, *numbers: int) -> subprocess.CompletedProcess:
    """The program, which gets signals in step 5."""
    command = [sys.executable, "-c", CHILD, ",".join(str(int(number)) for number in numbers)]
    command += ["--config_yaml", home / "toy.yaml", "--run_root_dir", folder, "--trainer.num_workers", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_ctrl_c_is_one_line_that_names_the_last_checkpoint(home, tmp_path):
    ended = child(home, tmp_path, signal.SIGINT)
    assert ended.returncode == 130 and ended.stdout == ""
    last = f"the last checkpoint is {tmp_path}/run/checkpoints/step_000003"
    said = [line for line in ended.stderr.splitlines() if "it/s" not in line]
    assert said[-1] == f"interrupted: {last}, continue with --trainer.resume true"
    assert "Traceback" not in ended.stderr and "KeyboardInterrupt" not in ended.stderr


def test_a_second_sigterm_ends_the_process_at_once(home, tmp_path):
    ended = child(home, tmp_path, signal.SIGTERM, signal.SIGTERM)
    assert ended.returncode == -signal.SIGTERM and "Traceback" not in ended.stderr
    assert names(tmp_path / "run") == ["step_000003"]


PAIR = """
import os, signal, sys
from vla_bench.config import load_config
from vla_bench.training import imitation

finish, clean = imitation.finish, imitation.update
imitation.finish = lambda run: None  # the processes stay connected from one run to the next
source, home = sys.argv[1:]
straight = imitation.train(load_config(source, "--run_id straight"))

def update(run, batches):
    if run.step == 1 and os.environ["RANK"] == "1":  # only one process is told
        os.kill(os.getpid(), signal.SIGTERM)
    return clean(run, batches)

imitation.update = update
try:
    imitation.train(load_config(source, "--run_id stopped"))
except SystemExit as left:
    assert left.code == 143, left.code
else:
    raise AssertionError("the run was not stopped")
imitation.update, imitation.finish = clean, finish
imitation.train(load_config(home + "/stopped", "--trainer.resume true"))
"""


def test_two_processes_stop_after_the_same_step_and_go_on_bit_for_bit(config, tmp_path, losses):
    """A head that draws noise, in two processes of which one is told to stop."""
    options = "--trainer.max_train_steps 3 --trainer.per_device_batch_size 2"
    config(options, "GR00T").save(tmp_path / "pair.yaml")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "pair.py").write_text(PAIR)
    command = [*launch, tmp_path / "pair.py", tmp_path / "pair.yaml", tmp_path]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stderr.count("SIGTERM: stopped after step 2 of 3") == 1
    assert names(tmp_path / "stopped") == ["step_000002", "step_000003"]
    assert_equal_runs(tmp_path / "stopped", tmp_path / "straight", losses)
    for checkpoint in list_checkpoints(tmp_path / "stopped"):
        first, second = json.loads((checkpoint / "trainer/rng.json").read_text())
        assert first["torch"] != second["torch"], "each process draws its own noise"


@pytest.fixture
def told(monkeypatch):
    """A clock at 100 s, and what a request does to this process, in order."""
    told = SimpleNamespace(now=100.0, done=[])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: told.now)
    monkeypatch.setattr(stopping.signal, "signal", lambda number, what: told.done.append((number, what)))
    monkeypatch.setattr(stopping.os, "kill", lambda pid, number: told.done.append((pid, number)))
    return told


HEARD = (signal.SIGTERM, signal.SIG_DFL)


def test_the_second_request_ends_a_process_of_its_own(told, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    request = StopRequest()
    assert (request.asked_at, request.again, request.termed_at) == (None, False, None)
    assert request.launched is False
    request.receive(signal.SIGTERM, None)
    assert request.again is False
    assert request.asked_at == 100.0 and told.done == [HEARD]
    told.now = 103.0
    request.receive()
    assert request.asked_at == 100.0


@pytest.mark.parametrize(
    "later, ended", [(0.0, False), (4.9, False), (5.0, False), (5.1, True), (60.0, True)]
)
def test_a_launchers_echo_ends_nothing_and_a_later_request_does(told, monkeypatch, later, ended):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "it")
    request = StopRequest()
    request.receive()
    assert told.done == [] and ECHO_S == 5.0
    told.now += later
    request.receive()
    assert (
        told.done == ([HEARD, (os.getpid(), signal.SIGTERM)] if ended else []) and request.asked_at == 100.0
    )


@pytest.mark.parametrize("launched", [False, True])
def test_a_job_that_is_to_come_back_is_not_ended_by_its_first_sigterm(told, monkeypatch, launched):
    """SIGUSR1 two minutes before the end, SIGTERM at the end, and SIGTERM again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "it") if launched else monkeypatch.delenv(
        "TORCHELASTIC_RUN_ID", False
    )
    request = StopRequest()
    for _ in range(3):
        request.receive(signal.SIGUSR1, None)
    assert (request.asked_at, request.again, request.termed_at) == (100.0, True, None) and told.done == []
    told.now = 220.0
    request.receive(signal.SIGTERM, None)
    assert (request.asked_at, request.again, request.termed_at) == (100.0, True, 220.0)
    assert told.done == ([] if launched else [HEARD])
    told.now = 230.0
    request.receive(signal.SIGTERM, None)
    assert (os.getpid(), signal.SIGTERM) in told.done or not launched


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_a_signal_does_afterwards_what_it_did_before_also_after_an_error(number, before):
    own = signal.signal(number, before)
    (other,) = STATUS.keys() - {number}
    try:
        with pytest.raises(KeyError), stop_requests() as request:
            ignored = before is signal.SIG_IGN
            assert (signal.getsignal(number) is signal.SIG_IGN) == ignored
            assert ignored or signal.getsignal(number) == request.receive
            assert signal.getsignal(other) == request.receive
            raise KeyError
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, own)


TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
NOBODY, STOP, AGAIN = [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]


@pytest.mark.parametrize(
    "asked_at, again, others, expected",
    [
        (None, False, NOBODY, None),
        (3.0, False, NOBODY, TERM),
        (None, False, STOP, TERM),
        (3.0, False, STOP, TERM),
        (3.0, True, NOBODY, USR1),
        (None, False, AGAIN, USR1),
        (3.0, False, AGAIN, USR1),
        (3.0, True, STOP, USR1),
    ],
)
def test_all_stop_when_any_was_asked_and_for_the_same(asked_at, again, others, expected):
    def reduce(value, how):
        assert how == "sum"
        return value + torch.tensor(others)

    accelerator = SimpleNamespace(device="cpu", reduce=reduce)
    assert agreed(SimpleNamespace(asked_at=asked_at, again=again), accelerator) is expected


@pytest.mark.parametrize("rank, said", [(None, True), ("0", True), ("1", False)])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_process_says_where_the_run_stands(config, tmp_path, capsys, monkeypatch, rank, said, checkpoint):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    place = tmp_path / "run/checkpoints/step_000002"
    if checkpoint:
        place.mkdir(parents=True)
    with pytest.raises(SystemExit) as end, interruptible(config()):
        raise KeyboardInterrupt
    last = (
        f"the last checkpoint is {place}, continue with --trainer.resume true"
        if checkpoint
        else "no checkpoint yet"
    )
    assert end.value.code == 130 and capsys.readouterr().err == (f"interrupted: {last}\n" if said else "")
    with pytest.raises(KeyError), interruptible(config()):
        raise KeyError
