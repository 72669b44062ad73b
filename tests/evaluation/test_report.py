"""A report says what the files say: each number, and which file is wrong where two do not agree."""

import json

import pytest

from vla_bench.evaluation.report import load_evaluations, main, report_text, success_rows, success_table
from vla_bench.evaluation.statistics import summarize, wilson_interval

# not as many of one task as of the other, and tasks not in the order of the alphabet
OUTCOMES = {"push": (True, False, True), "lift": (False,)}
STEPS = {"push": (40, 200, 61), "lift": (200,)}
RECORDS = [
    {"task": task, "episode": i, "success": success, "steps": STEPS[task][i]}
    for task, outcomes in OUTCOMES.items()
    for i, success in enumerate(outcomes)
]
FINGERPRINT = {"policy": "p", "protocol": {"execute_steps": 3}}


def write(folder, records=RECORDS, summary=None):
    folder.mkdir(parents=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def summary(records=RECORDS, **changes):
    return {**summarize(records), "fingerprint": FINGERPRINT, **changes}


@pytest.fixture
def run(tmp_path):
    """A run with a finished evaluation, one that is not, and one in which no episode has ended."""
    write(tmp_path / "eval" / "sim", summary=summary())
    write(tmp_path / "eval" / "later", RECORDS[:2])
    write(tmp_path / "eval" / "never", [])
    return tmp_path


def test_all_evaluations_of_a_run_that_have_an_episode(run):
    found = load_evaluations(run)
    assert {name: (e["finished"], e["episodes"], e["successes"]) for name, e in found.items()} == {
        "later": (False, 2, 1),
        "sim": (True, 4, 2),
    }
    assert found["sim"]["records"] == RECORDS and found["later"]["records"] == RECORDS[:2]


def test_the_folder_of_one_evaluation_stands_for_itself(run):
    assert list(load_evaluations(run / "eval" / "sim")) == ["sim"]


def test_old_names_are_read_as_those_of_today(run):
    assert load_evaluations(run)["sim"]["fingerprint"] == {"policy": "p", "protocol": {"n_action_steps": 3}}


@pytest.mark.parametrize("folder", [".", "eval/never", "nowhere"])
def test_a_folder_without_any_episode_is_refused(tmp_path, folder):
    write(tmp_path / "eval" / "never", [])
    with pytest.raises(FileNotFoundError, match="evaluate first"):
        load_evaluations(tmp_path / folder)


def test_rows_hold_each_task_and_all_together(run):
    rows = {row.pop("task"): row for row in success_rows(load_evaluations(run)["sim"])}
    assert list(rows) == ["push", "lift", "all"]
    keys = ("successes", "episodes", "success_rate", "mean_steps")
    assert [tuple(row[key] for key in keys) for row in rows.values()] == [
        (2, 3, 2 / 3, 50.5),
        (0, 1, 0.0, None),
        (2, 4, 0.5, 50.5),
    ]
    for row, counts in zip(rows.values(), ((2, 3), (0, 1), (2, 4)), strict=True):
        assert (row["low"], row["high"]) == wilson_interval(*counts) and "errors" not in row


def test_the_table_holds_the_same_numbers_by_benchmark_and_task(run):
    table = success_table(run)
    assert list(table.index) == [
        ("later", "push"),
        ("later", "all"),
        ("sim", "push"),
        ("sim", "lift"),
        ("sim", "all"),
    ]
    assert table.loc[("sim", "push"), "mean_steps"] == 50.5 and table.loc[("sim", "all"), "successes"] == 2
    assert table.loc[("later", "all"), "high"] == wilson_interval(1, 2)[1]


def test_the_text_shows_rates_in_per_cent_with_their_intervals(run):
    assert (
        report_text(run)
        == """\
later (unfinished)
  push     1/2     50.0%  [  9.5,  90.5]    40 steps
  all      1/2     50.0%  [  9.5,  90.5]    40 steps
sim
  push     2/3     66.7%  [ 20.8,  93.9]    50 steps
  lift     0/1      0.0%  [  0.0,  79.3]     - steps
  all      2/4     50.0%  [ 15.0,  85.0]    50 steps"""
    )


def test_episodes_without_an_outcome_stand_beside_the_rate(tmp_path):
    hung = {"task": "push", "episode": 3, "success": False, "steps": 7, "error": "it hung"}
    write(tmp_path / "eval" / "sim", [RECORDS[0], hung])
    rows = success_rows(load_evaluations(tmp_path)["sim"])
    assert [(row["errors"], row["successes"], row["episodes"]) for row in rows] == [(1, 1, 1), (1, 1, 1)]
    assert "1 without an outcome" in report_text(tmp_path)


def test_without_any_outcome_there_is_no_rate(tmp_path):
    hung = {"task": "push", "episode": 0, "success": False, "steps": 7, "error": "it hung"}
    write(tmp_path / "eval" / "sim", [hung])
    assert report_text(tmp_path).splitlines()[1].split()[:3] == ["push", "0/0", "-%"]


@pytest.mark.parametrize("name", [name for name in summary() if name not in ("per_task", "fingerprint")])
def test_a_number_that_the_episodes_do_not_give_is_found(tmp_path, name):
    odd = {"confidence_interval": [0.0, 1.0], "episodes": 3}.get(name, 1)
    folder = write(tmp_path / "eval" / "sim", summary=summary(**{name: odd}))
    if name == "episodes":  # an evaluation with a smaller plan in the same folder
        assert load_evaluations(folder)["sim"]["episodes"] == 3
        return
    with pytest.raises(ValueError, match=f"summary.json: '{name}' is .*one of the two files was edited"):
        load_evaluations(folder)


def test_a_task_that_was_edited_is_found(tmp_path):
    changed = summary()
    changed["per_task"]["lift"]["successes"] = 1
    with pytest.raises(ValueError, match="'per_task' is"):
        load_evaluations(write(tmp_path / "eval" / "sim", summary=changed))


def test_a_summary_of_more_episodes_than_there_are_is_refused(tmp_path):
    folder = write(tmp_path / "eval" / "sim", RECORDS[:3], summary())
    with pytest.raises(ValueError, match="sums up 4 episodes, .*episodes.jsonl holds 3: evaluate again"):
        load_evaluations(folder)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"success_rate": "0.5"}, "'success_rate' is '0.5'"),
        ({"per_task": {"push": {}}}, "in 'per_task'"),
        ({"fingerprint": {"protocol": 3}}, "in 'fingerprint'"),
        ({"mean_over_tasks": [1]}, "'mean_over_tasks' is"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(tmp_path, change, named):
    with pytest.raises(ValueError, match=f"summary.json.*{named}"):
        load_evaluations(write(tmp_path / "eval" / "sim", summary=summary(**change)))


def test_the_program_prints_the_text(run, capsys):
    main([str(run)])
    assert capsys.readouterr().out == report_text(run) + "\n"


def test_the_program_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert capsys.readouterr().err.startswith("error: no evaluation in ")
