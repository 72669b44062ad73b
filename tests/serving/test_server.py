"""A server: the policy's own answers, whoever asks; whatever is sent to it, it goes on."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla_bench.__main__ import main
from vla_bench.serving.checks import message_from
from vla_bench.serving.client import ClientEpisode, PolicyClient
from vla_bench.serving.policy import Policy
from vla_bench.serving.protocol import pack, unpack
from vla_bench.serving.server import serve_in_thread
from vla_bench.serving.session import prediction_seed

CASES = int(os.environ.get("VLA_BENCH_CASES", "20"))


def healthz_ms(url: str) -> float:
    """How long `/healthz` takes, in milliseconds."""
    begin = time.perf_counter()
    with urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=10) as answer:
        assert answer.read() == b"OK\n"
    return 1e3 * (time.perf_counter() - begin)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("images", [None, "png"])
def test_a_served_policy_answers_what_it_answers_itself(run, llava_observation, batch_size, images):
    policy = Policy.from_pretrained(run, batch_size=batch_size)
    with serve_in_thread(policy) as server, PolicyClient(server.url, images=images) as client:
        assert client.fingerprint == policy.fingerprint and client.spec == policy.spec
        for seed in (0, 7, 2**40):
            served = client.predict(llava_observation, seed=seed)
            assert served.tobytes() == policy.predict(llava_observation, seed=seed).tobytes()


@pytest.mark.parametrize("batch_size", [2, 8])
def test_an_answer_does_not_depend_on_its_place_or_its_neighbours(run, llava_observation, batch_size):
    policy, rng = Policy.from_pretrained(run, batch_size=batch_size), np.random.default_rng(0)
    alone = policy.predict(llava_observation, seed=7).tobytes()
    for place in range(batch_size):
        for lang in (llava_observation["lang"], "go to the red square " * 3):
            others = [
                {**llava_observation, "state": rng.normal(size=2), "lang": lang} for _ in range(batch_size)
            ]
            seeds = [int(seed) for seed in rng.integers(99, size=batch_size)]
            others[place], seeds[place] = llava_observation, 7
            assert policy.predict_batch(others, seeds)[place].tobytes() == alone


def test_many_clients_at_once_each_get_their_own_answer(toy):
    ToyPolicy, observation = toy
    policy = ToyPolicy(seconds=0.002)

    def episode(number):
        with PolicyClient(server.url) as client:
            for step in range(20):
                chunk = client.predict(
                    observation(number, step / 8, "up" * (1 + number % 3)), seed=1000 * number + step
                )
                assert (chunk == [number + step / 8, 1000 * number + step]).all()
            return True

    slowest = []
    with serve_in_thread(policy) as server, ThreadPoolExecutor(12) as pool:
        running = [pool.submit(episode, number) for number in range(12)]
        while not all(each.done() for each in running):
            slowest.append(healthz_ms(server.url))
            time.sleep(0.02)
        assert all(each.result() for each in running)
    assert sum(policy.batches) == 240 and max(policy.batches) > 1
    assert np.median(slowest) < 100


def test_the_loop_is_free_while_the_policy_computes(toy):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy(seconds=1.5)) as server, PolicyClient(server.url) as client:
        asked = threading.Thread(target=client.predict, args=(observation(),), kwargs={"seed": 0})
        asked.start()
        time.sleep(0.2)
        with PolicyClient(server.url, connect_s=0.5):  # connects, and is greeted
            assert healthz_ms(server.url) < 500
        assert asked.is_alive()
        asked.join()


def test_a_client_that_goes_is_forgotten(toy):
    """What waits for it is not computed."""
    ToyPolicy, observation = toy
    policy = ToyPolicy(seconds=0.3, batch_size=1)
    message = pack({**message_from(observation(), policy.spec), "seed": 1})
    with serve_in_thread(policy) as server:
        with PolicyClient(server.url) as first:
            asked = threading.Thread(target=first.predict, args=(observation(),), kwargs={"seed": 0})
            asked.start()
            time.sleep(0.1)
            with connect(server.url) as gone:
                gone.recv(), gone.send(message)
                time.sleep(0.05)
                gone.socket.shutdown(socket.SHUT_RDWR)  # as when its process is killed
            asked.join()
            first.predict(observation(), seed=2)
        end = time.monotonic() + 5
        while server.server.connections and time.monotonic() < end:
            time.sleep(0.02)
        assert not server.server.connections and server.batcher.pending == 0
    assert len(policy.batches) == 2


def test_a_full_queue_is_said_and_waited_for(toy):
    ToyPolicy, observation = toy
    policy = ToyPolicy(seconds=0.2, batch_size=1)
    message = pack({**message_from(observation(), policy.spec), "seed": 1})
    with (
        serve_in_thread(policy, queue_size=1) as server,
        connect(server.url) as first,
        connect(server.url) as second,
    ):
        first.recv(), second.recv()
        first.send(message)
        time.sleep(0.05)
        second.send(message)
        told = json.loads(second.recv())
        assert told["code"] == "busy" and "1 requests wait already" in told["message"]
        first.recv()
        first.send(message)
        time.sleep(0.05)
        with PolicyClient(server.url) as patient:
            assert patient.predict(observation(), seed=3)[0, 1] == 3


def test_a_late_request_is_told(toy):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy(seconds=0.3, batch_size=1), timeout_s=0.1) as server:
        message = pack({**message_from(observation(), ToyPolicy.spec), "seed": 1})
        with connect(server.url) as first, connect(server.url) as second:
            first.recv(), second.recv()
            first.send(message)
            time.sleep(0.05)
            second.send(message)
            assert json.loads(second.recv())["code"] == "late"
            assert unpack(first.recv())["seed"] == 1


@pytest.mark.parametrize("returned", [np.full((4, 2), np.nan), np.zeros((3, 2)), None, np.zeros((4, 2), complex)],
                         ids=["nan", "shape", "none", "complex"])  # fmt: skip
def test_what_a_policy_must_not_return_does_not_leave(toy, returned):
    ToyPolicy, observation = toy
    policy = ToyPolicy()
    policy.predict_batch = lambda observations, seeds: [returned] * len(seeds)
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        with pytest.raises(ValueError, match="the policy (promises|returned)"):
            client.predict(observation(), seed=0)


def test_what_a_policy_raises_is_not_told(toy, caplog):
    ToyPolicy, observation = toy
    policy = ToyPolicy()

    def predict_batch(observations, seeds):
        raise RuntimeError("no weights in /secret/place")

    policy.predict_batch = predict_batch
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        with pytest.raises(RuntimeError, match="its log says more under [0-9a-f]{8}$") as told:
            client.predict(observation(), seed=0)
    assert "secret" not in str(told.value) and "/secret/place" in caplog.text


def test_starvla_gets_the_policys_own_answers(run, llava_observation):
    """Three examples of one request, the state as [1, S], as StarVLA's clients send it."""
    policy = Policy.from_pretrained(run, batch_size=4)
    image, lang = np.asarray(llava_observation["image"][0]), llava_observation["lang"]
    states = [np.asarray(llava_observation["state"]) + shift for shift in (0.0, 1.0, 2.0)]
    examples = [{"image": [image], "lang": lang, "state": state[None]} for state in states]
    with serve_in_thread(policy) as server, connect(f"{server.url}/starvla") as client:
        assert unpack(client.recv())["action_chunk_size"] == policy.spec.horizon
        client.send(
            pack(
                {
                    "type": "infer",
                    "request_id": "a",
                    "examples": examples,
                    "seed": [3, 4, 5],
                    "use_ddim": True,
                }
            )
        )
        reply = unpack(client.recv())
    assert reply["ok"] and reply["request_id"] == "a"
    expected = [policy.predict({**llava_observation, "state": s}, seed=3 + i) for i, s in enumerate(states)]
    assert reply["data"]["actions"].tobytes() == np.stack(expected).tobytes()


def test_vla_eval_gets_the_policys_own_answers_one_action_at_a_time(run, llava_observation):
    """With images as PNG, as the harness sends them; an error does not end the episode."""
    policy, seq = Policy.from_pretrained(run), iter(range(1, 99))
    image = np.asarray(llava_observation["image"][0])
    seen = {"images": {policy.spec.cameras[0]: image}, "task_description": llava_observation["lang"]}
    seen["state"] = np.asarray(llava_observation["state"])

    def say(kind, payload, replies=True):
        number = next(seq)
        envelope = {"type": kind, "payload": payload, "seq": number, "timestamp": 0.0}
        client.send(pack(envelope, text_keys=True, images="png"))
        reply = unpack(client.recv()) if replies else None
        assert reply is None or reply["seq"] == number
        return reply

    with (
        serve_in_thread(policy, seed=50000, n_action_steps=2) as server,
        connect(f"{server.url}/vla-eval") as client,
    ):
        assert say("hello", {"protocol_version": 1})["payload"]["protocol_version"] == 1
        say("episode_start", {"task": {"name": "reach-red"}}, replies=False)
        actions = [say("observation", seen)["payload"]["actions"]]
        assert say("observe", seen)["type"] == "error"
        actions += [say("observation", seen)["payload"]["actions"] for _ in range(3)]
        say("episode_end", {"success": False}, replies=False)
    seeds = [prediction_seed(50000, n) for n in range(2)]
    expected = [policy.predict(llava_observation, seed=seed)[:2] for seed in seeds]
    assert np.stack(actions).tobytes() == np.concatenate(expected).tobytes()


@pytest.mark.parametrize("path", ["/", "/starvla", "/vla-eval"])
def test_every_dialect_refuses_and_goes_on(toy, path):
    ToyPolicy, _ = toy
    rng = np.random.default_rng(8)
    with serve_in_thread(ToyPolicy()) as server, connect(server.url + path) as client:
        if path != "/vla-eval":
            client.recv()
        good = [
            pack({"type": kind, "payload": {}, "seq": 1, "timestamp": 0.0})
            for kind in ("hello", "infer", "observation")
        ]
        for _ in range(2 * CASES):
            client.send(mutated(good[int(rng.integers(3))], rng))
            assert client.recv(timeout=5)
        with PolicyClient(server.url) as other:
            assert other.fingerprint == "toy"


def mutated(frame: bytes, rng: np.random.Generator) -> bytes:
    changed, at = bytearray(frame), int(rng.integers(len(frame)))
    kind = rng.integers(4)
    if kind == 0:
        changed[int(rng.integers(min(120, len(frame))))] = int(rng.integers(256))
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at : at + 5] = b"\xdd\xff\xff\xff\xff"
    else:
        changed = bytearray(rng.bytes(int(rng.integers(1, 200))))
    return bytes(changed) or b"\0"


def test_every_mutated_frame_gets_one_reply_and_the_next_client_its_answer(toy):
    ToyPolicy, observation = toy
    rng, good = np.random.default_rng(6), pack({**message_from(observation(), ToyPolicy.spec), "seed": 3})
    tracemalloc.start()
    with serve_in_thread(ToyPolicy()) as server, connect(server.url) as client:
        client.recv()
        for _ in range(5 * CASES):
            frame = mutated(good, rng)
            client.send(frame if rng.integers(8) else frame.decode("latin-1"))
            reply = client.recv(timeout=5)
            assert isinstance(reply, bytes) or json.loads(reply)["code"] in ("malformed", "refused"), reply
        client.send(good)
        assert unpack(client.recv())["seed"] == 3
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 8 << 20


def raw(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def upgrade(knock: socket.socket, path: bytes = b"/") -> None:
    knock.sendall(
        b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )


@pytest.mark.parametrize(
    "attack",
    [
        "random bytes",
        "half closed",
        "header of 2 GB",
        "too large",
        "never reads",
        "no handshake",
        "half a frame",
    ],
)
def test_an_attack_costs_nobody_else_anything(toy, attack):
    ToyPolicy, observation = toy
    rng, good = np.random.default_rng(7), pack({**message_from(observation(), ToyPolicy.spec), "seed": 3})
    masked = lambda head, body: head + b"\0\0\0\0" + body
    with serve_in_thread(ToyPolicy(), frame_bytes=1 << 20) as server, raw(server) as knock:
        if attack == "random bytes":
            knock.sendall(rng.bytes(4000))
        elif attack != "no handshake":
            upgrade(knock)
        if attack == "half closed":
            knock.sendall(masked(b"\x82\xfe" + len(good).to_bytes(2, "big"), good))
            knock.shutdown(socket.SHUT_WR)
        elif attack == "header of 2 GB":
            knock.sendall(masked(b"\x82\xff" + (2 << 30).to_bytes(8, "big"), b""))
        elif attack == "too large":
            knock.sendall(masked(b"\x82\xff" + (1 << 21).to_bytes(8, "big"), bytes(1 << 20)))
        elif attack == "half a frame":
            knock.sendall(masked(b"\x82\xfe" + len(good).to_bytes(2, "big"), good[: len(good) // 2]))
        elif attack == "never reads":
            knock.settimeout(0.5)
            try:
                for _ in range(2000):
                    knock.sendall(masked(b"\x82\xfe" + len(good).to_bytes(2, "big"), good))
            except OSError:
                pass  # its own socket is full
        with PolicyClient(server.url, connect_s=5) as client:
            assert client.predict(observation(), seed=5)[0, 1] == 5
        assert healthz_ms(server.url) < 1000


def test_a_message_over_the_limit_is_refused_by_name(toy):
    ToyPolicy, _ = toy
    with serve_in_thread(ToyPolicy(), frame_bytes=2000) as server, connect(server.url) as client:
        client.recv()
        client.send(bytes(3000))
        with pytest.raises(ConnectionClosed, match="1009"):
            client.recv(timeout=5)


def serving(run, port: int) -> multiprocessing.Process:
    """`vla_bench serve` in a process of its own, a copy of this one that has imported torch."""
    words = ["serve", "--checkpoint", str(run), "--port", str(port), "--batch_size", "2"]
    process = multiprocessing.get_context("fork").Process(target=main, args=(words,), daemon=True)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_server_that_is_killed_in_an_episode_is_waited_for(run, llava_observation):
    """kill -9, a new server on the same port, and every action is what it would have been."""
    policy, port = Policy.from_pretrained(run, batch_size=2), free_port()
    first = serving(run, port)
    with PolicyClient(f"ws://127.0.0.1:{port}", connect_s=60) as client:
        episode, found = ClientEpisode(client, seed=50000), []
        for step in range(4):
            if step == 2:
                first.kill()
                first.join()
                second = serving(run, port)
            found.append(episode.predict(llava_observation).tobytes())
    second.terminate()
    second.join(timeout=30)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    expected = [policy.predict(llava_observation, seed=prediction_seed(50000, step)) for step in range(4)]
    assert found == [chunk.tobytes() for chunk in expected]


def test_an_evaluation_through_a_server_continues_one_without(run, tmp_path, capsys):
    """Two episodes here, two more through a server: the file is that of an evaluation in one process."""
    copy = shutil.copytree(run, tmp_path / "llava", ignore=shutil.ignore_patterns("eval"))
    short = ["evaluation.n_action_steps=2", "evaluation.max_steps=12"]
    main(["evaluate", "--run", str(copy), "--out", str(tmp_path / "both"), *short, "evaluation.episodes=1"])
    with serve_in_thread(Policy.from_pretrained(copy)) as server:
        ask = ["evaluate", "--run", str(copy), *short, "evaluation.episodes=2", "--server", server.url]
        main([*ask, "--out", str(tmp_path / "both")])
        main([*ask, "--out", str(tmp_path / "served")])
    main(["evaluate", "--run", str(copy), "--out", str(tmp_path / "direct"), *short, "evaluation.episodes=2"])
    files = {(tmp_path / name / "episodes.jsonl").read_bytes() for name in ("both", "served", "direct")}
    assert len(files) == 1


def test_another_policy_than_the_runs_is_not_evaluated(run, toy, tmp_path, capsys):
    ToyPolicy, _ = toy
    with serve_in_thread(ToyPolicy()) as server, pytest.raises(SystemExit):
        main(["evaluate", "--run", str(run), "--out", str(tmp_path / "out"), "--server", server.url])
    assert "serves another policy than" in capsys.readouterr().err and not (tmp_path / "out").exists()
