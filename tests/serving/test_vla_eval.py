"""The harness's protocol: envelopes with a number, episodes, one action at a time, images as PNG."""

import itertools

import numpy as np
import pytest
from websockets.sync.client import connect

from vla_bench.serving.policy import Policy
from vla_bench.serving.protocol import pack, unpack
from vla_bench.serving.server import serve_in_thread
from vla_bench.serving.session import prediction_seed

NUMBERS = itertools.count(1)


def send(client, kind: str, payload, images: str | None = "png") -> int:
    number = next(NUMBERS)
    envelope = {"type": kind, "payload": payload, "seq": number, "timestamp": 0.0}
    client.send(pack(envelope, text_keys=True, images=images))
    return number


def ask(client, kind: str, payload, images: str | None = "png") -> dict:
    number = send(client, kind, payload, images)
    reply = unpack(client.recv(timeout=20))
    assert reply["seq"] == number
    return reply


def seen(brightness: int = 10) -> dict:
    image = np.full((16, 24, 3), brightness, np.uint8)
    return {"images": {"top": image}, "task_description": "up", "state": np.array([0.25])}


@pytest.fixture
def client(toy):
    """The harness of a toy policy whose chunks are carried out by two actions."""
    ToyPolicy, _ = toy
    with (
        serve_in_thread(ToyPolicy(), seed=5, n_action_steps=2) as server,
        connect(f"{server.url}/vla-eval") as client,
    ):
        yield client


@pytest.mark.parametrize("images", ["png", None])
def test_the_actions_are_the_policys_own(run, llava_observation, images):
    policy = Policy.from_pretrained(run)
    image, lang = np.asarray(llava_observation["image"][0]), llava_observation["lang"]
    payload = {"images": {policy.spec.cameras[0]: image}, "task_description": lang}
    payload["state"] = np.asarray(llava_observation["state"])
    with (
        serve_in_thread(policy, seed=50000, n_action_steps=2) as server,
        connect(f"{server.url}/vla-eval") as client,
    ):
        send(client, "episode_start", {})
        actions = [ask(client, "observation", payload, images)["payload"]["actions"] for _ in range(4)]
    chunks = [policy.predict(llava_observation, seed=prediction_seed(50000, n))[:2] for n in range(2)]
    assert np.stack(actions).tobytes() == np.concatenate(chunks).tobytes()


def test_a_jpeg_is_what_it_decodes_to(client):
    """Of one colour, which a JPEG keeps."""
    assert ask(client, "observation", seen(128), "jpeg")["payload"]["actions"][0] == 128.25


def test_the_greeting_says_what_is_served(client):
    told = ask(client, "hello", {"harness_version": "0.8.0", "protocol_version": 1})["payload"]
    assert told["protocol_version"] == 1 and told["vla_bench"]["fingerprint"] == "toy"
    assert told["observation_spec"].keys() == {"top", "language", "state"}


def test_another_version_of_the_protocol_is_refused(client):
    assert "version 2" in ask(client, "hello", {"protocol_version": 2})["payload"]["error"]


def test_an_episode_begins_with_a_seed_of_its_own(client):
    """And what is left of the last chunk is forgotten."""
    send(client, "episode_start", {"task": {"name": "a"}})
    first = ask(client, "observation", seen())["payload"]["actions"][1]
    send(client, "episode_end", {})
    send(client, "episode_start", {"task": {"name": "a"}})
    second = ask(client, "observation", seen())["payload"]["actions"][1]
    assert [first, second] == [prediction_seed(5, 0), prediction_seed(6, 0)]


def test_the_policy_looks_once_per_chunk(client):
    send(client, "episode_start", {})
    levels = [ask(client, "observation", seen(b))["payload"]["actions"][0] for b in (1, 2, 3, 4)]
    assert levels == [1.25, 1.25, 3.25, 3.25]


@pytest.mark.parametrize(
    "kind, change, named",
    [
        (
            "observation",
            {"images": {"top": np.zeros((8, 24, 3), np.uint8)}},
            "'images/top' is uint8 [8, 24, 3]",
        ),
        ("observation", {"images": {"side": np.zeros((16, 24, 3), np.uint8)}}, "'images/side'"),
        ("observation", {"task_description": 3}, "'task_description' must be"),
        ("observation", {"state": np.array([np.inf])}, "'state': x is inf"),
        ("observe", {}, "no message of type 'observe'"),
    ],
    ids=["size", "camera", "instruction", "state", "type"],
)
def test_an_error_names_the_field_and_keeps_the_socket(client, kind, change, named):
    reply = ask(client, kind, {**seen(), **change})
    assert reply["type"] == "error" and named in reply["payload"]["error"], reply
    assert ask(client, "observation", seen())["type"] == "action"


@pytest.mark.parametrize("missing", ["type", "payload", "seq", "timestamp"])
def test_a_field_that_the_envelope_lacks_is_named(client, missing):
    envelope = {"type": "observation", "payload": seen(), "seq": 9, "timestamp": 0.0}
    client.send(pack({key: part for key, part in envelope.items() if key != missing}, text_keys=True))
    assert f"needs '{missing}'" in unpack(client.recv(timeout=20))["payload"]["error"]


def test_no_frame_costs_the_connection(frames_survived):
    envelope = lambda kind, payload: {"type": kind, "payload": payload, "seq": 3, "timestamp": 0.5}
    good = [
        envelope("observation", seen()),
        envelope("hello", {"protocol_version": 1}),
        envelope("episode_start", {}),
    ]
    probe = {"type": "hello", "payload": {}, "seq": 2**62 + 1, "timestamp": 0.0}
    is_mine = lambda reply: unpack(reply)["seq"] == 2**62 + 1
    frames_survived("/vla-eval", good, pack(probe), is_mine)
