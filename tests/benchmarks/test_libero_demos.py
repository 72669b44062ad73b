"""The scripted expert in LIBERO-Object: how often it succeeds, what is recorded, and that a replay succeeds again."""

import os

import numpy as np
import pytest
from PIL import Image

from vla_bench.benchmarks import libero as libero_module
from vla_bench.benchmarks.libero import LiberoObject
from vla_bench.benchmarks.libero_demos import GRASPS, NoisyBenchmark, grasp_action, libero_expert, record
from vla_bench.benchmarks.point import PointReach
from vla_bench.benchmarks.record import RecordedBenchmark, _play
from vla_bench.data.layout import Layout, PolicySpec
from vla_bench.evaluation.rollout import EvaluationSettings, evaluate
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.replay import RandomPolicy, ReplayPolicy
from vla_bench.serving.server import serve_in_thread

STATES = int(
    os.environ.get("VLA_BENCH_LIBERO_STATES", "1")
)  # official initial states per task; 10 in make libero
TASKS = [f"pick_up_the_{thing}_and_place_it_in_the_basket" for thing in GRASPS]


def spec_of(benchmark, **changes):
    spec = benchmark.spec
    values = {
        "action": spec.action,
        "state": spec.state,
        "cameras": spec.cameras,
        "image_size": spec.image_size,
    }
    values |= {"horizon": 8, "control_rate": spec.control_rate, "normalization": {"action": "identity"}}
    return PolicySpec(**values | {"dataset": "demos", "statistics_hash": "0" * 16} | changes)


@pytest.mark.parametrize("thing", GRASPS)
def test_actions_are_bounded_and_kept_by_single_precision(thing):
    rng = np.random.default_rng(0)
    for _ in range(20):
        hand, lying = rng.uniform(-0.4, 0.4, 3), rng.uniform(-0.3, 0.3, 3)
        action = grasp_action(hand, 0.08, lying, np.array([0, 0.26, 0]), GRASPS[thing], rest=0.02)
        assert np.abs(action).max() <= 1 and (action[3:6] == 0).all() and action[6] in (-1, 1)
        np.testing.assert_array_equal(np.float32(action), action)


def test_noise_is_executed_and_not_recorded():
    kept = []
    recorded = RecordedBenchmark(NoisyBenchmark(PointReach(max_steps=6), 0.5), kept.append)
    _play(recorded, "reach-red", 3, lambda env: lambda seen: np.array([0.5, 0.25]))
    rng = np.random.default_rng(NoisyBenchmark(PointReach(), 0.5).make("reach-red", 3).start)
    steps = np.diff(kept[0].state, axis=0)
    assert (kept[0].action == np.float32([0.5, 0.25])).all()
    noise = [0.5 * rng.normal(size=2) for _ in range(6)]
    clear = [
        i for i in range(5) if (1 < kept[0].state[i : i + 2]).all() and (kept[0].state[i : i + 2] < 30).all()
    ]
    assert clear
    for i in clear:  # a point moves by two pixels for an action of 1, at most
        wanted = 2 * np.clip([0.5 + noise[i][0], 0.25], -1, 1)
        np.testing.assert_allclose(steps[i], wanted, atol=1e-5)


def test_the_expert_succeeds_from_official_initial_states(libero_installed, monkeypatch):
    """At least 95 of 100, ten of each task."""
    monkeypatch.setattr(libero_module.LiberoEnvironment, "_observe", lambda self: {})  # nobody looks
    benchmark, failed = LiberoObject(image_size=32), []
    for task in benchmark.tasks():
        for scene in range(STATES):
            env = benchmark.make(task, scene)
            env.reset()
            act, step = libero_expert(env), None
            while step is None or not step.done:
                step = env.step(act({}), observe=False)
            failed += [] if step.success else [(task, scene)]
            env.close()
    benchmark.close()
    print(f"{10 * STATES - len(failed)} of {10 * STATES}; failed: {failed}")
    assert len(failed) <= 0.05 * 10 * STATES, failed


@pytest.fixture(scope="module")
def demonstrations(libero_installed):
    """Of every task as many as asked for, without noise, and the benchmark that they were made in."""
    benchmark, kept = LiberoObject(image_size=32), []
    recorded = RecordedBenchmark(benchmark, kept.append)
    for task in benchmark.tasks()[: 10 if STATES > 1 else 2]:
        for scene in (20, 21):
            _play(recorded, task, scene, libero_expert)
    yield benchmark, kept
    benchmark.close()


def test_a_replay_through_server_and_client_succeeds_again(demonstrations, tmp_path):
    """Layouts, rates and conventions agree from end to end: at least 95% of what succeeded does so again."""
    benchmark, kept = demonstrations
    good = [demo for demo in kept if demo.success]
    assert len(good) >= 0.9 * len(kept)
    episodes = []
    for demo in good:
        lang = benchmark.instruction(demo.task)
        images = zip(*(demo.images[camera] for camera in benchmark.cameras), strict=True)
        seen = [
            {"image": [Image.fromarray(frame) for frame in frames], "lang": lang, "state": np.float64(state)}
            for frames, state in zip(images, demo.state, strict=True)
        ]
        episodes.append((seen, demo.action))
    tasks = sorted({demo.task for demo in good})
    settings = EvaluationSettings("libero_object", tasks, episodes=2, first_seed=50020, n_action_steps=5)
    with serve_in_thread(ReplayPolicy(spec_of(benchmark), episodes)) as server:
        with PolicyClient(server.url, images="png") as client:
            summary = evaluate(client, benchmark, settings, tmp_path / "out", show_progress=False)
    again = summary["successes"]
    print(f"{again} of {len(good)} succeeded again")
    assert again >= 0.95 * len(good)


def test_a_recording_holds_what_was_done(libero_installed, tmp_path):
    from vla_bench.data.lerobot import LeRobotDataset
    from vla_bench.data.validation import validate

    report = record(tmp_path / "data", TASKS[2:3], episodes=1, image_size=64, noise=0.1, first_seed=4)
    data = LeRobotDataset(tmp_path / "data")
    benchmark = LiberoObject(image_size=64)
    assert report["episodes"] == 1 and len(data) == report["frames"] > 40
    assert validate(tmp_path / "data") == []
    assert (data.action_layout, data.state_layout) == (benchmark.spec.action, benchmark.spec.state)
    assert (data.fps, data.cameras, data.benchmark) == (20, benchmark.cameras, "libero_object")
    assert data[0]["lang"] == "pick up the butter and place it in the basket"


MISMATCHES = {
    "gripper": ({"gripper": "positive_opens"}, "expected 'positive_closes'"),
    "kind": ({"kind": "absolute"}, "expected 'delta'"),
    "rotation": ({"rotation": "euler_xyz"}, "expected 'axis_angle'"),
}


@pytest.mark.parametrize("changes, message", MISMATCHES.values(), ids=MISMATCHES)
def test_a_policy_of_another_layout_is_refused_before_the_first_reset(
    changes, message, libero_installed, tmp_path, monkeypatch
):
    def never(*_):
        raise AssertionError("a simulator was started")

    monkeypatch.setattr(libero_module, "LiberoSimulator", never)
    benchmark = LiberoObject(image_size=32)
    layout = Layout(**vars(benchmark.spec.action) | changes)
    policy = RandomPolicy(spec_of(benchmark, action=layout))
    settings = EvaluationSettings("libero_object", TASKS[:1], episodes=1)
    with pytest.raises(ValueError, match=message):
        evaluate(policy, benchmark, settings, tmp_path / "out", show_progress=False)
    assert not (tmp_path / "out" / "episodes.jsonl").exists()
