"""Every evaluation below a folder: what is found, what stands beside what, and which key keeps two apart."""

import json
import shutil

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.results import (
    find_summaries,
    leaderboard,
    leaderboard_html,
    leaderboard_markdown,
    main,
    protocol_notes,
    results,
    write_leaderboard,
)
from vla_bench.evaluation.rollout import EvaluationSettings, fingerprint
from vla_bench.evaluation.statistics import success_interval, summarize


class Policy:
    def __init__(self, name):
        self.fingerprint = name


def write(
    folder, outcomes, policy="p", tasks=("push", "lift"), change=None, method="clopper_pearson", errors=0
):
    """An evaluation in which each task had these outcomes."""
    identity = fingerprint(Policy(policy), PointReach(), EvaluationSettings("point"))
    if change:
        *above, last = change[0].split(".")
        place = identity
        for name in above:
            place = place[name]
        place[last] = change[1]
    records = [
        {"task": task, "episode": i, "success": bool(success), "steps": 5}
        for task in tasks
        for i, success in enumerate(outcomes)
    ]
    for record in records[:errors]:
        record["error"] = "it hung"
    folder.mkdir(parents=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {**summarize(records, method), "fingerprint": identity}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    write(tmp_path / "oft/eval/point", [1, 1, 0])
    write(tmp_path / "deep/er/pi0/eval/point", [1, 1, 1], "q")
    return tmp_path


def overall(table):
    return table[table.task == "all"].set_index("run")


def test_all_summaries_are_found_however_deep(runs):
    table = overall(results(runs))
    assert table.successes.to_dict() == {"oft": 4, "deep/er/pi0": 6}
    assert list(results(runs).task) == ["push", "lift", "all"] * 2
    low, high = success_interval(4, 6)
    assert (table.loc["oft", "low"], table.loc["oft", "high"]) == (low, high)
    assert table.loc["oft", "mean_over_tasks"] == pytest.approx(2 / 3) and table.loc["oft", "policy"] == "p"


def test_like_stands_beside_like(runs):
    board = leaderboard(results(runs))
    assert board.shape == (2, 1) and list(board.index) == [("deep/er/pi0", "q"), ("oft", "p")]
    assert board.iloc[1, 0] == "66.7% [22.3, 95.7] 4/6"
    assert list(protocol_notes(runs).values()) == [[]]


@pytest.mark.parametrize(
    "key, value",
    [
        ("protocol.n_action_steps", 1),
        ("protocol.first_seed", 7),
        ("benchmark.max_steps", 400),
        ("benchmark.image_size", [64, 64]),
        ("benchmark.version.vla_bench", "9.9"),
        ("benchmark.renderer", "osmesa"),
    ],
)
def test_unlike_protocols_never_share_a_column_and_the_key_is_named(runs, key, value):
    write(runs / "other/eval/point", [1, 0, 0], "r", change=(key, value))
    board = leaderboard(results(runs))
    assert board.shape == (3, 2)
    assert ((board != "").sum(axis=1) == 1).all()
    notes = protocol_notes(runs)
    assert sorted(notes) == sorted(board.columns)
    assert all(len(lines) == 1 and lines[0].startswith(f"{key} = ") for lines in notes.values())
    assert f"{key} = {value!r}" in leaderboard_markdown(runs)
    assert key in leaderboard_html(runs)


def test_a_mean_over_other_tasks_is_another_column(runs):
    write(runs / "few/eval/point", [1, 1, 1], tasks=("push",))
    assert leaderboard(results(runs)).shape == (3, 2)
    assert "tasks = ['push']" in leaderboard_markdown(runs)


def test_more_episodes_of_the_same_scenes_share_a_column(runs):
    write(runs / "long/eval/point", [1] * 20)
    assert leaderboard(results(runs)).shape == (3, 1)


def test_one_policy_twice_under_one_protocol_has_two_rows(runs):
    write(runs / "oft/eval/point_again", [1, 0, 0])
    board = leaderboard(results(runs))
    assert sorted(board.loc[("oft", "p")].iloc[:, 0]) == ["33.3% [4.3, 77.7] 2/6", "66.7% [22.3, 95.7] 4/6"]


def test_other_benchmarks_are_other_columns_without_a_note(runs):
    write(runs / "oft/eval/plane", [1, 0, 0], change=("benchmark.name", "plane"))
    board = leaderboard(results(runs))
    assert [name.split()[0] for name in board.columns] == ["plane", "point"]
    assert "different protocols" not in leaderboard_markdown(runs)


def test_comparisons_and_rollouts_of_a_training_are_left_out(runs):
    write(runs / "oft/comparisons/pi0/a", [1, 1, 1])
    (runs / "oft/comparisons/pi0/comparison.json").write_text("{}")
    write(runs / "oft/rollouts/step_000100/process_0", [1, 1, 1])
    assert len(find_summaries(runs)) == 2


def test_a_summary_without_its_episodes_is_read(runs):
    before = results(runs)
    (runs / "oft/eval/point/episodes.jsonl").unlink()
    assert results(runs).equals(before)


def test_a_summary_that_its_episodes_contradict_is_refused(runs):
    path = runs / "oft/eval/point/summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "successes": 5}))
    with pytest.raises(
        ValueError, match="oft/eval/point/summary.json: 'successes' is 5, the episodes give 4"
    ):
        results(runs)


def test_intervals_of_older_summaries_are_exact_in_the_table(runs):
    write(runs / "old/eval/point", [1, 1, 0], method="wilson")
    path = runs / "old/eval/point/summary.json"
    content = json.loads(path.read_text())
    del content["interval_method"]
    content["fingerprint"]["protocol"]["execute_steps"] = content["fingerprint"]["protocol"].pop(
        "n_action_steps"
    )
    path.write_text(json.dumps(content))
    table = overall(results(runs))
    assert table.loc["old", "low"] == table.loc["oft", "low"]
    assert table.loc["old", "protocol"] == table.loc["oft", "protocol"]


def test_errors_stand_beside_the_rate(runs):
    write(runs / "hung/eval/point", [1, 1, 1], errors=2)
    write(runs / "lost/eval/point", [1], tasks=("push", "lift"), errors=2)
    board = leaderboard(results(runs))
    assert board.loc[("hung", "p")].iloc[0].endswith("4/4, 2 errors")
    assert board.loc[("lost", "p")].iloc[0] == "no outcome (2 errors)"
    assert board.index[-1] == ("lost", "p")


def test_names_that_markdown_or_html_would_read_are_safe(runs):
    shutil.move(runs / "oft", runs / "o|f<t")
    assert "| o\\|f<t |" in leaderboard_markdown(runs)
    assert "o|f&lt;t" in leaderboard_html(runs) and "f<t" not in leaderboard_html(runs)


@pytest.mark.parametrize(
    "name, writer", [("board.md", leaderboard_markdown), ("board.html", leaderboard_html)]
)
def test_the_page_is_written(runs, name, writer, capsys):
    main([str(runs), "--out", str(runs / name)])
    assert (runs / name).read_text() == writer(runs) and capsys.readouterr().out == ""


def test_another_ending_is_refused(runs):
    with pytest.raises(ValueError, match="as .md or .html, not as .pdf"):
        write_leaderboard(runs, runs / "board.pdf")


def test_the_program_prints_the_board(runs, capsys):
    main([str(runs)])
    assert capsys.readouterr().out == leaderboard_markdown(runs)


def test_nothing_below_a_folder_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert capsys.readouterr().err.startswith("error: no summary.json below ")


def test_a_folder_of_one_evaluation_is_named_by_itself(runs):
    assert set(results(runs / "oft/eval/point").run) == {"point"}
    assert set(results(runs / "oft").run) == {"oft"}
