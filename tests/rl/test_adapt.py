"""An adaptation: goes on as if it had not stopped, learns what was rewarded, and stops before it is lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_bench.benchmarks.benchmark import Step
from vla_bench.benchmarks.point import PointEnvironment
from vla_bench.config import ConfigError, load_config
from vla_bench.files import list_checkpoints
from vla_bench.rl import adapt, collect
from vla_bench.rl.adapt import (
    Collapse,
    credit,
    learn,
    play_groups,
    read_sections,
    set_up,
    train,
    trained_policy,
)
from vla_bench.rl.batch import in_batches
from vla_bench.training.loop import read_metrics

TIMES = ("play_s", "learn_s")


@pytest.fixture
def rewarded(monkeypatch):
    """Every second attempt is rewarded, by its random numbers."""
    plain = collect.episode_of

    def episode_of(attempt):
        episode = plain(attempt)
        episode.reward = float(attempt.noise % 2)
        return episode

    monkeypatch.setattr(collect, "episode_of", episode_of)


def numbers(run):
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def tensors(checkpoint):
    found = {
        name: load_file(checkpoint / name) for name in ("model.safetensors", "trainer/beside.safetensors")
    }
    state = torch.load(checkpoint / "trainer/optimizer.pt", weights_only=True)["optimizer"]["state"]
    return {**{f"{n}/{k}": v for n, each in found.items() for k, v in each.items()},
            **{f"{n}/{k}": v for n, each in state.items() for k, v in each.items()}}  # fmt: skip


@pytest.mark.parametrize("learns", ["grpo", "ppo", "backbone"])
def test_an_interrupted_run_makes_the_same_next_update(learns, config, rewarded):
    how = {"grpo": "", "ppo": "--rl.algorithm ppo", "backbone": "--trainer.freeze_modules vlm.model.lm_head"}[
        learns
    ]
    run = train(config(f"--trainer.max_train_steps 3 --trainer.resume true {how}"))
    last, seen = list_checkpoints(run)[-1], numbers(run)
    weights = tensors(last)
    stds = [tensors(each)["trainer/beside.safetensors/head.raw_std"] for each in list_checkpoints(run)]
    assert not torch.equal(*stds[1:])
    shutil.rmtree(last)
    train(config(f"--trainer.max_train_steps 3 --trainer.resume true {how}"))
    assert numbers(run) == seen
    again = tensors(last)
    assert again.keys() == weights.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, again[name])] == []


def test_each_update_learns_from_new_scenes(config, monkeypatch):
    asked, plain = [], collect.Collector.play

    def play(self, player, wanted):
        asked.extend((each.task, each.seed, each.noise) for each in wanted)
        return plain(self, player, wanted)

    monkeypatch.setattr(collect.Collector, "play", play)
    train(config("--rl.first_seed 200000"))
    assert len(set(asked)) == len(asked) == 12
    assert {(task, seed) for task, seed, _ in asked} == {
        (task, seed) for task in ("reach-red", "reach-blue") for seed in (200000, 200001)
    }


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_what_was_rewarded_becomes_more_likely(algorithm, config, rewarded):
    changes = f"--rl.algorithm {algorithm} --rl.epochs 4 --rl.groups 4 --trainer.learning_rate 1e-4"
    adaptation = set_up(config(changes))
    with adaptation.collector:
        groups = play_groups(adaptation, 4)
    batch = credit(adaptation, groups)
    rewards = torch.tensor([e.reward for group in groups for e in group for _ in e.decisions])
    row = learn(adaptation, batch)
    gain = in_batches(adaptation.learner, batch.decisions, 8)["log_prob"] - batch.log_probs
    assert 0 < rewards.mean() < 1
    assert gain[rewards == 1].mean() > 0.005 > -0.005 > gain[rewards == 0].mean()
    assert row["rl/update_kl"] > 0


def test_before_the_first_step_the_present_policy_is_the_one_that_played(config):
    adaptation = set_up(config("--trainer.freeze_modules vlm.model.lm_head"))
    with adaptation.collector:
        batch = credit(adaptation, play_groups(adaptation, 2))
    now = in_batches(adaptation.learner, batch.decisions, 8)["log_prob"]
    assert torch.allclose(now, batch.log_probs, atol=1e-4)
    assert torch.allclose(batch.reference, batch.log_probs, atol=1e-4)


def test_an_episode_without_an_outcome_is_counted_and_not_learned_from(config, monkeypatch):
    plain = PointEnvironment.step

    def step(self, action, *, observe=True):
        found = plain(self, action, observe=observe)
        odd = self.seed == 100_000 and self.task == "reach-red" and self.steps == 5
        return Step(found.observation, float("nan"), True) if odd else found

    monkeypatch.setattr(PointEnvironment, "step", step)
    run = train(config("--trainer.max_train_steps 1 --rl.refills 1"))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert (row["rl/episodes"], row["rl/left_out"], row["rl/groups_kept"]) == (6, 3, 1)
    assert row["rl/success_rate"] == 0
    assert row["rl/decisions"] == 3 * 7


def test_groups_that_say_nothing_are_replaced_until_it_is_enough(config):
    run = train(config("--trainer.max_train_steps 1 --rl.success_range [0.1,0.9] --rl.refills 3"))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert (row["rl/groups"], row["rl/groups_kept"], row["rl/decisions"]) == (6, 0, 0)


@pytest.mark.parametrize(("bound", "limit", "number"), [("max_kl", 5.0, 5.1), ("min_entropy", -3.0, -3.1)])
def test_a_collapse_stops_at_the_last_good_checkpoint(
    bound, limit, number, config, rewarded, monkeypatch, tmp_path
):
    whole, key = train(config("--run_id whole")), {"max_kl": "rl/kl", "min_entropy": "rl/entropy"}[bound]
    plain = adapt.update_row

    def update_row(adaptation, *what):
        return plain(adaptation, *what) | ({key: number} if adaptation.run.step == 1 else {key: 0.1})

    monkeypatch.setattr(adapt, "update_row", update_row)
    with pytest.raises(
        Collapse, match=f"update 2: {key} is {number}, .* rl.{bound}, {limit:g}; .*step_000001"
    ):
        train(config(f"--run_id lost --rl.{bound} {limit}"))
    assert [path.name for path in list_checkpoints(tmp_path / "lost")] == ["step_000001"]
    ours, theirs = (tensors(run / "checkpoints/step_000001") for run in (tmp_path / "lost", whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(
    config, rewarded, monkeypatch, tmp_path
):
    monkeypatch.setattr(adapt, "decisions_loss", lambda found, *_: found["log_prob"].sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan in update 1"):
        train(config())
    assert list_checkpoints(tmp_path / "run") == []


def test_a_policy_with_another_number_of_denoising_steps_is_refused(config):
    run = train(config("--trainer.max_train_steps 1"))
    assert trained_policy(run).spec == trained_policy(run, "reference").spec
    (run / "rl.json").write_text(json.dumps({"denoising_steps": 4}), encoding="utf-8")
    with pytest.raises(ValueError, match="acts with None denoising steps and learned with 4"):
        trained_policy(run)


def test_a_run_is_not_continued_with_another_protocol(config):
    train(config("--trainer.max_train_steps 1 --trainer.resume true"))
    with pytest.raises(ValueError, match="cannot be continued: protocol was"):
        set_up(config("--trainer.max_train_steps 1 --trainer.resume true --evaluation.max_steps 9"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("--rl.denoising_steps 4", "takes no such steps"),
        ("--trainer.ema_decay 0.9", "trainer.ema_decay"),
        ("--evaluation.first_seed 100000", "rl.first_seed"),
        ("--rl.exploration.stdd 1", "rl.exploration"),
        ("--evaluation.n_action_steps 9", "horizon is 4"),
        ("--rl.algorithm reinforce", "rl.algorithm"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(overrides, said, config, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train(config(overrides))
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_of_an_adaptation_runs_on_its_own(server):
    done = server({"notebook": str(Path(__file__).parents[2] / "experiments/rl.ipynb")})
    assert done["returncode"] == 0, done["output"][-4000:]


def test_the_shipped_configuration_has_no_unread_key():
    cfg = load_config(Path(__file__).parents[2] / "experiments/configs/rl.yaml")
    read_sections(cfg)
    assert [cfg.get(key) is None for key in ("seed", "run_id", "run_root_dir")] == [False] * 3
    cfg.require_read()
    assert cfg.unread() == []
