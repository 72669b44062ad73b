"""How long it takes to open a large dataset, and to sum it up; no video is touched.

python experiments/speed/open_dataset.py
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_bench.data.action_modes import action_statistics, make_encoding
from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.parts import Part
from vla_bench.data.writer import INDEX_FEATURES, PATHS

CAMERA = "observation.images.front"


def columns(episodes: np.ndarray, frames: int, numbers: dict[str, int]) -> pa.Table:
    """The rows of some episodes of equal length."""
    rows = len(episodes) * frames
    found = {"timestamp": np.tile(np.arange(frames, dtype=np.float32) / 30, len(episodes))}
    found |= {
        "frame_index": np.tile(np.arange(frames), len(episodes)),
        "episode_index": np.repeat(episodes, frames),
    }
    found |= {"index": episodes[0] * frames + np.arange(rows), "task_index": np.zeros(rows, np.int64)}
    values = np.random.default_rng(0)
    for name, width in numbers.items():
        flat = values.normal(size=rows * width).astype(np.float32)
        found[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    return pa.table(found)


def write(
    root: Path, version: str, episodes: int, frames: int, numbers: dict[str, int], per_file: int
) -> None:
    """A dataset without its videos."""
    data, video = PATHS[version]
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    for first in range(0, episodes, per_file):
        place = {"chunk_index": 0, "file_index": first // per_file, "episode_chunk": first // 1000}
        path = root / data.format(episode_index=first, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(columns(np.arange(first, min(first + per_file, episodes)), frames, numbers), path)
    count = np.arange(episodes)
    if version == "v3.0":
        rows = {"episode_index": count, "length": np.full(episodes, frames), "tasks": [["do it"]] * episodes}
        rows |= {"dataset_from_index": count * frames, "dataset_to_index": (count + 1) * frames}
        for prefix in ("data", f"videos/{CAMERA}"):
            rows |= {f"{prefix}/chunk_index": count * 0, f"{prefix}/file_index": count // per_file}
        rows[f"videos/{CAMERA}/from_timestamp"] = count % per_file * frames / 30
        pq.write_table(pa.table(rows), root / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.table({"task_index": [0], "task": ["do it"]}), root / "meta/tasks.parquet")
    else:
        lines = [
            json.dumps({"episode_index": e, "tasks": ["do it"], "length": frames}) for e in range(episodes)
        ]
        (root / "meta/episodes.jsonl").write_text("\n".join(lines))
        (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "do it"}\n')
    features = {
        name: {"dtype": "float32", "shape": [width], "names": None} for name, width in numbers.items()
    }
    features |= {CAMERA: {"dtype": "video", "shape": [224, 224, 3], "names": ["height", "width", "channels"]}}
    features |= {n: {"dtype": dtype, "shape": [1], "names": None} for n, dtype in INDEX_FEATURES.items()}
    info = {
        "codebase_version": version,
        "fps": 30,
        "data_path": data,
        "video_path": video,
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))


def seconds(work: Callable) -> tuple[float, float]:
    """Wall and CPU time of the faster of two runs."""
    found = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for version, episodes, per_file in (
            ("v3.0", 2_500, 100),
            ("v3.0", 5_000, 100),
            ("v3.0", 10_000, 100),
            ("v3.0", 10_000, 10_000),
            ("v2.1", 10_000, 1),
        ):
            root = Path(folder) / f"{version}_{episodes}_{per_file}"
            write(root, version, episodes, 100, {"action": 7, "observation.state": 8}, per_file)
            wall, cpu = seconds(lambda root=root: LeRobotDataset(root))
            files = -(-episodes // per_file)
            print(
                f"{version} {episodes * 100:9,} frames, {episodes:6,} episodes in {files:6,} files: opened in {wall:.2f} s, CPU {cpu:.2f} s"
            )
        root = Path(folder) / "summed"
        write(root, "v3.0", 1_350, 200, {"action": 7, "observation.state": 8}, 50)
        wall, cpu = seconds(lambda: LeRobotDataset(root).statistics())
        print(f"v3.0   270,000 frames of 15 numbers opened and summed up in {wall:.2f} s, CPU {cpu:.2f} s")
    parts = [Part(f"joint_{i}", (f"joint_{i}",), "joint") for i in range(14)]
    numbers = np.random.default_rng(0).normal(size=(270_000, 14)).astype(np.float32)
    table = numbers, numbers, np.arange(0, 270_001, 200)
    encoding = make_encoding(parts, parts, "relative")
    wall, cpu = seconds(lambda: action_statistics(encoding, [table], 16))
    print(f"270,000 chunks of 16 relative actions of 14 numbers summed up in {wall:.2f} s, CPU {cpu:.2f} s")


if __name__ == "__main__":
    main()
