"""A run folder that was damaged is served, continued, reported and evaluated right, or refused in one line that names
the file.

`VLA_BENCH_ALL_DAMAGES=1` tries all cases, otherwise sixty of them, drawn with a seed.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from vla_bench.benchmarks.point import PointReach
from vla_bench.config import ConfigError, load_config
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.report import report_text
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate
from vla_bench.serving.policy import Policy
from vla_bench.training.imitation import train

NEWEST = "checkpoints/step_000004"
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
FILES = [
    *(f"{NEWEST}/{name}" for name in CHECKPOINT),
    "config.yaml",
    "dataset_statistics.json",
    "metrics.jsonl",
    "eval/point/episodes.jsonl",
    "eval/point/fingerprint.json",
    "eval/point/summary.json",
]
FOREIGN = [
    "checkpoints/step_final",
    "checkpoints/step_000004.bak",
    "checkpoints/step_9",
    "checkpoints/.step_000009",
]
USES = ["serve", "resume", "report", "evaluate"]
ALLOWED = (ValueError, OSError)  # what the command line turns into one line
SETTINGS = EvaluationSettings(benchmark="point", episodes=2, first_seed=900, n_action_steps=4, max_steps=8)


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def become_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def places(value: object, where: tuple = ()) -> list[tuple]:
    """The path to every value in a tree, lists of numbers counted once."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    found = [where] if where else []
    for key, child in list(children)[:20]:
        found += places(child, (*where, key))
    return found


def retype(path: Path, rng: random.Random) -> None:
    """One value of a JSON file becomes one of another kind."""
    lines = path.suffix == ".jsonl"
    text = path.read_text(encoding="utf-8")
    tree = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    *parents, last = rng.choice(places(tree))
    holder = tree
    for key in parents:
        holder = holder[key]
    others = [None, "false", 1.5, -1, True, [], {}, "1", [None], {"a": 1}]
    holder[last] = rng.choice([v for v in others if type(v) is not type(holder[last])])
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in tree) if lines else json.dumps(tree), encoding="utf-8"
    )


DAMAGES = {f.__name__: f for f in (truncate, flip, delete, empty, become_a_folder, retype)}


def cases() -> list[tuple[str, str, str, int, bool]]:
    """Use, damage, file, seed, whether the checkpoint keeps its manifest."""
    found = []
    for use in USES:
        for file in FILES:
            for name in DAMAGES:
                if name == "retype" and not file.endswith((".json", ".jsonl")):
                    continue
                for manifest in (
                    (True, False) if file.startswith(NEWEST) and "manifest" not in file else (True,)
                ):
                    found.append((use, name, file, len(found), manifest))
        found += [(use, "foreign", file, len(found), True) for file in FOREIGN]
    return found


ALL = cases()
CHOSEN = ALL if os.environ.get("VLA_BENCH_ALL_DAMAGES") else random.Random(8).sample(ALL, 60)


def test_there_are_at_least_three_hundred_cases():
    assert len(ALL) >= 300


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> SimpleNamespace:
    """A run of four steps with an evaluation of two episodes per task, and what each use of it gives."""
    runs = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        options = "--trainer.max_train_steps 6 --trainer.save_interval 2 --trainer.log_interval 1"
        run = train(load_config(home / "toy.yaml", f"--run_root_dir {runs} {options}"))
    finished = weights(run / "checkpoints/step_000006")
    shutil.rmtree(run / "checkpoints/step_000006")
    policy = Policy.from_pretrained(run)
    point = PointReach()
    stand_in = stand_in_policy(policy.fingerprint, point)
    evaluate(stand_in, point, SETTINGS, run / "eval/point", show_progress=False)
    return SimpleNamespace(
        run=run,
        finished=finished,
        policy=policy,
        report=report_text(run),
        episodes=(run / "eval/point/episodes.jsonl").read_bytes(),
    )


def stand_in_policy(fingerprint: str, point: PointReach) -> SimpleNamespace:
    """A policy for `point`, whose actions are no matter, with the fingerprint of a trained one."""
    spec = point.spec
    own = PolicySpec(spec.action, spec.state, spec.cameras, spec.image_size, 8, spec.control_rate,
                     {"action": "identity"}, "none", "none", spec.name)  # fmt: skip
    predict = lambda observation, seed: np.full((8, spec.action.dim), 0.1)
    return SimpleNamespace(fingerprint=fingerprint, spec=own, predict=predict)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def serve(run: Path, whole: SimpleNamespace, observation: Callable) -> None:
    policy = Policy.from_pretrained(run)
    expected = whole.policy.predict(observation(), seed=0)
    assert (policy.predict(observation(), seed=0) == expected).all(), "other actions"


def resume(run: Path, whole: SimpleNamespace, observation: Callable) -> None:
    train(load_config(run, "--trainer.resume true"))
    found = weights(run / "checkpoints/step_000006")
    assert all(torch.equal(found[key], value) for key, value in whole.finished.items()), "other weights"


def report(run: Path, whole: SimpleNamespace, observation: Callable) -> None:
    assert report_text(run) == whole.report or "unfinished" in report_text(run), "another report"


def go_on(run: Path, whole: SimpleNamespace, observation: Callable) -> None:
    point = PointReach()
    stand_in = stand_in_policy(whole.policy.fingerprint, point)
    evaluate(stand_in, point, SETTINGS, run / "eval/point", show_progress=False)
    assert (run / "eval/point/episodes.jsonl").read_bytes() == whole.episodes, "other episodes"


ACTIONS = {"serve": serve, "resume": resume, "report": report, "evaluate": go_on}


@pytest.mark.parametrize(("use", "damage", "file", "seed", "manifest"), CHOSEN, ids=lambda v: str(v))
def test_a_damaged_run_is_right_or_refused_in_one_line(
    whole, observation, tmp_path, use, damage, file, seed, manifest
):
    run = shutil.copytree(whole.run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(whole.run.parent), str(tmp_path)))
    if not manifest:
        (run / NEWEST / "manifest.json").unlink()
    if damage == "foreign":
        (run / file).mkdir()
        (run / file / "policy.json").write_text("{}")
    else:
        DAMAGES[damage](run / file, random.Random(seed))
    untouched = {p: p.read_bytes() for p in (run / "checkpoints/step_000002").rglob("*") if p.is_file()}
    try:
        ACTIONS[use](run, whole, observation)
    except ALLOWED as error:
        message = str(error)
        assert len(message.splitlines()) == 1 or "holds episodes of another evaluation" in message, message
        named = Path(file).name in message or Path(file).parts[0] == "checkpoints" and NEWEST in message
        assert named, message
        assert damage != "foreign", message
    except AssertionError as error:
        # without a manifest nothing tells that a number is another number
        numbers = ("model.safetensors", "optimizer.pt", "rng.json") if not manifest else ("episodes.jsonl",)
        assert damage == "flip" and Path(file).name in numbers, str(error)
    assert {p: p.read_bytes() for p in untouched} == untouched


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """The run, elsewhere."""
    run = shutil.copytree(whole.run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(whole.run.parent), str(tmp_path)))
    return run


@pytest.mark.parametrize("use", [serve, resume])
def test_weights_of_another_step_are_refused(copied, whole, observation, use):
    shutil.copy(copied / "checkpoints/step_000002/model.safetensors", copied / NEWEST)
    with pytest.raises(ValueError, match="model.safetensors has other content than when it was saved"):
        use(copied, whole, observation)


@pytest.mark.parametrize("use", [serve, resume])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_also_without_a_manifest(
    copied, whole, observation, use, number
):
    path = copied / NEWEST / "model.safetensors"
    content = weights(copied / NEWEST)
    next(value for value in content.values() if value.is_floating_point()).view(-1)[-1] = number
    save_file(content, path)
    (copied / NEWEST / "manifest.json").unlink()
    with pytest.raises(ValueError, match="model.safetensors: .* holds numbers that are not finite"):
        use(copied, whole, observation)


def test_the_optimizer_of_another_step_is_refused(copied, whole, observation):
    shutil.copy(copied / "checkpoints/step_000002/trainer/optimizer.pt", copied / NEWEST / "trainer")
    with pytest.raises(ValueError, match="optimizer.pt has other content .*resume last_good goes on"):
        resume(copied, whole, observation)


def test_a_policy_without_the_trainers_half_is_served(copied, whole, observation):
    shutil.rmtree(copied / NEWEST / "trainer")
    serve(copied, whole, observation)


@pytest.mark.parametrize("key", ["resume", "is_resume"])
@pytest.mark.parametrize("mode, kept", [("last_good", True), ("auto", "auto")])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(copied, whole, capsys, key, mode, kept):
    torn = copied / NEWEST / "trainer/optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    train(load_config(copied, f"--trainer.{key} {mode}"))
    assert "optimizer.pt has 1000 bytes" in capsys.readouterr().out
    found = weights(copied / "checkpoints/step_000006")
    assert all(torch.equal(found[key], value) for key, value in whole.finished.items())
    names = {path.name for path in (copied / "checkpoints").iterdir()}
    assert names == {"step_000002", "step_000004", "step_000004.damaged", "step_000006"}
    assert load_config(copied).to_dict()["trainer"]["resume"] == kept


@pytest.mark.parametrize("mode", ["auto", "last_good"])
def test_no_run_begins_anew_where_all_checkpoints_are_damaged(copied, mode):
    for torn in copied.glob("checkpoints/*/model.safetensors"):
        torn.write_bytes(torn.read_bytes()[:1000])
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole"):
        train(load_config(copied, f"--trainer.resume {mode}"))
    assert len(list(copied.glob("checkpoints/step_00000?"))) == 2


@pytest.mark.parametrize(
    "words", ["--trainer.resume auto", "--trainer.is_resume true", "trainer.is_resume=auto"]
)
def test_a_run_that_goes_on_by_itself_starts_by_itself(copied, tmp_path, words):
    """The command of a cluster's job is the same each time: in an empty folder it starts."""
    cfg = load_config(copied, f"{words} --run_id other --trainer.max_train_steps 2 --trainer.warmup_steps 0")
    run = train(cfg)
    before = (run / "checkpoints/step_000002/model.safetensors").stat()
    assert train(cfg) == run and (run / "checkpoints/step_000002/model.safetensors").stat() == before


def test_a_changed_configuration_file_is_noticed(copied):
    config = (copied / "config.yaml").read_text()
    assert "weight_decay: 0.01" in config
    (copied / "config.yaml").write_text(config.replace("weight_decay: 0.01", "weight_decay: 0.11"))
    with pytest.raises(
        ConfigError, match="config.yaml is not what step_000004 was trained with: trainer.weight_decay"
    ):
        train(load_config(copied, "--trainer.resume true"))


HOLD = """
import os, sys
from vla_bench.files import hold_folder
class Owner: pass
owner = Owner()
hold_folder(sys.argv[1], owner)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("folder", ["", "eval/point"])
def test_a_folder_that_another_process_writes_is_left_alone_until_that_one_is_killed(
    copied, whole, observation, folder
):
    use = go_on if folder else resume
    command = [sys.executable, "-c", HOLD, copied / folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        pid = int(other.stdout.readline())
        before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
        with pytest.raises(OSError, match=f"in use by process {pid} on {socket.gethostname()}"):
            use(copied, whole, observation)
        assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before
        other.kill()
    use(copied, whole, observation)


def change_video(data: Path) -> None:
    video = next(data.rglob("*.mp4"))
    content = bytearray(video.read_bytes())
    content[len(content) // 2] ^= 1
    video.write_bytes(content)


def change_instruction(data: Path) -> None:
    path = data / "meta/tasks.parquet"
    table = pq.read_table(path)
    place = next(i for i, name in enumerate(table.column_names) if pa.types.is_string(table.schema.types[i]))
    other = pa.array(["open the box"] * len(table))
    pq.write_table(table.set_column(place, table.column_names[place], other), path)


def swap_rows(data: Path) -> None:
    path = next((data / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    rows = [1, 0, *range(2, len(table))]
    place = table.column_names.index("action")
    pq.write_table(table.set_column(place, table.schema.field("action"), table["action"].take(rows)), path)


@pytest.fixture
def moved_data(home, tmp_path) -> tuple[Path, Path]:
    """A run of two steps of three on a dataset of its own, and that dataset."""
    data = shutil.copytree(home / "toy", tmp_path / "data")
    options = "--trainer.max_train_steps 3 --trainer.save_interval 2 --datasets.vla_data.held_out 0.0"
    run = train(
        load_config(home / "toy.yaml", f"--run_root_dir {tmp_path} --datasets.vla_data.root {data} {options}")
    )
    shutil.rmtree(run / "checkpoints/step_000003")
    return run, data


@pytest.mark.parametrize(
    ("change", "file"),
    [(change_video, "mp4"), (change_instruction, "meta/tasks.parquet"), (swap_rows, "data/")],
    ids=["video", "instruction", "rows"],
)
def test_a_run_is_not_continued_on_other_data(moved_data, change, file):
    run, data = moved_data
    change(data)
    with pytest.raises(ValueError, match=f"trained on other data: in .*{file}.* has other content"):
        train(load_config(run, "--trainer.resume true"))


def test_data_that_were_only_copied_are_the_same(moved_data, capsys):
    run, data = moved_data
    for path in data.rglob("*.mp4"):
        os.utime(path, (0, 0))
    train(load_config(run, "--trainer.resume true"))
    assert "2 video files have another time of modification" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_know_its_data_says_so(moved_data, capsys):
    run, _ = moved_data
    checkpoint = run / "checkpoints/step_000002"
    progress = json.loads((checkpoint / "trainer/progress.json").read_text())
    del progress["data"], progress["config"]
    (checkpoint / "trainer/progress.json").write_text(json.dumps(progress))
    (checkpoint / "manifest.json").unlink()
    train(load_config(run, "--trainer.resume true"))
    assert "could not be checked" in capsys.readouterr().out
