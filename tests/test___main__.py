"""The command line: every word reaches its program, and each program says what it takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vla_bench.__main__ import COMMANDS, main

RUN = Path(__file__).parent / "fixtures" / "version_0_1" / "runs" / "llava"
SHORT = ["evaluation.episodes=2", "evaluation.n_action_steps=2", "evaluation.max_steps=12"]


def test_the_promised_commands_exist():
    assert {"train", "evaluate", "record", "convert", "list", "new", "validate"} <= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_says_what_it_takes(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--run", "--config_yaml"])
def test_evaluate_continues_to_the_known_episodes(option, tmp_path, capsys):
    run = shutil.copytree(RUN, tmp_path / "llava")
    main(["evaluate", option, str(run), *SHORT])
    episodes = (run / "eval" / "point" / "episodes.jsonl").read_bytes()
    assert episodes == (RUN.parents[1] / "llava_episodes.jsonl").read_bytes()
    printed = capsys.readouterr().out
    main(["report", str(run)])
    assert capsys.readouterr().out == printed and "reach-red" in printed


def test_evaluate_writes_where_it_is_told(tmp_path):
    run = shutil.copytree(RUN, tmp_path / "llava")
    main(["evaluate", "--run", str(run), "--out", str(tmp_path / "out"), *SHORT])
    assert (tmp_path / "out" / "summary.json").exists() and not (
        run / "eval" / "point" / "summary.json"
    ).exists()


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    words = ["evaluate", "--run", str(tmp_path / "nowhere")]
    process = subprocess.run(
        [sys.executable, "-m", "vla_bench", *words], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2 and "nowhere" in process.stderr and "Traceback" not in process.stderr


PACKAGE = Path(__file__).parents[1] / "vla_bench"
FILES = [*(f"models/frameworks/{name}" for name in ("oft", "fast", "pi", "gr00t", "openvla", "llava", "pi0", "pi05")),
         "training/imitation", "data/lerobot"]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_program_can_be_run_as_a_file(file, tmp_path):
    command = [sys.executable, str(PACKAGE / f"{file}.py"), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0 and "usage:" in process.stdout, process.stderr
