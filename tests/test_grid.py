"""Every backbone with every head that can read it, from configuration alone, on random weights of the real architectures."""

import importlib
import json
import multiprocessing
import shutil
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.loading import backbone_class
from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.fast import FASTCodec
from vla_bench.registry import BACKBONES as BACKBONES_MENU
from vla_bench.registry import FRAMEWORKS, HEADS

T, D, S = 4, 3, 2  # actions in a chunk, numbers in an action, numbers in a state
SIZES = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
COMPOSED = ("prismatic", "dinosiglip", "eagle2_5_vl")
BACKBONES = (*BUILDERS, *COMPOSED)
WORDS = ("open the drawer", "press the button from the top", "pick up the red block and place it")

DIT = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.0}
FLOW = {"num_heads": 4, "num_future_tokens": 2, "dropout": 0.0, "repeated_diffusion_steps": 16}
EXPERT = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "repeated_diffusion_steps": 8}
BRICKS = {  # row of the grid: the framework that hands the head what it reads, the head, its size
    "MLP": ("OFT", "MLP", {"hidden_size": 32}),
    "FAST": ("FAST", "FAST", {}),
    "Bins": ("OpenVLA", "Bins", {}),
    "Transformer": ("LlavaVLA", "Transformer", {"hidden_size": 32}),
    "FlowMatching": ("GR00T", "FlowMatching", {"hidden_size": 64, "num_layers": 2, **FLOW}),
    "LayerwiseFlowMatching": ("PI", "LayerwiseFlowMatching", FLOW),
    "Diffusion": ("LlavaVLA", "Diffusion", DIT),
    "DiscreteDiffusion": ("LlavaVLA", "DiscreteDiffusion", DIT),
    "ActionExpert": ("PI0", "ActionExpert", EXPERT),
    "ActionExpert, adaptive": ("PI05", "ActionExpert", EXPERT | {"adaptive_norm": True}),
}
PAIRS = [(backbone, row) for backbone in BACKBONES for row in BRICKS]


def sample(seed: int, lang: str) -> dict:
    rng = np.random.default_rng(seed)
    colour = np.array([[230, 40, 40], [40, 200, 60], [50, 60, 220]])[seed]
    pictures = [rng.integers(0, 60, (64, 64, 3)) + 0.75 * colour for _ in range(2)]
    return {
        "image": [Image.fromarray(picture.clip(0, 255).astype(np.uint8)) for picture in pictures],
        "lang": lang,
        "action": np.tile(rng.uniform(-1, 1, (1, D)), (T, 1)).astype(np.float32),
        "action_is_pad": np.arange(T) >= T - seed % 2,
        "state": rng.normal(size=S).astype(np.float32).clip(-1, 1),
    }


EXAMPLES = [sample(i, words) for i, words in enumerate(WORDS)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder for the tiny checkpoints, which are written when they are first wanted, and FAST's tokenizer."""
    home = tmp_path_factory.mktemp("grid")
    chunks = np.stack([e["action"] for e in EXAMPLES] * 4)
    FASTCodec.fit(chunks, vocab_size=256, scale=50).save(home / "tokenizer")
    return home


@pytest.fixture(scope="module")
def worker():
    """One process that prepares batches, as a data loader's worker does."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def checkpoint(home: Path, backbone: str) -> Path:
    folder = home / backbone
    if not folder.exists():
        write = write_tiny_composed if backbone in COMPOSED else write_tiny
        write(backbone, folder, corpus=WORDS, reserved_tokens=320, **SIZES)
    return folder


def configuration(home: Path, backbone: str, row: str) -> dict:
    framework, head, sizes = BRICKS[row]
    own = {"tokenizer": str(home / "tokenizer")} if head == "FAST" else {}
    return {
        "name": framework,
        "vlm": {"base_vlm": str(checkpoint(home, backbone))},
        "action_horizon": T,
        "action_model": {"type": head, **sizes, **own},
    }


def test_the_grid_is_complete():
    """Nothing registered is left out: every head but the inference twins, and every framework by name or by kin."""
    assert {head for _, head, _ in BRICKS.values()} == {n for n in HEADS.known if not n.endswith("Inference")}
    assert {framework for framework, _, _ in BRICKS.values()} == set(FRAMEWORKS.known)
    kinds = {alias for known in BACKBONES_MENU.known.values() for alias in known.aliases}
    assert set(BACKBONES) - {"dinosiglip", "llava"} == kinds - {"any", "EagleBackbone"}


def fixed_noise(head: str, size: int) -> torch.Tensor | None:
    """The same for a sample whatever else is in the batch, in the head's own shape."""
    if head == "DiscreteDiffusion":  # two uniform numbers per round and token
        noise = torch.rand(1, 8, 2, T * D, generator=torch.Generator().manual_seed(3))
    else:
        noise = torch.randn(1, T, D, generator=torch.Generator().manual_seed(3))
    return noise.expand(size, *noise.shape[1:]).contiguous()


def predict(model: Framework, batch: dict, head: str) -> np.ndarray:
    return model.predict_action(batch, noise=fixed_noise(head, len(batch["lang"])))["normalized_actions"]


def learn_by_heart(model: Framework, head: str, most: int = 600) -> tuple[float, float]:
    """Trains on one batch until its action error is a twentieth; returns the error before and after."""
    batch = model.prepare(EXAMPLES)
    targets, valid = batch["actions"].numpy(), ~batch["action_is_pad"].numpy()

    def error() -> float:
        return float(np.abs(predict(model, batch, head) - targets)[valid].mean())

    before = error()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(most):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / most) ** 0.5
        optimizer.zero_grad()
        model(batch)["action_loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 40 == 39 and (after := error()) < 0.05 * before:
            return before, after
    return before, error()


@pytest.mark.parametrize(("backbone", "row"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_pair(home, worker, backbone, row, tmp_path, monkeypatch):
    config, head = configuration(home, backbone, row), BRICKS[row][1]
    reason = backbone_class(checkpoint(home, backbone)).unsupported_reads.get(HEADS.get(head).reads)
    if reason:
        with pytest.raises(ValueError) as refused:
            build_framework(config, action_dim=D, state_dim=S)
        assert reason in str(refused.value) and HEADS.get(head).__name__ in str(refused.value)
        return
    torch.manual_seed(0)
    model = build_framework(config, action_dim=D, state_dim=S)

    # prepare, here and in a worker process
    batch = model.prepare(EXAMPLES)
    there = worker.submit(model.prepare, EXAMPLES).result()
    assert all(torch.equal(there["inputs"][name], value) for name, value in batch["inputs"].items())

    # one batch by heart, then forward and backward: a gradient in every trainable parameter
    before, after = learn_by_heart(model, head)
    assert after < 0.05 * before, (before, after)
    model.zero_grad()
    model(batch)["action_loss"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("vlm.") for name in trained)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in trained.values())

    # no head but one that speaks has the vocabulary scored
    scored = []
    model.vlm.model.get_output_embeddings().register_forward_hook(lambda *_: scored.append(1))
    model(batch)
    predict(model, batch, head)
    assert bool(scored) == (model.reads == "tokens")

    # where it looks
    maps = model.attention_maps(batch, generator=torch.Generator().manual_seed(0))
    grids = model.vlm.image_grids(batch["inputs"])
    for example, found, sizes in zip(EXAMPLES, maps, grids, strict=True):
        assert [m.shape for m in found.images] == sizes and len(sizes) == len(example["image"])
        assert [word for word, _ in found.words] == example["lang"].split()
        shares = [m.sum() for m in found.images] + [share for _, share in found.words]
        assert min(shares) >= 0 and 0 < sum(shares) <= 1 + 1e-4

    # saved, the base model gone, loaded without network: the same prediction; alone the same as in a batch
    expected = predict(model, batch, head)
    model.save_pretrained(tmp_path / "saved")
    elsewhere = shutil.move(home / backbone, tmp_path / "gone")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "connect", _refuse)
            loaded = Framework.from_pretrained(tmp_path / "saved")
            np.testing.assert_array_equal(predict(loaded, loaded.prepare(EXAMPLES), head), expected)
            alone = predict(loaded, loaded.prepare(EXAMPLES[:1]), head)
            np.testing.assert_allclose(alone[0], expected[0], atol=1e-5)
    finally:
        shutil.move(elsewhere, home / backbone)


PROGRAMS = {"OFT": "oft", "FAST": "fast", "PI": "pi", "GR00T": "gr00t", "OpenVLA": "openvla"}
PROGRAMS |= {"LlavaVLA": "llava", "PI0": "pi0", "PI05": "pi05"}


@pytest.mark.parametrize("row", BRICKS)
def test_a_framework_as_a_program(home, row, tmp_path, capsys):
    config = configuration(home, "qwen2_5_vl", row)
    name = config["name"]
    yaml = tmp_path / "config.yaml"
    yaml.write_text(json.dumps({"framework": config}))
    main = importlib.import_module(f"vla_bench.models.frameworks.{PROGRAMS[name]}").main
    main(["--config_yaml", str(yaml), "--action_dim", str(D), "--image_size", "64"])
    printed = capsys.readouterr().out
    assert f"{name}: {T} actions" in printed and "loss" in printed and f"prediction [1, {T}, {D}]" in printed


def _refuse(*args, **kwargs):
    raise AssertionError("the network was asked")
