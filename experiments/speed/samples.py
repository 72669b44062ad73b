"""Samples per second of one worker: this package beside the public LeRobot dataset class, on the same files.

python experiments/speed/samples.py PYTHON_WITH_LEROBOT [--codec h264 av1] [--samples 800] [--long 20000]

A sample is two images of 224 x 224, a state and a chunk of 16 actions, drawn in a random order. Both sides are a
`DataLoader` with one worker that persists, four batches of eight prefetched, images as uint8. LeRobot runs as its
trainer runs it: `return_uint8=True`, its own collate function, torchcodec, the cameras decoded in parallel threads.
Its Python is an environment of its own (lerobot with its extra `dataset`; torchcodec needs FFmpeg's libraries).
Both are asked in turns. What is compared is the worker's CPU time, which a busy machine does not change; the time on
the clock is printed beside it. Memory is the worker's proportional and resident set.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from fractions import Fraction
from pathlib import Path
from statistics import median

import numpy as np
from child import Child

HORIZON, BATCH, CAMERAS, SIZE, FPS = 16, 8, ("front", "wrist"), 224, 30
HERTZ = os.sysconf("SC_CLK_TCK")


def draw_episode(rng: np.random.Generator, length: int) -> np.ndarray:
    """A noisy scene in which a square moves, uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    shade = [
        120 + 80 * np.sin(6 * x + 6 * rng.random()),
        120 + 70 * np.cos(5 * y),
        100 + 60 * np.sin(4 * (x + y)),
    ]
    scene = np.stack(shade, -1) + rng.normal(0, 4, (SIZE, SIZE, 3))
    frames = np.repeat(scene.clip(0, 255).astype(np.uint8)[None], length, 0)
    for t in range(length):
        row, column = 20 + t % 170, 3 * t % 190
        frames[t, row : row + 30, column : column + 30] = (230, 60, 40)
    return frames


def write(root: Path, episodes: int = 40, length: int = 150) -> None:
    """A dataset of v3.0, ten episodes in a file, H.264 with a key frame every second frame."""
    from vla_bench.data.layout import Layout
    from vla_bench.data.writer import LeRobotWriter

    rng, layout = np.random.default_rng(0), Layout(tuple(f"joint_{i}" for i in range(7)))
    options = {"cameras": dict.fromkeys(CAMERAS, (SIZE, SIZE)), "state": layout, "action": layout}
    with LeRobotWriter(root, fps=FPS, episodes_per_file=10, **options) as writer:
        for episode in range(episodes):
            numbers = np.cumsum(rng.normal(0, 0.01, (length, 7)), axis=0)
            images = {camera: draw_episode(rng, length) for camera in CAMERAS}
            writer.add_episode(images=images, state=numbers, action=numbers, task=f"task {episode % 5}")


def to_av1(root: Path) -> None:
    """Encodes every video anew as LeRobot does when nothing is said: SVT-AV1, crf 30, preset 12, GOP 2."""
    import av

    options = {"crf": "30", "preset": "12", "g": "2"}
    for path in root.rglob("*.mp4"):
        with av.open(str(path)) as old, av.open(f"{path}.new", "w", format="mp4") as new:
            stream = new.add_stream("libsvtav1", rate=Fraction(FPS), options=options)
            stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
            for frame in old.decode(video=0):
                new.mux(stream.encode(frame.reformat(format="yuv420p")))
            new.mux(stream.encode())
        os.replace(f"{path}.new", path)
    info = json.loads((root / "meta/info.json").read_text().replace('"h264"', '"av1"'))
    (root / "meta/info.json").write_text(json.dumps(info))


def open_ours(root: str):  # the dataset, how a batch is made, and what to call it
    import av
    from torch.utils.data import default_collate

    from vla_bench.data.lerobot import LeRobotDataset

    def stack(samples):
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        images = [dict(zip(CAMERAS, map(np.asarray, sample.pop("image")))) for sample in samples]
        return default_collate([{**sample, **each} for sample, each in zip(samples, images)])

    return LeRobotDataset(root, horizon=HORIZON), stack, f"vla_bench, PyAV {av.__version__}"


def open_lerobot(root: str):
    import lerobot
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.datasets.video_utils import get_safe_default_video_backend
    from lerobot.utils.collate import lerobot_collate_fn

    window = {"action": [t / FPS for t in range(HORIZON)]}
    dataset = LeRobotDataset("local/dataset", root=root, delta_timestamps=window, return_uint8=True)
    backend = get_safe_default_video_backend()
    if backend == "torchcodec":
        import torchcodec

        backend = f"torchcodec {torchcodec.__version__}"
    return dataset, lerobot_collate_fn, f"lerobot {lerobot.__version__}, {backend}"


def decode_ours(dataset):  # decodes one image of a sample's first camera
    from vla_bench.data.video import reader

    key = dataset.image_keys[0]

    def decode(index: int) -> None:
        episode, frame, _ = dataset.subset.locate(index)
        path, start = episode.videos[key]
        reader(path).read_at(start, episode.length, frame, frame / FPS, FPS)

    return decode


def decode_lerobot(dataset):  # torchcodec alone, as LeRobot opens it, without what LeRobot does around it
    from fsspec import open as open_file
    from torchcodec.decoders import VideoDecoder

    key = f"observation.images.{CAMERAS[0]}"
    lengths = np.array(dataset.meta.episodes["length"])
    ends = np.cumsum(lengths)
    begins = np.round(np.array(dataset.meta.episodes[f"videos/{key}/from_timestamp"]) * FPS).astype(int)
    paths = [str(dataset.root / dataset.meta.get_video_file_path(e, key)) for e in range(len(lengths))]
    decoders = {p: VideoDecoder(open_file(p).__enter__(), seek_mode="approximate") for p in sorted({*paths})}

    def decode(index: int) -> None:
        episode = int(np.searchsorted(ends, index, side="right"))
        frame = int(begins[episode] + index - ends[episode] + lengths[episode])
        decoders[paths[episode]].get_frames_at(indices=[frame])

    return decode


def shown(batch: dict) -> list[float]:
    """Mean brightness of the first image of each camera, to see that both sides return the same frames."""
    images = [batch.get(camera, batch.get(f"observation.images.{camera}")) for camera in CAMERAS]
    assert all(str(image.dtype) == "torch.uint8" for image in images)
    return [round(float(image[0].float().mean()), 1) for image in images]


def resources(pid: int) -> dict[str, float]:
    """CPU seconds of a process, and its proportional and resident set in MiB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    cpu = (int(fields[11]) + int(fields[12])) / HERTZ
    return {"cpu": cpu, "pss": kib["Pss"] / 1024, "rss": kib["Rss"] / 1024}


def serve(which: str, root: str) -> None:
    """Reads from each line of the input what to do and how often, does it, prints what that took."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    dataset, collate, name = {"ours": open_ours, "lerobot": open_lerobot}[which](root)
    decode = {"ours": decode_ours, "lerobot": decode_lerobot}[which](dataset)
    order = np.random.default_rng(0)
    indices = [int(i) for _ in range(20) for i in order.permutation(len(dataset))]
    options = {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 4}
    loader = DataLoader(dataset, batch_size=BATCH, sampler=indices, collate_fn=collate, **options)
    batches = iter(loader)
    first = next(batches)
    worker = batches._workers[0].pid
    print(
        json.dumps({"name": name, "shown": shown(first), "images": len(dataset) * len(CAMERAS)}), flush=True
    )
    for line in sys.stdin:
        what, times = line.split()
        process = worker if what == "load" else os.getpid()
        before, clock = resources(process), time.perf_counter()
        if what == "load":
            for _ in range(int(times) // BATCH):
                next(batches)
        else:
            for index in order.integers(0, len(dataset), int(times)):
                decode(int(index))
        after = resources(process)
        found = {"wall": time.perf_counter() - clock, "pss": after["pss"], "rss": after["rss"]}
        print(json.dumps({**found, "cpu": after["cpu"] - before["cpu"]}), flush=True)


class Loader:
    """The other process."""

    def __init__(self, python: str, which: str, root: Path):
        command = [python, __file__, "--serve", which, "--root", str(root)]
        self.process = Child(command)
        self.about = self.process.answer()

    def load(self, times: int, what: str = "load") -> dict:
        """Wall and CPU seconds of so many samples, and the worker's memory afterwards; or of images: "decode"."""
        return self.process.ask(f"{what} {times}")


def compare(root: Path, python: str, samples: int, repeats: int, long: int) -> None:
    """Both sides in turns, then memory over many samples."""
    sides = {"ours": Loader(sys.executable, "ours", root), "lerobot": Loader(python, "lerobot", root)}
    brightness = [np.array(side.about["shown"]) for side in sides.values()]
    assert np.abs(brightness[0] - brightness[1]).max() < 2, f"not the same frames: {brightness}"
    found: dict[str, list[dict]] = {name: [] for name in sides}
    decoded: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.load(samples // 2)  # files are opened, decoders made
        side.load(100, "decode")
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(side.load(samples))
        for name, side in sides.items():
            decoded[name].append(side.load(samples, "decode")["cpu"] / samples)
    cost = {}
    for name, side in sides.items():
        cpu, wall = (median(row[key] for row in found[name]) / samples for key in ("cpu", "wall"))
        cost[name] = cpu, wall
        memory = f"PSS {found[name][-1]['pss']:.0f} MiB, RSS {found[name][-1]['rss']:.0f} MiB"
        print(
            f"  {side.about['name']:32} CPU {1000 * cpu:6.3f} ms, clock {1000 * wall:6.3f} ms per sample; "
            f"{1 / cpu:5.0f} samples per second of CPU; {memory}; "
            f"the decoder alone {1000 * median(decoded[name]):.3f} ms per image",
            flush=True,
        )
    size = sum(path.stat().st_size for path in root.rglob("*.mp4"))
    print(f"  {size / sides['ours'].about['images'] / 1000:.1f} kB per image", flush=True)
    cpu, wall = (theirs / ours for ours, theirs in zip(cost["ours"], cost["lerobot"]))
    print(f"  {cpu:.1f} times less CPU, {wall:.1f} times less time on the clock", flush=True)
    sides["lerobot"].close()
    if long:
        steps = [sides["ours"].load(long // 10) for _ in range(10)]
        held = ", ".join(f"{step['rss']:.1f}" for step in steps)
        print(f"  over {long} samples more, RSS in MiB: {held}", flush=True)
    sides["ours"].close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", nargs="?", help="a Python that can import lerobot")
    parser.add_argument("--codec", nargs="+", choices=("h264", "av1"), default=["h264", "av1"])
    parser.add_argument("--samples", type=int, default=800, help="in each repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--long", type=int, default=20_000, help="samples over which memory is watched; 0: none"
    )
    parser.add_argument("--serve", choices=("ours", "lerobot"), help=argparse.SUPPRESS)
    parser.add_argument("--root", help="a dataset with two cameras of 224 x 224; made when left out")
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.root)
    if not options.python:
        parser.error("the Python that can import lerobot is missing")
    with tempfile.TemporaryDirectory() as folder:
        for codec in options.codec:
            root = Path(options.root or Path(folder) / codec)
            if not options.root:
                write(root)
                to_av1(root) if codec == "av1" else None
            print(f"{'files of ' + options.root if options.root else codec}", flush=True)
            compare(root, options.python, options.samples, options.repeats, options.long)


if __name__ == "__main__":
    main()
