"""The episodes that are collected are those of the evaluation, and only successes unless told otherwise."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla_bench.data.episode_plan import open_source
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.validation import validate
from vla_bench.evaluation.collect import collect
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate
from vla_bench.serving.policy import Policy

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"
SETTINGS = EvaluationSettings(benchmark="point", episodes=4, n_action_steps=2, max_steps=25, num_envs=1)


@pytest.fixture(scope="module")
def policy():
    return Policy.from_pretrained(RUN)


@pytest.fixture(scope="module")
def evaluated(policy, tmp_path_factory):
    """The lines of the same episodes by an evaluation."""
    out = tmp_path_factory.mktemp("eval")
    evaluate(policy, None, SETTINGS, out, show_progress=False)
    return [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("failures", [True, False])
def test_the_episodes_are_those_of_the_evaluation(failures, policy, evaluated, tmp_path):
    wanted = [row for row in evaluated if failures or row["success"]]
    assert 0 < len([row for row in evaluated if row["success"]]) < len(evaluated), "choose another max_steps"
    found = collect(policy, SETTINGS, tmp_path / "new", failures=failures)
    assert found == {"episodes": 8, "successes": sum(row["success"] for row in evaluated)}
    assert validate(tmp_path / "new") == []
    details, data = open_source(tmp_path / "new").details, LeRobotDataset(tmp_path / "new")
    assert [(d["benchmark_task"], d["seed"]) for d in details.values()] == [
        (r["task"], r["seed"]) for r in wanted
    ]
    assert np.diff(data.starts).tolist() == [row["steps"] for row in wanted]


def test_without_a_success_nothing_is_left(policy, tmp_path):
    none = EvaluationSettings(benchmark="point", episodes=1, n_action_steps=2, max_steps=1, num_envs=1)
    with pytest.raises(
        ValueError, match="no episode to record was a success; failures=True keeps the others"
    ):
        collect(policy, none, tmp_path / "new")
    assert not list(tmp_path.iterdir())
