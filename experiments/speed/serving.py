"""Many clients of one server: nothing lost, nothing mixed up, and what the server adds to the model.

python experiments/speed/serving.py RUN [--clients 32] [--requests 2000] [--batch_size 8] [--rounds 5]

Three parts, each with its servers in processes of their own:

- `load`: 32 clients ask 2,000 times; every answer is compared, byte for byte, with what the policy says to that
  observation and seed alone, while another process asks `/healthz` twenty times a second. With batches and without.
- `overhead`: a policy that costs nothing, with an image of 224 x 224 pixels, beside openpi's pattern of a server, which
  computes in the loop that talks to the clients. The two take turns, round after round.
- `batches`: the same with a policy that takes 10 ms for a batch of any size, as a GPU does.

The clients are a few lines on bare sockets, so that the cores are the servers'.
"""

import argparse
import asyncio
import contextlib
import http.client
import multiprocessing
import os
import selectors
import socket
import time
from urllib.parse import urlsplit

import msgpack
import numpy as np
from PIL import Image

from vla_bench.data.layout import Layout, PolicySpec, image_sizes
from vla_bench.serving.checks import handshake, message_from, observation_from
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.policy import Policy
from vla_bench.serving.protocol import pack, unpack
from vla_bench.serving.replay import RandomPolicy
from vla_bench.serving.server import PolicyServer, ServerSettings, give_way, serve_forever

EMPTY = PolicySpec(Layout(tuple("abcdefg")), Layout(tuple("abcdefgh")), ("image",), (224, 224), 10, 20.0,
                   {"action": "min_max", "state": "min_max"}, "none", "0" * 16)  # fmt: skip
FORK = multiprocessing.get_context("fork")


class Steady(RandomPolicy):
    """Takes 10 ms for a batch, however many observations are in it."""

    def predict(self, observation, *, seed):
        return self.predict_batch([observation], [seed])[0]

    def predict_batch(self, observations, seeds):
        time.sleep(0.01)
        return [RandomPolicy.predict(self, each, seed=seed) for each, seed in zip(observations, seeds)]


# Servers


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ours(policy, port: int) -> None:
    """Serves until it is ended, as `vla_bench serve` does."""
    give_way()
    asyncio.run(serve_forever(PolicyServer(policy, ServerSettings(port=port, queue_size=256))))


def openpis(policy, port: int) -> None:
    """openpi's pattern: one message, one answer, computed in the loop."""
    from websockets.asyncio.server import serve

    def unpack_array(found):
        if b"__ndarray__" in found:
            return np.ndarray(buffer=found[b"data"], dtype=np.dtype(found[b"dtype"]), shape=found[b"shape"])
        return found

    async def handle(connection):
        await connection.send(pack(handshake(policy.spec, policy.fingerprint)))
        async for frame in connection:
            message = msgpack.unpackb(frame, object_hook=unpack_array)
            seed = message.pop("seed")
            actions = policy.predict(observation_from(message, policy.spec), seed=seed)
            reply = {"actions": actions, "seed": seed, "server_timing": {"infer_ms": 0.0}}
            await connection.send(pack(reply))

    async def run():
        async with serve(handle, "127.0.0.1", port, compression=None, max_size=None) as server:
            await server.serve_forever()

    asyncio.run(run())


def quietly(pattern, policy, port: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    pattern(policy, port)


@contextlib.contextmanager
def served(pattern, policy):
    """The process of a server, and its URL."""
    port = free_port()
    process = FORK.Process(target=quietly, args=(pattern, policy, port), daemon=True)
    process.start()
    try:
        PolicyClient(f"ws://127.0.0.1:{port}").close()
        yield process, f"ws://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


# Clients


def questions(spec: PolicySpec, count: int) -> list[dict]:
    """Observations of which no two are alike, with instructions of several lengths."""
    rng, words = np.random.default_rng(0), ["open the drawer", "press the button from the top"]
    found = []
    for number in range(count):
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in image_sizes(spec)]
        state = {"state": rng.normal(size=spec.state.dim)} if spec.state else {}
        found.append({"image": images, "lang": words[number % 2], **state})
    return found


def masked(payload: bytes) -> bytes:
    """A binary frame of a websocket, as a client sends it."""
    size = len(payload)
    long = b"\xfe" + size.to_bytes(2, "big") if size < 1 << 16 else b"\xff" + size.to_bytes(8, "big")
    head = b"\x82" + (bytes([0x80 | size]) if size < 126 else long)
    key = np.frombuffer(b"mask", np.uint8)
    rows = np.frombuffer(payload + bytes(-size % 4), np.uint8).reshape(-1, 4) ^ key
    return head + b"mask" + rows.tobytes()[:size]


class BareClient:
    """A websocket on a bare socket, which leaves the processor to the server."""

    def __init__(self, url: str):
        where = urlsplit(url)
        self.socket = socket.create_connection((where.hostname, where.port), 20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = ("Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")  # fmt: skip
        self.socket.sendall("\r\n".join(("GET / HTTP/1.1", *head, "", "")).encode())
        self.file = self.socket.makefile("rb")
        while self.file.readline().strip():
            pass
        self.receive()  # the handshake
        self.asked, self.since = 0, 0.0

    def ask(self, number: int, frame: bytes) -> None:
        self.asked, self.since = number, time.perf_counter()
        self.socket.sendall(frame)

    def receive(self) -> bytes:
        kind, size = self.file.read(2)
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        body = self.file.read(size)
        return self.receive() if kind & 15 == 9 else body  # a ping

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def ask(url: str, clients: int, requests: int, frames: list[bytes], answers: list[bytes] | None = None):
    """Requests per second, and how long each took, in ms. Raises `AssertionError` for an answer to another question."""
    ready, taken, sent = selectors.DefaultSelector(), [], 0
    everyone = [BareClient(url) for _ in range(clients)]
    begin = time.perf_counter()
    for client in everyone:
        ready.register(client.socket, selectors.EVENT_READ, client)
        client.ask(sent % len(frames), frames[sent % len(frames)])
        sent += 1
    while len(taken) < requests:
        for key, _ in ready.select(60):
            client, reply = key.data, key.data.receive()
            taken.append(1e3 * (time.perf_counter() - client.since))
            told = unpack(reply)
            assert told["seed"] == client.asked, f"asked {client.asked}, answered {told['seed']}"
            assert answers is None or told["actions"].tobytes() == answers[client.asked]
            if sent < requests:
                client.ask(sent % len(frames), frames[sent % len(frames)])
                sent += 1
    rate = len(taken) / (time.perf_counter() - begin)
    for client in everyone:
        client.close()
    assert sent == len(taken) == requests
    return rate, taken


def health(url: str, done, found) -> None:
    """How long `/healthz` takes, in ms, twenty times a second, until it is told to stop."""
    where = urlsplit(url)
    while not done.is_set():
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"OK\n"
        connection.close()
        found.put(1e3 * (time.perf_counter() - begin))
        time.sleep(0.05)
    found.put(None)


def percentiles(values: list[float]) -> str:
    parts = [f"p{percent} {np.percentile(values, percent):.1f}" for percent in (50, 95, 99)]
    return ", ".join(parts) + f", most {max(values):.1f} ms"


# Parts


def load(run: str, clients: int, requests: int, batch_size: int) -> float:
    """Requests per second of a run's policy."""
    policy = Policy.from_pretrained(run, batch_size=batch_size)
    asked = questions(policy.spec, 40)
    frames = [
        masked(pack({**message_from(each, policy.spec), "seed": seed})) for seed, each in enumerate(asked)
    ]
    answers = [chunk.tobytes() for chunk in policy.predict_batch(asked, list(range(len(asked))))]
    with served(ours, policy) as (_, url):
        done, found = FORK.Event(), FORK.Queue()
        watcher = FORK.Process(target=health, args=(url, done, found), daemon=True)
        watcher.start()
        rate, taken = ask(url, clients, requests, frames, answers)
        done.set()
        waited = list(iter(lambda: found.get(timeout=20), None))
        watcher.join()
    print(
        f"batches of {batch_size}: {requests} requests of {clients} clients, each with its own answer; {rate:.0f}/s"
    )
    print(f"  a request {percentiles(taken)}; /healthz {percentiles(waited)}")
    return rate


def cpu_s(process) -> float:
    """What a process has computed."""
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(policy, clients: int, rounds: int, requests: int) -> None:
    """The two servers in turns."""
    asked = questions(policy.spec, 10)
    frames = [
        masked(pack({**message_from(each, policy.spec), "seed": seed})) for seed, each in enumerate(asked)
    ]
    with served(ours, policy) as first, served(openpis, policy) as second:
        rows = {"ours": (first, []), "openpi's pattern": (second, [])}
        for _ in range(rounds):
            for (process, url), found in rows.values():
                before = cpu_s(process)
                rate, taken = ask(url, clients, requests, frames)
                found.append((rate, np.median(taken), 1e3 * (cpu_s(process) - before) / requests))
        for name, (_, found) in rows.items():
            rate, median, cpu = np.median(found, axis=0)
            best = min(each[1] for each in found)
            print(
                f"  {clients:2} clients, {name:16}: {rate:5.0f}/s, {median:.2f} ms (best round {best:.2f}), CPU {cpu:.2f} ms"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of the two servers in turns")
    options = parser.parse_args()
    print("a policy that costs nothing:")
    for clients in (1, 16):
        compare(RandomPolicy(EMPTY), clients, options.rounds, max(clients, options.requests // 5))
    print("a policy that takes 10 ms for a batch of up to 16:")
    for clients in (1, 16):
        compare(Steady(EMPTY, batch_size=16), clients, options.rounds, max(clients, options.requests // 20))
    rates = [load(options.run, options.clients, options.requests, size) for size in (options.batch_size, 1)]
    print(
        f"batches of {options.batch_size} against 1: {rates[0] / rates[1]:.2f} times the requests per second"
    )


if __name__ == "__main__":
    main()
