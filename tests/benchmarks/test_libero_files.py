"""LIBERO's files: what they say is what the package itself says, and none of them is run."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from vla_bench.benchmarks.libero_files import (
    ASSETS_VARIABLE,
    SUITES,
    assets_digest,
    assets_folder,
    instruction_of,
    read_initial_states,
    task_file,
    task_names,
)


def archive(content, protocol=2):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", pickle.dumps(content, protocol=protocol))
    file.seek(0)
    return file


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_initial_states_are_read_as_they_were_written(protocol):
    states = np.random.default_rng(protocol).normal(size=(50, 92))
    if protocol == 5:  # arrays are made by another function there, which no official file calls
        with pytest.raises(ValueError, match="it would call"):
            read_initial_states(archive(states, protocol))
    else:
        np.testing.assert_array_equal(read_initial_states(archive(states, protocol)), states)


class Calls:
    """A pickle that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content", [Calls(os.mkdir, "harmed"), Calls(eval, "1"), [Calls(os.getcwd)], Calls(np.load, "x")]
)
def test_a_file_that_calls_anything_is_refused_and_nothing_is_called(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="it would call"):
        read_initial_states(archive(content))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [np.zeros(3), np.zeros((2, 2), np.float32), {"a": 1}])
def test_a_file_of_anything_but_a_matrix_is_refused(content):
    with pytest.raises(ValueError, match="a float64 matrix"):
        read_initial_states(archive(content))


def test_assets_are_told_apart_by_names_and_sizes(tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/a").write_text("12")
    first = assets_digest(tmp_path)
    (tmp_path / "scenes/a").write_text("123")
    second = assets_digest(tmp_path)
    (tmp_path / "scenes/a").rename(tmp_path / "scenes/b")
    assert len({first, second, assets_digest(tmp_path)}) == 3


def test_assets_that_are_not_there_are_refused_with_the_command_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"libero_files --out ASSETS fetches them"):
        assets_folder()


@pytest.mark.parametrize("suite", SUITES)
def test_tasks_instructions_and_initial_states_are_those_of_the_package(suite, libero_installed):
    """Its own loader runs pickled code, which is why it is used only here."""
    torch = pytest.importorskip("torch")
    from vla_bench.benchmarks.libero_simulator import load_simulator

    load_simulator()
    from libero.libero.benchmark import get_benchmark

    theirs = get_benchmark(suite)()
    ours = task_names(suite)
    assert ours == theirs.get_task_names() and len(ours) == (90 if suite == "libero_90" else 10)
    for task, their in zip(ours, theirs.tasks, strict=True):
        assert instruction_of(task) == their.language
        assert task_file("bddl_files", suite, task).is_file()
        file = task_file("init_files", suite, task)
        states = read_initial_states(file)
        assert states.shape[0] == 50
        np.testing.assert_array_equal(states, torch.load(file, weights_only=False))
