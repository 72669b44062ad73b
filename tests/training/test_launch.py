"""Ranks that are started from a notebook: what they are told, and what becomes of them. No SLURM is needed."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from vla_bench.config import load_config
from vla_bench.training import launch as module
from vla_bench.training.launch import (
    LaunchPlan,
    Progress,
    RankFailedError,
    RequeueError,
    StoppedError,
    launch,
    launch_plan,
    node_address,
    rendezvous,
    start,
    statuses,
    watch,
)

# A training that says what it was told, and does what its overrides say.
TOY = """
import json, os, signal, sys, time
from pathlib import Path

source, words = Path(sys.argv[2]), dict(word.lstrip("+").split("=") for word in sys.argv[3:])
rank = os.environ["RANK"]
(source.parent / f"pid_{rank}").write_text(str(os.getpid()) + "\\n")
told = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU")}
(source.parent / f"told_{rank}.json").write_text(json.dumps({**told, "words": sys.argv[3:]}))
if words.get("stop") == rank or words.get("stop") == "all":
    print("asked to stop: stopped after step 2 of 4, which is saved", file=sys.stderr)
    raise SystemExit(int(words["status"]))
if words.get("fail") == rank:
    raise ValueError(f"rank {rank} has no frames")
if "wait" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN if words["wait"] == "deaf" else signal.SIG_DFL)
    time.sleep(600)
"""
# As SLURM's: the tasks run here, one after the other in the background, each with its number.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$FAKE/srun.words"
tasks=$(printf '%s\\n' "$@" | sed -n 's/^--ntasks=//p')
while [[ $1 == --* ]]; do shift; done
for task in $(seq 0 $((tasks - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NODEID=$task SLURM_STEP_ID=0 "$@" &
done
wait
"""
SCONTROL = """#!/bin/bash
[[ $2 == hostnames ]] && printf 'n1\\nn2\\n' || echo "NodeName=$3 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1 Port=7"
"""
SCANCEL = """#!/bin/bash
echo "$@" >> "$FAKE/scancel.words"
kill -${1#--signal=} $(cat "$FAKE"/pid_*)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with a toy training as `toy_training` and its configuration `toy.yaml`."""
    (tmp_path / "toy_training.py").write_text(TOY)
    tree = {"run_root_dir": str(tmp_path / "runs"), "run_id": "toy", "trainer": {"max_train_steps": 4}}
    load_config(tree).save(tmp_path / "toy.yaml")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    monkeypatch.setattr(module, "GRACE_S", 1.0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def slurm(toy, monkeypatch):
    """The toy in a job of two nodes, on programs that stand in for SLURM's."""
    (toy / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (toy / "bin" / name).write_text(text)
        (toy / "bin" / name).chmod(0o755)
    told = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    told |= {"PATH": f"{toy / 'bin'}{os.pathsep}{os.environ['PATH']}", "FAKE": str(toy)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return toy


def run(home: Path, *words: str, plan: LaunchPlan | None = None) -> Path:
    return launch("toy_training", home / "toy.yaml", [f"+{word}" for word in words], plan or launch_plan(2))


def told(home: Path, rank: int) -> dict:
    return json.loads((home / f"told_{rank}.json").read_text())


@pytest.mark.parametrize("where, address", [("toy", "127.0.0.1"), ("slurm", "10.1.2.3")])
def test_each_rank_knows_its_place(where, address, request, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    home = request.getfixturevalue(where)
    assert run(home) == home / "runs/toy"
    for rank in (0, 1):
        found = told(home, rank)
        assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == (str(rank), "2", address)
        assert found["ACCELERATE_USE_CPU"] == "true" and found["words"] == []
    assert told(home, 1)["LOCAL_RANK"] == ("0" if where == "slurm" else "1")


def test_a_gpu_machine_is_not_told_to_use_its_cpu(toy, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    run(toy)
    assert told(toy, 0)["ACCELERATE_USE_CPU"] is None


@pytest.mark.parametrize("where", ["toy", "slurm"])
def test_the_message_of_the_rank_that_failed_is_the_error_and_the_others_are_ended(where, request):
    """Also one that is deaf to requests, as one that waits in the network's library is."""
    home, began = request.getfixturevalue(where), time.monotonic()
    with pytest.raises(
        RankFailedError, match="^rank 1 of 2 ended with status 1: ValueError: rank 1 has no frames"
    ):
        run(home, "fail=1", "wait=deaf")
    assert time.monotonic() - began < 15
    (log,) = (home / "runs/toy/logs").glob("*/rank_1.log")
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("where", ["toy", "slurm"])
@pytest.mark.parametrize("status, error", [(75, RequeueError), (138, RequeueError), (143, StoppedError)])
def test_a_training_that_was_asked_to_stop_is_no_failure(where, status, error, request):
    home = request.getfixturevalue(where)
    with pytest.raises(error, match="^asked to stop: stopped after step 2 of 4, which is saved$"):
        run(home, "stop=all", f"status={status}")


def test_a_rank_that_fails_while_the_others_stop_is_a_failure(toy):
    with pytest.raises(RankFailedError, match="rank 1 has no frames"):
        run(toy, "stop=0", "status=75", "fail=1")


def test_an_interrupted_cell_leaves_no_rank_behind(toy, monkeypatch):
    launched = start(
        LaunchPlan(2),
        toy / "logs",
        [sys.executable, "-m", "toy_training", "--config_yaml", str(toy / "toy.yaml"), "wait=1"],
    )
    monkeypatch.setattr(Progress, "look", interrupted_at(3))
    with pytest.raises(KeyboardInterrupt):
        watch(launched, Progress(launched, toy / "metrics.jsonl", 4))
    assert set(statuses(launched).values()) <= {128 + signal.SIGTERM, 128 + signal.SIGKILL}
    assert len(statuses(launched)) == 2


def interrupted_at(look: int):
    """A look of the cell, the third of which somebody interrupts."""
    count = []

    def looks(self):
        count.append(1)
        if len(count) == look:
            raise KeyboardInterrupt

    return looks


def test_a_job_that_was_queued_again_continues_its_run(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(slurm)
    assert told(slurm, 0)["words"] == ["trainer.resume=true"]
    assert (slurm / "runs/toy/logs/job_77_1/rank_1.log").is_file()


def test_srun_is_asked_for_what_the_job_has(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    run(slurm)
    words = (slurm / "srun.words").read_text().split("\n")
    assert {"--nodes=2", "--ntasks=2", "--cpus-per-task=3", "--kill-on-bad-exit=0"} <= set(words)


def test_accelerate_is_started_once_on_each_node(slurm):
    """With the node's own number, and as a module that a fake `accelerate` here only prints."""
    folder = slurm / "accelerate/commands"
    folder.mkdir(parents=True)
    (slurm / "accelerate/__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "launch.py").write_text("import sys; print(*sys.argv[1:])")
    (slurm / "zero3.yaml").write_text("")
    plan = LaunchPlan(8, 2, slurm=True, accelerate_config=str(slurm / "zero3.yaml"))
    run(slurm, plan=plan)
    for node in (0, 1):
        (log,) = (slurm / "runs/toy/logs").glob(f"*/rank_{node}.log")
        assert re.search(
            rf"--num_machines 2 --num_processes 8 .*--main_process_ip 10.1.2.3 --machine_rank {node} -m toy_",
            log.read_text(),
        )


def test_srun_that_cannot_start_is_told(slurm):
    (slurm / "bin/srun").write_text(
        "#!/bin/bash\necho 'srun: error: Unable to allocate resources: Invalid account' >&2; exit 1\n"
    )
    with pytest.raises(RankFailedError, match="srun: error: Unable to allocate resources: Invalid account"):
        run(slurm)


def test_the_address_can_be_said(slurm, monkeypatch):
    assert node_address("n[1-2]") == "10.1.2.3"
    monkeypatch.setenv("MASTER_ADDR", "192.168.0.7")
    assert rendezvous(launch_plan())["MASTER_ADDR"] == "192.168.0.7"
