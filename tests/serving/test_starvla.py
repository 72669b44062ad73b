"""StarVLA's protocol: several examples in an envelope, the request's number in the reply."""

import numpy as np
import pytest
from websockets.sync.client import connect

from vla_bench.serving.policy import Policy
from vla_bench.serving.protocol import pack, unpack
from vla_bench.serving.server import serve_in_thread
from vla_bench.serving.session import prediction_seed


def ask(client, message) -> dict:
    client.send(pack(message))
    return unpack(client.recv(timeout=20))


def example(brightness: int = 10, lang: str = "up") -> dict:
    return {"image": [np.full((16, 24, 3), brightness, np.uint8)], "lang": lang, "state": np.array([[0.25]])}


@pytest.fixture
def client(toy):
    """A client of a toy policy that has been greeted."""
    ToyPolicy, _ = toy
    with serve_in_thread(ToyPolicy(), seed=5) as server, connect(f"{server.url}/starvla") as client:
        assert unpack(client.recv(timeout=20))["action_chunk_size"] == 4
        yield client


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_actions_are_the_policys_own(run, llava_observation, batch_size):
    policy = Policy.from_pretrained(run, batch_size=batch_size)
    image, lang = np.asarray(llava_observation["image"][0]), llava_observation["lang"]
    states = [np.asarray(llava_observation["state"]) + shift for shift in (0.0, 1.0, 2.0)]
    examples = [{"image": [image], "lang": lang, "state": state[None]} for state in states]
    with serve_in_thread(policy) as server, connect(f"{server.url}/starvla") as client:
        client.recv(timeout=20)
        reply = ask(
            client, {"type": "infer", "request_id": "a", "payload": {"examples": examples, "seed": [3, 4, 5]}}
        )
    expected = [policy.predict({**llava_observation, "state": s}, seed=3 + i) for i, s in enumerate(states)]
    assert reply["data"]["actions"].tobytes() == np.stack(expected).tobytes()


def test_each_example_has_its_own_answer(client):
    reply = ask(client, {"examples": [example(b) for b in (3, 1, 2)], "seed": [7, 8, 9]})
    assert reply["data"]["actions"][:, 0].tolist() == [[3.25, 7], [1.25, 8], [2.25, 9]]


def test_the_reply_has_the_number_of_its_request(client):
    for number in ("a", 7):
        assert (
            ask(client, {"type": "infer", "request_id": number, "examples": [example()]})["request_id"]
            == number
        )


def test_examples_without_seeds_get_those_of_the_episode(client):
    seeds = ask(client, {"examples": [example(), example()]})["data"]["seed"]
    ask(client, {"type": "reset"})
    seeds += ask(client, {"examples": [example()]})["data"]["seed"]
    assert seeds == [prediction_seed(5, 0), prediction_seed(5, 1), prediction_seed(6, 0)]


def test_a_ping_is_answered(client):
    assert (
        ask(client, {"type": "ping", "request_id": "p"}).items()
        >= {"status": "ok", "request_id": "p"}.items()
    )


def test_what_has_no_effect_is_said(client):
    reply = ask(client, {"examples": [example()], "use_ddim": True, "cfg_scale": 1.5})
    assert reply["data"]["without_effect"] == ["cfg_scale", "use_ddim"]


@pytest.mark.parametrize(
    "message, named",
    [
        ({"examples": []}, "'examples' must be"),
        ({"examples": [example()] * 65}, "'examples' must be"),
        ({"examples": [{"image": []}]}, "examples[0] has 0 images"),
        ({"examples": [example(), {"image": [np.zeros((8, 8, 3), np.uint8)], "lang": "up", "state": [0.0]}]}, "uint8 [8, 8, 3]"),
        ({"examples": [{**example(), "depth": 1}]}, "unknown field 'depth'"),
        ({"examples": [example()], "seed": [1, 2]}, "'seed' has 2 numbers"),
        ({"examples": [example()], "unnorm_key": "bridge"}, "'unnorm_key' is 'bridge'"),
        ({"examples": [example()], "temperature": 1.0}, "unknown field 'temperature'"),
        ({"type": "kill"}, "'type' must be"),
        ({"examples": [example()], "prefix": {}}, "'prefix': StarVLA's protocol has no field for the chunk"),
        ({"examples": [example()], "inference_delay": 2}, "openpi's requests at / have 'prefix'"),
        ({"type": "predict_action_realtime", "examples": [example()]}, "StarVLA's protocol has no field for the chunk"),
        ({"payload": 3}, "'payload' must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_error_names_the_field_and_keeps_the_socket(client, message, named):
    reply = ask(client, {"request_id": "r", **message})
    assert (reply["ok"], reply["status"], reply["request_id"]) == (False, "error", "r")
    assert reply["error"]["code"] == "refused" and named in reply["error"]["message"], reply
    assert ask(client, {"examples": [example()]})["ok"]


def test_no_frame_costs_the_connection(frames_survived):
    infer = {"type": "infer", "request_id": "a", "payload": {"examples": [example()], "seed": [1]}}
    good = [infer, {"examples": [example(), example()], "seed": [1, 2]}, {"type": "reset"}, {"type": "ping"}]
    is_mine = lambda reply: unpack(reply)["request_id"] == "probe of this test"
    frames_survived("/starvla", good, pack({"type": "ping", "request_id": "probe of this test"}), is_mine)
