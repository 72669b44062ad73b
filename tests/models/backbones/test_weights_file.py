"""Checkpoints open in a fresh process, without network and base model."""

import os
import shutil
import subprocess
import sys

import numpy as np
import torch

from vla_bench.models.frameworks.build import build_framework

KINDS = ("qwen2_5_vl", "qwen3_vl", "paligemma")


OPEN = """
import socket, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
from vla_bench.models.frameworks.framework import Framework

given = np.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = Framework.from_pretrained(folder)
    examples = [
        {"image": [Image.fromarray(p) for p in pair], "lang": str(text), "state": state}
        for pair, text, state in zip(given["images"], given["words"], given["state"])
    ]
    found = model.predict_action(examples, noise=torch.from_numpy(given["noise"]))
    np.save(Path(folder) / "found.npy", found["normalized_actions"])
"""


def test_checkpoints_open_in_a_fresh_process_without_network_or_base_model(
    home, tmp_path, observed, with_larger_weights
):
    heads = {
        "OFT": {"type": "MLP", "hidden_size": 32},
        "GR00T": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 2, "num_heads": 4},
    }
    rng = np.random.default_rng(0)
    given = {
        "images": np.stack([[np.asarray(p) for p in pair] for pair in observed.images]),
        "words": np.array(observed.texts),
        "state": rng.normal(size=(len(observed.texts), 2)).astype(np.float32),
        "noise": rng.normal(size=(len(observed.texts), 4, 3)).astype(np.float32),
    }
    np.savez(tmp_path / "given.npz", **given)
    examples = [
        {"image": i, "lang": w, "state": s}
        for i, w, s in zip(observed.images, observed.texts, given["state"], strict=True)
    ]
    expected = {}
    for kind in ("qwen2_5_vl", "paligemma"):
        base = shutil.copytree(home / kind, tmp_path / "base" / kind)
        for name, head in heads.items():
            config = {"name": name, "vlm": {"base_vlm": str(base)}, "action_horizon": 4, "action_model": head}
            model = with_larger_weights(build_framework(config, action_dim=3, state_dim=2))
            folder = tmp_path / f"{kind}-{name}"
            model.save_pretrained(folder)
            noise = torch.from_numpy(given["noise"])
            expected[folder] = model.predict_action(examples, noise=noise)["normalized_actions"]
    shutil.rmtree(tmp_path / "base")

    kept = {n: v for n, v in os.environ.items() if "proxy" not in n.lower() and not n.startswith("HF_")}
    environment = kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    command = [sys.executable, "-c", OPEN, tmp_path / "given.npz", *expected]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, actions in expected.items():
        np.testing.assert_allclose(np.load(folder / "found.npy"), actions, atol=1e-6, err_msg=folder.name)
