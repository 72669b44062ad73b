"""How long a policy takes for one observation, beside another tree; and an evaluation with and without batches.

git worktree add /tmp/before COMMIT && python experiments/speed/policy.py RUN [--before /tmp/before]
python experiments/speed/policy.py RUN --episodes 4 [--num_envs 4] [--batch_size 4]

Each tree has a process of its own with one thread, and they are asked in turns for ten predictions each. What is
compared is CPU time, which a busy machine changes less than the clock. The actions of both are compared, too.
With `--episodes`, the run's own evaluation is played in turns with one observation at a time and in batches.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from child import Child

HERE = Path(__file__).resolve().parents[2]


def serve(run: str) -> None:
    """Predicts as often as each line of the input says; CPU seconds of each prediction, and all actions."""
    import numpy as np
    import torch
    from PIL import Image

    from vla_bench.data.layout import image_sizes
    from vla_bench.serving.policy import Policy

    policy, rng, number = Policy.from_pretrained(run), np.random.default_rng(0), 0
    torch.set_num_threads(1)
    size, state = image_sizes(policy.spec)[0], policy.spec.state
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        taken, actions = [], []
        for _ in range(int(line)):
            pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in policy.spec.cameras]
            seen = {"image": [Image.fromarray(each) for each in pixels], "lang": "open the drawer"}
            seen |= {"state": rng.normal(size=state.dim)} if state else {}
            begin = time.process_time()
            chunk = policy.predict(seen, seed=number)
            taken.append(time.process_time() - begin)
            actions, number = [*actions, chunk.tolist()], number + 1
        print(json.dumps({"taken": taken, "actions": actions}), flush=True)


def compare(run: str, roots: dict[str, Path], rounds: int) -> None:
    """Prints what a prediction takes in each tree."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--serve", str(Path(run).resolve())]
    trees = {n: Child(command, environment | {"PYTHONPATH": str(r)}, r) for n, r in roots.items()}
    found: dict[str, list] = {name: [] for name in trees}
    for tree in trees.values():
        tree.answer()
        tree.ask("10")  # the first ones ask for memory
    for turn in range(rounds):
        for name in list(trees) if turn % 2 else reversed(trees):
            found[name].append(trees[name].ask("10"))
    for name, tree in trees.items():
        tree.close()
        each = [1e3 * seconds for row in found[name] for seconds in row["taken"]]
        print(f"{name:7} CPU {median(each):5.2f} ms a prediction (median of {len(each)}, one thread)")
    if len(found) == 2:
        before, now = found.values()
        ratios = [median(b["taken"]) / median(n["taken"]) for b, n in zip(before, now)]
        far = max(abs(x - y) for b, n in zip(before, now) for x, y in zip(flat(b), flat(n)))
        print(f"{median(ratios):.2f} times faster; actions differ by at most {far:.1e}")


def flat(answer: dict) -> list[float]:
    """All numbers of the actions."""
    return [number for chunk in answer["actions"] for row in chunk for number in row]


def evaluate_in_turns(run: str, episodes: int, num_envs: int, batch_size: int, rounds: int) -> None:
    """Prints episodes per hour with and without batches."""
    from vla_bench.evaluation.program import evaluate_run

    asked = {"one by one, 1 environment": (1, 1), f"one by one, {num_envs} environments": (num_envs, 1)}
    asked |= {f"batches of {batch_size}, {num_envs} environments": (num_envs, batch_size)}
    rates: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(rounds):
        for name in list(asked) if turn % 2 else reversed(asked):
            envs, size = asked[name]
            values = {"episodes": episodes, "num_envs": envs, "batch_size": size, "videos_per_task": 0}
            words = [f"evaluation.{key}={value}" for key, value in values.items()]
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                _, summary = evaluate_run(run, words, folder, show_progress=False)
                rates[name].append(3600 * summary["episodes"] / (time.perf_counter() - begin))
    first = median(next(iter(rates.values())))
    for name, found in rates.items():
        print(f"{name:32} {median(found):6.0f} episodes an hour, {median(found) / first:.2f} times the first")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--before", type=Path, help="another tree")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--episodes", type=int, help="of each task: an evaluation instead")
    parser.add_argument("--num_envs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args()
    if options.episodes:
        evaluate_in_turns(options.run, options.episodes, options.num_envs, options.batch_size, options.rounds)
        return
    before = {"before": options.before.resolve()} if options.before else {}
    compare(options.run, before | {"now": HERE}, options.rounds)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
