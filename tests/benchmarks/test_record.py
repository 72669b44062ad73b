"""What is recorded of an episode is what was seen and done in it, and nothing is left of a recording that failed."""

from pathlib import Path

import numpy as np
import pytest

from vla_bench.benchmarks.point import REACH, PointReach
from vla_bench.benchmarks.record import RecordedEnvironment, record_episodes, recording
from vla_bench.data.edited_dataset import write_edited
from vla_bench.data.episode_plan import open_source, pieces_of
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.validation import validate
from vla_bench.evaluation.rollout import EvaluationSettings, run_episode
from vla_bench.serving.policy import Policy

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"


def expert(environment):
    target = environment.squares[environment.task]
    return lambda observation: np.clip((target - observation["state"]) / REACH, -1, 1)


def wander(seed):
    """Somebody who acts at random, the same each time."""
    rng = np.random.default_rng(seed)
    return lambda environment: lambda observation: rng.uniform(-1, 1, 2)


def played(seed: int, task: str, act) -> list:
    """Image, state and action of every step, by the environment itself."""
    env, rows, done = PointReach(max_steps=12).make(task, seed), [], False
    observation, act = env.reset(), act(env)
    while not done:
        action = act(observation)
        rows.append((np.asarray(observation["image"][0]), observation["state"], action))
        step = env.step(action)
        observation, done = step.observation, step.done
    return rows


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_rows_are_what_was_seen_and_done(version, tmp_path):
    point = PointReach(max_steps=12)
    record_episodes(point, wander(7), tmp_path / "new", episodes=1, failures=True, version=version)
    assert validate(tmp_path / "new", every_frame=True) == []
    rng = wander(7)
    expected = [row for task in point.tasks() for row in played(0, task, rng)]
    data = LeRobotDataset(tmp_path / "new")
    assert len(data) == len(expected)
    assert (data.columns["state"] == np.float32([row[1] for row in expected])).all()
    assert (data.columns["action"] == np.float32([row[2] for row in expected])).all()
    for i, (image, _, _) in enumerate(expected):
        assert np.abs(np.asarray(data[i]["image"][0]).astype(int) - image).mean() < 4
    assert [data[int(i)]["lang"] for i in data.starts[:-1]] == [
        point.instruction(task) for task in point.tasks()
    ]


def test_failures_are_left_out_unless_they_are_wanted(tmp_path):
    point, seeds = PointReach(max_steps=8), range(12)
    kept = {}
    for failures in (False, True):
        with recording(point, tmp_path / str(failures), failures=failures) as recorded:
            for seed in seeds:
                env = recorded.make("reach-red", seed)
                observation, act, done = env.reset(), expert(env.environment), False
                while not done:
                    step = env.step(act(observation))
                    observation, done = step.observation, step.done
                env.close()
        kept[failures] = [*open_source(tmp_path / str(failures)).details.values()]
    assert [row["seed"] for row in kept[True]] == list(seeds)
    assert kept[False] == [row for row in kept[True] if row["success"]] and 0 < len(kept[False]) < 12
    assert {row["benchmark_task"] for row in kept[True]} == {"reach-red"}


def test_what_is_known_of_an_episode_outlives_an_edit(tmp_path):
    record_episodes(PointReach(), expert, tmp_path / "one", episodes=2, version="v2.1")
    write_edited(pieces_of(open_source(tmp_path / "one"), [3, 0]), tmp_path / "new", "3.0")
    old, new = open_source(tmp_path / "one").details, open_source(tmp_path / "new").details
    assert new == {0: old[3], 1: old[0]} and old[3]["benchmark_task"] == "reach-blue"


def test_a_policy_is_recorded_and_does_not_notice(tmp_path):
    policy, settings = Policy.from_pretrained(RUN), EvaluationSettings(n_action_steps=2, max_steps=12)
    point = PointReach()
    plain = [run_episode(policy, point, "reach-red", seed, settings, record=False)[0] for seed in (1, 2)]
    with recording(point, tmp_path / "new", failures=True) as recorded:
        again = [
            run_episode(policy, recorded, "reach-red", seed, settings, record=False)[0] for seed in (1, 2)
        ]
    same = lambda rows: [
        {k: v for k, v in row.items() if "seconds" not in k and "time" not in k and "ms" not in k}
        for row in rows
    ]
    assert same(again) == same(plain)
    data = LeRobotDataset(tmp_path / "new")
    assert np.diff(data.starts).tolist() == [row["steps"] for row in plain]


def test_an_episode_that_begins_again_is_recorded_once(tmp_path):
    kept = []
    point = PointReach()
    env = RecordedEnvironment(point.make("reach-red", 0), point.spec, "reach-red", 0, kept.append)
    env.reset()
    env.step(np.ones(2))
    env.reset()
    env.step(-np.ones(2))
    env.step(-np.ones(2), observe=False)
    env.close()
    assert len(kept) == 1 and (kept[0].action == -1).all() and len(kept[0].action) == 2


def test_an_environment_that_raises_leaves_nothing(tmp_path):
    class Broken(PointReach):
        def make(self, task, seed):
            env = super().make(task, seed)
            if seed == 1:
                env.step = lambda action, observe=True: (_ for _ in ()).throw(
                    RuntimeError("the simulator died")
                )
            return env

    with pytest.raises(RuntimeError, match="the simulator died"):
        record_episodes(Broken(), expert, tmp_path / "new", episodes=3)
    assert not list(tmp_path.iterdir())


def test_too_few_successes_are_named_and_leave_nothing(tmp_path):
    still = lambda environment: lambda observation: np.zeros(2)
    with pytest.raises(ValueError, match="reach-red: 0 of 6 scenes ended in success, 2 are wanted"):
        record_episodes(PointReach(max_steps=3), still, tmp_path / "new", episodes=2, tries=3)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_never_written_over(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="exists and is never written over"):
        record_episodes(PointReach(), expert, tmp_path / "new", episodes=1)


def test_details_cannot_hide_what_is_computed(tmp_path):
    from vla_bench.benchmarks.record import open_writer

    point = PointReach()
    with pytest.raises(ValueError, match="episode 0: details cannot be called 'length'"):
        with open_writer(tmp_path / "new", point.spec) as writer:
            images = {"top": np.zeros((2, 32, 32, 3), np.uint8)}
            vectors = {"state": np.zeros((2, 2)), "action": np.zeros((2, 2))}
            writer.add_episode(images=images, **vectors, task="go", details={"length": 3})
