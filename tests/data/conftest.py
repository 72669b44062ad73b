"""Tiny datasets in any layout of the metadata, written with nothing but pyarrow and PyAV."""

import io
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

TOP = "observation.images.top"
INDEX = {"timestamp": "float32"} | {
    n: "int64" for n in ("frame_index", "episode_index", "index", "task_index")
}


def level(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A plain image whose grey level tells its number, modulo 16."""
    return np.full((height, width, 3), i * 16 % 256, np.uint8)


def level_of(image: Image.Image) -> int:
    return int(round(float(np.asarray(image).mean()) / 16)) % 16


def encode(
    path: Path,
    frames: list,
    fps: float,
    codec: str = "libx264",
    options: dict | None = None,
    container: dict | None = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(100000), options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def png(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def vector(width: int, names: object = None, dtype: str = "float32") -> dict:
    return {"dtype": dtype, "shape": [width], "names": names}


def camera(shape=(48, 64, 3), names=("height", "width", "channels"), dtype: str = "video", **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "names": list(names) if names else None, **more}


def counting(width: int) -> Callable[[int], list]:
    return lambda row: [float(row + d) for d in range(width)]


PLAIN = {"action": vector(3), "observation.state": vector(3), TOP: camera()}


def _columns(lengths: tuple, fps: float, extra: dict) -> dict:
    ends = np.cumsum((0, *lengths))
    steps = np.concatenate([np.arange(n) for n in lengths])
    columns = {"timestamp": (steps / fps).astype(np.float32), "frame_index": steps}
    columns |= {"episode_index": np.repeat(np.arange(len(lengths)), lengths), "index": np.arange(ends[-1])}
    columns["task_index"] = np.zeros(ends[-1], np.int64)
    return columns | {name: [value(i) for i in range(ends[-1])] for name, value in extra.items()}


def _info(version: str, fps: float, features: dict, paths: tuple, more: dict) -> str:
    index = {n: {"dtype": d, "shape": [1], "names": None} for n, d in INDEX.items()}
    told = {"codebase_version": version, "fps": fps, "chunks_size": 1000, "features": features | index}
    return json.dumps(told | dict(zip(("data_path", "video_path"), paths)) | more, indent=1)


def write_v21(
    root: Path,
    *,
    lengths=(6, 5),
    fps=30,
    features=None,
    extra=None,
    tasks=("do it",),
    image=level,
    modality=None,
    info=None,
    encoder=encode,
    rate=None,
):
    """A dataset v2.1. `extra`: column to a function of the row; `image`: of row, height and width."""
    features = PLAIN if features is None else features
    extra = {"action": counting(3), "observation.state": counting(3)} if extra is None else extra
    (root / "meta").mkdir(parents=True)
    columns, ends = _columns(lengths, fps, extra), np.cumsum((0, *lengths))
    for e in range(len(lengths)):
        rows = slice(ends[e], ends[e + 1])
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({n: values[rows] for n, values in columns.items()}), path)
        for name, feature in features.items():
            if feature["dtype"] == "video" and lengths[e]:
                height, width = [n for n in feature["shape"] if n > 4][:2]
                frames = [image(i, height, width) for i in range(ends[e], ends[e + 1])]
                encoder(root / f"videos/chunk-000/{name}/episode_{e:06d}.mp4", frames, rate or fps)
    lines = lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    rows = [{"episode_index": e, "tasks": [tasks[0]], "length": n} for e, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text(lines(rows), "utf-8")
    rows = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    (root / "meta/tasks.jsonl").write_text(lines(rows), "utf-8")
    paths = (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    (root / "meta/info.json").write_text(_info("v2.1", fps, features, paths, info or {}))
    if modality is not None:
        (root / "meta/modality.json").write_text(json.dumps(modality))
    return root


def write_v30(
    root: Path,
    *,
    lengths=(6, 5),
    fps=30,
    features=None,
    extra=None,
    tasks=("do it",),
    image=level,
    rate=None,
    change=lambda rows: rows,
    encoder=encode,
    info=None,
):
    """A dataset v3.0 with all episodes in one file. `rate`: of the video; `change`: of the rows of meta/episodes."""
    features = PLAIN if features is None else features
    extra = {"action": counting(3), "observation.state": counting(3)} if extra is None else extra
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(_columns(lengths, fps, extra)), root / "data/chunk-000/file-000.parquet")
    cameras, ends = [n for n, f in features.items() if f["dtype"] == "video"], np.cumsum((0, *lengths))
    for name in cameras:
        frames = [image(i, *features[name]["shape"][:2]) for i in range(ends[-1])]
        encoder(root / f"videos/{name}/chunk-000/file-000.mp4", frames, rate or fps)
    rows = []
    for e, n in enumerate(lengths):
        row = {
            "episode_index": e,
            "tasks": ["do it"],
            "length": n,
            "data/chunk_index": 0,
            "data/file_index": 0,
        }
        row |= {"dataset_from_index": int(ends[e]), "dataset_to_index": int(ends[e + 1])}
        for name in cameras:
            row |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": 0}
            begin, end = (float(ends[i]) / (rate or fps) for i in (e, e + 1))
            row |= {f"videos/{name}/from_timestamp": begin, f"videos/{name}/to_timestamp": end}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(change(rows)), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": range(len(tasks)), "task": tasks}), root / "meta/tasks.parquet")
    paths = (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    (root / "meta/info.json").write_text(_info("v3.0", fps, features, paths, info or {}))
    return root


@pytest.fixture(scope="session")
def make():
    """The functions above."""
    return SimpleNamespace(
        v21=write_v21,
        v30=write_v30,
        level=level,
        level_of=level_of,
        encode=encode,
        png=png,
        vector=vector,
        camera=camera,
        counting=counting,
        PLAIN=PLAIN,
        TOP=TOP,
    )
