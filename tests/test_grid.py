"""Every backbone with every head that can read it, from configuration alone, on random weights of the real architectures."""

import importlib
import json
import multiprocessing
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.attention_map import AttentionMap
from vla_bench.models.backbones.loading import backbone_class
from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.fast import FASTCodec
from vla_bench.registry import BACKBONES, FRAMEWORKS, HEADS

T, D, S = 4, 3, 2  # actions in a chunk, numbers in an action, numbers in a state
SIZES = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
COMPOSED = ("prismatic", "dinosiglip", "eagle2_5_vl")
COLUMNS = (*BUILDERS, *COMPOSED)  # of the grid: tiny checkpoints
SERVED_BY = {"dinosiglip": "prismatic", "llava": "any"}  # the others are served under their own name
INSTRUCTIONS = ("open the drawer", "press the button from the top", "pick up the red block and place it")

DIT = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "dropout": 0.0}
FLOW = {"num_heads": 4, "num_future_tokens": 2, "dropout": 0.0, "repeated_diffusion_steps": 16}
EXPERT = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "repeated_diffusion_steps": 8}
ROWS = {  # of the grid: the framework that hands the head what it reads, the head, its size
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


def reason_against(backbone: str, row: str) -> str | None:
    """Why a backbone cannot give a head what it reads, as the backbone declares it; None when they fit."""
    cls = BACKBONES.get(SERVED_BY.get(backbone, backbone))
    return cls.unsupported_reads.get(HEADS.get(ROWS[row][1]).reads)


PAIRS = [(backbone, row) for backbone in COLUMNS for row in ROWS]
REFUSED = [pair for pair in PAIRS if reason_against(*pair)]
FITTING = [pair for pair in PAIRS if not reason_against(*pair)]


def sample(seed: int, lang: str) -> dict:
    rng = np.random.default_rng(seed)
    colour = np.array([[230, 40, 40], [40, 200, 60], [50, 60, 220]])[seed]
    images = [rng.integers(0, 60, (64, 64, 3)) + 0.75 * colour for _ in range(2)]
    return {
        "image": [Image.fromarray(image.clip(0, 255).astype(np.uint8)) for image in images],
        "lang": lang,
        "action": np.tile(rng.uniform(-1, 1, (1, D)), (T, 1)).astype(np.float32),
        "action_is_pad": np.arange(T) >= T - seed % 2,
        "state": rng.normal(size=S).astype(np.float32).clip(-1, 1),
    }


EXAMPLES = [sample(i, lang) for i, lang in enumerate(INSTRUCTIONS)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder for the tiny checkpoints, which are written when they are first wanted, and FAST's tokenizer."""
    home = tmp_path_factory.mktemp("grid")
    chunks = np.stack([e["action"] for e in EXAMPLES] * 4)
    FASTCodec.fit(chunks, vocab_size=256, scale=50).save(home / "tokenizer")
    return home


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    """One process that prepares batches, as a data loader's worker does."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def checkpoint(home: Path, backbone: str) -> Path:
    folder = home / backbone
    if not folder.exists():
        write = write_tiny_composed if backbone in COMPOSED else write_tiny
        write(backbone, folder, corpus=INSTRUCTIONS, reserved_tokens=320, **SIZES)
    return folder


def configuration(home: Path, backbone: str, row: str) -> dict:
    framework, head, sizes = ROWS[row]
    own = {"tokenizer": str(home / "tokenizer")} if head == "FAST" else {}
    return {
        "name": framework,
        "vlm": {"base_vlm": str(checkpoint(home, backbone))},
        "action_horizon": T,
        "action_model": {"type": head, **sizes, **own},
    }


def predict(model: Framework, batch: dict) -> np.ndarray:
    """Actions from noise that is the same for a sample whatever else is in the batch."""
    noise = model.action_model.draw_noise(1, torch.Generator().manual_seed(3))
    if noise is not None:
        noise = noise.expand(len(batch["lang"]), *noise.shape[1:]).contiguous()
    return model.predict_action(batch, noise=noise)["normalized_actions"]


def overfit_one_batch(model: Framework, batch: dict, most: int = 600) -> tuple[float, float]:
    """Trains on one batch until its action error is a twentieth; returns the error before and after."""
    targets, valid = batch["actions"].numpy(), ~batch["action_is_pad"].numpy()

    def error() -> float:
        return float(np.abs(predict(model, batch) - targets)[valid].mean())

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


@dataclass
class Pair:
    """A head on a backbone, trained on one batch; its tests only read it."""

    backbone: str
    model: Framework = field(repr=False)
    batch: dict = field(repr=False)
    before: float  # action error on the batch
    after: float

    @cached_property
    def maps(self) -> list[AttentionMap]:
        return self.model.attention_maps(self.batch, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FITTING, ids="-".join)
def pair(request, home) -> Pair:
    torch.manual_seed(0)
    model = build_framework(configuration(home, *request.param), action_dim=D, state_dim=S)
    batch = model.prepare(EXAMPLES)
    return Pair(request.param[0], model, batch, *overfit_one_batch(model, batch))


@pytest.fixture(scope="module")
def loaded(pair, home, tmp_path_factory) -> Framework:
    """The pair, saved, and loaded where there is neither its base model nor a network."""
    folder = tmp_path_factory.mktemp("saved")
    pair.model.save_pretrained(folder / "saved")
    base = home / pair.backbone
    elsewhere = shutil.move(base, folder / "gone")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", _refuse)
            return Framework.from_pretrained(folder / "saved")
    finally:
        shutil.move(elsewhere, base)


def _refuse(*args, **kwargs):
    raise AssertionError("the network was asked")


def test_the_grid_is_complete():
    """Nothing registered is left out: every head but the inference heads, every framework and backbone."""
    assert {head for _, head, _ in ROWS.values()} == {n for n in HEADS.known if not n.endswith("Inference")}
    assert {framework for framework, _, _ in ROWS.values()} == set(FRAMEWORKS.known)
    kinds = {alias for known in BACKBONES.known.values() for alias in known.aliases}
    assert set(COLUMNS) - {"dinosiglip", "llava"} == kinds - {"any", "EagleBackbone"}


@pytest.mark.parametrize("backbone", COLUMNS)
def test_a_checkpoint_is_served_by_the_class_of_its_kind(home, backbone):
    kind = SERVED_BY.get(backbone, backbone)
    assert backbone_class(checkpoint(home, backbone)) is BACKBONES.get(kind)


@pytest.mark.parametrize(("backbone", "row"), REFUSED, ids=map("-".join, REFUSED))
def test_a_pair_that_does_not_fit_is_refused_with_the_reason(home, backbone, row):
    with pytest.raises(ValueError) as refused:
        build_framework(configuration(home, backbone, row), action_dim=D, state_dim=S)
    assert reason_against(backbone, row) in str(refused.value)
    assert HEADS.get(ROWS[row][1]).__name__ in str(refused.value)


# ---------------------------------------------------------------- every pair that fits


def test_a_worker_prepares_the_same_batch(pair, worker):
    there = worker.submit(pair.model.prepare, EXAMPLES).result()
    assert all(torch.equal(there["inputs"][name], value) for name, value in pair.batch["inputs"].items())


def test_one_batch_is_overfitted(pair):
    assert pair.after < 0.05 * pair.before, (pair.before, pair.after)


def test_every_trainable_parameter_has_a_gradient(pair):
    pair.model.zero_grad()
    pair.model(pair.batch)["action_loss"].backward()
    trained = {name: p for name, p in pair.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("vlm.") for name in trained)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in trained.values())


def test_only_a_token_head_has_the_vocabulary_scored(pair):
    scored = []
    output = pair.model.vlm.model.get_output_embeddings()
    hook = output.register_forward_hook(lambda *_: scored.append(1))
    pair.model(pair.batch)
    predict(pair.model, pair.batch)
    hook.remove()
    assert bool(scored) == (pair.model.reads == "tokens")


def test_an_attention_map_has_the_grid_of_its_image(pair):
    grids = pair.model.vlm.image_grids(pair.batch["inputs"])
    for example, found, sizes in zip(EXAMPLES, pair.maps, grids, strict=True):
        assert [m.shape for m in found.images] == sizes
        assert len(sizes) == len(example["image"])


def test_an_attention_map_has_the_words_of_the_instruction(pair):
    for example, found in zip(EXAMPLES, pair.maps, strict=True):
        assert [word for word, _ in found.words] == example["lang"].split()


def test_an_attention_map_holds_shares_of_one(pair):
    for found in pair.maps:
        shares = [m.sum() for m in found.images] + [share for _, share in found.words]
        assert min(shares) >= 0 and 0 < sum(shares) <= 1 + 1e-4


def test_a_loaded_policy_predicts_the_same(pair, loaded):
    expected = predict(pair.model, pair.batch)
    np.testing.assert_array_equal(predict(loaded, loaded.prepare(EXAMPLES)), expected)


def test_a_sample_alone_is_predicted_as_in_a_batch(pair, loaded):
    expected = predict(pair.model, pair.batch)
    alone = predict(loaded, loaded.prepare(EXAMPLES[:1]))
    np.testing.assert_allclose(alone[0], expected[0], atol=1e-5)


# ---------------------------------------------------------------- as programs


PROGRAMS = {"OFT": "oft", "FAST": "fast", "PI": "pi", "GR00T": "gr00t", "OpenVLA": "openvla"}
PROGRAMS |= {"LlavaVLA": "llava", "PI0": "pi0", "PI05": "pi05"}


@pytest.mark.parametrize("row", ROWS)
def test_a_framework_as_a_program(home, row, tmp_path, capsys):
    config = configuration(home, "qwen2_5_vl", row)
    name = config["name"]
    yaml = tmp_path / "config.yaml"
    yaml.write_text(json.dumps({"framework": config}))
    main = importlib.import_module(f"vla_bench.models.frameworks.{PROGRAMS[name]}").main
    main(["--config_yaml", str(yaml), "--action_dim", str(D), "--image_size", "64"])
    printed = capsys.readouterr().out
    assert f"{name}: {T} actions" in printed and "loss" in printed and f"prediction [1, {T}, {D}]" in printed
