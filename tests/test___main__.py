"""The command line: every word reaches its program, and each program says what it takes."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

from vla_bench.__main__ import COMMANDS, main
from vla_bench.benchmarks.point import PointReach
from vla_bench.files import write_manifest

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
def test_evaluate_continues_to_the_known_episodes(option, as_in_0_1, tmp_path, capsys):
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


HERE = str(Path(__file__))
TRAIN = str(Path(__file__).parents[1] / "experiments/train.ipynb")
PI0 = str(Path(__file__).parents[1] / "experiments/configs/convert/openpi_pi0.yaml")
MISTAKES = {
    "train": {
        "missing": ([], "--config_yaml"),
        "wrong": (
            ["--config_yaml", str(RUN), "trainer.max_train_step=3"],
            "did you mean 'trainer.max_train_steps'",
        ),
        "no file": (["--config_yaml", "nowhere.yaml"], "nowhere.yaml"),
    },
    "cotrain": {
        "missing": ([], "--config_yaml"),
        "wrong": (["--config_yaml", str(RUN)], "datasets.vlm_data is missing"),
        "no file": (["--config_yaml", "nowhere.yaml"], "nowhere.yaml"),
    },
    "adapt": {
        "missing": ([], "--config_yaml"),
        "wrong": (["--config_yaml", str(RUN)], "rl.policy"),
        "no file": (["--config_yaml", "nowhere.yaml"], "nowhere.yaml"),
    },
    "serve": {
        "missing": ([], "--checkpoint"),
        "wrong": (["--checkpoint", str(RUN), "--host", "0.0.0.0"], "so the server needs a key"),
        "no file": (["--checkpoint", "nowhere"], "nowhere"),
    },
    "launch": {
        "missing": ([], "notebook"),
        "wrong": ([TRAIN, "-p", "confg", "a.yaml"], "did you mean 'config'"),
        "no file": (["nowhere.ipynb"], "no notebook at nowhere.ipynb"),
    },
    "vlm": {
        "missing": ([], "--config_yaml"),
        "wrong": (["--config_yaml", str(RUN)], "datasets.vla_data: this program learns from language alone"),
        "no file": (["--config_yaml", "nowhere.yaml"], "nowhere.yaml"),
    },
    "export": {
        "missing": ([], "run"),
        "wrong": ([str(RUN), "out", "--head", "mlp"], "single head"),
        "no file": (["nowhere", "out"], "nowhere"),
    },
    "graph": {
        "missing": ([], "run"),
        "wrong": ([str(RUN), "out", "--head", "mlp"], "single head"),
        "no file": (["nowhere", "out"], "nowhere"),
    },
    "evaluate": {
        "missing": ([], "--run"),
        "wrong": (["--run", str(RUN), "evaluation.episods=3"], "did you mean 'evaluation.episodes'"),
        "no file": (["--run", "nowhere"], "nowhere"),
    },
    "report": {
        "missing": ([], "run"),
        "wrong": (["--verfy", "nowhere"], "--verfy"),
        "no file": (["nowhere"], "no evaluation in nowhere"),
    },
    "merge": {
        "missing": ([], "folder"),
        "wrong": (["--fodler", "nowhere"], "--fodler"),
        "no file": (["nowhere"], "no shards in nowhere"),
    },
    "compare": {
        "missing": ([str(RUN)], "run_b"),
        "wrong": ([str(RUN), str(RUN), "--allow", "protocol.max_stps"], "did you mean 'protocol.max_steps'"),
        "no file": (["nowhere", str(RUN)], "nowhere"),
    },
    "results": {
        "missing": ([], "folder"),
        "wrong": (["nowhere", "--ot", "board.md"], "--ot"),
        "no file": (["nowhere"], "no summary.json below nowhere"),
    },
    "record": {
        "missing": (["--tasks", "drawer-open-v3"], "--out"),
        "wrong": (["--tasks", "drawer-open-v9", "--out", "new"], "did you mean 'drawer-open-v3'"),
        "no file": (["--tasks", "drawer-open-v3", "--out", HERE], Path(HERE).name),
    },
    "collect": {
        "missing": (["--run", str(RUN)], "--out"),
        "wrong": (
            ["--run", str(RUN), "--out", "new", "evaluation.episods=3"],
            "did you mean 'evaluation.episodes'",
        ),
        "no file": (["--run", "nowhere", "--out", "new"], "nowhere"),
    },
    "validate": {
        "missing": ([], "the dataset's folder is missing"),
        "wrong": (["--horizon", "x", "nowhere"], "--horizon"),
        "no file": (["nowhere"], "nowhere"),
    },
    "doctor": {
        "missing": ([], "path"),
        "wrong": (["nowhere", "--action_mode", "relativ"], "relativ"),
        "no file": (["nowhere"], "nowhere"),
    },
    "dataset": {
        "missing": (["delete", "nowhere", "new"], "--episodes"),
        "wrong": (["delet", "nowhere", "new"], "invalid choice: 'delet'"),
        "no file": (["convert", "nowhere", "new", "--version", "3.0"], "nowhere"),
    },
    "from_hdf5": {
        "missing": (["nowhere.hdf5", "new"], "--images"),
        "wrong": (["nowhere.hdf5", "new", "--images", "flop"], "invalid choice: 'flop'"),
        "no file": (["nowhere.hdf5", "new", "--images", "flip"], "nowhere.hdf5 is missing"),
    },
    "from_rlds": {
        "missing": (["nowhere", "new", "--fps", "5"], "--last_step"),
        "wrong": (["nowhere", "new", "--fps", "x", "--last_step", "keep"], "--fps"),
        "no file": (["nowhere", "new", "--fps", "5", "--last_step", "keep"], "nowhere"),
    },
    "conversations": {
        "missing": ([], "--config_yaml"),
        "wrong": (["--config_yaml", str(RUN), "--sample", "x"], "--sample"),
        "no file": (["--config_yaml", "nowhere.yaml"], "nowhere.yaml"),
    },
    "convert": {
        "missing": ([], ""),
        "wrong": (["--format", "openpi_pi9", "here", "--config", PI0, "--out", "new"], "openpi_pi9"),
        "no file": (["--format", "openpi_pi0", "nowhere", "--config", PI0, "--out", "new"], "nowhere"),
    },
    "fluxvla": {
        "missing": (["config.py"], "--out"),
        "wrong": (["config.py", "--out", "x.yaml", "--colour", "red"], "--colour"),
        "no file": (["nowhere.py", "--out", "x.yaml"], "nowhere.py"),
    },
    "list": {"wrong": (["--colour", "red"], "--colour")},
    "simulators": {"wrong": (["metawolrd"], "did you mean 'metaworld'")},
    "trust": {
        "missing": ([], "FILE"),
        "wrong": (["code.txt"], "code.txt is neither a Python file (.py) nor a notebook"),
        "no file": (["mixture.py"], "imports: no file"),
    },
    "new": {
        "missing": (["head"], "name"),
        "wrong": (["hed", "Mine"], "'hed'"),
        "no file": (["head", "Mine", "--out", HERE], Path(HERE).name),
    },
}
CASES = {
    f"{command}: {what}": (command, *case) for command, all in MISTAKES.items() for what, case in all.items()
}


def test_the_mistakes_of_every_command_are_tried():
    assert set(MISTAKES) == set(COMMANDS)


@pytest.mark.parametrize("command, words, named", CASES.values(), ids=CASES)
def test_a_mistake_is_one_line(command, words, named, server, tmp_path):
    done = server({"program": ["-m", "vla_bench", command, *words], "cwd": str(tmp_path)})
    told = [line for line in done["output"].splitlines() if not line.startswith((" ", "usage:"))]
    assert done["returncode"] in (1, 2) and len(told) == 1, done["output"]
    assert re.search("error: |problem: ", told[0]) and named in told[0], told[0]
    assert not list(tmp_path.iterdir()), "a command that is refused leaves something behind"


def test_a_word_that_is_no_command_is_refused(server):
    done = server({"program": ["-m", "vla_bench", "evalute"]})
    assert done["returncode"] == 2 and "invalid choice: 'evalute'" in done["output"]


@pytest.mark.parametrize(
    "words, missing",
    [
        (["train", "--config_yaml", str(RUN)], "torch"),
        (["evaluate", "--run", str(RUN)], "torch"),
        (["report", str(RUN), "--verify"], "torch"),
        (["convert", "--list"], "torch"),
        (["validate", "nowhere"], "pyarrow"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_package_that_is_not_installed_is_one_line(words, missing, server, tmp_path):
    program = (
        f"import sys; sys.modules[{missing!r}] = None; from vla_bench.__main__ import main; main({words!r})"
    )
    (tmp_path / "bare.py").write_text(program)
    done = server({"program": [str(tmp_path / "bare.py")]})
    hint = f"error: vla_bench {words[0]} needs '{missing}': pip install \"vla_bench[train]\""
    assert done["returncode"] == 2 and done["output"].splitlines()[-1] == hint, done["output"]
    assert "Traceback" not in done["output"]


@pytest.fixture
def evaluated(tmp_path, capsys):
    """A run whose checkpoint has a manifest, evaluated."""
    run = shutil.copytree(RUN, tmp_path / "llava")
    write_manifest(checkpoint_of(run))
    main(["evaluate", "--run", str(run), "--verify", *SHORT])
    capsys.readouterr()
    return run


def checkpoint_of(run):
    return max((run / "checkpoints").iterdir())


@pytest.mark.parametrize("folder", ["", "eval/point"])
def test_report_says_which_checkpoint_its_numbers_belong_to(folder, evaluated, capsys):
    main(["report", str(evaluated / folder), "--verify"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"point: episodes of {checkpoint_of(evaluated).name}, every byte is as it was saved"


def test_report_says_where_there_is_no_manifest(evaluated, capsys):
    (checkpoint_of(evaluated) / "manifest.json").unlink()
    main(["report", str(evaluated), "--verify"])
    assert "it has no manifest to compare with" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("command", [["evaluate", "--run"], ["report"]], ids=lambda words: words[0])
def test_verify_finds_a_flipped_bit(command, evaluated, capsys):
    weights = checkpoint_of(evaluated) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main([*command, str(evaluated), "--verify"])
    told = capsys.readouterr().err
    assert left.value.code == 2 and "model.safetensors has other content than when it was saved" in told
    assert len(told.splitlines()) == 1


def test_verify_finds_numbers_of_other_weights(evaluated, capsys):
    """As after a training that went on."""
    checkpoint = checkpoint_of(evaluated)
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    write_manifest(checkpoint)
    main(["report", str(evaluated)])
    with pytest.raises(SystemExit):
        main(["report", str(evaluated), "--verify"])
    assert re.search("holds episodes of the policy [0-9a-f]{16}, .* is [0-9a-f]{16}", capsys.readouterr().err)


def test_a_simulator_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PointReach, "make", lambda self, task, seed: importlib.import_module("physx"))
    run = shutil.copytree(RUN, tmp_path / "llava", ignore=shutil.ignore_patterns("eval"))
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "--run", str(run), "evaluation.num_envs=1", *SHORT])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and "No module named 'physx' in reach-red seed" in told[0]


PACKAGE = Path(__file__).parents[1] / "vla_bench"
FILES = [
    "own_code",
    "training/imitation",
    "training/cotrain",
    "training/adapters",
    "training/submit",
    "training/vlm",
    "training/export",
    "evaluation/program",
    "evaluation/report",
    "evaluation/merge",
    "rl/adapt",
    "serving/policy",
    "serving/server",
    "serving/exported",
    "serving/gr00t",
    "scaffold",
]
FILES += [f"models/{name}" for name in ("compatibility", "interop/convert", "interop/fluxvla")]
FILES += [
    f"models/backbones/{name}" for name in ("tiny", "tiny_composed")
]  # components: see test_programs.py


@pytest.mark.parametrize("file", FILES)
def test_a_program_can_be_run_as_a_file(file, tmp_path, server):
    done = server({"program": [str(PACKAGE / f"{file}.py"), "--help"], "cwd": str(tmp_path)})
    assert done["returncode"] == 0 and "usage:" in done["output"], done["output"]
