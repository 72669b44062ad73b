"""Chunks that go on from others: a prefix through policy, server and client; the times; a delayed server on a clock."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.benchmarks.point import PointReach
from vla_bench.config import ConfigError, load_config
from vla_bench.data.layout import Layout, PolicySpec
from vla_bench.data.normalize import Normalizer, Statistics
from vla_bench.evaluation.rollout import EvaluationSettings, build_benchmark, run_episode
from vla_bench.evaluation.statistics import success_interval
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.frameworks.build import build_framework
from vla_bench.serving.checks import message_from
from vla_bench.serving.client import PolicyClient, RefusedError
from vla_bench.serving.policy import Policy
from vla_bench.serving.real_time import (
    MAX_LATE,
    DelayedServer,
    Prefix,
    RealTime,
    RealTimeRunner,
    check_prefix,
    check_times,
    prefix_message,
    prefix_weights,
)
from vla_bench.serving.replay import RandomPolicy, ReplayPolicy
from vla_bench.serving.server import serve_in_thread
from vla_bench.training.imitation import train

ROOT = Path(__file__).parents[2]
H = 8
SPEC = PolicySpec(
    action=Layout(("dx", "dy")),
    state=Layout(("x",)),
    cameras=("top",),
    image_size=(32, 32),
    horizon=H,
    control_rate=10.0,
    normalization={"action": "min_max", "state": "min_max"},
    dataset="toy",
    statistics_hash="0" * 16,
)
HEADS = {
    "GR00T": {"type": "FlowMatching", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "rtc_max_delay": 3,
              "num_future_tokens": 2, "dropout": 0.0, "num_inference_timesteps": 4},
    "OFT": {"type": "MLP", "hidden_size": 16, "num_queries": 2},
}  # fmt: skip


def statistics(low, high):
    low, high = np.array(low), np.array(high)
    return Statistics(
        min=low, max=high, mean=(low + high) / 2, std=(high - low) / 4, q01=low, q99=high, count=9
    )


NORMALIZERS = {
    "action": Normalizer(statistics([0.0, -10.0], [4.0, 30.0]), "min_max"),
    "state": Normalizer(statistics([0.0], [1.0]), "min_max"),
}


@pytest.fixture(scope="module")
def make_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny = {
        "image_size": 32,
        "hidden_size": 32,
        "num_layers": 1,
        "vision_hidden_size": 32,
        "vision_layers": 1,
    }
    write_tiny("qwen2_5_vl", folder, corpus=["go"], **tiny)

    def make(name="GR00T", head=None, **options):
        torch.manual_seed(0)
        section = {"name": name, "vlm": {"base_vlm": str(folder)}, "action_horizon": H}
        model = build_framework(
            section | {"action_model": HEADS[name] | (head or {})}, action_dim=2, state_dim=1
        )
        with torch.no_grad():
            for parameter in model.action_model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return Policy(model, SPEC, NORMALIZERS, "tiny", **options)

    return make


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy()


def seen(state=0.5, colour="red"):
    return {"image": [Image.new("RGB", (32, 32), colour)], "lang": "go", "state": [state]}


def old(rows=H, seed=0):
    return np.random.default_rng(seed).uniform([0.5, -5.0], [3.5, 25.0], (rows, 2))


@pytest.mark.parametrize("delay", [1, 3])
def test_a_model_trained_with_a_delay_keeps_the_decided_actions_exactly(policy, delay):
    given = old()
    chunk = policy.predict(seen(), seed=0, prefix=Prefix(given, delay, 4, "trained"))
    np.testing.assert_allclose(chunk[:delay], given[:delay], rtol=1e-6, atol=1e-5)
    free = policy.predict(seen(), seed=0)
    assert np.abs(chunk[delay:] - free[delay:]).max() > 1e-3  # and the rest knows of them


def test_the_ramp_keeps_the_frozen_actions_and_leaves_the_free_ones(policy):
    given = old()
    chunk = policy.predict(seen(), seed=0, prefix=Prefix(given, 2, 4, "ramp"))
    np.testing.assert_allclose(chunk[:2], given[:2], rtol=1e-5, atol=1e-4)
    assert np.abs(chunk[4:] - given[4:]).max() > 0.1


def test_guidance_comes_nearer_to_the_old_chunk_where_it_holds(policy):
    given, free = old(), policy.predict(seen(), seed=0)
    chunk = policy.predict(seen(), seed=0, prefix=Prefix(given, 2, 4, "guided"))
    assert np.abs(chunk[:2] - given[:2]).mean() < 0.7 * np.abs(free[:2] - given[:2]).mean()


@pytest.mark.parametrize("method", ["trained", "guided", "ramp"])
def test_without_a_delay_and_without_an_overlap_nothing_changes(policy, method):
    chunk = policy.predict(seen(), seed=3, prefix=Prefix(np.zeros((0, 2)), 0, H, method))
    np.testing.assert_allclose(chunk, policy.predict(seen(), seed=3), atol=1e-5)


def test_an_odd_batch_is_refused(make_policy):
    """Its last row is computed by other instructions: 1e-6 beside another place, so an answer would depend on neighbours."""
    with pytest.raises(ValueError, match="batch_size must be 1 or an even number, got 3"):
        make_policy(batch_size=3)


@pytest.mark.parametrize("size", [2, 4, 6])
@pytest.mark.parametrize("method", ["trained", "guided", "ramp"])
def test_an_answer_does_not_depend_on_who_else_asks(make_policy, method, size):
    policy = make_policy(batch_size=size)
    asked = [{**seen(0.1 * i), "prefix": Prefix(old(seed=i), 2, 4, method)} for i in range(3)]
    asked += [seen(0.7), {**seen(0.2), "prefix": Prefix(old(), 1, 4, method)}]
    together = policy.predict_batch(asked, range(5))
    alone = [policy.predict_batch([each], [seed])[0] for seed, each in enumerate(asked)]
    assert [each.tobytes() for each in together] == [each.tobytes() for each in alone]


@pytest.mark.parametrize("method", ["trained", "guided", "ramp"])
def test_a_prefix_travels_through_server_and_client(policy, method):
    prefix = Prefix(old(), 2, 4, method, "linear")
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        served = client.predict(seen(), seed=1, prefix=prefix)
    assert served.tobytes() == policy.predict(seen(), seed=1, prefix=prefix).tobytes()


@pytest.mark.parametrize(
    "name, methods, delay", [("GR00T", ("trained", "guided", "ramp"), 3), ("OFT", (), 0)]
)
def test_the_handshake_says_what_a_policy_takes(make_policy, name, methods, delay):
    policy = make_policy(name)
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        assert (client.prefix_methods, client.prefix_delay) == (methods, delay)
    assert (policy.prefix_methods, policy.prefix_delay) == (methods, delay)


def test_a_head_that_was_not_trained_with_a_delay_is_not_offered_as_such(make_policy):
    policy = make_policy("GR00T", head={"rtc_max_delay": 0})
    assert (policy.prefix_methods, policy.prefix_delay) == (("guided", "ramp"), 0)


def test_policies_without_a_network_offer_no_prefix():
    with serve_in_thread(RandomPolicy(SPEC)) as server, PolicyClient(server.url) as client:
        assert (client.prefix_methods, client.prefix_delay) == ((), 0)


def test_a_longer_delay_than_was_trained_is_refused(policy):
    with pytest.raises(ValueError, match="prefix holds 4 actions, but FlowMatchingHead was trained with"):
        policy.predict(seen(), seed=0, prefix=Prefix(old(), 4, 4, "trained"))


def test_a_head_that_does_not_flow_is_refused_by_name(make_policy):
    policy = make_policy("OFT")
    with pytest.raises(ValueError, match="MLPHead takes no 'prefix'"):
        policy.predict(seen(), seed=0, prefix=Prefix(old(), 2, 4))
    sample = {**seen(), "state": np.zeros(1, np.float32), "dataset": "toy", "origin": "test"}
    with pytest.raises(ValueError, match="MLPHead takes neither prefix nor steer"):
        policy.framework.predict_action([sample], prefix=torch.zeros(1, 2, 2))


@pytest.mark.parametrize("kind", ["replay", "random"])
def test_policies_without_a_network_refuse_a_prefix(kind):
    policy = ReplayPolicy(SPEC, [([seen()], np.zeros((1, 2)))]) if kind == "replay" else RandomPolicy(SPEC)
    with pytest.raises(ValueError, match=f"a {kind} policy takes no 'prefix'"):
        policy.predict({**seen(), "prefix": Prefix(old(), 2, 4)}, seed=0)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"steps": 1}, "steps must be from the delay"),
        ({"steps": 7}, "steps must be from the delay to what is left of the horizon, 2 to 6"),
        ({"delay": 5}, "delay must be at most half"),
        ({"delay": 2.0}, "delay"),
        ({"method": "guidance"}, "there is no method 'guidance'"),
        ({"slope": ["exp"]}, "there is no slope"),
        ({"actions": np.zeros((3, 2))}, r"actions are \[3, 2\], expected numbers \[4 to 8, 2\]"),
        ({"actions": np.zeros((8, 3))}, r"expected numbers \[4 to 8, 2\]"),
        ({"actions": np.full((8, 2), np.inf)}, "must be finite"),
        ({"actions": [[0, 0]]}, "must be an array"),
        ({"speed": 1}, "unknown field 'speed'"),
    ],
)  # fmt: skip
def test_the_server_refuses_a_prefix_that_does_not_fit(policy, change, named):
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        message = message_from(seen(), SPEC) | {"prefix": prefix_message(Prefix(old(), 2, 4)) | change}
        with pytest.raises(RefusedError, match=named):
            client.request(message)
        assert client.predict(seen(), seed=0).shape == (H, 2)


def test_a_prefix_becomes_what_the_model_would_have_predicted(policy):
    given = Prefix(old(5), 2, 4)
    found = policy._old_actions({**seen(), "prefix": given})
    np.testing.assert_allclose(found[:5, 0], given.actions[:, 0] / 2 - 1, atol=1e-6)
    np.testing.assert_allclose(found[:5, 1], (given.actions[:, 1] - 10) / 20, atol=1e-6)
    np.testing.assert_array_equal(found[5:], 0)


# The times


@pytest.mark.parametrize("horizon", [4, 9])
def test_the_inequalities_hold_for_all_times_and_no_others(horizon):
    for delay in range(horizon + 1):
        for steps in range(1, horizon + 2):
            if delay <= steps <= horizon - delay:
                check_times(horizon, delay, steps)
            else:
                with pytest.raises(ConfigError):
                    check_times(horizon, delay, steps)


def test_weights_by_hand():
    third = np.array([2 / 3, 1 / 3])  # two positions between one frozen and two free, H=5, d=1, s=2
    np.testing.assert_allclose(prefix_weights(5, 1, 2, "linear"), [1, *third, 0, 0])
    np.testing.assert_allclose(
        prefix_weights(5, 1, 2), [1, *third * (np.exp(third) - 1) / (np.e - 1), 0, 0]
    )  # 0.3678, 0.0767
    np.testing.assert_allclose(prefix_weights(5, 1, 2)[1:3], [0.36770, 0.07675], atol=1e-5)


def test_the_prefix_of_a_clock_is_what_is_left():
    clock, chunk = RealTime(8, 2, 3), np.arange(8.0)[:, None]
    assert clock.prefix("guided") is None
    clock.add(chunk)
    for _ in range(4):  # one step later than it could look
        clock.take()
    prefix = clock.prefix("ramp", "ones")
    assert prefix.actions.ravel().tolist() == [4, 5, 6, 7]
    assert (prefix.delay, prefix.steps, prefix.method, prefix.slope) == (2, 4, "ramp", "ones")


@pytest.mark.parametrize("at, left", [(6, 2), (7, 1)])
def test_of_a_chunk_that_ends_too_soon_all_that_is_left_is_decided(at, left):
    clock = RealTime(8, 2, 3)
    clock.begin()
    clock.add(np.arange(8.0)[:, None])
    clock.now = at
    prefix = clock.prefix("guided")
    assert (prefix.delay, prefix.steps, prefix.actions.ravel().tolist()) == (left, at, [6.0, 7.0][-left:])
    check_prefix(prefix, 8, 1)


def test_of_a_chunk_that_is_over_there_is_no_prefix():
    clock = RealTime(8, 2, 3)
    clock.begin()
    clock.add(np.zeros((8, 1)))
    clock.now = 8
    assert clock.is_over and clock.prefix("guided") is None and clock.looked == 8
    with pytest.raises(IndexError, match="no chunk reaches this control step"):
        clock.take()
    assert clock.add(np.ones((8, 1))) and clock.take() == 1


@pytest.mark.parametrize("late", [1, 2, 3, 4])
@pytest.mark.parametrize("method", [None, "guided"])
def test_a_robot_recovers_from_late_chunks(late, method):
    """Each action is the one for its control step, although so many chunks in a row are thrown away."""
    server = DelayedServer(
        lambda now, prefix: now + np.arange(12.0)[:, None], lambda look: 4 if 0 < look <= late else 2
    )
    runner, discarded = RealTimeRunner(RealTime(12, 2, 4), server, method), []
    for now in range(60):
        assert runner.act(now) == now
        discarded.append(runner.clock.late)
    assert max(discarded) == 1  # after a second one the old chunk is over, and the robot waits for the next
    assert runner.clock.waits == (late > 1) and discarded[-1] == 0


def test_late_chunks_are_discarded_and_five_in_a_row_are_an_error():
    clock = RealTime(8, 2, 3)
    clock.begin()
    clock.add(np.zeros((8, 1)))
    for number in range(MAX_LATE):
        clock.begin()
        clock.now += 3
        if number < MAX_LATE - 1:
            assert clock.add(np.ones((8, 1))) is False
    assert clock.chunk.max() == 0
    with pytest.raises(TimeoutError, match="5 chunks in a row"):
        clock.add(np.ones((8, 1)))


# A delayed server


def seam(policy, method, delay=2, steps=4, looks=6):
    """The largest jump between the last old action and the first new one, normalised, over a run."""
    server = DelayedServer(
        lambda now, prefix: policy.predict(seen(), seed=now, prefix=prefix), lambda _: delay
    )
    runner, jumps = RealTimeRunner(RealTime(H, delay, steps), server, method), []
    for now in range(looks * steps):
        old_chunk, begin = runner.clock.chunk, runner.clock.chunk_begin
        action = runner.act(now)
        if old_chunk is not None and runner.clock.chunk_begin != begin:
            jumps.append(np.abs((action - old_chunk[now - begin]) / [2.0, 20.0]).max())
    return max(jumps)


def test_the_seam_of_a_delayed_server_is_smaller_than_without_a_prefix(policy):
    naive = seam(policy, None)
    assert seam(policy, "ramp") < 0.75 * naive and seam(policy, "guided") < 0.3 * naive


# The notebook


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    """A run of one step with a head that flows, on the data of `point`."""
    home = tmp_path_factory.mktemp("real_time")
    fixtures = ROOT / "tests/fixtures/version_0_1"
    head = {**HEADS["GR00T"], "rtc_max_delay": 1, "num_layers": 1, "num_inference_timesteps": 2}
    model = {
        "name": "GR00T",
        "vlm": {"base_vlm": str(fixtures / "tiny")},
        "action_horizon": 4,
        "action_model": head,
    }
    trainer = {
        "max_train_steps": 1,
        "warmup_steps": 0,
        "per_device_batch_size": 2,
        "num_workers": 0,
        "learning_rate": 1e-3,
    }
    data = {"vla_data": {"root": str(fixtures / "dataset")}}
    tree = {
        "run_root_dir": str(home),
        "run_id": "flow",
        "framework": model,
        "datasets": data,
        "trainer": trainer,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(load_config(tree))


def notebook(**parameters):
    """What the notebook finds with these parameters."""
    cells = json.loads((ROOT / "experiments/real_time.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert parameters.keys() <= names.keys()
                names |= parameters
    return names


def test_the_notebook_measures_each_method_at_each_delay(flow_run, tmp_path, capsys):
    small = {
        "run": str(flow_run),
        "benchmark": "point",
        "episodes": 1,
        "steps": 2,
        "max_steps": 7,
        "delays": [0, 1],
    }
    names = notebook(**small, output=str(tmp_path / "rows.csv"))
    told, table = capsys.readouterr().out, names["table"]
    tasks = PointReach().tasks()
    assert f"{8 * len(tasks)} episodes" in told and "takes trained, guided, ramp" in told
    assert [*table.index] == [(d, m) for d in (0, 1) for m in ("none", "ramp", "guided", "trained")]
    assert set(table.n) == {len(tasks)} and np.isfinite(table.jump).all() and (table.jump > 0).all()
    for (low, high), k in zip(table[["low", "high"]].to_numpy(), table.successes):
        assert (low, high) == success_interval(k, len(tasks))
    rows = names["results"]
    assert (tmp_path / "rows.csv").read_text().count("\n") == 1 + len(rows)
    figure = plt.gcf()
    assert [len(axes.lines) > 0 for axes in figure.axes] == [True, True]
    plt.close("all")
    # without a delay and a method, what is carried out is what an evaluation carries out
    settings = EvaluationSettings(benchmark="point", n_action_steps=2, max_steps=7)
    scenes, policy = build_benchmark(settings, names["spec"]), Policy.from_pretrained(flow_run)
    for row in rows[(rows.method == "none") & (rows.delay == 0)].itertuples():
        record, _ = run_episode(policy, scenes, row.task, row.seed, settings, record=False)
        assert (record["steps"], record["success"]) == (row.steps, row.success)
    free, held = (rows[(rows.method == m) & (rows.delay == 0)].reset_index() for m in ("none", "trained"))
    assert np.allclose(free.jump, held.jump, atol=1e-6)  # of no delay, nothing is decided


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"delays": [2]}, "delays must be at most the run's rtc_max_delay, 1"),
        ({"delays": [2], "steps": 1, "methods": ["none"]}, "steps must be from the delay"),
        ({"methods": ["guide"]}, "methods must be of"),
        ({"delays": 3}, "delays"),
    ],
)
def test_the_notebook_refuses_what_the_run_cannot_do(flow_run, wrong, told):
    with pytest.raises(ConfigError, match=told):
        notebook(**{"run": str(flow_run), "benchmark": "point", "steps": 2, **wrong})
