"""Random access to the images of a dataset: the package's reader beside the plain way, a file opened anew per sample.

python experiments/speed/video_access.py experiments/runs/data/metaworld_quickstart
"""

import argparse
import time
from collections.abc import Callable

import av
import numpy as np

from vla_bench.data.lerobot import LeRobotDataset
from vla_bench.data.video import reader


def opened_anew(path, index: int) -> np.ndarray:
    """The peer: open, seek to the key frame before, decode on, convert. Correct, and what most loaders do."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        ticks = 1 / (stream.average_rate * stream.time_base)
        container.seek(round(index * ticks), stream=stream, backward=True)
        for frame in container.decode(stream):
            if round(frame.pts / ticks) == index:
                return frame.to_ndarray(format="rgb24")
    raise IndexError(index)


def milliseconds(read: Callable, places: list, repeats: int = 5) -> float:
    """The best of several passes, per image."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for place in places:
            read(*place)
        best = min(best, (time.perf_counter() - start) / len(places))
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    dataset = LeRobotDataset(options.dataset)
    key = dataset.files.cameras()[0]
    rng = np.random.default_rng(0)
    places = []
    for index in rng.integers(0, len(dataset), options.samples):
        episode, frame, _ = dataset.subset.locate(int(index))
        path, start = episode.videos[key]
        moment = (start, episode.length, frame, frame / dataset.fps, dataset.fps)
        places.append((path, moment, reader(path).locate(*moment)))
    for path, moment, index in places:
        assert np.array_equal(reader(path).read_at(*moment), opened_anew(path, index)), (
            "the two ways must give the same pixels"
        )
    ours = milliseconds(lambda path, moment, index: reader(path).read_at(*moment), places)
    theirs = milliseconds(lambda path, moment, index: opened_anew(path, index), places)
    print(f"{len(places)} random images {dataset.image_size} of {dataset.name}")
    print(f"  opened anew  {theirs:7.3f} ms per image")
    print(f"  vla_bench    {ours:7.3f} ms per image   {theirs / ours:.1f} x")


if __name__ == "__main__":
    main()
