"""Eagle's prompt and public names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.eagle import compose_eagle, public_names
from vla_bench.models.backbones.prismatic import compose
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.interop.weights import load_mapped

WORDS = ("open the drawer", "press the button from the top", "close the window")


KINDS = ("siglip_linear_gemma", "siglip_mlp_qwen2", "dinosiglip_fused_llama", "eagle_qwen3")


SIZE, WIDTH = 64, 64


def make_image(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


RNG = np.random.default_rng(0)


IMAGES = [[make_image(RNG), make_image(RNG, 48, 80)] for _ in WORDS]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("parts")
    for kind in ("siglip", "dinov2", "dinov2_with_registers"):
        width = 32 if kind == "siglip" else 48
        write_tiny_component(kind, home / kind, image_size=SIZE, hidden_size=width, num_layers=3)
    for kind in ("llama", "gemma", "qwen2", "qwen3"):
        write_tiny_component(kind, home / kind, corpus=WORDS, hidden_size=WIDTH, num_layers=3)
    return home


def loud(vlm: VLM) -> VLM:
    """Larger random weights, so that a wrong position or a leak moves the features."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vlm.eval()


def composed(home: Path, kind: str) -> VLM:
    vision = {"type": "SigLIP", "path": str(home / "siglip")}
    if kind == "siglip_linear_gemma":
        return compose(vision, {"type": "Linear"}, {"type": "Gemma", "path": str(home / "gemma")})
    if kind == "siglip_mlp_qwen2":
        return compose(
            vision | {"layer": -2}, {"type": "MLP"}, {"type": "Qwen2", "path": str(home / "qwen2")}
        )
    if kind == "eagle_qwen3":
        return compose_eagle(home / "siglip", home / "qwen3", select_layer=2)
    vision = {"dinov2_path": str(home / "dinov2_with_registers"), "siglip_path": str(home / "siglip")}
    llama = {"type": "Llama", "path": str(home / "llama")}
    return compose({"type": "DinoSigLIP", **vision}, {"type": "FusedMLP"}, llama)


@pytest.fixture(scope="module")
def backbones(home) -> dict[str, VLM]:
    torch.manual_seed(0)
    return {kind: loud(composed(home, kind)) for kind in KINDS}


def test_the_prompt_is_openvlas_and_eagles(backbones):
    llama, eagle = backbones["dinosiglip_fused_llama"], backbones["eagle_qwen3"]
    tokenizer, image = llama.processor.tokenizer, llama.config.image_token_id
    plain = tokenizer(WORDS[0])["input_ids"]
    ids = llama.prepare([IMAGES[0]], WORDS[:1])["input_ids"][0].tolist()
    assert plain[0] == tokenizer.bos_token_id and ids == plain[:1] + [image] * 32 + plain[1:]
    frame = "<image {}><img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{frame.format(1)}{frame.format(2)}{WORDS[0]}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = eagle.prepare([IMAGES[0]], WORDS[:1])["input_ids"][0].tolist()
    assert ids == eagle.processor.tokenizer(text)["input_ids"]


def test_public_names_of_eagle_carry_every_weight(home):
    torch.manual_seed(0)
    first = compose_eagle(home / "siglip", home / "qwen3", select_layer=2)
    second = loud(compose_eagle(home / "siglip", home / "qwen3", select_layer=2))
    mapping = {ours.removeprefix("vlm."): theirs for ours, theirs in public_names().items()}
    public = {}
    for name, value in first.state_dict().items():
        (ours,) = [key for key in mapping if name.startswith(key + ".")]
        public[mapping[ours] + name.removeprefix(ours)] = value.clone()
    assert {name.split(".")[2] for name in public} == {"vision_model", "mlp1", "language_model"}
    load_mapped(second, public, mapping)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    public.pop("backbone.eagle_model.mlp1.1.weight")
    with pytest.raises(ValueError, match="mlp1.1.weight|projector.layers.1.weight"):
        load_mapped(second, public, mapping)
