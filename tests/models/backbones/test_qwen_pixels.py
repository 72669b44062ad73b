"""Pixels from a table: transformers' image processor bit for bit, and saved under its name."""

import pickle

import numpy as np
import pytest
import transformers
from PIL import Image

from vla_bench.models.backbones.processor import load_processor
from vla_bench.models.backbones.qwen_pixels import KEPT, Qwen2VLImageProcessorPil, QwenPrepare
from vla_bench.models.backbones.vlm import VLMPrepare

KINDS = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
every_kind = pytest.mark.parametrize("kind", KINDS)


def pictures(seed: int, mode: str = "RGB") -> list[Image.Image]:
    """Some images of several sizes."""
    rng = np.random.default_rng(seed)
    sides = rng.integers(20, 300, (4, 2))
    return [Image.fromarray(rng.integers(0, 256, (*s, 3), np.uint8)).convert(mode) for s in sides]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("seed", range(3))
def test_pixels_are_the_hubs(seed, patch, mode):
    options = {"patch_size": patch, "size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}}
    options |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    images = pictures(seed, mode)
    found = Qwen2VLImageProcessorPil(**options)(images, return_tensors="pt")
    expected = transformers.Qwen2VLImageProcessorPil(**options)(images, return_tensors="pt")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_an_image_of_the_right_size_is_not_resized(monkeypatch):
    processor = Qwen2VLImageProcessorPil(patch_size=16)
    monkeypatch.setattr(processor, "resize", lambda *_, **__: pytest.fail("resized"))
    processor([Image.new("RGB", (96, 64))], return_tensors="pt")


@every_kind
def test_a_batch_is_the_hubs(home, kind):
    images = [[image] for image in pictures(5)]
    texts = ["go", "open the drawer", "press the button", "go"]
    prepare = QwenPrepare(load_processor(home / kind))
    assert type(prepare.processor.image_processor) is Qwen2VLImageProcessorPil
    expected = VLMPrepare(load_processor(home / kind))(images, texts)
    for each in (prepare, pickle.loads(pickle.dumps(prepare))):
        found = each(images, texts)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].equal(value) and found[name].dtype == value.dtype, name


def same(found, expected):
    """Whether two batches are equal, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value) and found[name].dtype == value.dtype, name


@every_kind
@pytest.mark.parametrize("rows, cameras", [(1, 1), (1, 2), (3, 1)])
def test_a_prompt_that_is_known_gives_the_hubs_batch(home, kind, rows, cameras, monkeypatch):
    ours, hub = QwenPrepare(load_processor(home / kind)), VLMPrepare(load_processor(home / kind))
    batches = [[[image] * cameras for image in pictures(seed)[:1] * rows] for seed in range(2)]
    texts, resized = (
        ["open the drawer"] * rows,
        [[[i.resize((90, 70)) for i in r] for r in b] for b in batches],
    )
    first, second = resized
    same(ours(first, texts), hub(first, texts))
    asked = []
    tokenize = type(ours.processor).__call__
    monkeypatch.setattr(
        type(ours.processor), "__call__", lambda self, **o: asked.append(self) or tokenize(self, **o)
    )
    found = ours(second, texts)
    assert not asked  # else it was not known
    same(found, hub(second, texts))


@pytest.mark.parametrize(
    "change",
    [
        lambda prepare: prepare.processor.tokenizer.add_tokens(["drawer"]),
        lambda prepare: setattr(prepare.processor.tokenizer, "padding_side", "right"),
        lambda prepare: setattr(prepare.processor, "chat_template", "{{ messages[0].role }}<|image_pad|>"),
        lambda prepare: setattr(prepare.processor.image_processor, "patch_size", 8),
        lambda prepare: setattr(prepare.processor.image_processor, "image_mean", (0.1, 0.2, 0.3)),
    ],
    ids=["a new token", "padding", "the template", "the size of a patch", "the mean"],
)
def test_what_is_known_is_forgotten_where_it_would_be_another(home, change):
    ours, hub = QwenPrepare(load_processor(home / KINDS[0])), VLMPrepare(load_processor(home / KINDS[0]))
    images = [[image.resize((64, 64))] for image in pictures(1)[:2]]
    ours(images[:1], ["open the drawer"])
    change(ours)
    change(hub)
    same(ours(images[1:], ["open the drawer"]), hub(images[1:], ["open the drawer"]))


def test_no_more_prompts_are_kept_than_this(home):
    prepare = QwenPrepare(load_processor(home / KINDS[0]))
    for number in range(300):
        prepare.prompt(f"go {number}", 1)
    assert len(prepare.prompts) <= KEPT


@every_kind
def test_a_prompt_without_an_image_marks_none(home, kind):
    inputs = QwenPrepare(load_processor(home / kind))([[], []], ["go", "open the drawer"])
    expected = VLMPrepare(load_processor(home / kind))([[], []], ["go", "open the drawer"])
    assert inputs.keys() == expected.keys() and not inputs["mm_token_type_ids"].any()


@every_kind
def test_a_checkpoint_names_the_hubs_processor(home, kind, tmp_path):
    load_processor(home / kind).save_pretrained(tmp_path / "hub")
    QwenPrepare(load_processor(home / kind)).processor.save_pretrained(tmp_path / "ours")
    for file in sorted((tmp_path / "hub").iterdir()):
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
