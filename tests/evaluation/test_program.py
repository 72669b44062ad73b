"""`vla_bench evaluate`: which run, which settings, and where the results go."""

import json
import shutil
from itertools import product
from math import comb, prod
from pathlib import Path

import pytest

from vla_bench.config import ConfigError, load_config
from vla_bench.evaluation.program import evaluate_run, flattery, main, run_folder
from vla_bench.evaluation.report import verify_text
from vla_bench.evaluation.rollout import EvaluationSettings
from vla_bench.evaluation.statistics import expected_best
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
        ([], {"batch_size": 1, "dataset": None, "head": None, "verify": False}),
        (["--verify"], {"batch_size": 1, "dataset": None, "head": None, "verify": True}),
        (
            ["--evaluation.batch_size", "2"],
            {"batch_size": 2, "dataset": None, "head": None, "verify": False},
        ),
        (["--dataset", "second"], {"batch_size": 1, "dataset": "second", "head": None, "verify": False}),
    ],
)
def test_each_option_reaches_the_policy_that_is_loaded(words, asked, run, monkeypatch, capsys):
    seen, load = [], Policy.from_pretrained
    monkeypatch.setattr(
        Policy,
        "from_pretrained",
        lambda folder, **more: seen.append((folder, more)) or load(folder, batch_size=more["batch_size"]),
    )
    main(["--run", str(run), *words, *SHORT])
    assert seen == [(run / "checkpoints/step_000003", asked)] and "reach-blue" in capsys.readouterr().out


def test_what_is_not_said_loads_the_first_robot_and_shows_progress(run, monkeypatch, capsys):
    seen, load = [], Policy.from_pretrained
    monkeypatch.setattr(Policy, "from_pretrained", lambda folder, **more: seen.append(more) or load(folder))
    evaluate_run(run, SHORT)
    assert seen == [{"batch_size": 1}] and "episode" in capsys.readouterr().err


def test_a_run_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--config_yaml/--run" in capsys.readouterr().err


@pytest.fixture
def best(run):
    """The same run, whose only checkpoint is the best of four by ten episodes of scenes from 40000 on."""
    told = {"step": 3, "metric": "eval/success_rate", "value": 0.5, "episodes": 20, "seeds": [40000, 40010]}
    (run / "best.json").write_text(
        json.dumps({**told, "candidates": [[1, 0.2], [2, 0.1], [3, 0.5], [4, 0.4]]})
    )
    return run


def test_the_best_checkpoint_comes_with_a_warning_and_a_folder_of_its_own(best, capsys):
    results, summary = evaluate_run(best, SHORT, checkpoint="best", show_progress=False)
    assert results == best / "eval" / "point_step_000003" and summary["episodes"] == 1
    told = capsys.readouterr().err
    assert "step 3 is the best of 4 checkpoints by eval/success_rate, 0.5 of 20 episodes" in told
    assert f"their mean of 0.3, the best would still show {expected_best(4, 20, 0.3):.3g}" in told
    assert verify_text(best).startswith("point_step_000003: episodes of step_000003, ")


@pytest.mark.parametrize("first, refused", [(39999, False), (40000, True), (40009, True), (40010, False)])
def test_the_scenes_that_chose_a_checkpoint_are_refused_unless_they_are_asked_for(best, first, refused):
    words = [*SHORT, f"evaluation.first_seed={first}"]
    if refused:
        with pytest.raises(ValueError, match="scenes 40000 to 40009 chose this checkpoint.*--same_seeds"):
            evaluate_run(best, words, checkpoint="best", show_progress=False)
        assert not (best / "eval").exists()
    evaluate_run(best, words, checkpoint="best", same_seeds=True, show_progress=False)


def test_a_checkpoint_that_no_episodes_chose_is_flattered_by_none(best):
    told = {"step": 3, "metric": "eval/action_error", "value": 0.5, "candidates": [[3, 0.5]]}
    (best / "best.json").write_text(json.dumps(told))
    assert flattery(best, EvaluationSettings("point")).endswith("; no episodes chose it")


@pytest.mark.parametrize("candidates, episodes, rate", [(3, 5, 0.3), (2, 8, 0.9)])
def test_the_best_of_several_is_what_enumeration_says(candidates, episodes, rate):
    one = [comb(episodes, x) * rate**x * (1 - rate) ** (episodes - x) for x in range(episodes + 1)]
    every = product(range(episodes + 1), repeat=candidates)
    expected = sum(max(xs) * prod(one[x] for x in xs) for xs in every) / episodes
    assert expected_best(candidates, episodes, rate) == pytest.approx(expected)


BENCHMARK = """
from vla_bench.benchmarks.point import PointReach
from vla_bench.registry import BENCHMARKS


@BENCHMARKS.register("mine")
class Mine(PointReach):
    '''A point of one's own.'''
"""


def test_a_benchmark_of_an_imported_file_runs_in_processes_of_its_own(run, tmp_path):
    (tmp_path / "mine.py").write_text(BENCHMARK)
    own = [f"imports=[{tmp_path}/mine.py]", "evaluation.benchmark=mine", *SHORT[1:], "evaluation.episodes=3"]
    evaluate_run(run, own, tmp_path / "alone", show_progress=False)
    evaluate_run(run, [*own, "evaluation.num_envs=2"], tmp_path / "beside", show_progress=False)
    one, two = ((tmp_path / name / "episodes.jsonl").read_text() for name in ("alone", "beside"))
    assert one == two and len(one.splitlines()) == 3
