"""MT50 by two protocols: the groups, the means, the images and the scenes."""

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import TASKS, MetaWorld
from vla_bench.benchmarks.metaworld_mt50 import (
    DIFFICULTY,
    PROTOCOLS,
    MT50LeRobot,
    MT50StarVLA,
    mt50_overall,
    task_weights,
)


def test_every_task_is_in_one_of_four_groups():
    assert set(DIFFICULTY) == set(TASKS)
    assert [list(DIFFICULTY.values()).count(group) for group in ("easy", "medium", "hard", "very_hard")] == [
        28,
        11,
        6,
        5,
    ]
    assert DIFFICULTY["drawer-open-v3"] == "easy" and DIFFICULTY["stick-pull-v3"] == "very_hard"


@pytest.mark.parametrize("seed", range(5))
def test_the_means_are_those_of_the_tasks_and_of_the_groups(seed):
    rates = dict(zip(TASKS, np.random.default_rng(seed).uniform(size=50)))
    groups = {
        group: [rates[task] for task in TASKS if DIFFICULTY[task] == group]
        for group in set(DIFFICULTY.values())
    }
    assert mt50_overall(rates, "lerobot") == pytest.approx(np.mean(list(rates.values())))
    assert mt50_overall(rates, "starvla") == pytest.approx(
        np.mean([np.mean(each) for each in groups.values()])
    )


def test_a_rate_of_fewer_tasks_is_no_rate_of_fifty():
    with pytest.raises(ValueError, match="1 are missing: push-v3"):
        mt50_overall({task: 1.0 for task in TASKS if task != "push-v3"}, "starvla")


@pytest.mark.parametrize("variant", PROTOCOLS)
def test_the_weights_of_all_tasks_are_one(variant):
    assert sum(task_weights(variant).values()) == pytest.approx(1)


def first(benchmark, seed):
    env = benchmark.make("hammer-v3", seed)
    seen = env.reset()
    env.close()
    benchmark.close()
    return seen["state"], np.asarray(seen["image"][0])


def test_starvla_sees_the_middle_of_scenes_4042_to_4051():
    state, image = first(MT50StarVLA(image_size=48), 50_007)
    _, whole = first(MetaWorld(image_size=72), 4049)
    assert (image == whole[12:60, 12:60]).all() and image.shape == (48, 48, 3)
    assert (first(MT50StarVLA(image_size=48), 17)[1] == image).all()
    assert not (first(MT50StarVLA(image_size=48), 8)[1] == image).all() and state.shape == (4,)


def test_lerobot_sees_the_whole_of_the_seeds_own_scene():
    _, image = first(MT50LeRobot(image_size=48), 50_007)
    assert (image == first(MetaWorld(image_size=48), 50_007)[1]).all()


def test_the_two_and_plain_metaworld_are_three_protocols():
    specs = [MT50LeRobot().spec, MT50StarVLA().spec, MetaWorld(image_size=480).spec]
    assert len({spec.name for spec in specs}) == len({spec.protocol for spec in specs}) == 3
    assert [(spec.max_steps, spec.image_size) for spec in specs[:2]] == [(500, (480, 480)), (400, (224, 224))]


def test_a_simulator_of_the_same_task_is_used_again():
    benchmark = MT50StarVLA(image_size=32)
    one = benchmark.make("hammer-v3", 0)
    simulator = one.simulator
    one.close()
    assert benchmark.make("hammer-v3", 1).simulator is simulator
    benchmark.give_back(simulator)
    other = benchmark.make("push-v3", 1)
    assert other.simulator is not simulator and type(other.simulator) is type(simulator)
    other.close()
    benchmark.close()
