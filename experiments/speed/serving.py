"""Many clients of one server: nothing lost, nothing mixed up, and what the server adds to the model.

python experiments/speed/serving.py RUN [--clients 32] [--requests 2000] [--batch_size 8]

Three parts, each with its servers in processes of their own:

- `load`: 32 clients ask 2,000 times; every answer is compared, byte for byte, with what the policy says to that
  observation and seed alone, while `/healthz` is asked twenty times a second.
- `batches`: the same without batches; the ratio of requests per second.
- `overhead`: a policy that costs nothing, with an image of 224 x 224 pixels, beside openpi's pattern of a server, which
  computes in the loop that talks to the clients.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
from PIL import Image

from vla_bench.data.layout import Layout, PolicySpec, image_sizes
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.policy import Policy
from vla_bench.serving.replay import RandomPolicy
from vla_bench.serving.server import PolicyServer, ServerSettings, serve_forever

EMPTY = PolicySpec(Layout(tuple("abcdefg")), Layout(tuple("abcdefgh")), ("image",), (224, 224), 10, 20.0,
                   {"action": "min_max", "state": "min_max"}, "none", "0" * 16)  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ours(policy, port: int) -> None:
    """Serves until it is ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    asyncio.run(serve_forever(PolicyServer(policy, ServerSettings(port=port, queue_size=256))))


def openpis(policy, port: int) -> None:
    """openpi's pattern: one message, one answer, computed in the loop."""
    from websockets.asyncio.server import serve

    from vla_bench.serving.checks import handshake, observation_from
    from vla_bench.serving.protocol import pack

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
            await connection.send(
                pack({"actions": actions, "seed": seed, "server_timing": {"infer_ms": 0.0}})
            )

    async def run():
        async with serve(handle, "127.0.0.1", port, compression=None, max_size=None) as server:
            await server.serve_forever()

    asyncio.run(run())


@contextlib.contextmanager
def served(pattern, policy):
    """The URL of a server in a process of its own."""
    port = free_port()
    process = multiprocessing.get_context("fork").Process(target=pattern, args=(policy, port), daemon=True)
    process.start()
    try:
        yield f"ws://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join()


def questions(spec: PolicySpec, count: int) -> list[dict]:
    """Observations of which no two are alike, with instructions of several lengths."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in image_sizes(spec)]
        state = {"state": rng.normal(size=spec.state.dim)} if spec.state else {}
        found.append(
            {
                "image": images,
                "lang": ["open the drawer", "press the button from the top"][number % 2],
                **state,
            }
        )
    return found


def ask(
    url: str, clients: int, requests: int, asked: list[dict], answers: list[bytes] | None
) -> tuple[float, list[float]]:
    """Requests per second, and how long each took, in ms. Raises `AssertionError` for an answer to another question."""
    taken: list[float] = []

    def client(number: int) -> None:
        with PolicyClient(url, timeout_s=300) as policy:
            for step in range(-(-requests // clients)):
                which = (7 * number + step) % len(asked)
                begin = time.perf_counter()
                chunk = policy.predict(asked[which], seed=which)
                taken.append(1e3 * (time.perf_counter() - begin))
                assert answers is None or chunk.tobytes() == answers[which], (
                    f"client {number}, request {step}"
                )

    PolicyClient(url).close()
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    assert len(taken) == -(-requests // clients) * clients
    return len(taken) / (time.perf_counter() - begin), taken


def watch_health(url: str, until) -> list[float]:
    """How long `/healthz` took, in ms, twenty times a second."""
    found = []
    while not until():
        begin = time.perf_counter()
        with urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=10) as answer:
            assert answer.read() == b"OK\n"
        found.append(1e3 * (time.perf_counter() - begin))
        time.sleep(0.05)
    return found


def percentiles(values: list[float]) -> str:
    return (
        ", ".join(f"p{p} {np.percentile(values, p):.1f}" for p in (50, 95, 99))
        + f", most {max(values):.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    rates = {}
    for batch_size in (options.batch_size, 1):
        policy = Policy.from_pretrained(options.run, batch_size=batch_size)
        asked = questions(policy.spec, 40)
        answers = [chunk.tobytes() for chunk in policy.predict_batch(asked, list(range(len(asked))))]
        with served(ours, policy) as url, ThreadPoolExecutor(1) as watcher:
            PolicyClient(url).close()
            done: list[bool] = []
            health = watcher.submit(watch_health, url, lambda done=done: bool(done))
            try:
                rates[batch_size], taken = ask(url, options.clients, options.requests, asked, answers)
            finally:
                done.append(True)
            print(f"batches of {batch_size}: {len(taken)} requests of {options.clients} clients, each with its own answer; "
                  f"{rates[batch_size]:.0f}/s; a request {percentiles(taken)}; /healthz {percentiles(health.result())}")  # fmt: skip
    print(
        f"batches of {options.batch_size} against 1: {rates[options.batch_size] / rates[1]:.2f} times the requests per second"
    )
    for clients in (1, 16):
        for name, pattern in (("ours", ours), ("openpi's pattern", openpis)):
            with served(pattern, RandomPolicy(EMPTY)) as url:
                ask(url, clients, 10 * clients, questions(EMPTY, 10), None)
                rate, taken = ask(url, clients, 60 * clients, questions(EMPTY, 10), None)
                print(f"overhead, {clients:2} clients, {name:16}: {rate:.0f}/s, {percentiles(taken)}")


if __name__ == "__main__":
    main()
