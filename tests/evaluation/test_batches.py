"""Several environments and one batch: the same file for any number of them, whoever is in a batch."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation import rollout as rollout_module
from vla_bench.evaluation.program import evaluate_run
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate, read_episodes, run_episode
from vla_bench.evaluation.workers import LocalWorker
from vla_bench.serving.policy import Policy

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"
SHORT = EvaluationSettings(benchmark="point", episodes=3, n_action_steps=2, max_steps=12, batch_size=4)


@pytest.fixture(scope="module")
def policy():
    """A network that answers four observations at once, and counts how many of them were asked."""
    policy = Policy.from_pretrained(RUN, batch_size=4)
    policy.fills, whole = [], policy.predict_batch

    def counted(observations, seeds):
        policy.fills.append(len(observations))
        return whole(observations, seeds)

    policy.predict_batch = counted
    return policy


@pytest.fixture(scope="module")
def expected(policy, tmp_path_factory):
    """What one environment gives, one observation in each batch."""
    folder = tmp_path_factory.mktemp("one")
    evaluate(policy, None, SHORT, folder, show_progress=False)
    assert set(policy.fills) == {1}
    return {name: (folder / name).read_bytes() for name in ("episodes.jsonl", "summary.json")}


@pytest.fixture
def together(monkeypatch):
    """Environments in this process, all of which wait at the same moment."""
    workers = lambda benchmark, count, _: [LocalWorker(benchmark) for _ in range(count)]
    monkeypatch.setattr(rollout_module, "open_workers", workers)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_any_number_of_environments_gives_the_same_files(count, together, policy, expected, tmp_path):
    policy.fills.clear()
    evaluate(policy, None, replace(SHORT, num_envs=count), tmp_path, show_progress=False)
    assert max(policy.fills) == min(count, 4)  # else nothing was batched
    for name, content in expected.items():
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("count", [2, 4])
def test_environments_in_processes_give_the_same_files(count, policy, expected, tmp_path):
    evaluate(policy, None, replace(SHORT, num_envs=count), tmp_path, show_progress=False)
    assert (tmp_path / "episodes.jsonl").read_bytes() == expected["episodes.jsonl"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_simulator_that_fails_costs_one_retry_and_no_number(sent, policy, expected, tmp_path, capsys):
    whole, hit = policy.predict_batch, []

    def predict_batch(observations, seeds):
        if not hit and len(policy.fills) - begin == 5:
            hit.append(multiprocessing.active_children()[0].pid)
            os.kill(hit[0], sent)
        return whole(observations, seeds)

    begin, policy.predict_batch = len(policy.fills), predict_batch
    try:
        settings = replace(SHORT, num_envs=4, step_timeout_s=1.0)
        evaluate(policy, None, settings, tmp_path, show_progress=False)
    finally:
        policy.predict_batch = whole
    assert hit and capsys.readouterr().err.count("tried once more") == 1
    assert (tmp_path / "episodes.jsonl").read_bytes() == expected["episodes.jsonl"]
    assert not multiprocessing.active_children()


def test_an_answer_goes_to_the_environment_that_asked(together, state_policy, tmp_path):
    """A policy whose chunks differ with what it sees, and one that answers in another order."""

    class Together(state_policy):
        batch_size, swap = 4, False

        def attention(self, observation): ...

        def predict_batch(self, observations, seeds):
            found = [self.predict(each, seed=seed) for each, seed in zip(observations, seeds)]
            return found[::-1] if self.swap else found

    def records(folder, swap, **changes):
        policy, settings = Together(PointReach()), replace(SHORT, **changes)
        policy.swap = swap
        evaluate(policy, None, settings, tmp_path / folder, show_progress=False)
        return read_episodes(tmp_path / folder / "episodes.jsonl")

    alone = records("alone", False, batch_size=1)
    assert records("batched", False, num_envs=4) == alone
    assert records("swapped", True, num_envs=4) != alone


def test_a_policy_that_forgets_one_is_refused(together, state_policy, tmp_path):
    class Forgetful(state_policy):
        batch_size = 4

        def attention(self, observation): ...

        def predict_batch(self, observations, seeds):
            return [self.predict(observations[0], seed=seeds[0])]

    with pytest.raises(ValueError, match="shorter"):
        evaluate(
            Forgetful(PointReach()), None, replace(SHORT, num_envs=2), tmp_path / "out", show_progress=False
        )


def test_a_policy_that_answers_one_at_a_time_is_refused_before_the_first_scene(state_policy, tmp_path):
    policy = state_policy(PointReach())
    for play in (
        lambda: evaluate(policy, None, SHORT, tmp_path / "out"),
        lambda: run_episode(policy, PointReach(), "reach-red", 1, SHORT),
    ):
        with pytest.raises(ValueError, match="batch_size is 4, but a StatePolicy answers one observation"):
            play()
    assert not (tmp_path / "out").exists() and policy.calls == 0


def test_a_policy_of_another_batch_is_refused(policy, tmp_path):
    with pytest.raises(
        ValueError, match="is 3, but the policy was loaded with batch_size=4; load it with batch_size=3"
    ):
        evaluate(policy, None, replace(SHORT, batch_size=3), tmp_path / "out")


def test_one_episode_alone_is_that_of_the_evaluation(policy, expected):
    record, _ = run_episode(policy, PointReach(), "reach-red", SHORT.first_seed, SHORT, record=False)
    lines = [json.loads(line) for line in expected["episodes.jsonl"].decode().splitlines()]
    assert record == next(line for line in lines if (line["task"], line["episode"]) == ("reach-red", 0))


def test_the_program_loads_the_policy_for_the_batch(tmp_path, expected):
    words = "benchmark=point episodes=3 n_action_steps=2 max_steps=12 batch_size=4 first_seed=50000".split()
    words = [f"evaluation.{word}" for word in [*words, "num_envs=1", "videos_per_task=0", "attention=false"]]
    evaluate_run(RUN, words, tmp_path / "out", show_progress=False)
    assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == expected["episodes.jsonl"]
    identity = json.loads((tmp_path / "out" / "fingerprint.json").read_text())
    assert identity["protocol"]["batch_size"] == 4 and identity["policy"].endswith("-batch4")


def test_a_batch_of_one_asks_as_before(together, state_policy, tmp_path):
    alone = state_policy(PointReach())  # has no `predict_batch`
    evaluate(alone, None, replace(SHORT, batch_size=1, num_envs=2), tmp_path, show_progress=False)
    identity = json.loads((tmp_path / "fingerprint.json").read_text())
    predictions = [record["predictions"] for record in read_episodes(tmp_path / "episodes.jsonl")]
    assert "batch_size" not in identity["protocol"] and alone.calls == sum(predictions)
