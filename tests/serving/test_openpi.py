"""openpi's protocol: metadata first, then observation and chunk in turns; sessions, seeds and resets of its family."""

import json

import numpy as np
import pytest
from websockets.sync.client import connect

from vla_bench.serving.checks import message_from
from vla_bench.serving.policy import Policy
from vla_bench.serving.protocol import pack, unpack
from vla_bench.serving.server import serve_in_thread
from vla_bench.serving.session import prediction_seed


def ask(client, message) -> dict:
    client.send(pack(message))
    reply = client.recv(timeout=20)
    return unpack(reply) if isinstance(reply, bytes) else json.loads(reply)


@pytest.fixture
def served(toy):
    """A client of a toy policy that has been greeted, and a message for it."""
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy(), seed=5) as server, connect(server.url) as client:
        unpack(client.recv(timeout=20))
        yield client, message_from(observation(), ToyPolicy.spec)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_actions_are_the_policys_own(run, llava_observation, batch_size):
    policy = Policy.from_pretrained(run, batch_size=batch_size)
    message = message_from(llava_observation, policy.spec)
    with serve_in_thread(policy) as server, connect(server.url) as client:
        client.recv(timeout=20)
        for seed in (0, 7, 2**40):
            reply = ask(client, {**message, "seed": seed})
            assert reply["actions"].tobytes() == policy.predict(llava_observation, seed=seed).tobytes()


def test_the_first_frame_says_what_is_served(toy):
    ToyPolicy, _ = toy
    with serve_in_thread(ToyPolicy()) as server, connect(server.url) as client:
        told = unpack(client.recv(timeout=20))
    assert told["policy"]["hash"] == ToyPolicy.spec.hash and told["fingerprint"] == "toy"
    assert (told["image_resolution"], told["action_horizon"], told["action_dim"]) == ([16, 24], 4, 2)
    assert told["observation"]["state"] == "observation/state"


def test_a_client_without_seeds_gets_those_of_its_episode(served):
    client, message = served
    seeds = [ask(client, message)["seed"] for _ in range(2)]
    ask(client, {"endpoint": "reset"})
    seeds += [ask(client, message)["seed"]]
    assert seeds == [prediction_seed(5, 0), prediction_seed(5, 1), prediction_seed(6, 0)]


def test_sessions_of_a_connection_know_nothing_of_one_another(served):
    client, message = served
    seeds = {name: ask(client, {**message, "session_id": name})["seed"] for name in ("a", "b", 3)}
    assert set(seeds.values()) == {prediction_seed(5, 0)}
    ask(client, {"endpoint": "reset", "session_id": "a"})
    assert ask(client, {**message, "session_id": "b"})["seed"] == prediction_seed(5, 1)
    assert ask(client, {**message, "session_id": "a"})["seed"] == prediction_seed(6, 0)


def test_a_connection_has_a_bounded_number_of_sessions(served):
    client, message = served
    for name in range(64):
        assert "seed" in ask(client, {**message, "session_id": name})
    assert "at most 64 sessions" in ask(client, {**message, "session_id": 64})["message"]
    assert "seed" in ask(client, {**message, "session_id": 63})


def test_a_reset_answers_as_the_family_does(served):
    client, _ = served
    assert ask(client, {"endpoint": "reset"}) == {"status": "reset successful"}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"observation/image": np.zeros((8, 24, 3), np.uint8)}, "'observation/image' is uint8 [8, 24, 3]"),
        ({"observation/image": np.zeros((16, 24, 3))}, "'observation/image' is float64"),
        ({"observation/state": [float("nan")]}, "'observation/state': x is nan"),
        ({"observation/state": [1.0, 2.0]}, "'observation/state' is"),
        ({"prompt": ""}, "'prompt' must be an instruction"),
        ({"observation/stat": [1.0]}, "unknown field 'observation/stat'"),
        ({"seed": -1}, "'seed' must be"),
        ({"seed": 1.5}, "'seed' must be"),
        ({"session_id": [1]}, "'session_id' must be"),
        ({"endpoint": "kill"}, "'endpoint' must be 'infer' or 'reset'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_names_the_field_and_keeps_the_socket(served, change, named):
    client, message = served
    fields = {**message, **change}
    fields.pop("observation/top", None) if "observation/image" in change else None
    told = ask(client, fields)
    assert told["type"] == "error" and told["code"] == "refused" and named in told["message"], told
    assert ask(client, {**message, "seed": 4})["seed"] == 4


def test_the_second_reply_says_what_the_first_took(served):
    client, message = served
    first, second = (ask(client, message)["server_timing"] for _ in range(2))
    assert "prev_total_ms" not in first and second["prev_total_ms"] >= first["infer_ms"]


def test_no_frame_costs_the_connection(toy, frames_survived):
    ToyPolicy, observation = toy
    message = message_from(observation(), ToyPolicy.spec)
    good = [
        {**message, "seed": 3},
        {**message, "session_id": "a", "endpoint": "infer"},
        {"endpoint": "reset"},
    ]
    probe = pack({**message, "seed": 2**62 + 1})
    is_mine = lambda reply: isinstance(reply, bytes) and unpack(reply).get("seed") == 2**62 + 1
    frames_survived("/", good, probe, is_mine)
