"""Dashboards get the numbers of a run, and cost it nothing when they fail."""

import json
import re
import subprocess
import sys
import threading
import types
from functools import partialmethod
from importlib.util import find_spec

import pytest

from vla_bench.config import ConfigError, load_config
from vla_bench.training import trackers
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train
from vla_bench.training.loop import read_metrics
from vla_bench.training.trackers import Tracked, Tracker, open_trackers, tracker_id, tracker_names

TOLD = {"name": "run", "id": "0123456789ab", "project": "mine", "entity": "me", "configuration": {"seed": 3}}


class Hanging:
    def __init__(self, *_):
        self.rows = []

    def log(self, step, values):
        self.rows.append(step)
        threading.Event().wait()

    def close(self):
        raise AssertionError("never reached")


class Raising(Hanging):
    def log(self, step, values):
        raise ConnectionError("no route\nto host")


class Unopened(Hanging):
    def __init__(self, *_):
        raise SystemExit("no key")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(Tracker, "close", partialmethod(Tracker.close, timeout=0.1))


def test_a_row_is_never_waited_for():
    tracker = Tracker("slow", Hanging)

    class OnlyNow:
        maxsize = 2

        def put_nowait(self, row):
            raise trackers.queue.Full

    tracker.rows = OnlyNow()  # a method that may wait is not there
    tracker.log(1, {})
    assert tracker.dropped == "2 rows wait for it"


def test_a_row_is_what_it_was_when_it_was_logged():
    seen = []
    writer = types.SimpleNamespace(log=lambda step, values: seen.append((step, values)), close=lambda: None)
    tracker, row = Tracker("one", lambda: writer), {"loss": 1.0}
    tracker.log(1, row)
    row["loss"] = 2.0
    tracker.close()
    assert seen == [(1, {"loss": 1.0})] and not tracker.thread.is_alive()


@pytest.mark.parametrize(
    "kind, why",
    [
        (Hanging, "it has not finished in 0.1 s"),
        (Raising, "ConnectionError: no route to host"),
        (Unopened, "SystemExit: no key"),
    ],
)
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    config, straight, losses, impatient, monkeypatch, capsys, kind, why
):
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", kind)
    run = train(config("--trainer.trackers tensorboard", straight.framework))
    assert losses(run) == straight.losses
    said = re.split(r"[\r\n]", capsys.readouterr().err)
    lines = [line for line in said if "gets no more rows" in line]
    assert lines == [f"tensorboard gets no more rows ({why}); metrics.jsonl has all"]


def scalars(run) -> dict:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_every_number_once_also_of_a_run_that_was_continued(config, straight):
    run = train(config("--trainer.trackers [tensorboard] --trainer.eval_interval 3", straight.framework))
    known, checkpoint = tracker_id(run), latest_checkpoint(run)
    checkpoint.rename(run / "gone")  # continued from step 3: steps 4 to 6 happen twice
    train(load_config(run, "--trainer.resume true"))
    rows = read_metrics(run / "metrics.jsonl")
    expected = {key: [] for row in rows for key in row if key != "step"}
    for row in rows:
        for key in row.keys() - {"step"}:
            expected[key].append((row["step"], pytest.approx(row[key], rel=1e-6)))
    assert scalars(run) == expected
    assert tracker_id(run) == known


def test_without_trackers_a_run_folder_is_what_it_was(straight):
    assert not (straight.folder / "trackers.json").exists()
    assert not (straight.folder / "tensorboard").exists()


class Module(types.ModuleType):
    """wandb as far as it is called, with the names of its own arguments."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def Settings(self, *, silent, console, login_timeout):
        return "settings"

    def init(self, *, project, entity, name, id, resume, allow_val_change, settings, dir, config):
        self.calls.append(("init", project, entity, name, id, resume, dir, config))
        note = lambda what: lambda *args, **options: self.calls.append((what, *args, options))
        return types.SimpleNamespace(
            define_metric=note("define_metric"), log=note("log"), finish=note("finish")
        )


def test_wandb_is_called_in_this_order(monkeypatch, tmp_path):
    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)
    writer = trackers.WandB(Tracked(tmp_path, step=0, **TOLD))
    writer.log(5, {"loss": 1.5})
    writer.close()
    assert module.calls == [
        ("init", "mine", "me", "run", "0123456789ab", "allow", str(tmp_path), {"seed": 3}),
        ("define_metric", "*", {"step_metric": "step"}),
        ("log", {"step": 5, "loss": 1.5}, {}),
        ("finish", {}),
    ]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened = open_trackers(["wandb"], tmp_path, 0, {"run_id": "run", "wandb_project": "mine"})
    opened[0].log(1, {"loss": 1.0})
    opened[0].close()
    assert not opened[0].dropped
    assert len(list(tmp_path.rglob(f"run-{tracker_id(tmp_path)}.wandb"))) == 1


TRACKIO = """
import sys
from pathlib import Path
from vla_bench.training.trackers import open_trackers
for step, losses in ((0, (3.0, 2.0)), (1, (2.5, 1.0))):
    tracker = open_trackers(["trackio"], Path(sys.argv[1]), step, {"run_id": "run", "seed": 3})[0]
    for number, loss in enumerate(losses, step + 1):
        tracker.log(number, {"loss": loss})
    tracker.close()
    assert not tracker.dropped, tracker.dropped
import trackio
print([run.name for run in trackio.Api().runs("vla_bench")])
"""


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_knows_a_continued_run_as_one_and_prints_nothing_to_stdout(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    command = [sys.executable, "-c", TRACKIO, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout == f"['run-{tracker_id(tmp_path)}']\n", found.stderr


def test_what_asks_for_which_tracker(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    assert tracker_names(None) == [] and tracker_names(None, "mine") == ["wandb"]
    assert tracker_names([], "mine") == [] and tracker_names("", "mine") == []
    assert tracker_names("trackio, wandb") == tracker_names(["trackio", "wandb"]) == ["trackio", "wandb"]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert tracker_names(None, "mine") == []
    with pytest.raises(ConfigError, match=r'wandb is not installed: pip install "vla_bench\[wandb\]"'):
        tracker_names(["wandb"], "mine")


@pytest.mark.parametrize("odd", ["tensorbord", "none"])
def test_a_tracker_that_does_not_exist_is_refused_before_anything_is_written(config, tmp_path, odd):
    with pytest.raises(ConfigError, match=f"trainer.trackers: there is no tracker '{odd}'"):
        train(config(f"--trainer.trackers {odd}"))
    assert not (tmp_path / "run").exists()


def test_the_commands_of_starvla_run_without_the_library(config, straight, losses, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    run = train(config("--wandb_project mine --wandb_entity me", straight.framework))
    assert losses(run) == straight.losses
    said = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "wandb" in line]
    assert said == ['wandb_project is given, and wandb is not installed: pip install "vla_bench[wandb]"']


def test_the_commands_of_starvla_ask_for_wandb_where_it_is(config, straight, losses, monkeypatch):
    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    run = train(config("--wandb_project 2025 --wandb_entity me", straight.framework))
    known = tracker_id(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert module.calls[0][:6] == ("init", "2025", "me", "run", known, "allow")
    assert [call[1] for call in module.calls if call[0] == "log"] == rows
    latest_checkpoint(run).rename(run / "gone")
    train(load_config(run, "--trainer.resume true --wandb_entity other"))
    again = [call for call in module.calls if call[0] == "init"]
    assert [(call[2], call[4]) for call in again] == [("me", known), ("other", known)]
