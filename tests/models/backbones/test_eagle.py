"""Eagle's prompt and public names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.eagle import compose_eagle, public_names
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
def home(components) -> Path:
    return components


@pytest.fixture(scope="module")
def backbones(composed_backbones) -> dict[str, VLM]:
    return composed_backbones


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


def test_public_names_of_eagle_carry_every_weight(home, with_larger_weights):
    torch.manual_seed(0)
    first = compose_eagle(home / "siglip", home / "qwen3", select_layer=2)
    second = with_larger_weights(compose_eagle(home / "siglip", home / "qwen3", select_layer=2))
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
