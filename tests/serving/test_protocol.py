"""The codec: what goes in comes out, and whatever comes in is a value or a `ProtocolError`."""

import os
import struct
import time
import tracemalloc
import zlib

import hypothesis
import msgpack
import numpy as np
import pytest

from vla_bench.data.layout import Layout, PolicySpec
from vla_bench.serving.checks import message_from, observation_from
from vla_bench.serving.protocol import (
    DTYPES,
    Limits,
    ProtocolError,
    image_entry,
    pack,
    read_image,
    scan,
    unpack,
)

CASES = int(os.environ.get("VLA_BENCH_CASES", "20"))
FRAMES = 25 * CASES  # mutated frames; 12,500 in `make fuzz`

SPEC = PolicySpec(
    action=Layout(("dx", "dy")),
    state=Layout(("x", "y")),
    cameras=("front", "wrist"),
    image_size=(16, 24),
    horizon=4,
    control_rate=10.0,
    normalization={"action": "min_max", "state": "min_max"},
    dataset="toy",
    statistics_hash="0" * 16,
)


def drawn_value(rng: np.random.Generator, depth: int = 0):
    """A value that can be sent."""
    kind = rng.integers(0, 9 if depth < 4 else 7)
    if kind == 0:
        return None
    if kind == 1:
        return bool(rng.integers(2))
    if kind == 2:
        return int(rng.integers(-(2**63), 2**63 - 1)) >> int(rng.integers(64))
    if kind == 3:
        return float(rng.normal())
    if kind == 4:
        return "".join(chr(c) for c in rng.choice([97, 228, 0x4E2D, 0x1F600], rng.integers(0, 40)))
    if kind == 5:
        shape = tuple(rng.integers(0, 5, rng.integers(0, 5)))
        return rng.integers(0, 2, shape).astype(DTYPES[rng.integers(len(DTYPES))])
    if kind == 6:
        return rng.bytes(int(rng.integers(0, 300)))
    if kind == 7:
        return [drawn_value(rng, depth + 1) for _ in range(rng.integers(0, 20))]
    return {f"k{i}": drawn_value(rng, depth + 1) for i in range(rng.integers(0, 20))}


@pytest.mark.parametrize("text_keys", [False, True], ids=["openpi", "vla-eval"])
def test_what_is_sent_is_what_arrives(text_keys):
    rng = np.random.default_rng(1)
    for _ in range(CASES):
        value = drawn_value(rng)
        frame = pack(value, text_keys=text_keys)
        np.testing.assert_equal(unpack(frame), value)


def test_scan_counts_what_msgpack_builds():
    def count(value):
        if isinstance(value, list):
            return 1 + sum(map(count, value))
        if isinstance(value, dict):
            return 1 + sum(count(key) + count(part) for key, part in value.items())
        return 1

    rng = np.random.default_rng(2)
    for _ in range(CASES):
        frame = pack(drawn_value(rng))
        assert scan(frame) == count(msgpack.unpackb(frame))


@pytest.mark.parametrize("dtype", [*"OSUVMm", "c8", "c16", ">f4", "<f16", "<U5", "|S3", "|V8"])
def test_no_other_kind_of_numbers_is_read(dtype):
    for text in (True, False):
        entry = {"__ndarray__": True, "data": bytes(16), "dtype": dtype, "shape": [1]}
        frame = msgpack.packb({"x": entry if text else {k.encode(): v for k, v in entry.items()}})
        with pytest.raises(ProtocolError, match="x has the dtype"):
            unpack(frame)


@pytest.mark.parametrize(
    "shape",
    [[2**40, 2**40], [2**63], [-1, -4], [4, 1.0], [True, 4], "4", None, [[4]], [2] * 40, [3]],
    ids=str,
)
def test_an_absurd_shape_is_refused(shape):
    entry = {b"__ndarray__": True, b"data": bytes(16), b"dtype": "<f4", b"shape": shape}
    with pytest.raises(ProtocolError, match="^state"):
        unpack(msgpack.packb({"state": entry}))


HEADS = {
    "text of 2 GB": b"\xdb\x7f\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "list of 4 thousand million": b"\xdd\xff\xff\xff\xff",
    "dictionary of 4 thousand million": b"\xdf\xff\xff\xff\xff",
    "lists of 60,000 in one another": b"\xdc\xea\x60" * 1000,
    "a million lists in one another": b"\x91" * 1_000_000,
    "dictionaries in one another": b"\x81\xa1a" * 100_000 + b"\xc0",
    "a million empty lists": b"\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000,
    "a million nils": b"\xdd\x00\x0f\x42\x40" + b"\xc0" * 1_000_000,
    "a byte that begins nothing": b"\xc1",
    "an extension of 4 GB": b"\xc9\xff\xff\xff\xff\x05",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_promises_too_much_costs_nothing(name):
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ProtocolError):
        unpack(HEADS[name])
    taken, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20 and taken < 5, (peak, taken)


def test_a_frame_over_the_limit_is_not_looked_at():
    with pytest.raises(ProtocolError, match="at most 100 are read"):
        unpack(bytes(101), Limits(frame_bytes=100))


def png(width, height, data):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    each = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(each)


@pytest.mark.parametrize("shape", [[60_000, 60_000, 3], [16, 24, 3]], ids=["as it says", "with a lie"])
def test_a_bomb_in_an_image_is_refused_at_its_head(shape):
    bomb = png(60_000, 60_000, zlib.compress(bytes(20 << 20), 9))
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="front"):
        unpack(msgpack.packb({"front": {"__image__": True, "format": "png", "data": bomb, "shape": shape}}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_image_whose_data_go_on_behind_its_size_makes_no_more_than_its_size():
    long = png(24, 16, zlib.compress(bytes(50 << 20), 9))
    tracemalloc.start()
    try:
        found = read_image({"__image__": True, "format": "png", "data": long, "shape": [16, 24, 3]}, "front")
        assert found.shape == (16, 24, 3)
    except ProtocolError:
        pass  # a newer Pillow may call it damaged
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_damaged_image_is_refused_by_name(form):
    rng = np.random.default_rng(3)
    entry = image_entry(rng.integers(0, 255, (16, 24, 3), np.uint8), form)
    for _ in range(CASES):
        data = bytearray(entry["data"])
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        cut = bytes(data[: rng.integers(1, len(data))])
        for damaged in (bytes(data), cut):
            try:
                assert read_image({**entry, "data": damaged}, "front").shape == (16, 24, 3)
            except ProtocolError as error:
                assert str(error).startswith("front ")


def frames(rng: np.random.Generator) -> list[bytes]:
    """What clients send, in both spellings, with and without images."""
    pixels = rng.integers(0, 255, (16, 24, 3), np.uint8)
    openpi = {
        "observation/front": pixels,
        "observation/wrist": pixels,
        "observation/state": np.zeros(2),
        "prompt": "go",
    }
    images = {"images": {"front": pixels, "wrist": pixels}, "task_description": "go", "state": [0.0, 0.1]}
    envelope = {"type": "observation", "payload": images, "seq": 3, "timestamp": 1.5}
    return [pack(openpi), pack(openpi, images="png"), pack(images, text_keys=True, images="jpeg"), pack(envelope),
            msgpack.packb({"seed": 7, "endpoint": "reset"})]  # fmt: skip


def mutated(frame: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One of the ways in which a frame goes wrong."""
    changed, at = bytearray(frame), int(rng.integers(len(frame)))
    kind = rng.integers(8)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # in the heads, where the meaning is
        changed[int(rng.integers(min(len(frame), 120)))] = int(rng.integers(256))
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 4:
        del changed[at : at + int(rng.integers(1, 9))]
    elif kind == 5:
        other = others[int(rng.integers(len(others)))]
        changed[at:] = other[int(rng.integers(len(other))) :]
    elif kind == 6:
        changed[at : at + 5] = b"\xdd\xff\xff\xff\xff"
    else:
        changed = bytearray(rng.bytes(int(rng.integers(1, 400))))
    return bytes(changed) or b"\0"


def test_a_mutated_frame_is_a_value_or_a_protocol_error():
    """And what is a value is an observation, or refused with a `ValueError`; in bounded time and memory."""
    rng = np.random.default_rng(4)
    good = frames(rng)
    outcomes = {"refused frame": 0, "refused observation": 0, "observation": 0}
    tracemalloc.start()
    for _ in range(FRAMES):
        frame, begin = good[int(rng.integers(len(good)))], time.perf_counter()
        for _ in range(rng.integers(1, 4)):
            frame = mutated(frame, good, rng)
        try:
            message = unpack(frame)
            observation_from(message if isinstance(message, dict) else {}, SPEC)
            outcomes["observation"] += 1
        except ProtocolError:
            outcomes["refused frame"] += 1
        except ValueError:
            outcomes["refused observation"] += 1
        assert time.perf_counter() - begin < 2, frame[:200]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(outcomes.values()), outcomes  # each way is walked
    assert peak < 16 << 20 and held < 2 << 20, (held, peak)


def test_every_drawn_frame_is_a_value_or_a_protocol_error(fuzz):
    """Object arrays, absurd shapes, levels without end, heads that promise gigabytes, texts, bombs in images."""
    settings, hostile = fuzz
    rng, pixels = np.random.default_rng(4), np.zeros((16, 24, 3), np.uint8)
    good = [{"observation/front": pixels, "observation/state": rng.normal(size=2), "prompt": "go", "seed": 3},
            {"type": "observation", "payload": {"images": {"front": pixels}}, "seq": 3, "timestamp": 1.5}]  # fmt: skip

    @hypothesis.settings(settings, max_examples=8 * CASES)
    @hypothesis.given(hostile(good))
    def read(frame):
        begin = time.perf_counter()
        try:
            value = unpack(frame)
            assert_known(value)
        except ProtocolError:
            pass
        assert time.perf_counter() - begin < 2

    read()


def assert_known(value):
    """Nothing but plain values and arrays of the dtypes that are allowed."""
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            assert_known(part)
    elif isinstance(value, (np.ndarray, np.generic)):
        assert value.dtype.str in DTYPES
    else:
        assert value is None or isinstance(value, (bool, int, float, str, bytes))


def test_a_name_of_a_megabyte_is_not_looked_for():
    """Among the names of fields, which would take seconds."""
    begin = time.perf_counter()
    with pytest.raises(ProtocolError, match="at most 200 characters") as told:
        unpack(msgpack.packb({"observation": {"k" * 10**6: 1}}))
    assert time.perf_counter() - begin < 1 and len(str(told.value)) < 300


def test_images_share_one_limit():
    """Forty images that may each be unpacked, and together would be two gigabytes."""
    entry = {"__image__": True, "format": "png", "data": b"", "shape": [4096, 4096, 3]}
    with pytest.raises(ProtocolError, match="images of 671088640 pixels, at most 16777216"):
        unpack(msgpack.packb({"images": [{"front": [entry] * 40}]}))


def test_an_observation_survives_every_spelling():
    rng = np.random.default_rng(5)
    for frame in frames(rng)[:3]:
        observation = observation_from(unpack(frame), SPEC)
        again = observation_from(unpack(pack(message_from(observation, SPEC), images="png")), SPEC)
        assert [i.tobytes() for i in again["image"]] == [i.tobytes() for i in observation["image"]]
        assert again["lang"] == observation["lang"] and (again["state"] == observation["state"]).all()


@pytest.mark.parametrize(
    "odd", [object(), {1, 2}, 1j, 2**64, np.array(["a"]), np.array([None]), np.zeros(2, complex)]
)
def test_what_cannot_be_sent_is_said(odd):
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack({"x": odd})
