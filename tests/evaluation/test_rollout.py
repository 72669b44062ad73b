"""Closed-loop evaluation: the same numbers for any number of environments, and nothing that is broken gets in."""

from dataclasses import replace

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import MetaWorld
from vla_bench.benchmarks.point import PointReach
from vla_bench.evaluation.rollout import Recording, evaluate, read_episodes

TASKS = ["drawer-open-v3", "button-press-topdown-v3"]


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Folders of one evaluation with one and with four environments."""
    return {count: tmp_path_factory.mktemp(f"envs_{count}") for count in (1, 4)}


@pytest.fixture
def evaluated(counts, state_policy, settings):
    """The folders, evaluated once."""
    for count, out in counts.items():
        if not (out / "summary.json").exists():
            asked = settings(benchmark="metaworld", tasks=TASKS, episodes=3, max_steps=22, videos_per_task=1)
            benchmark = MetaWorld(tasks=TASKS, image_size=48, max_steps=30)
            evaluate(
                state_policy(benchmark), benchmark, replace(asked, num_envs=count), out, show_progress=False
            )
            benchmark.close()
    return counts


def test_one_and_four_environments_write_the_same_files(evaluated, files):
    one, four = files(evaluated[1]), files(evaluated[4])
    assert one == four and set(one) == {"episodes.jsonl", "summary.json", "fingerprint.json"}


def test_every_episode_executes_other_actions(evaluated):
    assert len({record["actions"] for record in read_episodes(evaluated[1] / "episodes.jsonl")}) == 6


@pytest.mark.parametrize("task", TASKS)
def test_one_and_four_environments_record_the_same_frames(evaluated, task):
    one, four = (vars(Recording.load(evaluated[n] / "videos" / f"{task}_0.npz")) for n in (1, 4))
    assert one["frames"].shape == (23, 1, 48, 48, 3)
    assert all(np.array_equal(one[key], four[key]) for key in one)


@pytest.mark.parametrize(
    "chunk, named",
    [
        (np.zeros((8, 3)), r"promises actions \[8, 2\] and returned \[8, 3\]"),
        (np.full((8, 2), np.inf), "not finite at step 0"),
    ],
    ids=["wrong shape", "infinite"],
)
def test_broken_predictions_are_refused(chunk, named, tmp_path, state_policy, run_evaluation):
    policy = state_policy(PointReach())
    policy.predict = lambda observation, *, seed: chunk
    with pytest.raises(ValueError, match=named):
        run_evaluation(tmp_path, policy)
