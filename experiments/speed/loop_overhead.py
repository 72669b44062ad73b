"""What a training loop costs besides the model: `fit`, a bare PyTorch loop and `transformers.Trainer`, in turns.

python experiments/speed/loop_overhead.py [--batch 32] [--blocks 30] [--key value ...]

The step is the quickstart's, at a batch size of which one takes about 100 ms on one thread. Each loop has a process of
its own with the same model, the same weights and the same prepared batches, and is asked for five steps at a time; it
logs every tenth. Two numbers are printed for each loop, medians over the blocks, CPU time:

- what a step costs, and how much more than in the bare loop, as the median over blocks that are neighbours
- what of it lies outside of the model's forward, of backward, and of AdamW's step. Clipping counts as outside for all

Then the quickstart is trained as configured, with its loader, and the share of the time that a step waits for data is
printed: of all steps together, and the median wait over the median step. With `num_workers: 1` that needs a second
core that is free; on a machine that others use, the median is the one to look at. `--wait_steps 0` leaves it out.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median

from child import Child

HERE = Path(__file__).resolve().parents[2]
CONFIG = HERE / "experiments/configs/quickstart.yaml"
LOOPS = ("bare", "ours", "trainer")
STEPS = 5  # of a block


class Clock:
    """CPU seconds of the process, and those of them that were spent in calls that are watched."""

    def __init__(self):
        self.inside, self.depth = 0.0, 0

    def watch(self, owner: object, name: str) -> None:
        """Counts what a method takes; calls within such calls once."""
        call = getattr(owner, name)

        def counted(*args, **options):
            self.depth += 1
            before = time.process_time()
            try:
                return call(*args, **options)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.inside += time.process_time() - before

        setattr(owner, name, counted)

    def read(self) -> tuple[float, float]:
        """CPU seconds so far, and those in watched calls."""
        return time.process_time(), self.inside


def turns(batches: list, clock: Clock) -> Iterator:
    """The batches again and again. Before each block it waits for a line, and tells what the last block took."""
    number, before = 0, None
    while True:
        if number % STEPS == 0:
            if before:
                total, inside = (now - then for now, then in zip(clock.read(), before))
                print(json.dumps({"total": total / STEPS, "inside": inside / STEPS}), flush=True)
            if not sys.stdin.readline():
                os._exit(0)  # the last block was told; the loop would go on
            before = clock.read()
        yield batches[number % len(batches)]
        number += 1


def run_ours(run, stream: Iterator) -> None:
    from vla_bench.training import imitation

    imitation.micro_batches = lambda _: ({"vla": batch} for batch in stream)
    imitation.fit(run, show=lambda _: None)


def run_bare(run, stream: Iterator) -> None:
    import torch

    model, optimizer, scheduler = run.framework, run.optimizer.optimizer, run.scheduler
    model.train()
    for number, batch in enumerate(stream):
        loss = model(batch)["action_loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if number % 10 == 9:
            print(f"step {number + 1}: {loss.item():.4f}", file=sys.stderr)


def run_trainer(run, stream: Iterator) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Loss(torch.nn.Module):
        """What Trainer wants of a model: keyword arguments in, `loss` out."""

        def __init__(self):
            super().__init__()
            self.framework = run.framework

        def forward(self, **batch):
            return {"loss": self.framework(batch)["action_loss"]}

    class Fed(Trainer):
        def get_train_dataloader(self):
            return stream

    folder = str(run.folder / "trainer")
    settings = {"max_steps": 10**6, "logging_steps": 10, "save_strategy": "no", "report_to": []}
    settings |= {"use_cpu": True, "max_grad_norm": 1.0, "remove_unused_columns": False}
    optimizers = (run.optimizer.optimizer, run.scheduler)
    Fed(Loss(), TrainingArguments(folder, **settings), train_dataset=[0], optimizers=optimizers).train()


def start(folder: str, overrides: list[str]):
    """The run of the quickstart."""
    from vla_bench.config import parse_cli
    from vla_bench.training.run import set_up

    never = [
        part
        for key in ("max_train_steps", "eval_interval", "save_interval")
        for part in (f"--trainer.{key}", "1000000")
    ]
    return set_up(
        parse_cli(["--config_yaml", str(CONFIG), "--run_root_dir", folder, *never, *overrides], "a loop")
    )


def serve(which: str, folder: str, overrides: list[str]) -> None:
    """One loop, as a process that waits for its turns."""
    import torch

    from vla_bench.training.imitation import micro_batches

    run, clock = start(folder, ["--trainer.num_workers", "0", *overrides]), Clock()
    source = micro_batches(run)
    batches = [next(source)["vla"] for _ in range(2 * STEPS)]
    clock.watch(run.framework, "forward")
    clock.watch(torch.Tensor, "backward")
    clock.watch(torch.optim.AdamW, "step")
    loops: dict[str, Callable] = {"ours": run_ours, "bare": run_bare, "trainer": run_trainer}
    print(json.dumps({"ready": True}), flush=True)
    loops[which](run, turns(batches, clock))


def wait(folder: str, steps: int, overrides: list[str]) -> None:
    """Trains with the loader, and prints the share of the time that steps waited for data."""
    from vla_bench.training import imitation

    run, rows = start(folder, ["--trainer.log_interval", "5", *overrides]), []
    original, run.settings.max_train_steps = imitation.speed, steps

    def kept(run, times):
        rows.extend(times)
        return original(run, times)

    imitation.speed = kept
    imitation.save = lambda run: None
    imitation.evaluate = lambda run: {}
    imitation.fit(run, show=lambda _: None, measure=lambda _: {})
    data, compute = zip(*rows[5:])  # the loader's process starts in the first ones
    found = {"data": mean(data), "compute": mean(compute)}
    found |= {"data_median": median(data), "compute_median": median(compute)}
    print(json.dumps(found), flush=True)


def loop(*arguments: str, overrides: list[str]) -> Child:
    """A process that does some steps when it is asked."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return Child([sys.executable, __file__, *arguments, *overrides], environment, HERE)


def compare(folder: str, blocks: int, overrides: list[str]) -> None:
    """The three loops in turns."""
    loops = {name: loop("--serve", name, f"{folder}/{name}", overrides=overrides) for name in LOOPS}
    for each in loops.values():
        each.answer()
        each.ask("go")  # memory is asked for, moments are made
    found: dict[str, list[dict]] = {name: [] for name in LOOPS}
    for number in range(blocks):
        for name in LOOPS if number % 2 else reversed(LOOPS):
            found[name].append(loops[name].ask("go"))
    for each in loops.values():
        each.close()
    for name in LOOPS:
        total = median(row["total"] for row in found[name])
        outside = median(row["total"] - row["inside"] for row in found[name])
        more = median(own["total"] / bare["total"] - 1 for own, bare in zip(found[name], found["bare"]))
        print(
            f"{name:8} CPU {1000 * total:6.1f} ms a step ({100 * more:+.1f}% against bare); outside of forward, "
            f"backward and AdamW {1000 * outside:.2f} ms, {100 * outside / total:.1f}%"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--blocks", type=int, default=30, help=f"of {STEPS} steps of each loop")
    parser.add_argument("--wait_steps", type=int, default=60, help="steps of the quickstart with its loader")
    options, overrides = parser.parse_known_args()
    overrides = [str(Path(each).resolve()) if Path(each).exists() else each for each in overrides]
    with tempfile.TemporaryDirectory() as folder:
        size = ["--trainer.per_device_batch_size", str(options.batch)]
        compare(folder, options.blocks, [*overrides, *size])
        if options.wait_steps:
            waiting = loop("--wait", f"{folder}/wait", str(options.wait_steps), overrides=overrides)
            seconds = waiting.answer()
            waiting.close()
            for which, end in (("mean", ""), ("median", "_median")):
                data, compute = (1000 * seconds[name + end] for name in ("data", "compute"))
                print(
                    f"data     a step of the quickstart waits {data:.1f} ms and computes {compute:.1f} ms on the clock "
                    f"({which}): {100 * data / (data + compute):.1f}%"
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], sys.argv[4:])
    elif sys.argv[1:2] == ["--wait"]:
        wait(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    else:
        main()
