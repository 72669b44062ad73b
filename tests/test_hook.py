"""The git hook for notebooks, in a small repository of its own."""

import json
import os
import subprocess
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def git(home: Path, *words: str) -> subprocess.CompletedProcess:
    mine = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    mine |= {f"GIT_{who}_{what}": "a@b.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    free = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(
        ["git", *words], cwd=home, env=free | mine, capture_output=True, text=True, check=False
    )


def stage(home: Path, source: str, count: int | None = None) -> None:
    """Puts a notebook with one exported cell into the index."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"display_name": "x", "language": "python", "name": "x"}}
    )
    texts = ["#| default_exp toy", f"#| export\n{source}"]
    notebook.cells = [nbformat.v4.new_code_cell(text, id=f"cell{i}") for i, text in enumerate(texts)]
    notebook.cells[1].execution_count = count
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (home / "nbs/00_toy.ipynb").write_text(text)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """With the hook, and one notebook that is exported and committed."""
    home = tmp_path_factory.mktemp("hook")
    text = (ROOT / "pyproject.toml").read_text().replace('name = "vla_bench"', 'name = "their_lab"')
    (home / "pyproject.toml").write_text(text)
    (home / "their_lab").mkdir()
    (home / "their_lab/__init__.py").write_text('__version__ = "0.1"\n')
    (home / "nbs").mkdir()
    git(home, "init", "-q")
    stage(home, "x = 1")
    for command in (["nbdev-clean"], ["nbdev-export"]):
        subprocess.run(command, cwd=home, check=True, capture_output=True)
    git(home, "add", "-A")
    assert git(home, "commit", "-qm", "first").returncode == 0
    hook = home / ".git/hooks/pre-commit"
    hook.write_bytes((ROOT / ".ci/pre-commit").read_bytes())
    hook.chmod(0o755)
    return home


def test_a_commit_without_notebooks_is_let_through(repository):
    (repository / "notes.md").write_text("a\n")
    git(repository, "add", "notes.md")
    assert git(repository, "commit", "-qm", "notes").returncode == 0


@pytest.mark.parametrize("wrong", ["x  =  2", "x = 3"], ids=["not formatted", "not exported"])
def test_a_notebook_that_is_not_ready_is_refused_with_what_to_do(repository, wrong):
    stage(repository, wrong)
    git(repository, "add", "nbs")
    done = git(repository, "commit", "-qm", "wrong")
    assert done.returncode == 1 and "run `make format`" in done.stderr
    assert git(repository, "log", "--oneline").stdout.count("wrong") == 0


def test_a_notebook_that_is_not_clean_is_refused(repository):
    stage(repository, "x = 1", count=7)
    git(repository, "add", "nbs")
    done = git(repository, "commit", "-qm", "wrong")
    assert done.returncode == 1 and "outputs' noise" in done.stderr


def test_an_exported_notebook_is_let_through(repository):
    stage(repository, "x = 4")
    for command in (["nbdev-clean"], ["nbdev-export"]):
        subprocess.run(command, cwd=repository, check=True, capture_output=True)
    git(repository, "add", "-A")
    done = git(repository, "commit", "-qm", "right")
    assert done.returncode == 0, done.stderr
