"""`vla_bench evaluate`: which run, which settings, and where the results go."""

import json
import shutil
from pathlib import Path

import pytest

from vla_bench.config import ConfigError, load_config
from vla_bench.evaluation.program import evaluate_run, main, run_folder
from vla_bench.serving.policy import Policy

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
SHORT = ["evaluation.episodes=1", "--evaluation.max_steps", "3", "evaluation.tasks=[reach-blue]"]


@pytest.fixture
def run(tmp_path):
    copy = shutil.copytree(FIXTURES / "runs" / "llava", tmp_path / "runs" / "llava")
    shutil.rmtree(copy / "eval")
    return copy


def test_a_run_is_evaluated_into_its_own_folder(run):
    results, summary = evaluate_run(run, SHORT, show_progress=False)
    assert results == run / "eval" / "point" and json.loads((results / "summary.json").read_text()) == summary
    (record,) = [json.loads(line) for line in (results / "episodes.jsonl").read_text().splitlines()]
    assert (record["task"], record["seed"], record["steps"]) == ("reach-blue", 50000, 3)
    assert record["predictions"] == 2  # n_action_steps=2 of the run's own configuration


def test_the_results_go_where_they_are_wanted(run, tmp_path):
    results, summary = evaluate_run(run, SHORT, tmp_path / "elsewhere", show_progress=False)
    assert results == tmp_path / "elsewhere" and (results / "summary.json").is_file()
    assert summary["episodes"] == 1 and not (run / "eval").exists()


def test_the_file_of_a_run_stands_for_its_folder(tmp_path):
    file = tmp_path / "any.yaml"
    file.write_text("run_root_dir: runs\nrun_id: 7\n")
    assert run_folder(file, load_config(file)) == Path("runs/7")
    assert run_folder(tmp_path, load_config({"run_root_dir": "runs", "run_id": "x"})) == tmp_path


def test_a_key_that_nothing_reads_is_refused_before_anything_is_loaded(run):
    with pytest.raises(ConfigError, match="epsodes"):
        evaluate_run(run, ["evaluation.epsodes=1"], show_progress=False)
    with pytest.raises(ConfigError, match="evalution"):
        evaluate_run(run, ["evalution.episodes=1"], show_progress=False)
    assert not (run / "eval").exists()


@pytest.mark.parametrize("flag", ["--run", "--config_yaml"])
def test_the_program_prints_the_rates_of_what_it_evaluated(flag, run, tmp_path, capsys):
    main([flag, str(run), "--out", str(tmp_path / "results"), *SHORT])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "results" and printed[1].split()[:2] == ["reach-blue", "0/1"]
    assert len(printed) == 3


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_unless_it_is_not_wanted(progress, run, capsys):
    evaluate_run(run, SHORT, show_progress=progress)
    assert ("episode" in capsys.readouterr().err) == progress


def test_an_error_is_one_line_and_exit_status_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--run", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "nowhere" in lines[0]


@pytest.mark.parametrize(
    "words, asked",
    [
        ([], {"dataset": None, "verify": False}),
        (["--verify"], {"dataset": None, "verify": True}),
        (["--dataset", "second"], {"dataset": "second", "verify": False}),
    ],
)
def test_each_option_reaches_the_policy_that_is_loaded(words, asked, run, monkeypatch, capsys):
    seen, load = [], Policy.from_pretrained
    monkeypatch.setattr(
        Policy, "from_pretrained", lambda folder, **more: seen.append((folder, more)) or load(folder)
    )
    main(["--run", str(run), *words, *SHORT])
    assert seen == [(run, asked)] and "reach-blue" in capsys.readouterr().out


def test_what_is_not_said_loads_the_first_robot_and_shows_progress(run, monkeypatch, capsys):
    seen, load = [], Policy.from_pretrained
    monkeypatch.setattr(Policy, "from_pretrained", lambda folder, **more: seen.append(more) or load(folder))
    evaluate_run(run, SHORT)
    assert seen == [{"dataset": None, "verify": False}] and "episode" in capsys.readouterr().err


def test_a_run_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--config_yaml/--run" in capsys.readouterr().err
