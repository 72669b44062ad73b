"""A run folder that was damaged is served, continued, reported and evaluated right, or refused in one line that names
the file.

`VLA_BENCH_ALL_DAMAGES=1` tries all cases, otherwise sixty of them, drawn with a seed.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.benchmarks.point import PointReach
from vla_bench.config import load_config
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
    import numpy as np

    from vla_bench.data.layout import PolicySpec

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
