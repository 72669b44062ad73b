"""A policy that needs no network, a checkpoint of version 0.1.0, and frames that nobody should send."""

import asyncio
import io
import multiprocessing
import os
import socket
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from websockets.sync.client import connect

from vla_bench.data.layout import Layout, PolicySpec
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.protocol import pack, read_frame
from vla_bench.serving.server import PolicyServer, ServerSettings, give_way, serve_forever

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"
CASES = int(os.environ.get("VLA_BENCH_CASES", "20"))  # 500 in `make fuzz`


class ToyPolicy:
    """Its actions say which observation and which seed they are for; it computes for `seconds`."""

    fingerprint = "toy"
    spec = PolicySpec(
        action=Layout(("brightness", "seed")),
        state=Layout(("x",)),
        cameras=("top",),
        image_size=(16, 24),
        horizon=4,
        control_rate=10.0,
        normalization={"action": "min_max", "state": "min_max"},
        dataset="toy",
        statistics_hash="0" * 16,
    )

    def __init__(self, seconds: float = 0.0, batch_size: int = 4):
        self.seconds, self.batch_size, self.batches = seconds, batch_size, []

    def group(self, observation):
        return len(observation["lang"])

    def predict_batch(self, observations, seeds):
        self.batches.append(len(seeds))
        time.sleep(self.seconds)
        return [np.tile([self.level(each), float(seed)], (4, 1)) for each, seed in zip(observations, seeds)]

    @staticmethod
    def level(observation):
        return float(np.asarray(observation["image"][0], np.float64).mean() + observation["state"][0])


def toy_observation(brightness: int = 10, state: float = 0.25, lang: str = "up"):
    return {"image": [Image.new("RGB", (24, 16), (brightness,) * 3)], "lang": lang, "state": [state]}


@pytest.fixture
def toy():
    """The class, and a function that makes observations for it."""
    return ToyPolicy, toy_observation


@pytest.fixture(scope="session")
def run():
    return RUN


@pytest.fixture(scope="module")
def llava_observation():
    with np.load(RUN.parents[1] / "llava_expected.npz") as file:
        image, lang, state = Image.fromarray(file["image"]), file["lang"].item(), file["state"]
    return {"image": [image], "lang": lang, "state": state}


# Servers in processes of their own


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(target, *arguments) -> multiprocessing.Process:
    """A process that is a copy of this one, which has imported torch."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def serve_toy(port: int, seconds: float, batch_size: int) -> None:
    given = ServerSettings(port=port, max_connections=200)
    give_way()
    asyncio.run(serve_forever(PolicyServer(ToyPolicy(seconds, batch_size), given)))


@pytest.fixture(scope="session")
def processes():
    """`start(target, *arguments)` starts a process, `port()` finds a port that is free."""
    return start, free_port


@contextmanager
def toy_server(port: int | None = None, seconds: float = 0.0, batch_size: int = 4):
    port = port or free_port()
    process = start(serve_toy, port, seconds, batch_size)
    try:
        yield process, f"ws://127.0.0.1:{port}"
    finally:
        process.kill()
        process.join(timeout=20)


@pytest.fixture(scope="session")
def toy_process():
    """A toy policy that is served by a process of its own: the process, and its address."""
    return toy_server


# Frames that nobody should send

fuzzing = settings(max_examples=2 * CASES, deadline=None, database=None, derandomize=CASES <= 20,
                   suppress_health_check=list(HealthCheck))  # fmt: skip


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG that says it has this size, whatever is in it."""
    chunk = lambda kind, body: (
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    )
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "jpeg")
    return file.getvalue()


BOMB = zlib.compress(bytes(8 << 20), 9)  # 8 MB of black in 8 kB
IMAGES = [png(24, 16, zlib.compress(bytes(16 * 73))), png(60_000, 60_000, BOMB), png(24, 16, BOMB),
          png(4096, 4096, BOMB), png(24, 16, b""), jpeg(24, 16), jpeg(24, 16)[:100], b"GIF89a", b""]  # fmt: skip


def one_of(values):
    """One of them, by its place: Hypothesis prints what it draws from."""
    return st.integers(0, len(values) - 1).map(lambda place: values[place])


sizes = st.sampled_from([0, 1, 3, 16, 24, 4096, 60_000, -1, 2**31, 2**40, 2**63, 1.5, "3", None])
shapes = st.lists(sizes, max_size=4) | st.just([1] * 70) | st.just([16, 24, 3]) | sizes
dtypes = st.sampled_from(
    ["|O", "|V8", "<c16", ">f4", "<U4", "<M8[s]", "<f8", "|u1", "|b1", "float32", "", 3, None]
)
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8)
leaves |= st.binary(max_size=40)
parts = {"data": st.binary(max_size=48) | st.just(16 * 24 * 3).map(bytes), "dtype": dtypes, "shape": shapes}
arrays = st.fixed_dictionaries({"__ndarray__": st.just(True), **parts}, optional={"more": leaves})
scalars = st.fixed_dictionaries({"__npgeneric__": st.just(True), "data": leaves, "dtype": dtypes})
forms = st.sampled_from(["png", "jpeg", "raw", "gif", None])
images = {"__image__": st.just(True), "format": forms, "data": one_of(IMAGES), "shape": shapes}
odd = leaves | arrays | scalars | st.fixed_dictionaries(images)
odd |= arrays.map(lambda array: {key.encode(): part for key, part in array.items()})
values = st.recursive(odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                      max_leaves=6)  # fmt: skip

depths = st.sampled_from([1, 11, 12, 13, 1000, 100_000])
heads = [
    b"\xc6\x7f\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xdd\x7f\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc1",
]
nested = st.builds(
    lambda depth, level: level * depth + b"\xc0", depths, st.sampled_from([b"\x91", b"\x81\xa1a"])
)


def packed(value) -> bytes:
    return msgpack.packb(value)


def changed(good):
    """Good messages with one of their fields changed, or one more, or one less."""

    def change(message, draw_place, value, how):
        message = dict(message)
        inner = message if "payload" not in message or how == "outer" else dict(message["payload"])
        key = sorted(inner)[draw_place % len(inner)] if inner and how != "more" else f"k{draw_place}"
        if how == "less":
            inner.pop(key, None)
        else:
            inner[key] = value
        if inner is not message:
            message["payload"] = inner
        return packed(message)

    hows = st.sampled_from(["inner", "outer", "more", "less"])
    return st.builds(change, one_of(good), st.integers(0, 9), values, hows)


def mutated(frames):
    """Whole frames, with bytes changed, cut out, or put in."""

    def mutate(frame, edits):
        frame = bytearray(frame)
        for place, out, put in edits:
            at = place % (len(frame) + 1)
            frame[at : at + out] = put
        return bytes(frame)

    places = st.integers(0, 150) | st.integers(0, 1 << 20)
    edit = st.tuples(
        places, st.sampled_from([0, 1, 1, 4, 1000]), st.binary(max_size=6) | st.sampled_from(heads)
    )
    return st.builds(mutate, one_of(frames), st.lists(edit, min_size=1, max_size=3))


def hostile(messages):
    """A strategy of frames: what goes wrong with these messages, and what never was one."""
    plain = [
        read_frame(pack(message, text_keys=True, images=form))
        for message in messages
        for form in (None, "png")
    ]
    frames = [msgpack.packb(message) for message in plain]
    random = (
        st.binary(max_size=200) | st.text(max_size=40) | values.map(packed) | nested | st.sampled_from(heads)
    )
    return changed(plain) | mutated(frames) | random


@pytest.fixture(scope="session")
def fuzz():
    """The settings of Hypothesis, and `hostile`."""
    return fuzzing, hostile


def survives(path, messages, probe, answered):
    """Every frame has at most one reply, then the probe has its own, on one socket; and the server holds no more memory."""

    @fuzzing
    @given(hostile(messages))
    def one(frame):
        client.send(frame)
        client.send(probe)
        reply = client.recv(timeout=10)
        if not answered(reply):
            reply = client.recv(timeout=10)
        assert answered(reply), (frame[:100], reply)

    with toy_server() as (process, url):
        PolicyClient(url, connect_s=20).close()
        with connect(url + path, max_size=None, compression=None) as client:
            if path != "/vla-eval":
                client.recv(timeout=10)
            one()
            before = resident_mb(process)
            one()
            assert resident_mb(process) - before < 24, "the server holds more and more"


@pytest.fixture(scope="session")
def frames_survived():
    return survives


def resident_mb(process) -> float:
    """The memory that a process holds."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="session")
def memory():
    return resident_mb
