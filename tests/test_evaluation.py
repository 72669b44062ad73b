"""Closed-loop evaluation: pure episodes, any number of environments, nothing lost, nothing mixed up."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_bench.benchmarks.metaworld import MetaWorld, Simulator, demonstrate
from vla_bench.benchmarks.point import PointReach
from vla_bench.data.layout import PolicySpec
from vla_bench.evaluation.rollout import EvaluationSettings, Recording, evaluate, read_episodes
from vla_bench.evaluation.statistics import summarize, wilson_interval
from vla_bench.evaluation.workers import WorkerError

QUICKSTART = ["drawer-open-v3", "button-press-topdown-v3", "window-open-v3", "door-open-v3"]
HORIZON = 8


class StatePolicy:
    """Heads for a place near where the picture is brightest and jitters with its seed: sees, feels, and is random."""

    fingerprint = "state-policy"

    def __init__(self, benchmark, delay=0.0):
        spec = benchmark.spec
        self.delay, self.calls = delay, 0
        self.spec = PolicySpec(spec.action, spec.state, spec.cameras, spec.image_size, HORIZON, spec.control_rate,
                               {"action": "identity"}, "none", "none", spec.name)  # fmt: skip

    def predict(self, observation, *, seed):
        self.calls += 1
        time.sleep(self.delay)
        pixels = np.asarray(observation["image"][0], np.float64).mean(axis=(0, 1)) / 255
        drive = np.resize(pixels - 0.4, self.spec.action.dim) - 0.3 * np.resize(
            observation["state"], self.spec.action.dim
        )
        jitter = np.random.default_rng([seed, len(observation["lang"])]).normal(
            size=(HORIZON, self.spec.action.dim)
        )
        return np.clip(drive + 0.5 * jitter, -1, 1)


def settings(**changes):
    base = EvaluationSettings(benchmark="point", episodes=6, first_seed=900, execute_steps=4)
    return replace(base, **changes)


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


# ---------------------------------------------------------------- statistics


def test_wilson_bounds_solve_their_equation():
    z = 1.959963984540054
    for n in (1, 10, 40, 500):
        for k in {0, 1, n // 2, n}:
            for bound in wilson_interval(k, n):
                # the true rate at which the observed one lies exactly z standard errors away
                assert abs(k / n - bound) == pytest.approx(z * np.sqrt(bound * (1 - bound) / n), abs=1e-7)


def test_summary_pools_episodes_and_averages_tasks():
    records = [
        {"task": t, "success": s, "steps": 5}
        for t, s in (("a", True), ("a", True), ("a", False), ("b", False))
    ]
    summary = summarize(records)
    assert (summary["success_rate"], summary["mean_over_tasks"]) == (0.5, pytest.approx(1 / 3))
    assert summary["per_task"]["a"]["confidence_interval"] == list(wilson_interval(2, 3))


# ---------------------------------------------------------------- MetaWorld


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
def test_an_episode_does_not_depend_on_what_was_played_before(task, simulator):
    fresh = {seed: trace(simulator(task), seed) for seed in (1, 2)}
    used = simulator(task)
    assert demonstrate(used, 3, render=False) is not None  # leaves the drawer open
    for seed in (2, 1, 2):
        assert trace(used, seed) == fresh[seed]
    assert fresh[1] != fresh[2]


def test_reset_shows_the_scene_that_the_first_step_finds(simulator):
    import mujoco

    ours = simulator("window-open-v3")
    for seed in range(4):
        handle = ours.reset(seed)[4:7]
        picture = ours.frames()[0]
        mujoco.mj_forward(ours.env.model, ours.env.data)
        assert np.array_equal(picture, ours.frames()[0])
        assert np.linalg.norm(ours.step(np.zeros(4))[0][4:7] - handle) < 1e-3

        ours.env.seed(seed)  # and MetaWorld's own reset does not: or this test could not fail
        stale = ours.env.reset()[0][4:7]
        assert np.linalg.norm(stale - handle) > 5e-3


def test_scripted_experts_succeed_with_noise(simulator):
    for task in QUICKSTART:
        one = simulator(task)
        done = [demonstrate(one, seed, render=False, max_steps=200) for seed in range(50000, 50010)]
        assert sum(demo is not None for demo in done) >= 9, task


# ---------------------------------------------------------------- any number of environments


def test_one_and_four_environments_give_the_same_file(tmp_path):
    asked = settings(benchmark="metaworld", tasks=QUICKSTART[:2], episodes=3, max_steps=22, videos_per_task=1)
    for num_envs in (1, 4):
        benchmark = MetaWorld(tasks=QUICKSTART[:2], image_size=48, max_steps=30)
        changed = replace(asked, num_envs=num_envs)
        evaluate(StatePolicy(benchmark), benchmark, changed, tmp_path / str(num_envs), show_progress=False)
        benchmark.close()
    one, four = files(tmp_path / "1"), files(tmp_path / "4")
    assert one == four and set(one) == {"episodes.jsonl", "summary.json", "fingerprint.json"}
    assert len({record["actions"] for record in read_episodes(tmp_path / "1" / "episodes.jsonl")}) == 6
    for name in ("drawer-open-v3_0.npz", "button-press-topdown-v3_0.npz"):
        a, b = (vars(Recording.load(tmp_path / n / "videos" / name)) for n in "14")
        assert a["frames"].shape == (23, 1, 48, 48, 3)
        assert all(np.array_equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------- interruptions


def evaluate_slowly(out):
    """Run in a process of its own by the test below."""
    policy = StatePolicy(PointReach(), delay=0.03)

    def note(observation, *, seed, predict=policy.predict):
        if not (pids := Path(out, "pids")).exists():  # once and whole: the kill comes at any moment after it
            pids.with_suffix(".new").write_text(
                json.dumps([child.pid for child in multiprocessing.active_children()])
            )
            pids.with_suffix(".new").replace(pids)
        return predict(observation, seed=seed)

    policy.predict = note
    evaluate(policy, PointReach(), settings(num_envs=2), out, show_progress=False)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_evaluation_continues_to_the_same_result(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluate(StatePolicy(PointReach()), PointReach(), settings(), whole, show_progress=False)
    command = [sys.executable, "-c", f"from test_evaluation import evaluate_slowly as e; e({str(killed)!r})"]
    process = subprocess.Popen(command, cwd=Path(__file__).parent)
    log = killed / "episodes.jsonl"
    wait_for(lambda: log.exists() and len(log.read_bytes().splitlines()) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = json.loads((killed / "pids").read_text())
    assert len(workers) == 2
    wait_for(lambda: not any(map(is_running, workers)), 10)  # no simulator is left behind
    (killed / "pids").unlink()
    kept = log.read_bytes()
    assert 3 <= len(kept.splitlines()) < 12 and not (killed / "summary.json").exists()

    log.write_bytes(kept + b'{"task": "reach-red", "epi')  # and the line that was being written
    policy = StatePolicy(PointReach())
    evaluate(policy, PointReach(), settings(), killed, show_progress=False)
    assert files(killed) == files(whole)
    everything = sum(record["predictions"] for record in read_episodes(log))
    assert 0 < policy.calls < everything  # the finished ones were not played again


def test_a_dead_simulator_is_named_and_nothing_is_lost(tmp_path):
    policy = StatePolicy(PointReach())

    def murderous(observation, *, seed, predict=policy.predict):
        if policy.calls == 40:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return predict(observation, seed=seed)

    policy.predict = murderous
    with pytest.raises(WorkerError, match=r"killed by signal 9 in reach-\w+ seed 90\d") as caught:
        evaluate(policy, PointReach(), settings(num_envs=2), tmp_path, show_progress=False)
    assert not multiprocessing.active_children()
    kept = len(read_episodes(tmp_path / "episodes.jsonl"))
    assert 0 < kept < 12 and f"{kept} of 12 episodes are finished and kept" in str(caught.value)
    summary = evaluate(StatePolicy(PointReach()), PointReach(), settings(), tmp_path, show_progress=False)
    assert summary["episodes"] == 12


def test_another_evaluation_does_not_continue_this_one(tmp_path):
    policy = StatePolicy(PointReach())
    evaluate(policy, PointReach(), settings(), tmp_path, show_progress=False)
    before, policy.calls = files(tmp_path), 0
    for changes, named in (
        ({"execute_steps": 5}, "protocol.execute_steps is 5 now and was 4"),
        ({"first_seed": 0}, "protocol.first_seed is 0 now and was 900"),
        ({"max_steps": 39}, "protocol.max_steps is 39 now and was 40"),
    ):
        with pytest.raises(ValueError, match=named):
            evaluate(policy, PointReach(), settings(**changes), tmp_path, show_progress=False)
    policy.fingerprint = "other weights"
    with pytest.raises(ValueError, match="policy is 'other weights' now"):
        evaluate(policy, PointReach(), settings(), tmp_path, show_progress=False)
    assert files(tmp_path) == before and policy.calls == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, named",
    [
        ({"cameras": ("gripperPOV",)}, r"build the benchmark with cameras=\['gripperPOV'\]"),
        ({"image_size": (224, 224)}, r"build the benchmark with image_size=\(224, 224\)"),
        ({"control_rate": 10.0}, "acts at 10 Hz, the benchmark runs at 80 Hz"),
        ({"action": {"gripper": "positive_opens"}}, "action gripper is 'positive_opens', expected 'positive_closes'"),
        ({"action": {"names": ("dx", "dy", "dz")}}, "action has 3 dimensions"),
        ({"state": {"frame": "base"}}, "state frame is 'base', expected 'world'"),
        ({"horizon": 3}, "set evaluation.execute_steps to at most 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_policy_that_does_not_fit_is_refused_before_the_first_episode(change, named, tmp_path):
    benchmark = MetaWorld(tasks=QUICKSTART[:1])
    policy = StatePolicy(benchmark)
    parts = {
        k: replace(getattr(policy.spec, k), **v) if isinstance(v, dict) else v for k, v in change.items()
    }
    policy.spec = replace(policy.spec, **parts)
    with pytest.raises(ValueError, match=named):
        evaluate(policy, benchmark, settings(benchmark="metaworld"), tmp_path / "out", show_progress=False)
    assert policy.calls == 0 and not (tmp_path / "out").exists()


def test_a_camera_that_the_simulator_lacks_is_refused_with_the_nearest(tmp_path):
    policy = StatePolicy(MetaWorld(tasks=QUICKSTART[:1]))
    policy.spec = replace(policy.spec, cameras=("corner22",))
    asked = settings(benchmark="metaworld", tasks=QUICKSTART[:1])
    with pytest.raises(ValueError, match="no camera 'corner22'; did you mean 'corner2'"):
        evaluate(policy, None, asked, tmp_path, show_progress=False)


def test_broken_predictions_are_refused(tmp_path):
    policy = StatePolicy(PointReach())
    for chunk, named in (
        (np.zeros((HORIZON, 3)), r"promises actions \[8, 2\] and returned \[8, 3\]"),
        (np.full((HORIZON, 2), np.inf), "not finite at step 0"),
    ):
        policy.predict = lambda observation, *, seed, chunk=chunk: chunk
        with pytest.raises(ValueError, match=named):
            evaluate(policy, PointReach(), settings(), tmp_path, show_progress=False)
