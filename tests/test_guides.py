"""Every row of the pages "coming from …": keys are read, names are known, commands exist, and code runs."""

import contextlib
import importlib
import io
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs/pages/guides").glob("from_*.md"))
CONFIG = ROOT / "experiments/configs/quickstart.yaml"
RUN = ROOT / "tests/fixtures/version_0_1/runs/llava"


def tables(path: Path) -> list[tuple[str, list[list[str]]]]:
    """The tables of a page: the head of the right column, and the rows as cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.M):
        head, _, *rows = [
            [cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in block.splitlines()
        ]
        found.append((", ".join(head), rows))
    return found


def rows(kind: str, also: str = "") -> list:
    """The rows of all pages whose right column is of a kind, and whose head has another word as well."""
    return [
        pytest.param(*row, id=f"{path.stem}-{number}-{i}")
        for path in GUIDES
        for number, (head, found) in enumerate(tables(path))
        if f"here, {kind}" in head and also in head
        for i, row in enumerate(found)
    ]


def code(cell: str) -> str:
    """What stands in backticks."""
    (found,) = re.findall(r"`([^`]+)`", cell)
    return found


def test_every_table_is_of_a_kind_that_is_executed():
    kinds = ("here, a key", "here, a name", "here, a command", "here, in Python")
    heads = [head for path in GUIDES for head, _ in tables(path)]
    assert len(GUIDES) == 4 and all(any(kind in head for kind in kinds) for head in heads), heads


def section_classes() -> dict:
    """The settings of the sections, by their keys in a configuration."""
    from vla_bench.evaluation.rollout import EvaluationSettings
    from vla_bench.training.data import DataSettings
    from vla_bench.training.run import TrainerSettings

    return {"trainer": TrainerSettings, "datasets.vla_data": DataSettings, "evaluation": EvaluationSettings}


@pytest.mark.parametrize("theirs, ours", rows("a key"))
def test_a_key_is_read(theirs, ours):
    from vla_bench.config import load_config

    key, _, value = code(ours).partition("=")
    settings, known = load_config(CONFIG, [code(ours)]), section_classes()
    assert settings[key] is not None or value == "null"
    for section, cls in known.items():
        if key.startswith(f"{section}."):
            assert key.removeprefix(f"{section}.").split(".")[0] in {field.name for field in fields(cls)}


@pytest.mark.parametrize("theirs, ours", rows("a key", "read here"))
def test_both_spellings_give_the_same_configuration(theirs, ours):
    from vla_bench.config import load_config

    assert load_config(CONFIG, code(theirs)).to_dict() == load_config(CONFIG, code(ours)).to_dict()


@pytest.mark.parametrize("theirs, ours, registry", rows("a name"))
def test_a_name_of_theirs_is_known(theirs, ours, registry):
    menu = vars(importlib.import_module("vla_bench.registry"))[code(registry)]
    assert menu.get(code(theirs)) is menu.get(code(ours))


@pytest.mark.parametrize("theirs, ours", rows("a command"))
def test_a_command_and_its_options_exist(theirs, ours):
    from vla_bench.__main__ import COMMANDS, main

    program, command, *words = shlex.split(code(ours))
    assert program == "vla_bench" and command in COMMANDS
    inner = words[:1] if command == "dataset" else []
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as stopped:
        main([command, *inner, "--help"])
    options = [word for word in words if word.startswith("--")]
    assert stopped.value.code == 0 and all(option in told.getvalue() for option in options)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What stands for the names in the code of the pages."""
    import torch

    from vla_bench.config import load_config
    from vla_bench.data.layout import Layout
    from vla_bench.data.lerobot import LeRobotDataset
    from vla_bench.data.sample import Sample
    from vla_bench.data.writer import LeRobotWriter
    from vla_bench.models.backbones.tiny import write_tiny
    from vla_bench.models.frameworks.build import build_framework
    from vla_bench.models.frameworks.framework import Framework
    from vla_bench.models.heads.head import HeadSizes
    from vla_bench.models.interop.fluxvla import from_fluxvla
    from vla_bench.registry import FRAMEWORKS, HEADS
    from vla_bench.serving.policy import Policy

    folder = tmp_path_factory.mktemp("guides")
    layout = Layout(("x", "y", "z", "gripper"))
    with LeRobotWriter(
        folder / "data", fps=10, cameras={"front": (32, 32)}, state=layout, action=layout
    ) as writer:
        for _ in range(2):
            numbers = np.zeros((4, 4), np.float32)
            images = {"front": np.zeros((4, 32, 32, 3), np.uint8)}
            writer.add_episode(images=images, state=numbers, action=numbers, task="open the drawer")
    sizes = {
        "image_size": 32,
        "hidden_size": 32,
        "num_layers": 1,
        "vision_hidden_size": 32,
        "vision_layers": 1,
    }
    tiny = write_tiny("paligemma", folder / "tiny", **sizes)
    section = {
        "name": "OFT",
        "vlm": {"base_vlm": str(tiny)},
        "action_horizon": 3,
        "action_model": {"type": "MLP"},
    }
    image, chunk = Image.new("RGB", (32, 32)), np.zeros((3, 4), np.float32)
    sample = Sample(image=[image], lang="open the drawer", state=np.zeros(4, np.float32), action=chunk)
    sample["action_is_pad"] = np.zeros(3, bool)
    torch.manual_seed(0)
    model = build_framework(section, action_dim=4, state_dim=4)
    model.save_pretrained(folder / "saved")
    with np.load(ROOT / "tests/fixtures/version_0_1/llava_expected.npz") as file:
        shown = {
            "image": [Image.fromarray(file["image"])],
            "lang": file["lang"].item(),
            "state": file["state"],
        }
    return {
        "DATASET": folder / "data", "RUN": RUN, "saved": folder / "saved", "config": {"framework": section},
        "dataset": LeRobotDataset(folder / "data", horizon=3), "examples": [sample], "model": model, "image": image,
        "chunk": chunk, "observation": shown, "sizes": HeadSizes(hidden_size=32, action_dim=4, horizon=3),
        **{f.__name__: f for f in (LeRobotDataset, Sample, build_framework, from_fluxvla, Framework, Policy, load_config)},
        "FRAMEWORKS": FRAMEWORKS, "HEADS": HEADS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def client(world):
    """The address of a server with the run's policy, and the class that asks it."""
    from vla_bench.serving.client import PolicyClient
    from vla_bench.serving.server import serve_in_thread

    with serve_in_thread(world["Policy"].from_pretrained(RUN)) as server:
        yield {"PolicyClient": PolicyClient, "url": server.url}


@pytest.mark.parametrize("theirs, ours", rows("in Python"))
def test_code_runs(theirs, ours, world, request):
    asks = request.getfixturevalue("client") if "PolicyClient" in code(ours) else {}
    exec(compile(code(ours), "guide", "exec"), world | asks)
