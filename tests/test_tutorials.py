"""A component of one's own: found by its entry point in an installed package, and scaffolded with tests that pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

HEAD = """
import torch
from torch import nn
from vla_bench.models.heads.head import ActionHead
from vla_bench.registry import HEADS


DECORATOR
class ConstantHead(ActionHead):
    reads = "last"

    def __init__(self, sizes, *, start: float = 0.0):
        super().__init__(sizes)
        self.guess = nn.Parameter(torch.full((self.horizon, self.action_dim), start))

    def loss(self, features, actions, is_pad, noise=None, time=None):
        pull = 0.0 * features.hidden.mean()
        return {"action_loss": self.mean((self.guess - actions) ** 2, is_pad) + pull}

    def sample(self, features, noise=None):
        return self.guess.expand(len(features.hidden), -1, -1)
"""

TRAIN = """
import sys, tempfile
import numpy as np, torch
from PIL import Image
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework

folder, framework, *heads = tempfile.mkdtemp(), *sys.argv[1:]
sizes = {"image_size": 64, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32, "vision_layers": 1}
base = str(write_tiny("paligemma", folder + "/tiny", **sizes))
sample = {"image": [Image.new("RGB", (64, 64))], "lang": "open the drawer",
          "action": np.full((3, 2), 0.5, np.float32), "action_is_pad": np.zeros(3, bool)}
for head in heads:
    config = {"name": framework, "vlm": {"base_vlm": base}, "action_horizon": 3, "action_model": {"type": head}}
    torch.manual_seed(0)
    model = build_framework(config, action_dim=2, state_dim=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model([sample])["action_loss"]
    before.backward()
    optimizer.step()
    assert model([sample])["action_loss"] < before
    model.save_pretrained(folder + "/saved")
    again = Framework.from_pretrained(folder + "/saved")
    chunks = [m.predict_action([sample])["normalized_actions"] for m in (model, again)]
    assert np.allclose(*chunks, atol=1e-6)
    print(type(model).__name__, type(model.action_model).__name__, type(model.action_model).__module__)
"""


def install(site: Path, package: str, modules: dict[str, str], points: dict[str, dict[str, str]]) -> None:
    """What pip leaves behind: a package, and a `.dist-info` with its entry points."""
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").touch()
    for name, source in modules.items():
        (site / package / f"{name}.py").write_text(source)
    info = site / f"{package}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    lines = [
        line for group, p in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in p.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def python(*words: str, site: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    paths = [str(site)] if site else []
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    env["PATH"] = os.pathsep.join([str(BIN), env["PATH"]])
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)


def test_heads_of_an_installed_package_train_from_configuration(tmp_path):
    """With and without a decorator of their own: what nbdev exports has one."""
    decorated = HEAD.replace("DECORATOR", '@HEADS.register("Decorated", aliases=("Const",))')
    modules = {"plain": HEAD.replace("DECORATOR", ""), "decorated": decorated}
    points = {name.capitalize(): f"their_lab.{name}:ConstantHead" for name in modules}
    install(tmp_path, "their_lab", modules, {"vla_bench.heads": points})
    run = python("-c", TRAIN, "LlavaVLA", *points, site=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"LlavaVLA ConstantHead their_lab.{name}" for name in modules]


def test_without_the_package_the_name_is_unknown():
    run = python("-c", "from vla_bench.registry import HEADS; HEADS.get('Plain')")
    assert run.returncode != 0 and "unknown action head 'Plain'" in run.stderr


def test_the_list_shows_plugins_and_survives_a_broken_one(tmp_path):
    points = {
        "vla_bench.heads": {
            "Constant": "their_lab.constant:ConstantHead",
            "Broken": "their_lab.broken:Broken",
        }
    }
    modules = {
        "constant": HEAD.replace("DECORATOR", ""),
        "broken": "raise RuntimeError('their cable is out')\n",
    }
    install(tmp_path, "their_lab", modules, points)
    run = python("-m", "vla_bench.models.compatibility", "--json", site=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads(run.stdout)["heads"]}
    assert rows["Constant"]["origin"] == "their_lab" and "LlavaVLA" in rows["Constant"]["frameworks"]
    assert all(fits is True for fits in rows["Constant"]["fits"].values())
    assert "their cable is out" in rows["Broken"]["missing"]
    assert {"MLP", "FlowMatching"} <= rows.keys()


def test_the_grid_refuses_in_the_words_of_the_components():
    from vla_bench.models.compatibility import grid
    from vla_bench.registry import BACKBONES, FRAMEWORKS, HEADS

    found = grid()
    rows = {row["name"]: row for row in found["heads"]}
    assert set(rows) == set(HEADS.names()) and {b["name"] for b in found["backbones"]} == set(
        BACKBONES.names()
    )
    for name, row in rows.items():
        reads = HEADS.get(name).reads
        assert row["frameworks"] == [f for f in FRAMEWORKS.names() if FRAMEWORKS.get(f).reads == reads]
        for backbone, fits in row["fits"].items():
            assert fits == BACKBONES.get(backbone).unsupported_reads.get(reads, True)


def test_a_backbone_of_an_installed_package_is_found_by_its_model_type(tmp_path):
    """The tutorial's two cells, word for word, as a module of another package."""
    cells = nbformat.read(ROOT / "nbs/tutorials/20_own_backbone.ipynb", 4).cells
    code = [c.source for c in cells if c.cell_type == "code"]
    classes = [c for c in code if "class DuetConfig" in c or "class DuetPrepare" in c]
    imports = next(c for c in code if "import transformers" in c)
    module = "\n\n".join([imports, *classes])
    install(tmp_path, "their_lab", {"duet": module}, {"vla_bench.backbones": {"duet": "their_lab.duet:Duet"}})
    writer = next(c for c in code if "def write_duet" in c).partition("folder = ")[0]
    (tmp_path / "write.py").write_text(
        f"{imports}\nfrom their_lab.duet import *\n{writer}\nwrite_duet('duet')\n"
    )
    run = python("write.py", site=tmp_path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    load = "from vla_bench.models.backbones.loading import load_vlm; v = load_vlm('duet'); print(type(v).__name__, v.model_type)"
    run = python("-c", load, site=tmp_path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-2:] == ["Duet", "duet"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """An empty nbdev repository of another project, with one notebook of each kind scaffolded in it."""
    home = tmp_path_factory.mktemp("lab")
    text = (ROOT / "pyproject.toml").read_text().replace('name = "vla_bench"', 'name = "their_lab"')
    (home / "pyproject.toml").write_text(text)
    (home / "their_lab").mkdir()
    (home / "their_lab/__init__.py").write_text('__version__ = "0.1"\n')
    for kind in ("head", "backbone", "framework"):
        run = python("-m", "vla_bench", "new", kind, f"Our{kind.capitalize()}ish", "--out", "nbs", cwd=home)
        assert run.returncode == 0, run.stderr
    return home


def scaffolded(repository: Path, kind: str) -> Path:
    (found,) = (repository / "nbs").glob(f"*_our_{kind}ish.ipynb")
    return found


def test_scaffolded_notebooks_pass_their_own_tests(repository):
    run = python(str(BIN / "nbdev-test"), "nbs", "--n-workers", "0", cwd=repository)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert len(list((repository / "nbs").glob("*.ipynb"))) == 3


@pytest.mark.parametrize("kind", ["head", "backbone", "framework"])
def test_the_installed_templates_are_those_of_the_notebooks(kind):
    installed, source = (
        ROOT / folder / f"{kind}.ipynb" for folder in ("vla_bench/templates", "nbs/templates")
    )
    assert installed.read_bytes() == source.read_bytes(), "stale: run `make format`"


@pytest.mark.parametrize("kind", ["head", "backbone", "framework"])
def test_a_scaffolded_notebook_is_clean(repository, kind):
    path = scaffolded(repository, kind)
    nbformat.validate(nbformat.read(path, 4))
    before, style = path.read_bytes(), ["--config", str(ROOT / "pyproject.toml")]
    for command in (["nbdev-clean", "--fname"], ["ruff", "format", *style], ["ruff", "check", *style]):
        run = [str(BIN / command[0]), *command[1:], str(path)]
        subprocess.run(run, cwd=repository, check=True, capture_output=True)
        assert path.read_bytes() == before, f"{command[0]} changes what was written"


def test_a_scaffolded_head_is_exported_installed_and_trained(repository, tmp_path):
    """The whole way that the notebook's last lines describe: export, entry point, configuration."""
    path = scaffolded(repository, "head")
    export = "from nbdev.export import nb_export; import sys; nb_export(sys.argv[1], lib_path='their_lab')"
    run = python("-c", export, str(path), cwd=repository)
    assert run.returncode == 0, run.stderr[-3000:]
    source = (repository / "their_lab/our_headish.py").read_text()
    install(
        tmp_path,
        "their_lab",
        {"our_headish": source},
        {"vla_bench.heads": {"OurHeadish": "their_lab.our_headish:OurHeadishHead"}},
    )
    run = python("-c", TRAIN, "GR00T", "OurHeadish", site=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["GR00T", "OurHeadishHead", "their_lab.our_headish"]


def test_nothing_is_overwritten_and_names_are_checked(repository):
    before = {path: path.read_bytes() for path in (repository / "nbs").iterdir()}
    for name, message in (
        ("OurHeadish", "not overwritten"),
        ("mlp", "the head 'MLP' exists"),
        ("my-head", "cannot name"),
    ):
        run = python("-m", "vla_bench.scaffold", "head", name, "--out", "nbs", cwd=repository)
        assert run.returncode == 2 and message in run.stderr and len(run.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in (repository / "nbs").iterdir()} == before


def test_in_this_repository_a_head_goes_to_its_folder(tmp_path):
    shutil.copytree(ROOT / "nbs/models/heads", tmp_path / "nbs/models/heads")
    shutil.copy(ROOT / "nbs/10_registry.ipynb", tmp_path / "nbs")
    run = python("-m", "vla_bench", "new", "head", "Mixture", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (path,) = (tmp_path / "nbs/models/heads").glob("*_mixture.ipynb")
    cells = nbformat.read(path, 4).cells
    assert cells[1].source == "#| default_exp models.heads.mixture"
    assert '"Mixture": Known(f"{_HEADS}.mixture"),' in run.stdout and "nbdev-export" in run.stdout
