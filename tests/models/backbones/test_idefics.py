"""SmolVLM as its authors publish it."""

import json

import numpy as np
from PIL import Image

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny import write_tiny

WORDS = ("open the drawer", "press the button from the top", "close the window")


SIZES = {"hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}


def make_image(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


IMAGES = [[make_image(2 * i), make_image(2 * i + 1)] for i in range(len(WORDS))]


def test_smolvlm_as_its_authors_publish_it(home, backbones, tmp_path):
    write_tiny("smolvlm", tmp_path, image_size=64, corpus=WORDS, reserved_tokens=8, **SIZES)
    file = tmp_path / "processor_config.json"
    published = json.loads(file.read_text())
    published["processor_class"] = "SmolVLMProcessor"
    published["image_processor"] |= {"do_image_splitting": True, "size": {"longest_edge": 256}}
    file.write_text(json.dumps(published))
    inputs, expected = load_vlm(tmp_path).prepare(IMAGES, WORDS), backbones["smolvlm"].prepare(IMAGES, WORDS)
    assert all(inputs[name].equal(expected[name]) for name in expected)
