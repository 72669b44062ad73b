"""Recorded actions through server, client and simulator."""

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import ACTION, STATE, MetaWorld, demonstrate
from vla_bench.data.layout import PolicySpec
from vla_bench.serving.chunking import ExecuteFirst, Scheduled
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.replay import ReplayPolicy
from vla_bench.serving.server import serve_in_thread

TASK, SEED, SIZE = "drawer-open-v3", 3, (32, 32)


@pytest.fixture(scope="module")
def benchmark():
    one = MetaWorld(tasks=[TASK], image_size=SIZE, max_steps=300)
    yield one
    one.close()


def play(benchmark, act):
    """Observations, actions and success of an episode."""
    environment = benchmark.make(TASK, SEED)
    observation, seen, done, actions = environment.reset(), [], [], []
    try:
        while True:
            seen.append(observation)
            actions.append(act(len(done), observation))
            step = environment.step(actions[-1])
            done.append(step.success)
            if step.done:
                return seen, np.array(actions), step.success
            observation = step.observation
    finally:
        environment.close()


def test_recorded_actions_succeed_again_through_the_whole_stack(benchmark):
    simulator = benchmark.take_simulator(TASK)
    demonstrated = demonstrate(simulator, SEED, noise=0.0, render=False).action.astype(np.float64)
    benchmark.give_back(simulator)
    seen, actions, success = play(benchmark, lambda step, _: demonstrated[step])
    assert success
    modes = {"action": "min_max", "state": "min_max"}
    spec = PolicySpec(action=ACTION, state=STATE, cameras=("corner2",), image_size=SIZE, horizon=12, control_rate=80.0,
                      normalization=modes, dataset="replayed", statistics_hash="0" * 16)  # fmt: skip
    policy = ReplayPolicy(spec, [(seen, actions)])
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        robot = Scheduled(lambda observation: client.predict(observation, seed=0), ExecuteFirst(6))
        _, again, success = play(benchmark, lambda _, observation: robot.act(observation))
    assert success
    np.testing.assert_array_equal(again, actions)
