"""How long a policy takes to load, and how much memory, beside copying its file's tensors.

python experiments/speed/load_checkpoint.py [--framework OFT] [--dtype float32]

A random checkpoint of about 0.7 B parameters is written into a temporary folder: Qwen2.5-VL by its own configuration
class, with the tiny tokenizer, and a head. Then `Framework.from_pretrained`, and a plain copy of the same tensors, run
in a process of their own each. The folder needs 3 GB, in `TMPDIR`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from vla_bench.models.backbones.processor import load_processor
from vla_bench.models.backbones.qwen import QwenVL
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework

TEXT = {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 34, "num_attention_heads": 10}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 64000, "layer_types": ["full_attention"] * 34}
HEADS = {"OFT": {"type": "MLP"}, "PI0": {"type": "ActionExpert"}}


def write(folder: Path, name: str, dtype: str) -> None:
    """Writes a checkpoint of a framework around a backbone of about 0.6 B parameters."""
    write_tiny("qwen2_5_vl", folder / "tiny", image_size=64)
    config = AutoConfig.from_pretrained(folder / "tiny")
    for key, value in TEXT.items():
        setattr(config.text_config, key, value)
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]  # of a head's 128 numbers, in pairs
    config.vision_config.out_hidden_size = TEXT["hidden_size"]
    config.dtype = getattr(torch, dtype)
    torch.set_default_dtype(config.dtype)
    vlm = QwenVL(Qwen2_5_VLForConditionalGeneration(config), load_processor(folder / "tiny"))
    torch.set_default_dtype(torch.float32)
    vlm.model.save_pretrained(folder / "base")
    vlm.save_config(folder / "base")
    section = {"name": name, "vlm": {"base_vlm": str(folder / "base"), "dtype": dtype}}
    section |= {"action_horizon": 8, "action_model": HEADS[name]}
    framework = build_framework(section, action_dim=7, state_dim=0)
    framework.save_pretrained(folder / "checkpoint")


def load(checkpoint: Path) -> int:
    """Bytes of the weights that `from_pretrained` has put in place."""
    framework = Framework.from_pretrained(checkpoint)
    return sum(p.nbytes for p in framework.parameters())


def copy(checkpoint: Path) -> int:
    """Bytes of the file's tensors, each copied into memory of its own."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as stored:
        return sum(tensor.nbytes for tensor in [stored.get_tensor(name).clone() for name in stored.keys()])


def peak() -> int:
    """The most memory that this process has had, in bytes; Linux."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(what: str, checkpoint: Path) -> None:
    """Prints seconds, seconds of the CPU, bytes of weights, and how far the process's peak memory rose, as JSON."""
    before, begin, worked = peak(), time.perf_counter(), time.process_time()
    size = {"load": load, "copy": copy}[what](checkpoint)
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    print(json.dumps({"seconds": seconds, "cpu": worked, "weights": size, "peak": peak() - before}))


def main() -> None:
    """Writes the checkpoint, measures both three times, and prints the best of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--framework", choices=HEADS, default="OFT")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.framework, options.dtype)
        for what in ("copy", "load"):
            command = [sys.executable, __file__, "--measure", what, f"{folder}/checkpoint"]
            runs = [json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(3)]
            best = min(runs, key=lambda run: run["seconds"])
            gib = best["weights"] / 2**30
            times = f"{best['seconds']:.2f} s, {best['cpu']:.2f} of the CPU"
            print(f"{what}: {times}; {gib:.2f} GiB of weights, peak {best['peak'] / best['weights']:.2f} x")


if __name__ == "__main__":
    main()
