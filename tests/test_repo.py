"""Checks on the repository itself that no single notebook can make."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "vla_bench").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
ROOMS = [
    "settings",
    "files",
    "registry",
    "config",
    "data",
    "models",
    "training",
    "serving",
    "benchmarks",
    "evaluation",
    "viz",
    "new",
    "__main__",
]
BASE = ["config", "registry", "settings", "data.sample", "data.layout", "data.normalize"]


def sources() -> dict[str, str]:
    """A digest of every notebook and module."""
    files = [p for room in ("nbs", "experiments", "figures", "vla_bench") for p in (ROOT / room).rglob("*")]
    kept = [
        p
        for p in files
        if p.suffix in (".ipynb", ".py") and "runs" not in p.parts and ".ipynb_checkpoints" not in p.parts
    ]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(kept)}


def test_export_and_clean_change_nothing(tmp_path, monkeypatch):
    for name in ("nbs", "experiments", "figures", "vla_bench", "pyproject.toml"):
        ignore = shutil.ignore_patterns("runs", "__pycache__", ".ipynb_checkpoints")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name, **({"ignore": ignore} if (ROOT / name).is_dir() else {}))
    before = sources()
    commands = [["nbdev-export"], ["nbdev-clean"]]
    commands += [["nbdev-clean", "--fname", name] for name in ("experiments", "figures")]
    for command in commands:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    after = sources()
    changed = sorted(k for k in before | after if before.get(k) != after.get(k))
    assert not changed, f"stale: run `make format` and commit {changed}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_has_one_parameters_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = {t.id for node in ast.parse("".join(tagged[0]["source"])).body for t in node.targets}
    assert names == {"config", "overrides", "output"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_has_its_notebook(path):
    match = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
    assert match, f"{path.name} was not exported from a notebook"
    notebook = (path.parent / match[1]).resolve()
    assert notebook.is_file(), f"orphan: {notebook} is gone"
    mirror = re.sub(r"^\d+[a-z]?_", "", notebook.stem)
    assert notebook.relative_to(ROOT / "nbs").with_name(mirror) == path.relative_to(
        ROOT / "vla_bench"
    ).with_suffix("")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_from_the_left(path):
    room = path.relative_to(ROOT / "vla_bench").parts[0].removesuffix(".py")
    allowed = {room, *ROOMS[: ROOMS.index(room)]} | ({"config"} if room != "settings" else set())
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            names = (
                [".".join(stem)]
                if len(".".join(stem).split(".")) > 1
                else [".".join([*stem, a.name]) for a in node.names]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "vla_bench" and len(parts) > 1:
                assert parts[1] in allowed, f"{path.name}:{node.lineno} imports {name}, a room to its right"


def test_the_base_install_needs_no_torch():
    torch_free = [f"vla_bench.{name}" for name in BASE]
    torch_free += [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in MODULES
        if p.parent.name in ("benchmarks", "evaluation")
    ]
    heavy = ["torch", "transformers", "pyarrow", "av", "metaworld", "mujoco", "matplotlib", "pandas"]
    code = f"import sys, {', '.join(torch_free)}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *EXPERIMENTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_hold_no_path_of_a_machine(path):
    found = re.findall(r"(?:/work/|/root/|/home/|/tmp/)[\w./-]*", path.read_text(encoding="utf-8"))
    assert not found, f"{path.name} holds {found[:3]}"


def test_settings_name_what_the_code_knows():
    from vla_bench.settings import DEFAULTS

    parser = ConfigParser()
    parser.read(ROOT / "settings.ini")
    assert {s: set(parser[s]) for s in parser.sections()} == {s: set(v) for s, v in DEFAULTS.items()}


def test_every_registered_component_is_where_the_registry_says():
    from vla_bench import registry

    for menu in (registry.FRAMEWORKS, registry.BACKBONES, registry.HEADS, registry.BENCHMARKS):
        for name, known in menu.known.items():
            component = menu.get(name)
            assert component.__module__ == known.module
            declared = re.search(
                rf'register\(\s*"{re.escape(name)}"(?:,\s*aliases=\(([^)]*)\))?',
                (ROOT / (known.module.replace(".", "/") + ".py")).read_text(),
            )
            assert declared, f"{known.module} does not register {name!r}"
            assert tuple(re.findall(r'"([^"]+)"', declared[1] or "")) == known.aliases
