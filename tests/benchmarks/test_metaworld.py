"""MetaWorld: episodes are pure functions of (task, seed), and the first observation tells the truth."""

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import Simulator, demonstrate

QUICKSTART = ["drawer-open-v3", "button-press-topdown-v3", "window-open-v3", "door-open-v3"]


@pytest.fixture
def simulator():
    made = []

    def make(task, size=48):
        made.append(Simulator(task, ["corner2"], (size, size)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def trace(simulator, seed, steps=8):
    """Everything that can be seen of a short episode, as bytes."""
    rng = np.random.default_rng(1)
    seen = [simulator.reset(seed).tobytes(), simulator.frames()[0].tobytes()]
    for _ in range(steps):
        observation, _ = simulator.step(rng.uniform(-1, 1, 4))
        seen += [observation.tobytes(), simulator.frames()[0].tobytes()]
    return seen


@pytest.mark.parametrize("task", ["drawer-open-v3", "door-open-v3"])
def test_an_episode_does_not_depend_on_the_one_before(task, simulator):
    fresh = {seed: trace(simulator(task), seed) for seed in (1, 2)}
    used = simulator(task)
    assert demonstrate(used, 3, render=False) is not None  # leaves the drawer open
    for seed in (2, 1, 2):
        assert trace(used, seed) == fresh[seed]
    assert fresh[1] != fresh[2]


def test_reset_renders_the_scene_that_mujoco_computes(simulator):
    import mujoco

    ours = simulator("window-open-v3")
    for seed in range(4):
        ours.reset(seed)
        image = ours.frames()[0]
        mujoco.mj_forward(ours.env.model, ours.env.data)
        assert np.array_equal(image, ours.frames()[0])


def test_reset_observes_the_scene_that_the_first_step_finds(simulator):
    ours = simulator("window-open-v3")
    for seed in range(4):
        handle = ours.reset(seed)[4:7]
        assert np.linalg.norm(ours.step(np.zeros(4))[0][4:7] - handle) < 1e-3


def test_the_reset_of_metaworld_itself_is_stale(simulator):
    """Or the two tests above could not fail."""
    ours = simulator("window-open-v3")
    for seed in range(4):
        handle = ours.reset(seed)[4:7]
        ours.env.seed(seed)
        assert np.linalg.norm(ours.env.reset()[0][4:7] - handle) > 5e-3


@pytest.mark.parametrize("task", QUICKSTART)
def test_the_scripted_expert_succeeds_with_noise(task, simulator):
    one = simulator(task)
    done = [demonstrate(one, seed, render=False, max_steps=200) for seed in range(50000, 50010)]
    assert sum(demo is not None for demo in done) >= 9
