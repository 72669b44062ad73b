"""What a simulator lacks: each thing alone, and all of them in one report."""

import os

import pytest

from vla_bench.benchmarks import needs as module
from vla_bench.benchmarks.needs import (
    EGL,
    SIMULATORS,
    Need,
    folder_need,
    main,
    missing_needs,
    package_need,
    render_fault,
    report,
    vulkan_drivers,
)
from vla_bench.registry import BENCHMARKS

HERE, GONE = Need("here", lambda: "yes", lambda: "nothing"), Need("gone", lambda: None, lambda: "run this")


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(module, "SIMULATORS", {"whole": ("a", [HERE]), "half": ("b, c", [HERE, GONE])})


def test_every_benchmark_belongs_to_a_simulator():
    listed = [each for benchmarks, _ in SIMULATORS.values() for each in benchmarks.split(", ")]
    assert sorted(listed) == sorted(set(BENCHMARKS.known) - {"point"})


def test_every_need_says_what_to_do():
    for name, (_, needs) in SIMULATORS.items():
        for need in needs:
            assert need.what and len(need.hint()) > 10 and "\n" not in need.hint(), (name, need.what)


def test_a_report_names_what_is_missing_and_what_to_run(two):
    assert report(["whole", "half"]) == [
        "whole            ready",
        "half             lacks gone",
        "    gone: run this",
    ]
    assert report(["half"], hints=False) == ["half             lacks gone"]


def test_a_named_simulator_that_lacks_something_ends_with_1_and_the_list_with_0(two, capsys):
    main([])
    main(["whole"])
    with pytest.raises(SystemExit) as left:
        main(["whole", "half"])
    assert left.value.code == 1 and "    gone: run this" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wanted, fits",
    [
        ((), True),
        (("1.4.0",), True),
        (("1.4",), True),
        (("1",), True),
        (("1.40",), False),
        (("1.4.0.1",), False),
        (("2",), False),
    ],
)
def test_a_version_fits_by_its_first_numbers(wanted, fits, monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "1.4.0")
    assert (package_need("robosuite", "x", wanted).found() is not None) == fits


@pytest.mark.parametrize("error", [FileNotFoundError("fetch it"), ValueError("install it")])
def test_a_folder_that_is_missing_is_told_in_the_adapters_own_words(error):
    def look():
        raise error

    need = folder_need("assets", look)
    assert need.found() is None and need.hint() == str(error)


def test_vulkan_drivers_are_those_that_are_named_else_those_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "one.json").write_text("{}")
    monkeypatch.setenv(
        "VK_ICD_FILENAMES", os.pathsep.join([str(tmp_path / "one.json"), str(tmp_path / "two.json")])
    )
    assert vulkan_drivers() == "one"
    monkeypatch.delenv("VK_ICD_FILENAMES")
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "two.json"))
    assert vulkan_drivers() is None


def test_egl_that_cannot_be_loaded_is_missing(monkeypatch):
    def load(name):
        raise OSError(name)

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    assert EGL.found() is None and "apt-get install" in EGL.hint()


@pytest.mark.parametrize(
    "code, told",
    [
        ("pass", None),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
        ("import os; os._exit(3)", "the process ended with 3"),
    ],
)
def test_a_driver_that_fails_is_told_in_one_line(code, told, monkeypatch):
    monkeypatch.setitem(module.PROBES, "EGL", code)
    assert render_fault("EGL") == told


def test_nothing_is_drawn_where_something_is_missing(monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "render_fault", lambda what: drawn.append(what) or "a fault")
    egl = Need("EGL", lambda: "libEGL.so.1", lambda: "install EGL")
    monkeypatch.setattr(module, "SIMULATORS", {"whole": ("a", [egl]), "half": ("b", [egl, GONE])})
    assert missing_needs("half", render=True) == [("gone", "run this")] and drawn == []
    assert missing_needs("whole", render=True) == [("EGL that renders (a fault)", "install EGL")]


def test_egl_is_drawn_with_here():
    """The simulator that the package has been tested with on this machine renders."""
    pytest.importorskip("mujoco")
    assert render_fault("EGL") is None
