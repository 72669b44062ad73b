"""Episodes of TFDS, written here without it, become the same numbers, images and instructions."""

import io
import json
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from vla_bench.data.episode_plan import open_source
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.lerobot_files import read_files
from vla_bench.data.paths import DatasetError
from vla_bench.data.rlds import convert_rlds, main
from vla_bench.data.validation import validate

LENGTHS = (5, 3, 8)
SIZES = {"image": (32, 48), "wrist_image": (48, 32)}


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: list) -> bytes:
    if isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    if isinstance(values[0], float):
        return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
    return field(3, field(1, b"".join(map(varint, values))))


def record(values: dict[str, list]) -> bytes:
    entries = (field(1, name.encode()) + field(2, feature(each)) for name, each in values.items())
    data = field(1, b"".join(field(1, entry) for entry in entries))

    def checked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return part + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    return checked(struct.pack("<Q", len(data))) + checked(data)


def tensor(*shape: int, dtype: str = "float32", **more) -> dict:
    told = {
        "shape": {"dimensions": [str(n) for n in shape]} if shape else {},
        "dtype": dtype,
        "encoding": "none",
    }
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": told | more,
    }


def image(height: int, width: int, channels: int = 3, dtype: str = "uint8") -> dict:
    shape = {"dimensions": [str(height), str(width), str(channels)]}
    return {"image": {"shape": shape, "dtype": dtype, "encodingFormat": "png"}}


def group(features: dict) -> dict:
    return {"featuresDict": {"features": features}}


def declared(**changes) -> dict:
    observation = {name: image(*size) for name, size in SIZES.items()}
    observation |= {"depth": image(32, 48, 1, "uint16"), "state": tensor(4)}
    steps = {"observation": group(observation), "action": tensor(3), "language_instruction": {"text": {}}}
    steps |= {"is_first": tensor(dtype="bool"), "is_last": tensor(dtype="bool"), "reward": tensor()}
    steps |= changes
    metadata = group(
        {"file_path": {"text": {}}, "success": tensor(dtype="bool"), "number": tensor(dtype="int64")}
    )
    return group(
        {"steps": {"sequence": {"feature": group(steps), "length": "-1"}}, "episode_metadata": metadata}
    )


def frame(episode: int, step: int, size: tuple[int, int]) -> np.ndarray:
    pixels = np.full((*size, 3), 20 * episode + 9 * step, np.uint8)
    pixels[: size[0] // 2, : size[1] // 2] += 90
    return pixels


def stored(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def values(episode: int, length: int) -> dict[str, list]:
    rng = np.random.default_rng(episode)
    found = {
        f"observation/{n}": [stored(frame(episode, t, size)) for t in range(length)]
        for n, size in SIZES.items()
    }
    found |= {"observation/depth": [b"-"] * length, "observation/state": rng.normal(size=4 * length).tolist()}
    found |= {"action": rng.normal(size=3 * length).tolist(), "reward": [0.0] * length}
    found |= {"is_first": [1] + [0] * (length - 1), "is_last": [0] * (length - 1) + [1]}
    found["language_instruction"] = [(b"open it", "schließ es".encode())[episode % 2]] * length
    metadata = {"file_path": [f"raw/{episode}.h5".encode()], "success": [episode % 2], "number": [episode]}
    return {f"steps/{n}": v for n, v in found.items()} | {
        f"episode_metadata/{n}": v for n, v in metadata.items()
    }


def write(
    root: Path,
    change=lambda episode, content: content,
    features: dict | None = None,
    shards=((0,), (1, 2)),
    split="train",
) -> Path:
    folder = root / "robot" / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "features.json").write_text(json.dumps(features or declared()))
    for number, episodes in enumerate(shards):
        content = b"".join(record(change(e, values(e, LENGTHS[e]))) for e in episodes)
        (folder / f"robot-{split}.tfrecord-{number:05d}-of-{len(shards):05d}").write_bytes(content)
    return folder


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("last", ["keep", "drop"])
def test_numbers_are_the_same(last, version, tmp_path):
    report = convert_rlds(write(tmp_path), tmp_path / "new", fps=5, last_step=last, version=version)
    assert validate(tmp_path / "new", every_frame=True) == []
    data, less = LeRobotDataset(tmp_path / "new"), last == "drop"
    assert report["episodes"] == 3 and report["frames"] == len(data) == sum(LENGTHS) - 3 * less
    for column, name, width in (("action", "action", 3), ("state", "observation/state", 4)):
        parts = [
            np.float32(values(e, n)[f"steps/{name}"]).reshape(n, width)[: n - less]
            for e, n in enumerate(LENGTHS)
        ]
        assert (data.columns[column] == np.concatenate(parts)).all()
    texts = ["open it", "schließ es", "open it"]
    assert [data[int(i)]["lang"] for i in data.starts[:-1]] == texts and data.fps == 5


def test_images_are_those_of_the_steps(tmp_path):
    convert_rlds(write(tmp_path), tmp_path / "new", fps=5, last_step="keep", crf=0)
    data = LeRobotDataset(tmp_path / "new")
    assert data.cameras == ("image", "wrist_image") and data.image_sizes == ((32, 48), (48, 32))
    for i, (episode, step) in enumerate((e, t) for e, n in enumerate(LENGTHS) for t in range(n)):
        for found, size in zip(data[i]["image"], SIZES.values()):
            assert np.abs(np.asarray(found).astype(int) - frame(episode, step, size)).max() <= 3


def test_what_is_told_of_an_episode_is_kept(tmp_path):
    convert_rlds(write(tmp_path), tmp_path / "new", fps=5, last_step="keep")
    details = open_source(tmp_path / "new").details
    assert details[1] == {"rlds.file_path": "raw/1.h5", "rlds.success": True, "rlds.number": 1}
    told = json.loads((tmp_path / "new/meta/source.json").read_text())
    assert told == {"dataset": "robot", "split": "train", "last_step": "keep"}


def test_actions_in_parts_are_put_together_in_the_order_named(tmp_path):
    parts = group({"move": tensor(2), "closes": tensor(dtype="bool")})

    def change(episode, content):
        content["steps/action/move"] = [float(t) for t in range(2 * LENGTHS[episode])]
        content["steps/action/closes"] = [t % 2 for t in range(LENGTHS[episode])]
        return content

    folder = write(tmp_path, change, declared(action=parts))
    convert_rlds(
        folder, tmp_path / "new", fps=5, last_step="keep", action=["action/closes", "action/move"], state=[]
    )
    found = LeRobotDataset(tmp_path / "new", state_key=None).columns["action"][:3]
    assert found.tolist() == [[0, 0, 1], [1, 2, 3], [0, 4, 5]]


def test_what_is_left_out_is_told(tmp_path, capsys):
    folder = write(tmp_path)
    main(
        [
            str(folder),
            str(tmp_path / "new"),
            "--fps",
            "5",
            "--last_step",
            "keep",
            "--cameras",
            "observation/image",
            "--task",
            "go",
        ]
    )
    assert capsys.readouterr().out.strip() == (
        f"{tmp_path / 'new'}: 3 episodes, 16 frames; left out: steps/observation/wrist_image, steps/observation/depth, "
        "steps/language_instruction, steps/is_first, steps/is_last, steps/reward"
    )
    assert read_files(tmp_path / "new").tasks == {0: "go"}


def test_one_split_is_read(tmp_path):
    folder = write(tmp_path)
    write(tmp_path, shards=((2,),), split="val")
    convert_rlds(folder, tmp_path / "new", fps=5, last_step="keep", split="val")
    assert len(LeRobotDataset(tmp_path / "new")) == LENGTHS[2]


def lacking(name):
    return lambda e, c: {k: v for k, v in c.items() if k != f"steps/{name}" or e != 2}


def replaced(name, values):
    return lambda e, c: c | ({f"steps/{name}": values} if e == 2 else {})


FAULTS = {
    "missing": (lacking("action"), "record 1: steps/action is missing"),
    "short": (replaced("observation/state", [0.5] * 28), "record 1: steps/observation/state has 7 steps, expected 8"),
    "odd": (replaced("action", [0.5] * 25), "record 1: steps/action holds 25 values, which are no steps of tensor"),
    "kind": (replaced("action", [b"a"] * 8), "record 1: steps/action holds 8 values, which are no steps of tensor"),
    "image": (replaced("observation/image", [b"no"] * 8), "record 1: steps/observation/image step 0 holds 2 bytes"),
    "size": (replaced("observation/image", [stored(frame(0, 0, (32, 32)))] * 8), r"step 0 is \[32, 32\], features.json says \[32, 48\]"),
    "instruction": (replaced("language_instruction", [b"a"] * 7 + [b"b"]), "record 1: steps/language_instruction has 2 different texts"),
    "nan": (replaced("action", [float("nan")] * 24), "episode 2: action holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_wrong_is_named_and_leaves_nothing(what, tmp_path):
    change, message = FAULTS[what]
    folder = write(tmp_path, change)
    with pytest.raises(ValueError, match=message) as told:
        convert_rlds(folder, tmp_path / "new", fps=5, last_step="keep")
    assert "\n" not in str(told.value) and [p.name for p in tmp_path.iterdir()] == ["robot"]


def test_a_damaged_file_is_named(tmp_path):
    folder = write(tmp_path)
    path = folder / "robot-train.tfrecord-00001-of-00002"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="00001-of-00002: record 0 has another checksum than its bytes"):
        convert_rlds(folder, tmp_path / "new", fps=5, last_step="keep")


def test_a_file_that_did_not_arrive_is_named(tmp_path):
    folder = write(tmp_path)
    (folder / "robot-train.tfrecord-00000-of-00002").unlink()
    with pytest.raises(DatasetError, match="split 'train' lacks 1 of 2 files, the first is number 0"):
        convert_rlds(folder, tmp_path / "new", fps=5, last_step="keep")


def test_episodes_are_counted_where_they_are_told(tmp_path):
    folder = write(tmp_path)
    told = {"splits": [{"name": "train", "shardLengths": ["1", "3"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(told))
    with pytest.raises(DatasetError, match="split 'train' holds 3 episodes, expected 4"):
        convert_rlds(folder, tmp_path / "new", fps=5, last_step="keep")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"action": ["actoin"]}, "steps have no tensor 'actoin'; did you mean 'action'?"),
        ({"cameras": ["observation/state"]}, "steps have no image 'observation/state'"),
        ({"instruction": "observation/text"}, "steps have no text 'observation/text'"),
        ({"last_step": "last"}, "last_step is 'last', expected keep or drop"),
        ({"robot": "aloha"}, "the action has 3 numbers, the robot aloha declares 14"),
        ({"split": "tset"}, "no split 'tset'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(given, message, tmp_path):
    with pytest.raises(ValueError) as told:
        convert_rlds(write(tmp_path), tmp_path / "new", **({"fps": 5, "last_step": "keep"} | given))
    assert message in str(told.value) and not (tmp_path / "new").exists()
