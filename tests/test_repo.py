"""Checks on the repository itself that no single notebook can make."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.ipynb"))
FIGURES = sorted((ROOT / "figures").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT / "vla_bench").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
PACKAGES = [
    "settings",
    "files",
    "progress",
    "timing",
    "registry",
    "own_code",
    "config",
    "data",
    "models",
    "training",
    "serving",
    "benchmarks",
    "evaluation",
    "rl",
    "viz",
    "scaffold",
    "__main__",
]
BASE = ["config", "registry", "settings", "timing", "files", "data.sample", "data.layout", "data.normalize"]
BASE += [
    f"serving.{name}"
    for name in (
        *("protocol", "checks", "session", "client", "batching", "service", "server"),
        *("connection", "openpi", "starvla", "vla_eval", "gr00t", "chunking", "real_time", "replay"),
    )
]
# Tests of no single module, each with what it is about.
CROSS_CUTTING = {
    "browser/test_docs.py": "the built pages, in a browser",
    "browser/test_lab.py": "notebooks, executed and run in JupyterLab, in a browser",
    "serving/test_commands.py": "server, client and policy: the commands on their pages",
    "training/test_own_robot.py": "the notebook of a training, with a robot that no simulator has",
    "training/test_own_code.py": "a file that a configuration imports: trained, continued, served",
    "test_docs.py": "the documentation: what is pasted from it, its links, its reference",
    "test_guides.py": "the pages for those who come from other codebases",
    "test_grid.py": "every backbone with every head that can read it",
    "test_hook.py": "the git hook for notebooks",
    "test_notebooks.py": "every notebook",
    "test_programs.py": "every component's module, run as a program",
    "test_readme.py": "the README and the documentation's first page",
    "test_repo.py": "the repository",
    "test_tutorials.py": "components of one's own, by hand and by the scaffold",
    "data/test_damaged_datasets.py": "every reader of a dataset",
    "data/test_viewed_samples.py": "viewed and view: each sample, against numbers made by hand",
    "data/test_defaults.py": "every function of the data: what is left out, and what is not to be changed",
    "training/test_real_mixture.py": "record, conversations and cotrain: both losses on a simulator's data",
    "training/test_streamed_run.py": "data, loop and imitation: a run on a stream",
    "evaluation/test_batches.py": "rollout, workers and policy: the observations of several simulators in one batch",
    "evaluation/test_failures.py": "rollout, workers and report: a simulator that raises or dies",
    "benchmarks/test_metaworld_episodes.py": "metaworld and rollout: what an episode of a simulator is made of",
    "evaluation/test_episodes.py": "rollout: what an episode is made of",
    "evaluation/test_fingerprint.py": "rollout and layout: each field of a comparison, changed alone",
    "evaluation/test_history.py": "rollout and windows: a policy that sees several observations",
    "evaluation/test_interruptions.py": "rollout and workers: an evaluation that is killed",
    "evaluation/test_refusals.py": "rollout and policy: what does not fit is refused",
    "evaluation/test_settings.py": "rollout and config: the section `evaluation`",
    "evaluation/test_version_0_1.py": "an evaluation that version 0.1 began",
    "evaluation/test_watchdog.py": "rollout, workers and report: a simulator that hangs",
    "models/backbones/test_qwen_and_paligemma.py": "what both families keep to",
    "models/heads/test_arguments.py": "every head: the defaults of its arguments, and each changed alone",
    "models/heads/test_computation.py": "every head: where it computes, in which precision, and no more than is asked for",
    "models/frameworks/test_contract.py": "what a framework expects of somebody's head",
    "models/frameworks/test_two_features.py": "two features of frameworks and heads together",
    "models/frameworks/test_values.py": "frameworks: values, not shapes",
    "models/heads/test_real_time_chunking.py": "every flow head: actions that are decided already",
    "models/heads/test_action_mask.py": "every head that masks: robots of one batch with different actions",
    "models/heads/test_hidden_state_heads.py": "every head that reads the last layer's hidden states",
    "models/interop/test_config_keys.py": "formats and conversion: every key of every original's configuration",
    "models/projectors/test_projectors.py": "what every projector keeps to",
    "rl/test_every_head.py": "every head that can explore, in its own framework on a tiny backbone",
    "training/test_bounds.py": "config, run and rollout: values that cannot be meant",
    "training/test_defaults.py": "every function of the training: what is left out, and what is not to be changed",
    "training/test_damaged_runs.py": "every reader of a run folder",
    "training/test_kills.py": "imitation, run and sharding: a run that is interrupted in any step, in any mode",
    "training/test_killed_saves.py": "files, checkpoint, retention, loop and run: a run that is killed at any byte",
    "training/test_full_disk.py": "files, checkpoint, loop and run: what a full disk leaves",
    "training/test_mixture.py": "data, run and policy: several robots in one run",
    "training/test_old_runs.py": "a run that version 0.1 wrote",
    "training/test_order_of_samples.py": "loop and order: which samples a run sees",
    "training/test_policy_of_a_run.py": "run and policy",
    "training/test_program.py": "the training, in each form that a program has",
    "training/test_slurm.py": "launch and submit, on a SLURM of two nodes",
    "training/test_seed_commands.py": "the training programs: the commands of the seeds, as they are written there",
    "training/test_several_heads.py": "several heads in a run: trained, continued, served, kept alone",
    "training/test_settings.py": "each setting reaches what it controls",
    "training/test_unread_keys.py": "config, run and rollout: keys that nothing reads",
    "training/test_what_is_trained.py": "optim, run and imitation: parts and losses",
    "viz/test_recording.py": "the recording that the pages show",
}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
LAYERS = [f"layers.{p.stem}" for p in MODULES if p.parent.name == "layers"]
# Objects that are not ours, asked for what only some of them have: per module, the name and the reason.
FOREIGN = {
    "models.backbones.any_vlm": {
        "signature": "any model of transformers: which inputs its forward takes",
        "get_rope_index": "models of transformers that count positions in three directions have it",
        "layer_types": "configurations of transformers with linear attention have it",
        "model": "models of transformers with an output matrix keep the rest here",
        "vision_feature_layer": "LLaVA's kin have it",
        "vision_tower": "LLaVA's kin have it",
    },
    "models.backbones.processor": {"signature": "which processors a class of transformers is made of"},
    "models.backbones.unused_parameters": {"variable": "autograd's leaves have it"},
    "models.backbones.vision": {
        "mask_token": "DINOv2's embeddings have it, DINOv3's and SigLIP's do not",
        "post_layernorm": "SigLIP's name for DINOv2's `layernorm`",
    },
    "models.backbones.weights_file": {"depth": "a thread's local has it from its first use on"},
    "models.backbones.vlm": {
        "head_dim": "configurations of transformers say it where it is not width / heads",
        "layer_types": "configurations of transformers with sliding or linear attention have it",
        "rope_parameters": "configurations of transformers with rotary positions have it",
    },
}


def sources() -> dict[str, str]:
    """A digest of every notebook and module."""
    files = [
        p for folder in ("nbs", "experiments", "figures", "vla_bench") for p in (ROOT / folder).rglob("*")
    ]
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


# Experiments on runs that exist: they have no configuration to change.
WITHOUT_CONFIG = {
    "live": {"server", "run", "dataset", "episode", "every", "requests", "seed"},
    "real_time": {
        *("run", "benchmark", "tasks", "episodes", "first_seed", "delays", "steps", "methods", "max_steps"),
        "output",
    },
    "faithfulness": {"runs", "dataset", "report_episodes", "choice_episodes", "frames_per_episode"},
}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_has_one_parameters_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = {t.id for node in ast.parse("".join(tagged[0]["source"])).body for t in node.targets}
    several = {"processes", "accelerate_config"}  # of a training on several processes
    if path.stem in WITHOUT_CONFIG:
        assert names == WITHOUT_CONFIG[path.stem]
        return
    assert names - several == {"config", "overrides", "output"} and names & several in (set(), several)


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


def module_name(path: Path) -> str:
    """`vla_bench.models.heads.mlp` for its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_main_guard(node: ast.AST) -> bool:
    """Whether this is `if __name__ == "__main__" …:`, which runs in a program and never in an import."""
    return isinstance(node, ast.If) and '__name__ == "__main__"' in ast.unparse(node.test).replace("'", '"')


def imports(path: Path, as_program: bool = True) -> dict[str, int]:
    """Every module of the package that a file imports, at its top, inside a function or as a program, with the line."""
    package, known, found = path.relative_to(ROOT).parts[:-1], {module_name(p) for p in MODULES}, {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not as_program:
        tree.body = [node for node in tree.body if not is_main_guard(node)]
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [stem] if stem in known else [f"{stem}.{a.name}" for a in node.names]
        found |= {name: node.lineno for name in names if name.startswith("vla_bench.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_imports_only_from_packages_to_its_left(path):
    package = path.relative_to(ROOT / "vla_bench").parts[0].removesuffix(".py")
    allowed = {package, *PACKAGES[: PACKAGES.index(package)]}
    for name, line in imports(path).items():
        assert name.split(".")[1] in allowed, f"{path.name}:{line} imports {name}, a package to its right"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_does_not_hide_one_of_pythons(path):
    """A program that is run as a file finds its neighbours before Python's own modules."""
    assert path.stem not in sys.stdlib_module_names - {
        "statistics"
    }  # which nothing imports before ours is complete


def test_there_is_no_import_circle():
    """Imports inside functions count: they are how a circle is usually hidden. A program is `__main__`, in no circle."""
    graph = {module_name(path): set(imports(path, as_program=False)) for path in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"an import circle: {' ← '.join(error.args[1])}")


def test_what_a_head_is_written_with_loads_no_transformers():
    names = ["features", "heads.head", *LAYERS]
    code = f"""import importlib, sys
for name in {names}:
    importlib.import_module("vla_bench.models." + name)
    assert "transformers" not in sys.modules, name"""
    subprocess.run([sys.executable, "-c", code], check=True)


def classes() -> dict[str, tuple[Path, ast.ClassDef]]:
    """Every class at the top of a module of the package."""
    return {
        node.name: (path, node)
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }


def test_no_class_exists_only_to_be_subclassed_once():
    """A class that has one subclass, is never made, and is named in no other module is half of that subclass."""
    found, bases, called, named = classes(), Counter(), set(), defaultdict(set)
    for _, node in found.values():
        bases.update({getattr(base, "attr", getattr(base, "id", "")) for base in node.bases})
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    named[alias.name].add(path)
            elif isinstance(node, ast.Attribute):
                named[node.attr].add(path)
    orphans = [
        f"{module_name(path)}.{name}"
        for name, (path, node) in found.items()
        if bases[name] == 1 and name not in called and not named[name] - {path} and not node.decorator_list
    ]
    assert not orphans, f"{orphans}: write each together with its subclass (`@patch` gives a method a cell)"


def sniffed(path: Path) -> dict[str, int]:
    """What a module asks objects whether they have it, with the line: `hasattr` or `getattr` with the name written
    out, and "signature" where a function is asked for its arguments."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name, words = getattr(node.func, "attr", getattr(node.func, "id", "")), node.args[1:2]
            if name == "signature":
                found[name] = node.lineno
            elif name in ("hasattr", "getattr") and words and isinstance(words[0], ast.Constant):
                found[words[0].value] = node.lineno
    return found


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.relative_to(ROOT).parts[1] in ("models", "training")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_abilities_are_declared_and_not_sniffed(path):
    """Classes of this package say what they offer. What transformers leaves open stands in `FOREIGN`, and only that."""
    allowed = FOREIGN.get(module_name(path).removeprefix("vla_bench."), {})
    found = sniffed(path)
    assert not found.keys() - allowed, {name: f"{path.name}:{found[name]}" for name in found.keys() - allowed}
    assert not allowed.keys() - found, f"take {allowed.keys() - found} out of FOREIGN"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_mirror_the_package(path):
    name = path.relative_to(ROOT / "tests")
    module = name.with_name(name.name.removeprefix("test_"))
    known = str(name) in CROSS_CUTTING or (ROOT / "vla_bench" / module).is_file()
    assert known, f"there is no vla_bench/{module}; a test of several modules is named in CROSS_CUTTING"


def test_the_base_install_needs_no_torch():
    torch_free = [f"vla_bench.{name}" for name in BASE]
    torch_free += [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in MODULES
        if p.parent.name in ("benchmarks", "evaluation")
    ]
    heavy = [
        "torch",
        "transformers",
        "pyarrow",
        "av",
        "metaworld",
        "mujoco",
        "matplotlib",
        "pandas",
    ]
    code = f"import sys, {', '.join(torch_free)}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def outputs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Every stored text of a notebook: the cell's id, the stream's name or the kind of data, the text."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if "text" in output:
                yield cell["id"], output["name"], "".join(output["text"])
            for kind, data in output.get("data", {}).items():
                if kind.startswith("text/"):
                    yield cell["id"], kind, "".join(data)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *EXPERIMENTS, *FIGURES], ids=lambda p: str(p.relative_to(ROOT)))
def test_stored_outputs_hold_no_warning(path):
    for cell, kind, text in outputs(path):
        one_line = kind == "stderr" and text.startswith("error: ")  # how our programs refuse
        assert one_line or kind != "stderr", (
            f"{path.name}, cell {cell} stores what went to standard error: {text[:200]}"
        )
        found = re.findall(r"\w*Warning: .*|warnings\.warn\(.*|^WARNING.*", text, re.M)
        assert not found, f"{path.name}, cell {cell}: {found}"


@pytest.mark.parametrize("path", [*NOTEBOOKS, *EXPERIMENTS, *FIGURES], ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_hold_no_path_of_a_machine(path):
    found = re.findall(
        r"(?:/work/|/root/|/home/|/tmp/|/var/folders/|site-packages/)[\w./-]*",
        path.read_text(encoding="utf-8"),
    )
    assert not found, f"{path.name} holds {found[:3]}"


def test_settings_name_what_the_code_knows():
    from vla_bench.settings import DEFAULTS

    parser = ConfigParser()
    parser.read(ROOT / "settings.ini")
    assert {s: set(parser[s]) for s in parser.sections()} == {s: set(v) for s, v in DEFAULTS.items()}


def test_every_registered_component_is_where_the_registry_says():
    from vla_bench import registry

    for known_registry in (registry.FRAMEWORKS, registry.BACKBONES, registry.HEADS, registry.BENCHMARKS):
        for name, known in known_registry.known.items():
            component = known_registry.get(name)
            assert component.__module__ == known.module
            declared = re.search(
                rf'register\(\s*"{re.escape(name)}"(?:,\s*aliases=\(([^)]*)\))?',
                (ROOT / (known.module.replace(".", "/") + ".py")).read_text(),
            )
            assert declared, f"{known.module} does not register {name!r}"
            assert tuple(re.findall(r'"([^"]+)"', declared[1] or "")) == known.aliases


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_are_read_and_written_as_utf_8_on_every_machine(path):
    """A call that leaves it out follows the machine's settings: on some, an umlaut in an instruction is an error."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    for call in (call for call in calls if isinstance(call.func, ast.Attribute)):
        if call.func.attr in ("read_text", "write_text"):
            assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("encoding") in (
                "'utf-8'",
                '"utf-8"',
            ), f"{path.name}:{call.lineno}"
