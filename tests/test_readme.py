"""Every command of the README and of the documentation's first page is run, or says here why not and what runs it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest
import yaml

from vla_bench.training.run import TrainerSettings

ROOT = Path(__file__).parents[1]
PROGRAMS = r"(git|pip|uv|make|papermill|python|vla_bench|jupyter|nbdev-\w+|source)\b"
# What stands for somebody's own, and what it is here.
PLACEHOLDERS = {
    r"\bRUN\b": "experiments/runs/quickstart",
    r"\bDATASET\b": "experiments/runs/data/from_the_page",
    r"\bNAME\b": "Sample",
    r"--config_yaml …": "--config_yaml experiments/configs/quickstart.yaml",
    r"--run …": "--run experiments/runs/quickstart",
    r" … ": " ",
}
# The overrides that make a quickstart small, as a user would give them.
TRAIN = (
    "trainer.max_train_steps=2 trainer.per_device_batch_size=2 trainer.warmup_steps=1 trainer.eval_samples=4"
)
SHORT = "evaluation.episodes=1 evaluation.max_steps=6 evaluation.tasks=[drawer-open-v3] evaluation.num_envs=1"
# Commands that are not run here: why, and what runs them.
ELSEWHERE = {
    "git clone https://github.com/vla-bench/vla_bench": ("there is no network", ".ci/run"),
    "make setup": ("installs everything", ".ci/run"),
    "source .venv/bin/activate": ("is about the reader's own shell", ".ci/run"),
    "make docs": ("takes minutes", ".ci/run"),
    "make test": ("is what runs this test", ".ci/run"),
    "make check": ("runs tests of this suite", "tests/test_readme.py::test_what_make_check_runs_exists"),
    "make slurm": ("installs SLURM", "tests/training/test_slurm.py::test_a_launched_sweep_is_an_array"),
    "vla_bench launch experiments/train.ipynb -p config experiments/configs/quickstart.yaml --cluster slurm --nodes 2 --gpus 8 --wait": (
        "needs a cluster", "tests/training/test_slurm.py::test_a_launched_job_that_makes_room_continues"),
    "vla_bench launch experiments/train.ipynb -p config experiments/configs/quickstart.yaml --cluster slurm --gpus 1 --sweep seed=0,1,2,3": (
        "needs a cluster", "tests/training/test_slurm.py::test_a_launched_sweep_is_an_array"),
    "make libero": ("downloads assets", "tests/benchmarks/test_libero_demos.py::test_the_expert_succeeds_from_official_initial_states"),
    "vla_bench graph RUN GRAPH --onnx": (
        "needs the extra onnx", "tests/serving/test_exported.py::test_onnx_computes_the_same"),
    "make lab": ("opens a browser", "tests/test_readme.py::test_jupyterlab_is_installed"),
    "make lowest": ("downloads other versions", "tests/test_readme.py::test_what_make_lowest_runs_exists"),
    "make format": ("writes the notebooks anew", "tests/test_repo.py::test_export_and_clean_change_nothing"),
    "make clients": ("installs two environments", ".ci/run"),
    "python experiments/speed/serving.py RUN": (
        "has a test of its own", "tests/serving/test_commands.py::test_another_command_does_what_it_says"),
    "vla_bench serve --checkpoint RUN --batch_size 8": (
        "serves until it is ended", "tests/serving/test_server.py::test_a_server_that_is_killed_in_an_episode_is_waited_for"),
    "vla_bench evaluate --run RUN --server ws://127.0.0.1:8000": (
        "needs a server", "tests/serving/test_server.py::test_an_evaluation_through_a_server_continues_one_without"),
    "vla_bench compare RUN RUN --checkpoint_b 800": (
        "plays for minutes", "tests/evaluation/test_compare.py::test_two_checkpoints_of_one_run"),
    "vla_bench results experiments/runs": (
        "needs finished evaluations", "tests/evaluation/test_results.py::test_the_program_prints_the_board"),
    "pip install vla_bench": ("there is no network", "tests/test_repo.py::test_the_base_install_needs_no_torch"),
    "python -m vla_bench.models.interop.convert --format openpi_pi0 SOURCE --config CONFIG.yaml --out RUN": (
        "needs somebody's checkpoint", "tests/models/interop/test_convert.py::test_the_sizes_of_openpi_are_those_of_its_tensors"),
    "python -m vla_bench.models.interop.fluxvla CONFIG.py --out CONFIG.yaml": (
        "needs somebody's configuration", "tests/models/interop/test_fluxvla.py::test_what_was_left_out_is_at_the_top_of_the_yaml"),
}  # fmt: skip

STARTS = ("git clone https://github.com/vla-bench/vla_bench", "make setup", "source .venv/bin/activate")


def prose(name: str) -> str:
    """A page's Markdown."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return text


def commands(text: str) -> list[str]:
    """The commands of a page, in its order: of the blocks for a shell, and those within sentences."""
    found = []
    for block, inline in re.findall(r"```bash\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", text, re.S):
        lines = re.sub(r"\\\n\s*", "", block).splitlines() or [inline]
        words = [" ".join(re.sub(r"\s#.*", "", line).split()) for line in lines]
        found += [part.strip() for line in words for part in line.split("&&")]
    found = [each for each in found if re.match(PROGRAMS, each) and " " in each]
    return [each for each in dict.fromkeys(found) if not each.startswith("cd ")]


PAGES = {name: commands(prose(name)) for name in ("README.md", "nbs/index.ipynb")}
ALL = list(dict.fromkeys(command for found in PAGES.values() for command in found))


def filled(command: str) -> str:
    """The command with something in the place of its placeholders."""
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(placeholder, value, command)
    return command


def essence(command: str) -> list[str]:
    """The words that say what a command does, without where papermill writes and how it reports."""
    words = shlex.split(re.sub("^python -m vla_bench ", "vla_bench ", filled(command)))
    words = [word for word in words if word not in ("--log-output", "--no-progress-bar")]
    if words[0] == "papermill":
        del words[2]
        if words[-3:] == ["-p", "overrides", ""]:
            del words[-3:]
    return sorted(words)  # options may stand in any order


HERE = list({tuple(essence(each)): each for each in reversed(ALL) if each not in ELSEWHERE}.values())[::-1]


def small(command: str) -> list[str]:
    """The words of a command that is run: shorter, through the options that a user has, and otherwise as it stands."""
    words = shlex.split(filled(command).replace("--episodes 25", "--episodes 1"))
    if words[:2] == ["papermill", "experiments/live.ipynb"]:
        words += ["-p", "requests", "4"]
    elif words[0] == "papermill":
        words += [] if "overrides" in words else ["-p", "overrides", ""]
        i = words.index("overrides") + 1
        words[i] = re.sub(r" trainer.max_train_steps=\d+", "", words[i])
        without_robots = " trainer.max_train_steps=2 trainer.warmup_steps=1"
        words[i] += {"evaluate": f" {SHORT}", "vlm": without_robots}.get(
            Path(words[1]).stem, f" {TRAIN} {SHORT}"
        )
    if words[:2] == ["vla_bench", "train"]:
        words += TRAIN.split() + SHORT.split()
    return words


def ignored(folder: str, names: list[str]) -> set[str]:
    """What a copy of the repository does without."""
    return {
        n
        for n in names
        if n in (".git", ".venv", "runs", "fixtures", "tests", "_docs")
        or n.startswith(("__pyc", ".ipynb", "_site"))
    }


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, in which commands are run."""
    copy = tmp_path_factory.mktemp("readme") / "vla_bench"
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def environment(clone):
    """Of a user in that copy."""
    return os.environ | {"PYTHONPATH": str(clone), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def quickstart(clone, environment):
    """The copy, in which `make quickstart` has recorded, trained and evaluated."""
    less = ["TASKS=drawer-open-v3", "EPISODES=2", f"OVERRIDES={TRAIN} {SHORT}"]
    command = ["make", "-o", "setup", "quickstart", *less]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"^  drawer-open-v3 +[01]/1 ", done.stdout, re.M), done.stdout[-2000:]
    return clone


@pytest.fixture(scope="module")
def made(clone, environment):
    """What `make quickstart` runs, each command by its essence."""
    command = ["make", "-n", "-o", "setup", "quickstart", "EPISODES=25"]
    printed = subprocess.run(
        command, cwd=clone, env=environment, capture_output=True, text=True, check=True
    ).stdout
    lines = [line for line in printed.splitlines() if re.match(PROGRAMS, line)]
    return [essence(line) for line in lines]


def test_both_pages_have_commands():
    assert all(len(found) > 5 for found in PAGES.values()) and len(HERE) > 8, HERE


def test_what_is_not_run_here_stands_on_a_page():
    assert not ELSEWHERE.keys() - set(ALL), "take it out of ELSEWHERE"


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_not_run_here_is_run_elsewhere(command):
    where = ELSEWHERE[command][1]
    path, _, name = where.partition("::")
    if name:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), (
            f"{where} is gone"
        )
    else:  # in a clone, and `make test` begins with `make setup`
        runs = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
        assert command in runs or (command in STARTS and "make test" in runs)


# What a command writes that others of the pages read; each process that runs tests has a clone of its own.
WRITTEN = {
    "experiments/runs/data/from_the_page": r"record .*--out DATASET",
    "experiments/runs/data/made_up": r"conversations --write experiments/runs/data/made_up",
}


# That the pages make with mkdir, as papermill asks for.
FOLDERS = {
    Path(name) for made in re.findall(r"^mkdir -p (.*)$", prose("README.md"), re.M) for name in made.split()
}


def run_here(command: str, clone: Path, server) -> None:
    """Runs a command in the copy, after the one that writes what it reads."""
    words = small(command)
    text = re.sub(r"configs/(cotrain|vlm)\.yaml", "made_up", " ".join(words))  # which name that dataset
    for place, writer in WRITTEN.items():
        if Path(place).name in text and not (clone / place).exists():
            first = next(each for each in HERE if re.search(writer, each))
            if first != command:
                run_here(first, clone, server)
    if words[0] == "papermill" and (folder := Path(words[2]).parent) in FOLDERS:
        (clone / folder).mkdir(parents=True, exist_ok=True)
    program = words[1:] if words[0] == "python" else ["-m", *words]
    done = server({"program": program, "cwd": str(clone), "env": {"PYTHONPATH": str(clone)}})
    assert done["returncode"] == 0, done["output"][-4000:]


@pytest.mark.parametrize("command", HERE)
def test_a_command_does_what_it_says(command, clone, made, server, request):
    by_make = command == "make quickstart" or essence(command) in made
    words = small(command)
    if by_make or re.search(
        "quickstart|cotrain|vlm.ipynb", " ".join(words)
    ):  # reads what the quickstart made
        request.getfixturevalue("quickstart")
    if not by_make:
        run_here(command, clone, server)


def test_the_quickstart_by_hand_is_what_make_does(made):
    """Recording, training and evaluation stand on the pages as `make quickstart` runs them."""
    told = [essence(command) for command in HERE]
    steps = [words for words in made if "papermill" in words or "record" in words]
    assert len(steps) == 3 and all(step in told for step in steps)


def test_jupyterlab_is_installed():
    done = subprocess.run(["jupyter", "lab", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.match(r"\d+\.\d+", done.stdout), done.stderr


def test_what_make_check_runs_exists():
    loader = SourceFileLoader("check", str(ROOT / ".ci/check"))
    check = module_from_spec(spec_from_loader("check", loader))
    loader.exec_module(check)
    found = check.chosen({Path("nbs/models/heads/10_mlp.ipynb"), Path("vla_bench/registry.py")})
    assert "tests/test_registry.py" in found and all(
        (ROOT / each.partition("::")[0]).exists() for each in found
    )


def test_what_make_lowest_runs_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = " ".join(re.findall(r"^LOWEST_TESTS \+?:?= (.*)$", makefile, re.M)).split()
    assert len(named) > 5 and all((ROOT / each).exists() for each in named)


def test_the_head_of_the_readme_can_be_registered(server, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", prose("README.md"), re.S)
    (tmp_path / "mine.py").write_text(block + '\nprint(HEADS.get("Mine").__name__)\n')
    done = server({"program": [str(tmp_path / "mine.py")]})
    assert done["output"] == "MyHead\n"


SECTIONS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", prose("README.md"), re.S)]


@pytest.mark.parametrize("tree", SECTIONS, ids=range(len(SECTIONS)))
def test_every_key_of_the_section_trainer_exists(tree):
    assert {*tree.get("trainer", {})} <= {field.name for field in fields(TrainerSettings)}


def test_the_values_of_the_section_trainer_can_be_meant(monkeypatch):
    monkeypatch.setattr("vla_bench.training.optimizers.find_spec", lambda package: object())
    told = [tree["trainer"] for tree in SECTIONS if "spike_guard" in tree.get("trainer", {})]
    assert len(told) == 1 and TrainerSettings(max_train_steps=10, **told[0]).profile == {"steps": 3}
