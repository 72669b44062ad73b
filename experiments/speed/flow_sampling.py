"""A chunk of actions from the flow-matching head and from its inference head: seconds, operations, and their ratio.

python experiments/speed/flow_sampling.py [--shape gr00t] [--repeats 5] [--compile]

Both heads hold the same weights and get the same noise. One thread on a CPU; bfloat16 autocast on a GPU. The two take
turns, so that a busy machine is equally unfair to both, and the median of each counts.
"""

import argparse
import time
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead, LayerwiseFlowMatchingInference
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead

SHAPES = {  # tokens of the prompt, width of the backbone, and the head's own sizes
    "small": (300, 1024, {"hidden_size": 256, "num_layers": 8, "num_heads": 4}),
    "gr00t": (600, 2048, {"hidden_size": 768, "num_layers": 16, "num_heads": 12}),
    "layerwise": (300, 1024, {"hidden_size": 256, "num_layers": 12, "num_heads": 4}),
}
HORIZON, ACTION_DIM, STATE_DIM = 16, 7, 8


def heads(shape: str, steps: int, compile: bool, device: torch.device) -> tuple:
    """The training head and the inference head with the same weights, and an observation for them."""
    length, width, own = SHAPES[shape]
    kinds = FlowMatchingHead, FlowMatchingInferenceHead
    layers, backbone = (), None
    if shape == "layerwise":
        kinds = LayerwiseFlowMatchingHead, LayerwiseFlowMatchingInference
        backbone = BackboneSizes(width, own["num_layers"], vocab_size=1)
        layers = tuple(torch.randn(1, length, width, device=device) for _ in range(own["num_layers"]))
    torch.manual_seed(0)
    sizes = HeadSizes(width, ACTION_DIM, HORIZON, STATE_DIM, backbone=backbone)
    own = {**own, "num_inference_timesteps": steps, "compile": compile}
    with device:
        training, inference = (kind(sizes, **own).eval() for kind in kinds)
        state = torch.randn(1, STATE_DIM)
        hidden = layers[-1] if layers else torch.randn(1, length, width)
        prompt = Features(hidden, torch.ones(1, length, dtype=torch.bool), layers=layers or None, state=state)
    inference.load_state_dict(training.state_dict())
    return training, inference, prompt


def seconds(call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gr00t")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile both samplers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, inference, prompt = heads(options.shape, options.steps, options.compile, device)
    noise = torch.randn(1, HORIZON, ACTION_DIM, device=device)

    def sample(head) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return head.sample(prompt, noise)

    difference = float((sample(training) - sample(inference)).abs().max())  # also warms both up
    times = {training: [], inference: []}
    for _ in range(options.repeats):
        for head, taken in times.items():
            taken.append(seconds(lambda: sample(head), device))  # noqa: B023, called at once
    length, width, own = SHAPES[options.shape]
    print(f"{options.shape} on {device}: {length} tokens of width {width}, {own}, {options.steps} steps")
    print(f"  largest difference between their actions {difference:.1e}")
    for head, taken in times.items():
        spread = f"{1000 * min(taken):.0f} to {1000 * max(taken):.0f}"
        counted = ""
        if not options.compile:
            with FlopCounterMode(display=False) as counter:
                sample(head)
            counted = f"{counter.get_total_flops() / 1e9:8.1f} GFLOP"
        print(f"  {type(head).__name__:32} {1000 * median(taken):8.0f} ms ({spread}) {counted}")
    print(f"  ratio of time {median(times[training]) / median(times[inference]):.2f}")


if __name__ == "__main__":
    main()
