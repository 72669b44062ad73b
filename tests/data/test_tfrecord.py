"""Records and examples, written here byte by byte, are read as they were written, and no damage goes unnoticed."""

import struct
import sys

import numpy as np
import pytest

from vla_bench.data.paths import DatasetError
from vla_bench.data.tfrecord import decode_example, fields, masked, read_records, varints
from vla_bench.registry import RegistryError

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    checksum = lambda part: struct.pack(
        "<I", ((crc32c(part) >> 15 | crc32c(part) << 17) + 0xA282EAD8) % (1 << 32)
    )
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_checksums_are_those_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283
    # the length of an empty record, as every TFRecord writer stores it
    assert masked(crc32c(struct.pack("<Q", 0))) == struct.unpack("<I", record(b"")[8:12])[0]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "a.tfrecord"
    file.write_bytes(b"".join(map(record, [b"first", b"", bytes(range(256)) * 3])))
    return file


def test_records_are_read_in_their_order(path):
    assert list(read_records(path)) == [b"first", b"", bytes(range(256)) * 3]


def test_an_empty_file_holds_no_record(tmp_path):
    (tmp_path / "a").touch()
    assert list(read_records(tmp_path / "a")) == []


def test_every_flipped_byte_and_every_cut_is_found(path):
    whole = path.read_bytes()
    ends = {len(record(b"first")), len(record(b"first")) + 16, len(whole)}
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DatasetError, match=r"a.tfrecord: record [012] "):
            list(read_records(path))
        if place and place not in ends:
            path.write_bytes(whole[:place])
            with pytest.raises(DatasetError, match=r"a.tfrecord: record [012] "):
                list(read_records(path))


def test_what_stands_before_the_damage_is_read(path):
    path.write_bytes(path.read_bytes()[:-1])
    records = read_records(path)
    assert (next(records), next(records)) == (b"first", b"")
    with pytest.raises(DatasetError, match="record 2 is cut off: it has 771 of 772 bytes"):
        next(records)


def test_without_the_extra_the_line_to_run_is_told(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(RegistryError, match=r'need \'google_crc32c\': pip install "vla_bench\[rlds\]"'):
        list(read_records(path))


NUMBERS = [0, 1, 127, 128, 300, -1, -(1 << 63), (1 << 63) - 1, 1 << 40]


@pytest.mark.parametrize("packed", [True, False])
def test_whole_numbers_of_every_size(packed):
    numbers = b"".join(map(varint, NUMBERS))
    content = field(1, numbers) if packed else b"".join(b"\x08" + varint(n) for n in NUMBERS)
    example = field(1, field(1, field(1, b"n") + field(2, field(3, content))))
    assert decode_example(example, "x")["n"].tolist() == NUMBERS
    assert varints(memoryview(numbers)).tolist() == NUMBERS


@pytest.mark.parametrize("packed", [True, False])
def test_floats_bit_for_bit(packed):
    values = np.array([0.1, -2.5, 3e38, 1e-45, np.inf], np.float32)
    content = field(1, values.tobytes()) if packed else b"".join(b"\x0d" + v.tobytes() for v in values)
    found = decode_example(field(1, field(1, field(1, b"f") + field(2, field(2, content)))), "x")["f"]
    assert found.dtype == np.float32 and (found == values).all()


def test_bytes_and_empty_lists():
    entries = {b"b": field(1, field(1, b"\x00\xff") + field(1, b"")), b"e": field(3, b""), b"n": b""}
    example = field(1, b"".join(field(1, field(1, name) + field(2, each)) for name, each in entries.items()))
    found = decode_example(example, "x")
    assert found.keys() == {"b", "e"} and found["b"] == [b"\x00\xff", b""] and len(found["e"]) == 0


def test_no_damaged_example_ends_in_another_error():
    content = field(1, struct.pack("<3f", 1, 2, 3))
    example = field(1, field(1, field(1, b"steps/action") + field(2, field(2, content))))
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(example[: rng.integers(1, len(example) + 1)])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            decode_example(bytes(damaged), "file: record 3")
        except DatasetError as error:
            assert str(error).startswith("file: record 3 is no tf.train.Example")


def test_fields_of_every_wire_type():
    data = b"\x08\x96\x01" + b"\x11" + bytes(8) + field(3, b"abc") + b"\x25" + bytes(4)
    assert [number for number, _ in fields(memoryview(data))] == [1, 2, 3, 4]
