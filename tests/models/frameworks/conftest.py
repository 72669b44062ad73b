"""Tiny backbones, made-up samples, and builders of small frameworks on them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework

T, D, S = 4, 3, 2  # actions in a chunk, numbers in an action, numbers in a state
WORDS = ("open the drawer", "press the button from the top", "pick up the red block and place it")
TINY = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
HEADS = {
    "OFT": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
    "GR00T": {
        "type": "FlowMatching",
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_future_tokens": 2,
        "dropout": 0.0,
        "repeated_diffusion_steps": 2,
    },
}


def made_up(seed: int, lang: str, cameras: int = 2, **more) -> dict:
    """A training sample of random pixels and numbers."""
    rng = np.random.default_rng(seed)
    return {
        "image": [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(cameras)],
        "lang": lang,
        "action": rng.uniform(-1, 1, (T, D)).astype(np.float32),
        "action_is_pad": np.arange(T) >= T - seed % 3,
        "state": rng.normal(size=S).astype(np.float32),
        "origin": f"toy episode {seed} frame 7",
        **more,
    }


class Toy:
    """Three samples, noise for them, and frameworks that read them."""

    T, D, S, heads, words = T, D, S, HEADS, WORDS
    sizes = {"action_dim": D, "state_dim": S}
    grids = {"qwen2_5_vl": (2, 2), "paligemma": (4, 4)}  # tokens of an image of 64 x 64 pixels
    examples = [made_up(i, words) for i, words in enumerate(WORDS)]
    noise = torch.randn(len(WORDS), T, D, generator=torch.Generator().manual_seed(5))

    def __init__(self, home: Path):
        self.home = home

    def configuration(self, pair: tuple[str, str], **head) -> dict:
        """The framework section of a pair (backbone, framework)."""
        backbone, name = pair
        vlm = {"base_vlm": str(self.home / backbone)}
        return {"name": name, "vlm": vlm, "action_horizon": T, "action_model": HEADS[name] | head}

    def fresh(self, pair: tuple[str, str], *, changes: dict | None = None, **head) -> Framework:
        """A framework as it is built, with `changes` of the framework section."""
        torch.manual_seed(0)
        return build_framework(self.configuration(pair, **head) | (changes or {}), **self.sizes)

    def build(self, pair: tuple[str, str], *, changes: dict | None = None, **head) -> Framework:
        """As `fresh`, with larger random weights in the head: small ones leave hidden states alike."""
        model = self.fresh(pair, changes=changes, **head)
        with torch.no_grad():
            for parameter in model.action_model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model

    def predict(self, model: Framework, examples) -> np.ndarray:
        """Actions from the same noise every time."""
        count = len(examples["lang"]) if isinstance(examples, dict) else len(examples)
        return model.predict_action(examples, noise=self.noise[:count])["normalized_actions"]

    def loss_at(self, model: Framework, batch: dict, time: float) -> float:
        """The loss with noise and time held fixed, which OFT does not read."""
        rows = len(batch["lang"]) * (2 if type(model).__name__ == "GR00T" else 1)
        noise = torch.randn(rows, T, D, generator=torch.Generator().manual_seed(1))
        return float(model(batch, noise=noise, time=torch.full((rows,), time))["action_loss"].detach())


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    """Samples and frameworks on tiny Qwen2.5-VL and PaliGemma."""
    home = tmp_path_factory.mktemp("frameworks")
    for backbone in ("qwen2_5_vl", "paligemma"):
        write_tiny(backbone, home / backbone, corpus=WORDS, **TINY)
    return Toy(home)


@pytest.fixture(
    params=[(backbone, name) for backbone in ("qwen2_5_vl", "paligemma") for name in HEADS], ids="-".join
)
def pair(request) -> tuple[str, str]:
    """A backbone and a framework."""
    return request.param


EXPERT = {"type": "ActionExpert", "hidden_size": 24, "intermediate_size": 48, "num_heads": 4}


class PiToy:
    """The same for π0 and π0.5, on backbones with a cache."""

    T, D, S, cameras, expert = T, D, S, 2, EXPERT
    sizes = {"action_dim": D, "state_dim": S}
    noise, time = Toy.noise, torch.tensor([0.15, 0.5, 0.95])

    def __init__(self, home: Path):
        self.home = home
        self.examples = [self.sample(i, words) for i, words in enumerate(WORDS)]
        masks = ((True, False), (False, True), None)
        self.half_masked = [self.sample(i, words, mask) for (i, words), mask in zip(enumerate(WORDS), masks)]

    @staticmethod
    def sample(seed: int, lang: str, image_mask: tuple[bool, ...] | None = None) -> dict:
        """A training sample whose state is within [-1, 1], as the prompt's bins want it."""
        state = np.random.default_rng(seed + 100).uniform(-1, 1, S).astype(np.float32)
        mask = {} if image_mask is None else {"image_mask": np.array(image_mask)}
        return made_up(seed, lang, state=state, **mask)

    def configuration(self, name: str, backbone: str = "paligemma", **changes) -> dict:
        """The framework section."""
        head = EXPERT | {"adaptive_norm": name == "PI05"}
        vlm = {"base_vlm": str(self.home / backbone)}
        return {"name": name, "vlm": vlm, "action_horizon": T, "action_model": head} | changes

    def build(self, name: str, backbone: str = "paligemma", *, spread: float = 0.1, **changes) -> Framework:
        """With weights away from their initial values: freshly made models attend alike to everything."""
        torch.manual_seed(0)
        model = build_framework(self.configuration(name, backbone, **changes), **self.sizes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += spread * torch.randn_like(parameter)
        return model.eval()

    def predict(self, model: Framework, examples, noise: Tensor | None = None) -> np.ndarray:
        """Actions from the same noise every time."""
        noise = self.noise if noise is None else noise
        return model.predict_action(examples, noise=noise)["normalized_actions"]


@pytest.fixture(scope="session")
def pi(tmp_path_factory) -> PiToy:
    """π0 and π0.5 on tiny PaliGemma, Qwen2.5-VL and Qwen3-VL."""
    home = tmp_path_factory.mktemp("pi")
    for backbone in ("paligemma", "qwen2_5_vl", "qwen3_vl"):
        write_tiny(backbone, home / backbone, corpus=WORDS, **TINY | {"vision_layers": 1})
    return PiToy(home)


@pytest.fixture(params=["PI0", "PI05"])
def name(request) -> str:
    """π0 or π0.5."""
    return request.param


@pytest.fixture
def version_0_1() -> SimpleNamespace:
    """A checkpoint and samples written by version 0.1, and what it predicted."""
    folder = Path(__file__).parents[2] / "fixtures/version_0_1"
    stored = np.load(folder / "llava_expected.npz")
    sample = {
        "image": [Image.fromarray(stored["image"])],
        "lang": str(stored["lang"]),
        "state": (stored["state"] / 32).astype(np.float32),
    }
    examples = [sample | {"dataset": dataset} for dataset in ("a", "b")]
    return SimpleNamespace(
        gr00t=folder / "gr00t", examples=examples, expected=dict(np.load(folder / "gr00t_expected.npz"))
    )
