"""Overrides as text and as lists, and the parameters of the experiments' notebooks."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vla_bench.config import ConfigError, load_config, parse_overrides

ROOT = Path(__file__).parents[1]
FILE = {"run_id": "r", "framework": {"name": "OFT"}, "trainer": {"max_train_steps": 5}, "note": None}


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("framework.prompt='put it in {lang}, please'", "framework.prompt", "put it in {lang}, please"),
        ('datasets.vla_data.root="/data/my set"', "datasets.vla_data.root", "/data/my set"),
        ("datasets.vla_data.root=/data/my\\ set", "datasets.vla_data.root", "/data/my set"),
        ("--datasets.vla_data.root '/data/my set' --seed 1", "datasets.vla_data.root", "/data/my set"),
        ("datasets.vla_data.cameras=[top, wrist]", "datasets.vla_data.cameras", ["top", "wrist"]),
        ("--datasets.vla_data.cameras [top, wrist] --seed 1", "datasets.vla_data.cameras", ["top", "wrist"]),
        ("evaluation.tasks=[\"a, b\", 'c d']", "evaluation.tasks", ["a, b", "c d"]),
        ("note={a: [1, 2], b: {c: 'x y'}}", "note", {"a": [1, 2], "b": {"c": "x y"}}),
        ("note='[1, 2]'", "note", [1, 2]),
        ("note=a'b c'd", "note", "ab cd"),
        ('note="it\'s"', "note", "it's"),
        ("note=x[0]", "note", "x[0]"),
        ("run_id='[x]'", "run_id", "[x]"),
        ("\n note=1\n\tseed=2\n", "note", 1),
    ],
)
def test_a_text_is_taken_apart_as_a_shell_does(text, key, value):
    found = load_config(FILE, text).get(key)
    assert (found if isinstance(found, (str, int, list)) else found.to_dict()) == value


def test_a_list_is_taken_as_it_is():
    words = ["note=a b", "--run_id", "my run", "evaluation.tasks=[a b, c]"]
    assert parse_overrides(words) == {"note": "a b", "run_id": "my run", "evaluation.tasks": "[a b, c]"}
    assert parse_overrides(tuple(words)) == parse_overrides(words)
    assert parse_overrides([]) == parse_overrides("") == {}


UNREADABLE = [
    *(
        "[1",
        "{",
        '"x',
        "'x",
        "*x",
        "@x",
        "%x",
        "`x`",
        ": :",
        "a: b: c",
        "[a, b]]",
        "{a: 1, a: 2}",
        "{[1]: 2}",
    ),
    *(
        "!!python/object:os.x",
        "!!int x",
        "!!set {a}",
        "!foo x",
        "\x01",
        "${",
        "${a",
        "[${]",
        "{a: ${}",
        "[" * 5000,
    ),
]


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: ascii(value[:12]))
@pytest.mark.parametrize("key", ["note", "seed", "trainer.max_train_steps", "trainer.new", "+mine.new"])
def test_a_value_that_yaml_cannot_read_is_one_line_that_quotes_it(key, value):
    with pytest.raises(ConfigError) as error:
        load_config(FILE, [f"{key}={value}"])
    assert f"{key}={value}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: ascii(value[:12]))
@pytest.mark.parametrize("key", ["run_id", "datasets.vla_data.root", "evaluation.tasks", "framework.prompt"])
def test_a_name_that_yaml_cannot_read_is_taken_or_refused(key, value):
    try:
        assert load_config(FILE, [f"{key}={value}"]).get(key) == value
    except ConfigError as error:
        assert key in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "overrides, quoted",
    [
        ("run_id='mine", "'mine"),
        ('note="a b', '"a b'),
        ("note=[a, b", "[a, b"),
        ("note=[a, 'b]", "[a, 'b]"),
        ("note=a\\", "note=a"),
        ("seed", "'seed'"),
        ("=5", "'=5'"),
        ("a..b=1", "'a..b'"),
        (".a=1", "'.a'"),
        ("a.=1", "'a.'"),
        ("a[0]=1", "'a[0]'"),
        ("++a=1", "'++a'"),
        ("+=1", "'+'"),
        (["a b=1"], "'a b'"),
        (["--note 1"], "'--note 1'"),
        (["note=1", 5], "5"),
        ([{"note": 1}], "{'note': 1}"),
        ([None], "None"),
        (5, "5"),
        (None, "None"),
        ({"note": 1}, "{'note': 1}"),
        ("note=", "'note'"),
        ("note=''", "'note'"),
        ("run_id.x=1", "'run_id.x'"),
    ],
)
def test_what_is_no_override_is_quoted(overrides, quoted):
    with pytest.raises(ConfigError) as error:
        load_config(FILE, overrides)
    assert quoted in str(error.value) and "\n" not in str(error.value)


BAD = {
    "-p confg X": "no parameter 'confg'; did you mean 'config'?",
    "-p override seed=1": "no parameter 'override'; did you mean 'overrides'?",
    "-p out X": "no parameter 'out'; did you mean 'output'?",
    "-p output 2025_01_15": "-r output VALUE",
    "-p overrides 5": "-r overrides VALUE",
}


@pytest.mark.parametrize("book", ["train", "evaluate"])
@pytest.mark.parametrize("arguments", BAD)
def test_a_notebook_refuses_a_parameter_that_it_does_not_have(tmp_path, book, arguments):
    head(book, tmp_path)
    result = papermill(tmp_path, *arguments.split())
    assert result.returncode and BAD[arguments] in result.stderr


@pytest.mark.parametrize("book", ["train", "evaluate"])
def test_a_notebook_takes_a_list_of_overrides(tmp_path, book):
    head(book, tmp_path)
    assert (
        papermill(tmp_path, "-y", "{overrides: ['run_id=my run', seed=1]}", "-p", "output", "x").returncode
        == 0
    )
    assert papermill(tmp_path).returncode == 0


def head(book: str, folder: Path) -> None:
    """A notebook up to the check of its parameters, without the imports that are slow."""
    notebook = nbformat.read(ROOT / f"experiments/{book}.ipynb", as_version=4)
    end = next(i for i, cell in enumerate(notebook.cells) if "check_parameters(" in cell.source)
    notebook.cells = notebook.cells[: end + 1]
    source = notebook.cells[end].source
    imported = next(line for line in source.splitlines() if "vla_bench.config" in line)
    notebook.cells[end].source = f"{imported}\n{source[source.index('check_parameters(') :]}"
    nbformat.write(notebook, folder / "head.ipynb")


def papermill(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", "head.ipynb", "out.ipynb", "--no-progress-bar", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)
