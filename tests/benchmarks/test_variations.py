"""One thing changed in MetaWorld's scenes: nothing else, nothing left behind, and the same change for everyone."""

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import MetaWorld
from vla_bench.benchmarks.variations import VARIATIONS

TASK = "drawer-open-v3"
ACTIONS = np.random.default_rng(0).uniform(-1, 1, size=(6, 4))


def played(benchmark, seed):
    """Images and states of a short episode."""
    env = benchmark.make(TASK, seed)
    seen = [env.reset(), *(env.step(action).observation for action in ACTIONS)]
    env.close()
    return np.stack([np.array(o["image"][0]) for o in seen]), np.stack([o["state"] for o in seen])


@pytest.fixture(scope="module")
def benchmarks():
    made = {name: MetaWorld(tasks=[TASK], image_size=48, variation=name) for name in (None, *VARIATIONS)}
    yield made
    for benchmark in made.values():
        benchmark.close()


@pytest.mark.parametrize("name", ["camera", "light", "distractor"])
def test_what_is_seen_changes_and_what_happens_does_not(name, benchmarks):
    images, states = played(benchmarks[None], 5)
    changed, same = played(benchmarks[name], 5)
    np.testing.assert_array_equal(same, states)
    assert all((a != b).any() for a, b in zip(changed, images, strict=True))


def test_another_start_is_three_centimetres_away_and_the_scene_is_the_same(benchmarks):
    (images, states), (changed, moved) = played(benchmarks[None], 5), played(benchmarks["start"], 5)
    assert np.linalg.norm(moved[0, :3] - states[0, :3]) == pytest.approx(0.03, abs=0.002)
    assert 0 < (images[0] != changed[0]).any(axis=-1).mean() < 0.5  # the drawer and the table stay


@pytest.mark.parametrize("name", VARIATIONS)
def test_an_episode_does_not_depend_on_those_before_it(name, benchmarks):
    first = played(benchmarks[name], 5)
    played(benchmarks[name], 6)
    for again, before in zip(played(benchmarks[name], 5), first, strict=True):
        np.testing.assert_array_equal(again, before)
    fresh = MetaWorld(tasks=[TASK], image_size=48, variation=name)
    for other, before in zip(played(fresh, 5), first, strict=True):
        np.testing.assert_array_equal(other, before)
    fresh.close()


@pytest.mark.parametrize("name", VARIATIONS)
def test_each_scene_has_a_change_of_its_own(name, benchmarks):
    seeds = range(20, 26)
    looks = [played(benchmarks[name], seed)[0][0].mean(axis=(0, 1)) for seed in seeds]
    plain = [played(benchmarks[None], seed)[0][0].mean(axis=(0, 1)) for seed in seeds]
    changes = np.round(np.array(looks) - plain, 3)
    assert len(np.unique(changes, axis=0)) == len(seeds)


def test_a_distractor_stands_still_while_the_hand_moves(benchmarks):
    images, _ = played(benchmarks[None], 5)
    changed, _ = played(benchmarks["distractor"], 5)
    places = (images != changed).any(axis=-1)
    assert (places == places[0]).mean() > 0.99 and places[0].sum() > 10


def test_a_varied_benchmark_is_another_protocol():
    specs = {name: MetaWorld(variation=name).spec for name in (None, *VARIATIONS)}
    assert len({spec.protocol for spec in specs.values()}) == len(specs)
    with pytest.raises(ValueError, match="no variation 'camra'.*'camera'"):
        MetaWorld(variation="camra")
