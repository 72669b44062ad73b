"""An evaluation that version 0.1.0 began, with its own names in fingerprint.json."""

import json
import shutil
from pathlib import Path

import pytest

from vla_bench.evaluation.report import load_evaluations, report_text
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate
from vla_bench.serving.policy import Policy

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version_0_1"


@pytest.fixture
def run(tmp_path):
    """A run with two of four episodes finished."""
    return shutil.copytree(FIXTURES / "runs" / "llava", tmp_path / "llava")


def continued(run, **changes):
    asked = {"benchmark": "point", "episodes": 2, "n_action_steps": 2, "max_steps": 12, **changes}
    policy = Policy.from_pretrained(run)
    return evaluate(policy, None, EvaluationSettings(**asked), run / "eval" / "point", show_progress=False)


def test_it_continues_to_the_same_episodes(run, as_in_0_1):
    continued(run)
    episodes = (run / "eval" / "point" / "episodes.jsonl").read_bytes()
    assert episodes == (FIXTURES / "llava_episodes.jsonl").read_bytes()


def test_its_summary_has_the_names_of_today(run):
    summary = continued(run)
    assert summary["fingerprint"]["protocol"]["n_action_steps"] == 2
    assert json.loads((run / "eval" / "point" / "summary.json").read_text()) == summary


def test_another_protocol_does_not_continue_it(run):
    with pytest.raises(ValueError, match="protocol.n_action_steps is 3 now and was 2"):
        continued(run, n_action_steps=3)


def test_it_is_reported(run):
    assert load_evaluations(run)["point"]["episodes"] == 2
    assert report_text(run).splitlines()[0] == "point (unfinished)"


def test_an_old_summary_is_reported_with_the_names_of_today(run):
    summary = continued(run)
    protocol = dict(summary["fingerprint"]["protocol"])
    protocol["execute_steps"] = protocol.pop("n_action_steps")
    old = {**summary, "fingerprint": {**summary["fingerprint"], "protocol": protocol}}
    (run / "eval" / "point" / "summary.json").write_text(json.dumps(old))
    evaluation = load_evaluations(run)["point"]
    assert evaluation["fingerprint"] == summary["fingerprint"] and evaluation["finished"]
