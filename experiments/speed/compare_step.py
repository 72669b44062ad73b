"""The quickstart's training step of this tree beside that of another one, on the same batches.

git worktree add /tmp/before COMMIT && python experiments/speed/compare_step.py /tmp/before [--key value ...]

Each tree has a process of its own: the quickstart's run, configured by `experiments/configs/quickstart.yaml` of this
tree and the keys that are given, on one thread, with the loader in the same process (`num_workers: 0`). They are
asked in turns for two steps each. What is compared is CPU time, which a busy machine changes less than the clock,
and the ratio is the median over neighbouring pairs. The losses of all steps and the largest difference are printed.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from child import Child

HERE = Path(__file__).resolve().parents[2]
CONFIG = HERE / "experiments/configs/quickstart.yaml"
MADE = {  # by the quickstart of this tree, for both
    "datasets.vla_data.root": "data/metaworld_quickstart",
    "framework.vlm.base_vlm": "models/tiny_qwen2_5_vl",
}


def serve(folder: str, overrides: list[str]) -> None:
    """Trains as many steps as each line of the input says, prints losses and CPU seconds of each."""
    import torch

    from vla_bench.config import parse_cli
    from vla_bench.training.imitation import micro_batches, update
    from vla_bench.training.run import set_up

    torch.set_num_threads(1)
    made = [f"{key}={HERE / 'experiments/runs' / place}" for key, place in MADE.items()]
    options = ["--run_root_dir", folder, "--trainer.num_workers", "0", *made, *overrides]
    run = set_up(parse_cli(["--config_yaml", str(CONFIG), *options], "one step"))
    stream = micro_batches(run)
    run.model.train()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        rows = []
        for _ in range(int(line)):
            before, clock = time.process_time(), time.perf_counter()
            batches = [next(stream)]
            loaded = time.process_time()
            loss, norm = update(run, batches)
            cpu, wall = time.process_time(), time.perf_counter() - clock
            rows.append(
                {"loss": loss, "norm": norm, "load": loaded - before, "update": cpu - loaded, "wall": wall}
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"rows": rows, "peak": peak}), flush=True)


class Tree:
    """A process that trains with the package of one tree."""

    def __init__(self, root: Path, folder: str, overrides: list[str]):
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", folder, *overrides]
        self.process = Child(command, environment, root)
        self.rows: list[dict] = []
        self.peak = 0.0
        self.process.answer()

    def steps(self, count: int) -> float:
        """Trains; CPU seconds per step."""
        answer = self.process.ask(str(count))
        self.rows, self.peak = self.rows + answer["rows"], answer["peak"]
        return sum(row["load"] + row["update"] for row in answer["rows"]) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="the other tree")
    parser.add_argument("--pairs", type=int, default=30, help="of two steps of each tree")
    options, overrides = parser.parse_known_args()
    overrides = [str(Path(each).resolve()) if Path(each).exists() else each for each in overrides]
    with tempfile.TemporaryDirectory() as folder:
        roots = {"before": Path(options.before).resolve(), "now": HERE}
        trees = {name: Tree(root, f"{folder}/{name}", overrides) for name, root in roots.items()}
        for tree in trees.values():
            tree.steps(2)  # files are opened, memory is asked for
        found: dict[str, list[float]] = {name: [] for name in trees}
        for pair in range(options.pairs):
            for name in list(trees) if pair % 2 else reversed(trees):
                found[name].append(trees[name].steps(2))
        for tree in trees.values():
            tree.process.close()
    for name, tree in trees.items():
        measured = tree.rows[2:]
        load, step, wall = (1000 * median(row[key] for row in measured) for key in ("load", "update", "wall"))
        total = 1000 * median(found[name])
        print(
            f"{name:7} CPU {total:6.1f} ms a step: data {load:5.1f}, update {step:6.1f}; clock {wall:6.1f} ms; "
            f"peak memory {tree.peak:.0f} MiB"
        )
    ratios = sorted(b / n for b, n in zip(found["before"], found["now"]))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"{median(ratios):.2f} times faster, half of {len(ratios)} pairs between {low:.2f} and {high:.2f}")
    pairs = list(zip(trees["before"].rows, trees["now"].rows))
    for count in (20, len(pairs)):
        far = max(abs(b["loss"] - n["loss"]) for b, n in pairs[:count])
        print(f"losses of the first {count} steps differ by at most {far:.1e}")


if __name__ == "__main__":
    serve(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--serve"] else main()
