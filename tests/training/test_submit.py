"""Notebooks as jobs: what is asked for, what is sent, and what is said of the end. No SLURM is needed."""

import json
import os
import pickle
import re
import sys
from pathlib import Path

import pytest

from vla_bench.training import submit as module
from vla_bench.training.submit import (
    JobRequest,
    NotebookJob,
    error_of,
    follow,
    main,
    make_parser,
    read_request,
    state,
    submit,
)

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "experiments/train.ipynb")
# It gives the next number, and keeps the script.
SBATCH = """#!/bin/bash
cp "$1" "$FAKE/sent.sh"
echo "Submitted batch job 12"
"""
SQUEUE = """#!/bin/bash
[[ -s $FAKE/queue ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
head -1 "$FAKE/queue"; sed -i 1d "$FAKE/queue"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs that stand in for SLURM's."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": "#!/bin/bash\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    return tmp_path


def asked(*words: str) -> list[JobRequest]:
    return read_request(make_parser().parse_args([TRAIN, *words]))


def refusal(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    told = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(told) == 1 and told[0].startswith("error: ")
    return told[0]


def test_the_line_of_the_documentation(slurm):
    words = "-p config experiments/configs/quickstart.yaml --cluster slurm --nodes 2 --gpus 8".split()
    (request,) = asked(*words, "--out", str(slurm / "out"), "--time", "2-00:00:00", "--partition", "long")
    (job,) = submit([request])
    assert job.job_id == "12"
    sent = (slurm / "sent.sh").read_text().splitlines()
    for line in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=2880",
        "partition=long",
        "requeue",
        "signal=USR1@120",
    ):
        assert f"#SBATCH --{line}" in sent, line
    assert not any("array" in line for line in sent)
    with open(job.paths.submitted_pickle, "rb") as file:
        function = pickle.load(file).function
    assert isinstance(function, NotebookJob) and function.notebook == Path(TRAIN)
    assert function.parameters == {"config": "experiments/configs/quickstart.yaml"}


def test_what_would_be_sent_is_printed_and_nothing_is_sent(slurm, tmp_path, capsys):
    main([TRAIN, "--cluster", "slurm", "--nodes", "2", "--out", str(tmp_path / "out"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in printed and "#SBATCH --ntasks-per-node=1" in printed
    assert not (slurm / "sent.sh").exists() and not (tmp_path / "out").exists()


def test_a_sweep_is_one_array_of_runs_with_folders_of_their_own(slurm, tmp_path):
    tree = {"run_root_dir": str(tmp_path / "runs"), "run_id": "x", "seed": 0}
    (tmp_path / "a.yaml").write_text(json.dumps(tree))
    words = ["-p", "config", str(tmp_path / "a.yaml"), "-p", "overrides", "+a=1", "--cluster", "slurm"]
    requests = asked(
        *words, "--out", str(slurm / "out"), "--sweep", "seed=0,1", "--sweep", "trainer.warmup_steps=0,5"
    )
    jobs = submit(requests)
    assert [job.job_id for job in jobs] == ["12_0", "12_1", "12_2", "12_3"]
    assert "#SBATCH --array=0-3%4" in (slurm / "sent.sh").read_text().splitlines()
    sent = []
    for job in jobs:
        with open(job.paths.submitted_pickle, "rb") as file:
            sent.append(pickle.load(file).function.parameters)
    assert [Path(each["output"]).relative_to(tmp_path / "runs/x").name for each in sent] == [
        f"seed_{seed}_warmup_steps_{steps}" for seed in (0, 1) for steps in (0, 5)
    ]
    assert sent[3]["overrides"] == ["+a=1", "seed=1", "trainer.warmup_steps=5"]


def test_processes_and_accelerate_reach_the_notebook_of_this_machine():
    (request,) = asked("--processes", "2", "--accelerate_config", "zero3.yaml")
    assert request.parameters == {"processes": 2, "accelerate_config": "zero3.yaml"}
    (request,) = asked("--gpus", "4")
    assert request.parameters == {"processes": 4}
    (request,) = asked()
    assert request.parameters == {} and (request.cluster, request.minutes) == ("local", 1440)


def test_on_a_cluster_the_processes_are_the_tasks_of_the_job():
    (request,) = asked("--cluster", "slurm", "--processes", "3", "--dry-run")
    assert request.parameters == {} and request.per_node == 3


@pytest.mark.parametrize(
    "words, expected",
    [
        (["-p", "proceses", "2"], "did you mean 'processes'"),
        (["-p", "processes", "two"], "parameter processes is 'two', expected int"),
        (["--nodes", "2"], "--nodes 2 needs a cluster: --cluster slurm"),
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--gpus", "-1"], "--gpus must be at least 0, got -1"),
        (["--time", "soon"], "--time must be minutes, HH:MM:SS or D-HH:MM:SS, got 'soon'"),
        (["--sweep", "seed"], "--sweep must be key=value,value"),
        (["--sweep", "seed=1,"], "--sweep must be key=value,value"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_anything_is_made(words, expected, tmp_path, capsys):
    out = tmp_path / "out"
    assert expected in refusal(capsys, TRAIN, *words, "--out", str(out)) and not out.exists()


def test_without_sbatch_nothing_is_sent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch on this machine" in refusal(capsys, TRAIN, "--cluster", "slurm")


def test_a_notebook_that_trains_nothing_takes_no_processes(capsys):
    told = refusal(capsys, str(ROOT / "experiments/evaluate.ipynb"), "--processes", "2")
    assert "evaluate.ipynb has no parameter 'processes'" in told


def test_a_missing_submitit_is_told(slurm, monkeypatch, capsys):
    from vla_bench.__main__ import main as program

    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit):
        program(["launch", TRAIN, "--cluster", "slurm", "--out", str(slurm / "out")])
    assert (
        capsys.readouterr().err
        == "error: vla_bench launch needs 'submitit': pip install \"vla_bench[cluster]\"\n"
    )


@pytest.fixture
def sent(slurm):
    """A job of the stand-in that waits and then runs; nothing is left of it."""
    (job,) = submit([JobRequest(Path(TRAIN), cluster="slurm", folder=slurm / "out")])
    (slurm / "queue").write_text("PENDING\nRUNNING\nRUNNING\n")
    return job


def test_who_waits_sees_the_states_and_the_log(sent):
    sent.paths.stdout.write_text("one\nsubmitit INFO - noise\ntwo\nunfini")
    assert list(follow([sent], every_s=0.01)) == [
        "one",
        "two",
        "job 12: pending",
        "job 12: running",
        "job 12: ended",
    ]
    assert "ended without a result, as when it is cancelled" in error_of(sent)


def test_a_job_that_was_queued_again_is_waited_for(slurm, sent):
    (slurm / "queue").write_text("RUNNING\nCOMPLETING\nPENDING\nRUNNING\n")
    states = [line.split()[-1] for line in follow([sent], every_s=0.01)]
    assert states == ["running", "completing", "pending", "running", "ended"]


def test_a_controller_that_does_not_answer_ends_nothing(slurm, sent):
    (slurm / "bin/squeue").write_text(
        "#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n"
    )
    assert state(sent) == "UNKNOWN"


@pytest.mark.parametrize(
    "result, error",
    [
        (("success", "a.ipynb"), None),
        (
            ("error", "Traceback\nRuntimeError: a.ipynb, In [3]: ValueError: no"),
            "a.ipynb, In [3]: ValueError: no",
        ),
    ],
)
def test_what_a_job_left_is_its_end(sent, result, error):
    sent.paths.result_pickle.write_bytes(pickle.dumps(result))
    assert state(sent) == "ENDED" and error_of(sent) == error


def test_who_waits_ends_as_the_job_ends(sent, monkeypatch, capsys):
    sent.paths.result_pickle.write_bytes(pickle.dumps(("success", "a.ipynb")))
    monkeypatch.setattr(module, "submit", lambda requests: [sent])
    with pytest.raises(SystemExit) as left:
        main([TRAIN, "--wait"])
    said = capsys.readouterr()
    assert left.value.code == 0 and said.err == ""
    assert said.out.splitlines() == [
        f"job 12: {sent.paths.folder / 'train.ipynb'}, its log: {sent.paths.stdout}",
        "job 12: ended",
    ]


def test_a_cell_that_fails_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    """On this machine, for real."""
    cells = [
        ("0", ["parameters"], "config = 'a.yaml'"),
        ("1", [], "print(config); raise ValueError('no frames')"),
    ]
    empty = {"cell_type": "code", "outputs": [], "execution_count": None}
    cells = [{**empty, "id": i, "metadata": {"tags": tags}, "source": text} for i, tags, text in cells]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    notebook = tmp_path / "small.ipynb"
    notebook.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    monkeypatch.setattr(module, "visible_gpus", lambda: 0)
    with pytest.raises(SystemExit) as left:
        main([str(notebook), "-p", "config", "b.yaml", "--out", str(tmp_path / "out"), "--wait"])
    said = capsys.readouterr()
    assert left.value.code == 1 and "\nb.yaml\n" in said.out
    number = re.match(r"job (\d+): .*/out/\1/small.ipynb, its log: .*/out/\1/", said.out)[1]
    executed = tmp_path / "out" / number / "small.ipynb"
    assert said.err == f"error: job {number}: {executed}, In [3]: ValueError: no frames\n"
