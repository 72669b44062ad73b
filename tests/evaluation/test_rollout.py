"""Closed-loop evaluation: the same numbers for any number of environments, and nothing that is broken gets in."""

from dataclasses import replace

import numpy as np
import pytest
import torch

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


NUMBERS = np.zeros((8, 2))
RUBBISH = {
    "wrong shape": (np.zeros((8, 3)), r"promises actions \[8, 2\] and returned \[8, 3\]"),
    "a batch": (np.zeros((1, 8, 2)), r"promises actions \[8, 2\] and returned \[1, 8, 2\]"),
    "one number": (0.5, r"promises actions \[8, 2\] and returned \[\]"),
    "nothing in a list": ([], r"promises actions \[8, 2\] and returned \[0\]"),
    "infinite": (np.full((8, 2), np.inf), "not finite at step 0"),
    "NaN later": (np.where(np.arange(8)[:, None] == 5, np.nan, NUMBERS), "not finite at step 5"),
    "complex": (NUMBERS + 1j, r"returned complex128 \[8, 2\]; expected an array of real numbers \[8, 2\]"),
    "complex without imaginary part": (NUMBERS.astype(complex), "returned complex128"),
    "a list of complex": ((NUMBERS + 1j).tolist(), "returned complex128"),
    "a dictionary": (
        {"normalized_actions": NUMBERS},
        "returned a dict with the keys 'normalized_actions'; expected",
    ),
    "None": (None, "returned None; expected"),
    "a text": ("forward", "returned 'forward'; expected"),
    "texts of numbers": (NUMBERS.astype(str), r"returned <U32 \[8, 2\]; expected"),
    "bytes": (NUMBERS.astype("S3"), r"returned \|S3 \[8, 2\]; expected"),
    "ragged": ([[0.0, 0.0]] * 7 + [[0.0]], "returned a list that is no array of numbers .*; expected"),
    "a None inside": ([[0.0, None]] * 8, r"returned object \[8, 2\]; expected"),
    "objects": (NUMBERS.astype(object), r"returned object \[8, 2\]; expected"),
    "booleans": (NUMBERS > 0, r"returned bool \[8, 2\]; expected"),
    "dates": (NUMBERS.astype("datetime64[s]"), "returned datetime64"),
    "a generator": ((row for row in NUMBERS), "returned a generator; expected"),
    "a function": (np.zeros, "returned a .*function.*; expected"),
    "masked": (np.ma.masked_array(NUMBERS, mask=NUMBERS == 0), "masked numbers cannot be executed"),
    "a tensor with a gradient": (torch.zeros(8, 2, requires_grad=True), "returned a Tensor that is no array"),
    "a tensor without storage": (torch.zeros(8, 2, device="meta"), "returned a Tensor that is no array"),
    "a complex tensor": (torch.zeros(8, 2, dtype=torch.complex64), r"returned complex64 \[8, 2\]"),
}


@pytest.mark.parametrize("chunk, named", RUBBISH.values(), ids=RUBBISH)
@pytest.mark.filterwarnings("error")  # numpy warns where it drops an imaginary part
def test_broken_predictions_are_refused_in_one_line_that_names_the_policy(
    chunk, named, tmp_path, state_policy, run_evaluation
):
    policy = state_policy(PointReach())
    policy.predict = lambda observation, *, seed: chunk
    with pytest.raises(ValueError, match=f"^StatePolicy .*{named}") as caught:
        run_evaluation(tmp_path, policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "convert",
    [
        np.ndarray.tolist,
        np.float32,
        np.float16,
        torch.from_numpy,
        lambda chunk: torch.from_numpy(chunk).half(),
    ],
    ids=["lists", "float32", "float16", "a tensor", "a tensor of float16"],
)
def test_whatever_holds_real_numbers_is_accepted(convert, tmp_path, state_policy, run_evaluation, files):
    policies = [state_policy(PointReach()) for _ in range(2)]
    for policy, way in zip(policies, (np.asarray, convert), strict=True):
        policy.predict = lambda observation, *, seed, way=way: way(np.full((8, 2), 0.25))
    for name, policy in zip("ab", policies, strict=True):
        run_evaluation(tmp_path / name, policy)
    assert files(tmp_path / "a") == files(tmp_path / "b")
