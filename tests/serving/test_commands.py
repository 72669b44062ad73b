"""Every command that stands on the pages about servers and clients does what it says."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from vla_bench.__main__ import main
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.policy import Policy
from vla_bench.training.checkpoint import find_checkpoint, read_spec

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "nbs/serving").glob("[0-4]*.ipynb"))
PROGRAMS = r"(vla_bench|python|make|pip) "
ELSEWHERE = {"make clients": ".ci/run"}  # installs two environments
SHORT = ["evaluation.episodes=1", "evaluation.max_steps=6", "evaluation.n_action_steps=2"]


def commands(page: Path) -> list[str]:
    """Those in blocks for a shell, and those within sentences."""
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = []
    for block, inline in re.findall(r"```bash\n(.*?)```|(?<!`)`([^`\n]+)`(?!`)", text, re.S):
        found += [re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines() or [inline]]
    return [each for each in found if re.match(PROGRAMS, each)]


ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
SERVE = [each for each in ALL if re.match(r"vla_bench serve|python -m vla_bench.serving.server", each)]
OTHERS = [each for each in ALL if each not in SERVE and each not in ELSEWHERE]


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "llava", ignore=shutil.ignore_patterns("eval"))


def filled(command: str, run: Path, key: Path, port: int) -> list[str]:
    """The words of a command, with something for its placeholders, and a port that is free."""
    camera = read_spec(find_checkpoint(run, "latest")).cameras[0]
    for placeholder, value in {"RUN": run, "KEY_FILE": key, "CAMERA": camera, "8000": port}.items():
        command = re.sub(rf"\b{placeholder}\b", str(value), command)
    return shlex.split(command)


def test_the_pages_have_commands():
    assert len(SERVE) > 4 and len(OTHERS) > 2, ALL


@pytest.mark.parametrize("command", SERVE)
def test_a_server_that_is_started_so_answers(command, copy, tmp_path, llava_observation, processes):
    start, free_port = processes
    key, port = tmp_path / "key", free_port()
    key.write_text("secret\n")
    words = filled(command, copy, key, port)
    words = [*words[words.index("--checkpoint") :], "--port", str(port)]
    server = start(main, ["serve", *words])
    given = {"api_key": "secret"} if "KEY_FILE" in command else {}
    size = int(re.search(r"--batch_size (\d+)|$", command)[1] or 1)
    expected = Policy.from_pretrained(copy, batch_size=size).predict(llava_observation, seed=3)
    with PolicyClient(f"ws://127.0.0.1:{port}", connect_s=60, **given) as client:
        assert np.array_equal(client.predict(llava_observation, seed=3), expected)
    server.terminate()
    server.join(timeout=30)
    assert server.exitcode == 0


@pytest.mark.parametrize("command", OTHERS)
def test_another_command_does_what_it_says(command, copy, tmp_path, processes, server, capsys):
    start, free_port = processes
    port = free_port()
    words = filled(command, copy, tmp_path / "key", port)
    if words[:2] == ["vla_bench", "evaluate"]:
        serving = start(main, ["serve", "--checkpoint", str(copy), "--port", str(port)])
        main([*words[1:], *SHORT, "--out", str(tmp_path / "out")])
        serving.terminate()
        serving.join(timeout=30)
        assert (tmp_path / "out" / "episodes.jsonl").read_text().count("\n") >= 1
    elif words[1] == "experiments/speed/serving.py":
        less = ["--clients", "3", "--requests", "12", "--batch_size", "2", "--rounds", "1"]
        done = server({"program": [*words[1:], *less], "cwd": str(ROOT), "env": {"PYTHONPATH": str(ROOT)}})
        assert "times the requests per second" in done["output"], done["output"][-2000:]
    else:
        assert words[:3] == ["python", "-m", "vla_bench.serving.policy"], f"how is this run? {command}"
        from vla_bench.serving.policy import main as describe

        describe(words[3:])
        assert json.loads(capsys.readouterr().out)["horizon"] == Policy.from_pretrained(copy).spec.horizon


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_not_run_here_is_run_elsewhere(command):
    assert command in ALL and command in (ROOT / ELSEWHERE[command]).read_text(encoding="utf-8").splitlines()
