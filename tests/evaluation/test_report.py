"""A report says what the files say: each number, and which file is wrong where two do not agree."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vla_bench.data.layout import spec_to_dict
from vla_bench.evaluation.report import (
    load_evaluations,
    main,
    report_text,
    success_rows,
    success_table,
    verify_text,
)
from vla_bench.evaluation.statistics import success_interval, summarize
from vla_bench.evaluation.suites import mean_interval
from vla_bench.files import write_manifest
from vla_bench.serving.policy import Policy
from vla_bench.training.checkpoint import read_spec

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"

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
        assert (row["low"], row["high"]) == success_interval(*counts) and "errors" not in row


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
    assert table.loc[("later", "all"), "high"] == success_interval(1, 2)[1]


def test_the_text_shows_rates_in_per_cent_with_their_intervals(run):
    low, high = (100 * bound for bound in mean_interval([(2, 3), (0, 1)]))
    assert (
        report_text(run)
        == f"""\
later (unfinished)
  push     1/2     50.0%  [  1.3,  98.7]    40 steps
  all      1/2     50.0%  [  1.3,  98.7]    40 steps
sim
  push     2/3     66.7%  [  9.4,  99.2]    50 steps
  lift     0/1      0.0%  [  0.0,  97.5]     - steps
  all      2/4     50.0%  [  6.8,  93.2]    50 steps
  mean  over tasks  33.3%  [{low:5.1f}, {high:5.1f}]"""
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


@pytest.mark.parametrize(
    "name", [name for name in summary() if name not in ("per_task", "fingerprint", "interval_method")]
)
def test_a_number_that_the_episodes_do_not_give_is_found(tmp_path, name):
    odd = {"confidence_interval": [0.0, 1.0], "episodes": 3}.get(name, 1)
    folder = write(tmp_path / "eval" / "sim", summary=summary(**{name: odd}))
    if name == "episodes":  # an evaluation with a smaller plan in the same folder
        assert load_evaluations(folder)["sim"]["episodes"] == 3
        return
    with pytest.raises(ValueError, match=f"summary.json: '{name}' is .*one of the two files was edited"):
        load_evaluations(folder)


@pytest.mark.parametrize("method", ["clopper_pearson", "mid_p", "wilson", None])
def test_a_summary_is_read_with_the_interval_that_it_names(tmp_path, method):
    content = {**summarize(RECORDS, method or "wilson"), "fingerprint": FINGERPRINT}
    if method is None:  # as written before summaries named it
        del content["interval_method"]
    write(tmp_path / "eval" / "sim", summary=content)
    found = load_evaluations(tmp_path)["sim"]
    assert found["interval_method"] == (method or "wilson")
    assert found["confidence_interval"] == content["confidence_interval"]
    assert success_rows(found)[-1]["low"] == success_interval(2, 4)[0]  # shown as all others are


@pytest.mark.parametrize("named, written", [("mid_p", "wilson"), ("wilson", "clopper_pearson")])
def test_a_summary_that_names_another_interval_than_it_holds_is_found(tmp_path, named, written):
    content = {**summarize(RECORDS, written), "fingerprint": FINGERPRINT, "interval_method": named}
    with pytest.raises(ValueError, match="'confidence_interval' is .*one of the two files was edited"):
        load_evaluations(write(tmp_path / "eval" / "sim", summary=content))


@pytest.mark.parametrize("odd, said", [("wilsn", "did you mean 'wilson'"), (1, "expected a text")])
def test_an_unknown_interval_of_a_summary_is_named(tmp_path, odd, said):
    folder = write(tmp_path / "eval" / "sim", summary=summary(interval_method=odd))
    with pytest.raises(ValueError, match=f"summary.json: 'interval_method' is {odd!r}.*{said}"):
        load_evaluations(folder)


@pytest.mark.parametrize("method, said", [("wilson", "covers 92.2%"), ("mid_p", "mid_p: not exact")])
def test_an_interval_that_is_not_exact_says_what_it_covers(run, capsys, method, said):
    main([str(run), "--interval", method])
    printed = capsys.readouterr().out
    assert said in printed.splitlines()[-1] and "[ 15.0,  85.0]" in printed or method != "wilson"


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


# --- whether the results are those of the checkpoint that is there ----------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A run of version 0.1 with its checkpoint and its evaluation."""
    return shutil.copytree(FIXTURES / "runs" / "llava", tmp_path / "llava")


@pytest.fixture
def step(trained):
    """The newest checkpoint, with a manifest."""
    (checkpoint,) = (trained / "checkpoints").iterdir()
    write_manifest(checkpoint)
    return checkpoint


@pytest.mark.parametrize("place", [".", "eval/point"])
def test_results_of_the_newest_checkpoint_are_verified(trained, step, place, capsys):
    line = f"point: episodes of {step.name}, every byte is as it was saved"
    assert verify_text(trained / place) == line
    main([str(trained / place), "--verify"])
    assert capsys.readouterr().out == f"{report_text(trained / place)}\n{line}\n"


def test_a_checkpoint_without_a_manifest_says_so(trained):
    assert verify_text(trained) == "point: episodes of step_000003, it has no manifest to compare with"


@pytest.mark.parametrize("place", [".", "eval/point"])
def test_results_of_another_policy_are_found(trained, step, place):
    (trained / "eval/point/fingerprint.json").write_text(json.dumps({"policy": "0123456789abcdef"}))
    named = f"eval/point holds episodes of the policy 0123456789abcdef, .*{step.name} is 890b98089d95d9e1: "
    with pytest.raises(ValueError, match=named):
        verify_text(trained / place)


def test_each_evaluation_is_verified_and_the_one_of_another_policy_named(trained, step):
    for name in ("second", "another"):
        shutil.copytree(trained / "eval/point", trained / "eval" / name)
    assert verify_text(trained).splitlines() == [
        f"{name}: episodes of {step.name}, every byte is as it was saved"
        for name in ("another", "point", "second")
    ]
    (trained / "eval/second/fingerprint.json").write_text(json.dumps({"policy": "0" * 16}))
    with pytest.raises(ValueError, match="eval/second holds episodes of the policy 0000000000000000"):
        verify_text(trained)


def test_a_checkpoint_that_was_changed_is_found(trained, step):
    weights = step / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors"):
        verify_text(trained)


def test_of_several_robots_each_ones_results_are_its_own(trained, step, monkeypatch):
    spec = read_spec(step)
    (trained / "policies").mkdir()
    for robot in (spec, replace(spec, control_rate=7.0, dataset="second")):
        (trained / "policies" / f"{robot.dataset}.json").write_text(json.dumps(spec_to_dict(robot)))
    fingerprints, asked = {spec.dataset: "1" * 16, "second": "2" * 16}, []

    def load(folder, *, dataset, verify):
        asked.append((folder, dataset, verify))
        return SimpleNamespace(fingerprint=fingerprints[dataset])

    monkeypatch.setattr(Policy, "from_pretrained", load)
    evaluated = trained / "eval/point/fingerprint.json"
    for fingerprint in fingerprints.values():
        evaluated.write_text(json.dumps({"policy": fingerprint}))
        assert verify_text(trained).startswith(f"point: episodes of {step.name}")
    robots = sorted(fingerprints)
    assert asked == [(step, robot, True) for robot in robots] * 2
    evaluated.write_text(json.dumps({"policy": "0" * 16}))
    with pytest.raises(ValueError, match=" or ".join(fingerprints[robot] for robot in robots)):
        verify_text(trained)


@pytest.mark.parametrize("errors", [0, 1])
def test_a_summary_counts_episodes_without_an_outcome_too(tmp_path, errors):
    hung = {"task": "push", "episode": 3, "success": False, "steps": 7, "error": "it hung"}
    records = [*RECORDS, hung]
    folder = write(tmp_path / "eval" / "sim", records[: 4 + errors], summary(records))
    if errors:
        assert load_evaluations(folder)["sim"]["errors"] == 1
        return
    with pytest.raises(ValueError, match="sums up 5 episodes, .*episodes.jsonl holds 4"):
        load_evaluations(folder)
