"""Trainings on a real SLURM of two nodes. `make slurm` starts one on this machine, and stops it afterwards.

Each job is the notebook `experiments/train.ipynb`, whole, sent by the scripts of `experiments/clusters` or by
`vla_bench launch`; what it trains is tiny.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.config import Config, load_config
from vla_bench.training.checkpoint import latest_checkpoint, list_checkpoints
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics

ROOT = Path(__file__).parents[2]
POINT = ROOT / "tests/fixtures/version_0_1"  # a dataset of the benchmark `point`, and a tiny backbone
STEPS = 40

pytestmark = pytest.mark.skipif("SLURM_CONF" not in os.environ, reason="no SLURM: run `make slurm`")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the configuration `point.yaml`: batch 2 in each process."""
    home = tmp_path_factory.mktemp("slurm")
    head = {
        "type": "FlowMatching",
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
    }  # draws noise, in each rank its own
    tree = {
        "run_root_dir": str(home / "runs"),
        "run_id": "run",
        "seed": 3,
        "framework": {"name": "LlavaVLA", "vlm": {"base_vlm": str(POINT / "tiny")}, "action_horizon": 4},
        "datasets": {"vla_data": {"root": str(POINT / "dataset"), "held_out": 0.2}},
        "trainer": {
            "max_train_steps": STEPS,
            "per_device_batch_size": 2,
            "learning_rate": {"base": 1e-3, "vlm": 1e-4},
            "num_workers": 1,
            "log_interval": 1,
            "eval_interval": 1000,
            "save_interval": 1000,
        },
        "evaluation": {"benchmark": "point", "episodes": 2, "n_action_steps": 2, "max_steps": 4},
    }
    tree["framework"]["action_model"] = {"type": "Transformer", "hidden_size": 8, "num_heads": 2}
    load_config(tree).save(home / "point.yaml")
    tree["framework"] |= {"name": "GR00T", "action_model": head}
    load_config(tree).save(home / "noise.yaml")
    return home


@pytest.fixture(scope="module", autouse=True)
def on_cpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.chdir(ROOT)
        yield


CPUS = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]


def sbatch(script: str, home: Path, *words: str, options: tuple[str, ...] = ()) -> str:  # the job's number
    """Sends one of our scripts."""
    log = f"--output={home}/{'%A_%a' if 'array' in script else '%j'}.log"
    command = ["sbatch", "--parsable", *CPUS, log, *options, f"experiments/clusters/{script}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def notebook(home: Path, name: str, config: str = "point.yaml", more: str = "") -> list[str]:
    """The words of papermill for one run."""
    executed = home / f"{name}.ipynb"
    words = ["experiments/train.ipynb", str(executed), "-p", "config", str(home / config)]
    return [*words, "-p", "overrides", f"run_id={name} {more}"]


def ended(job: str, limit: float = 240) -> None:
    """Returns when nothing is left of a job. Fails when that takes too long."""
    late = time.monotonic() + limit
    asked = ["squeue", "--noheader", "--array", "--jobs", job, "--format=%T"]
    while subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip():
        assert time.monotonic() < late, f"job {job} goes on and on"
        time.sleep(0.5)


def until(what, limit: float = 120):
    """Waits for something to be true, and returns it."""
    late = time.monotonic() + limit
    while not (found := what()):
        assert time.monotonic() < late, "it does not come"
        time.sleep(0.05)
    return found


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [
        (row["step"], row["loss"], row["grad_norm"])
        for row in read_metrics(run / "metrics.jsonl")
        if "loss" in row
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(run) / "model.safetensors")


def text_of(executed: Path) -> str:
    """All that an executed notebook shows."""
    cells = json.loads(executed.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(
        "".join(o.get("text", [])) + o.get("ename", "") + ": " + o.get("evalue", "") for o in outputs
    )


def alone(home: Path, config: str, *words: str) -> Config:
    return load_config(home / config, list(words))


@pytest.fixture(scope="module")
def two(home) -> Path:
    """A run on two nodes, which no one disturbed."""
    ended(sbatch("slurm_multi_node.sh", home, *notebook(home, "two", "noise.yaml")))
    return home / "runs/two"


def test_two_nodes_train_like_one_process(home):
    """What the head computes needs no noise: two processes with batch 2 see what one with batch 4 sees."""
    ended(sbatch("slurm_multi_node.sh", home, *notebook(home, "pair")))
    expected = train(alone(home, "point.yaml", "run_id=alone", "trainer.per_device_batch_size=4"))
    found = losses(home / "runs/pair")
    assert len(found) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses(expected)), rtol=1e-5, atol=1e-5)
    shown = text_of(home / "pair.ipynb")
    assert "2 processes on 2 nodes" in shown and f"step {STEPS} of {STEPS}: loss" in shown
    names = {path.name for path in (home / "runs/pair/logs").glob("*/*")}
    assert {"rank_0.log", "rank_1.log"} <= names


@pytest.mark.parametrize("to", [["--batch"], []], ids=["the_script", "the_training"])
def test_a_job_that_makes_room_continues_by_itself_and_ends_bit_for_bit(to, home, two):
    """As `--signal=B:USR1@120` sends it, to the script, and without `B:`, to the training processes."""
    name = f"again{len(to)}"
    run = home / "runs" / name
    job = sbatch("slurm_multi_node.sh", home, *notebook(home, name, "noise.yaml"))
    until(lambda: len(losses(run)) >= 3)
    subprocess.run(["scancel", *to, "--signal=USR1", job], check=True)
    ended(job)
    steps = [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]
    assert len(steps) == 2 and 3 <= steps[0] < STEPS and steps[1] == STEPS
    assert [path.name for path in sorted((run / "logs").iterdir())] == [f"job_{job}_0", f"job_{job}_1"]
    assert "the job is queued again" in (home / f"{job}.log").read_text()
    assert losses(run) == losses(two)
    found, expected = weights(run), weights(two)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_an_array_is_four_runs_with_different_seeds(home):
    words = [
        "experiments/train.ipynb",
        str(home / "array"),
        str(home / "point.yaml"),
        "trainer.max_train_steps=4",
    ]
    ended(sbatch("slurm_array.sh", home, *words))
    runs = [home / f"array/seed_{seed}" for seed in range(4)]
    assert [load_config(run)["seed"] for run in runs] == [0, 1, 2, 3]
    assert all(len(losses(run)) == 4 for run in runs) and len({losses(run)[0][1] for run in runs}) == 4
    one = train(alone(home, "point.yaml", "seed=2", "run_id=seed_2", "trainer.max_train_steps=4"))
    assert losses(runs[2]) == losses(one)


# A process of rank 1 that fails in the middle of its training, as one does that meets a broken file.
FAILING = """
import os
if os.environ.get("RANK") == "1" and os.environ.get("BREAK_AT"):
    import signal, threading, time
    def fail(*_):
        raise ValueError("episode_000003.parquet line 7 is damaged")
    def wait(metrics=os.environ["BREAK_AT"]):
        while not (os.path.isfile(metrics) and open(metrics).read().count("loss") >= 3):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGALRM)
    signal.signal(signal.SIGALRM, fail)
    threading.Thread(target=wait, daemon=True).start()
"""


@pytest.mark.parametrize("how", ["script", "launch"])
def test_a_rank_that_fails_ends_the_job_within_30_seconds_with_its_message(how, home, monkeypatch):
    name = f"failing_{how}"
    run, logs = home / "runs" / name, home / "runs" / name / "logs"
    (home / "broken").mkdir(exist_ok=True)
    (home / "broken/sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", f"{home / 'broken'}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("BREAK_AT", str(run / "metrics.jsonl"))
    message = (
        "RankFailedError: rank 1 of 2 ended with status 2: error: episode_000003.parquet line 7 is damaged"
    )
    more = "trainer.max_train_steps=100000"
    if how == "script":
        ended(sbatch("slurm_multi_node.sh", home, *notebook(home, name, more=more)))
        assert message in text_of(home / f"{name}.ipynb")
    else:
        words = ["-p", "config", str(home / "point.yaml"), "-p", "overrides", f"run_id={name} {more}"]
        words += ["--cluster", "slurm", "--nodes", "2", "--out", str(home / "launched"), "--wait"]
        command = [sys.executable, "-m", "vla_bench", "launch", "experiments/train.ipynb", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert (
            re.match(r"error: job \d+: .*/train.ipynb, In \[\d+\]: ", done.stderr) and message in done.stderr
        )
        assert re.search(r"^step \d+ of 100000: loss", done.stdout, re.M), "the progress is streamed"
    (failed,) = logs.glob("*/rank_1.log")
    (other,) = logs.glob("*/rank_0.status")
    assert other.stat().st_mtime - failed.stat().st_mtime < 20
    assert time.time() - failed.stat().st_mtime < 30


def test_a_cancelled_job_saves_and_is_not_queued_again(home):
    job = sbatch(
        "slurm_multi_node.sh", home, *notebook(home, "cancelled", more="trainer.max_train_steps=100000")
    )
    run = home / "runs/cancelled"
    until(lambda: len(losses(run)) >= 3)
    subprocess.run(["scancel", job], check=True)
    ended(job)
    assert [path.name for path in (run / "logs").iterdir()] == [f"job_{job}_0"]
    assert len(list_checkpoints(run)) == 1


def test_a_launched_job_that_makes_room_continues(home, two):
    """By submitit's script; who waits for it waits on."""
    words = ["-p", "config", str(home / "noise.yaml"), "-p", "overrides", "run_id=launched"]
    words += ["--cluster", "slurm", "--nodes", "2", "--out", str(home / "launched"), "--wait"]
    command = [sys.executable, "-m", "vla_bench", "launch", "experiments/train.ipynb", *words]
    run = home / "runs/launched"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        until(lambda: len(losses(run)) >= 3)
        (log,) = (run / "logs").iterdir()
        subprocess.run(["scancel", "--signal=USR1", log.name.split("_")[1]], check=True)
        out, error = waiting.communicate(timeout=240)
    assert waiting.returncode == 0, error
    assert "the job is queued again" in out and re.search(r"job \d+: pending.*job \d+: pending", out, re.S)
    assert losses(run) == losses(two)


def test_a_launched_sweep_is_an_array(home):
    words = [
        "-p",
        "config",
        str(home / "point.yaml"),
        "-p",
        "overrides",
        "run_id=sweep trainer.max_train_steps=2",
    ]
    words += ["--cluster", "slurm", "--out", str(home / "launched"), "--sweep", "seed=0,1", "--wait"]
    command = [sys.executable, "-m", "vla_bench", "launch", "experiments/train.ipynb", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    runs = [home / f"runs/sweep/seed_{seed}" for seed in (0, 1)]
    assert losses(runs[0])[0] != losses(runs[1])[0]
    assert len(set(re.findall(r"^job (\d+_\d): ", done.stdout, re.M))) == 2
