"""Composed backbones against transformers' own models, called one by one, and checkpoints that outlive their components.

Every expected value is computed here from the equations: a forward that embeds, replaces token by token and calls the
language model.
"""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from vla_bench.models.backbones.prismatic import compose
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.registry import RegistryError

WORDS = ("open the drawer", "press the button from the top", "close the window")


KINDS = ("siglip_linear_gemma", "siglip_mlp_qwen2", "dinosiglip_fused_llama", "eagle_qwen3")


every_kind = pytest.mark.parametrize("kind", KINDS)


SIZE, WIDTH = 64, 64


def make_image(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


RNG = np.random.default_rng(0)


IMAGES = [[make_image(RNG), make_image(RNG, 48, 80)] for _ in WORDS]


EXTRA = torch.randn(len(WORDS), 3, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def home(components) -> Path:
    return components


@pytest.fixture(scope="module")
def backbones(composed_backbones) -> dict[str, VLM]:
    return composed_backbones


def by_hand(vlm: VLM, inputs: dict, row: int, first: int, count: int) -> torch.Tensor:
    """Hidden states of one sample, without padding: its images are `first` to `first + count` of the batch."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    eyes, rows = vlm.vision_backbone, SIZE // 16
    tokens = []
    for k in range(first, first + count):
        views = inputs["pixel_values"][k : k + 1].split(3, 1)
        components = []
        for name, view in zip([name for name, _ in eyes.named_children()], views, strict=True):
            components.append(getattr(eyes, name)(view).last_hidden_state[:, -(rows**2) :])
        tokens += list(vlm.projector(torch.cat(components, -1), (rows, rows))[0])
    sequence, queue = [], iter(tokens)
    for i in ids.tolist():
        is_image = i == vlm.config.image_token_id
        sequence.append(next(queue) if is_image else vlm.llm_backbone.embed_tokens(torch.tensor(i)))
    assert next(queue, None) is None
    return vlm.llm_backbone(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0]


@every_kind
@torch.no_grad()
def test_hidden_states_are_a_straightforward_forward(backbones, kind):
    vlm = backbones[kind]
    counts = (2, 1, 0)  # images per sample
    inputs = vlm.prepare([row[:n] for row, n in zip(IMAGES, counts)], WORDS)
    features = vlm(inputs, layers="all", attention=True)
    assert len(features.layers) == vlm.num_layers == len(features.attention)
    for row, count in enumerate(counts):
        valid = inputs["attention_mask"][row].bool()
        expected = by_hand(vlm, inputs, row, sum(counts[:row]), count)
        torch.testing.assert_close(features.hidden[row][valid], expected, atol=1e-4, rtol=1e-4)
    assert [len(grids) for grids in vlm.image_grids(inputs)] == list(counts)
    for located, text in zip(vlm.words(inputs, WORDS), WORDS):
        assert [word for word, _ in located] == text.split() and all(span for _, span in located)
    assert vlm.text_config._attn_implementation == "sdpa"


@every_kind
@torch.no_grad()
def test_padding_side_and_company_do_not_matter(backbones, kind):
    vlm = backbones[kind]
    side = vlm.processor.tokenizer.padding_side
    results = []
    for padding in ("left", "right"):
        vlm.processor.tokenizer.padding_side = padding
        inputs = vlm.prepare(IMAGES, WORDS)
        results.append(vlm(inputs, EXTRA).extra)
        filled = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7)
        torch.testing.assert_close(
            vlm(dict(inputs, input_ids=filled), EXTRA).extra, results[-1], atol=1e-5, rtol=1e-5
        )
    vlm.processor.tokenizer.padding_side = side
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    alone = vlm(vlm.prepare(IMAGES[:1], WORDS[:1]), EXTRA[:1]).extra
    torch.testing.assert_close(alone[0], results[0][0], atol=1e-4, rtol=1e-4)


@every_kind
@torch.no_grad()
def test_a_masked_camera_is_not_seen(backbones, kind):
    vlm = backbones[kind]
    inputs = vlm.prepare(IMAGES, WORDS)
    seen = torch.tensor([[True, False], [True, True], [False, True]])
    masked = vlm(dict(inputs, image_mask=seen), EXTRA).extra
    pixels = inputs["pixel_values"].clone()
    pixels[[1, 4]] = torch.randn_like(pixels[[1, 4]])
    other = vlm(dict(inputs, image_mask=seen, pixel_values=pixels), EXTRA).extra
    torch.testing.assert_close(other, masked, atol=1e-6, rtol=1e-6)
    assert (vlm(dict(inputs, pixel_values=pixels), EXTRA).extra - vlm(inputs, EXTRA).extra)[
        0
    ].abs().max() > 1e-3


@every_kind
def test_a_gradient_reaches_every_trainable_parameter(backbones, kind):
    vlm = backbones[kind]
    vlm(vlm.prepare(IMAGES, WORDS), EXTRA).extra.square().sum().backward()
    lost = [n for n, p in vlm.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    tied = vlm.model.lm_head.weight is vlm.llm_backbone.embed_tokens.weight
    frozen = [n for n, p in vlm.named_parameters() if not p.requires_grad]
    vlm.zero_grad(set_to_none=True)
    assert not lost
    assert frozen == ([] if tied else ["model.lm_head.weight"])


@every_kind
@torch.no_grad()
def test_answers_and_decoding_agree_with_logits_of_the_whole_sequence(backbones, kind):
    vlm = backbones[kind]
    inputs = vlm.prepare(IMAGES[:1], WORDS[:1])

    def logits(ids):
        return vlm.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
        ).logits

    answer = torch.tensor([[5, 6, 7]])
    longer = torch.cat([inputs["input_ids"], answer], 1)
    expected = cross_entropy(logits(longer)[0, -4:-1], answer[0])
    loss = vlm.answer_loss(inputs, answer, torch.ones_like(answer, dtype=torch.bool))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    ids = inputs["input_ids"]
    for _ in range(3):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    said = vlm.decode(inputs, max_tokens=3, allowed=torch.arange(vlm.sizes.vocab_size))
    assert said[0].tolist() == ids[0, -3:].tolist()


def test_shards_and_components_can_be_found(backbones):
    for kind, vlm in backbones.items():
        names = {layer.__name__ for layer in vlm.layer_classes()}
        assert "SiglipEncoderLayer" in names and any(name.endswith("DecoderLayer") for name in names), kind
        components = [vlm.vision_backbone, vlm.projector, vlm.llm_backbone]
        counted = sum(p.numel() for component in components for p in component.parameters())
        head = vlm.model.lm_head.weight
        counted += 0 if head is vlm.llm_backbone.embed_tokens.weight else head.numel()
        assert counted == sum(p.numel() for p in vlm.parameters())


def samples(horizon: int = 4) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {
            "image": images,
            "lang": text,
            "action": rng.normal(size=(horizon, 3)).astype(np.float32),
            "action_is_pad": np.zeros(horizon, bool),
            "state": rng.normal(size=5).astype(np.float32),
        }
        for images, text in zip(IMAGES, WORDS)
    ]


def framework_config(home: Path, name: str, **more) -> dict:
    heads = {
        "OFT": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
        "GR00T": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 2, "num_heads": 4},
    }
    vlm = {
        "vision_backbone": {"type": "SigLIP", "path": str(home / "siglip")},
        "projector": {"type": "MLP"},
        "llm_backbone": {"type": "Qwen2", "path": str(home / "qwen2"), "num_layers": 2},
    }
    return {"name": name, "vlm": vlm, "action_horizon": 4, "action_model": heads[name], **more}


@pytest.mark.parametrize("name", ["OFT", "GR00T"])
def test_a_framework_is_built_from_three_components_and_outlives_them(home, tmp_path, name):
    components = tmp_path / "components"
    shutil.copytree(home, components)
    torch.manual_seed(0)
    model = build_framework(framework_config(components, name), action_dim=3, state_dim=5)
    examples, noise = samples(), torch.randn(3, 4, 3)
    batch = pickle.loads(pickle.dumps(model.prepare))(examples)
    model(batch)["action_loss"].backward()
    lost = [
        n for n, p in model.vlm.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not lost
    before = model.predict_action(examples, noise=noise)["normalized_actions"]
    maps = model.attention_maps(examples)
    assert [m.shape for m in maps[0].images] == [(4, 4)] * 2 and [w for w, _ in maps[1].words] == WORDS[
        1
    ].split()
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(components)
    again = Framework.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(
        again.predict_action(examples, noise=noise)["normalized_actions"], before, atol=1e-6
    )


def test_a_fresh_process_loads_a_checkpoint_without_components_or_network(home, tmp_path):
    torch.manual_seed(0)
    vision = {"dinov2_path": str(home / "dinov2_with_registers"), "siglip_path": str(home / "siglip")}
    config = framework_config(home, "OFT")
    config["vlm"] |= {"vision_backbone": {"type": "DinoSigLIP", **vision}, "projector": {"type": "FusedMLP"}}
    config["vlm"]["llm_backbone"] = {"type": "Llama", "path": str(home / "llama")}
    model = build_framework(config, action_dim=3, state_dim=5)
    model.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved" / "vlm").glob("*.json"):
        assert str(home) not in file.read_text(encoding="utf-8"), file.name
    plain = [
        {"lang": e["lang"], "state": torch.from_numpy(e["state"])}
        | {"image": [torch.from_numpy(np.array(image)) for image in e["image"]]}
        for e in samples()
    ]
    torch.save(plain, tmp_path / "samples.pt")
    code = (
        "import sys, torch\nfrom PIL import Image\nfrom vla_bench.models.frameworks.framework import Framework\n"
        "torch.set_num_threads(1)\nmodel = Framework.from_pretrained(sys.argv[1] + '/saved')\n"
        "batch = torch.load(sys.argv[1] + '/samples.pt', weights_only=True)\n"
        "for e in batch:\n"
        "    e |= {'image': [Image.fromarray(i.numpy()) for i in e['image']], 'state': e['state'].numpy()}\n"
        "torch.save(torch.from_numpy(model.predict_action(batch)['normalized_actions']), sys.argv[1] + '/out.pt')"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | offline, timeout=120
    )
    expected = model.predict_action(samples())["normalized_actions"]
    np.testing.assert_allclose(
        torch.load(tmp_path / "out.pt", weights_only=True).numpy(), expected, atol=1e-5
    )


@pytest.mark.parametrize("component", ["vision_backbone", "projector", "llm_backbone"])
def test_a_component_can_be_frozen_alone(home, component):
    model = build_framework(
        framework_config(home, "OFT", **{f"freeze_{component}": True}), action_dim=3, state_dim=5
    )
    frozen = {id(p) for p in getattr(model.vlm, component).parameters()}
    assert frozen == {id(p) for p in model.parameters() if not p.requires_grad}
    model(samples())["action_loss"].backward()
    assert all((p.grad is None) == (id(p) in frozen) for p in model.vlm.parameters())


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("vision_backbone", {"type": "SigLip"}, "did you mean 'SigLIP'"),
        ("vision_backbone", {"type": "DINOv2"}, "write type: SigLIP"),
        ("vision_backbone", {"layer": -9}, "vision layer -9; expected -1"),
        ("vision_backbone", {"path": "no/such/folder"}, "tiny_composed siglip --out FOLDER"),
        ("projector", {"type": "MLPs"}, "did you mean 'MLP"),
        ("projector", {"text_size": 3}, "'text_size' is set from the backbone"),
        ("projector", {"fused_vision_dim": 3}, "takes no argument 'fused_vision_dim'"),
        ("llm_backbone", {"type": "Llama"}, "holds a 'qwen2', expected 'llama'; write type: Qwen2"),
        ("llm_backbone", {"num_layers": 9}, "has 3 layers; 9 cannot be kept"),
        ("llm_backbone", {"select_layer": 2}, "takes no argument 'select_layer'"),
    ],
)
def test_components_that_do_not_fit_are_named(home, component, change, message):
    config = framework_config(home, "OFT")
    config["vlm"][component] = config["vlm"][component] | change
    with pytest.raises((RegistryError, ValueError, FileNotFoundError)) as caught:
        build_framework(config, action_dim=3, state_dim=5)
    assert message in str(caught.value)


def test_the_two_ways_of_composing_are_not_mixed(home):
    config = framework_config(home, "OFT")
    mixed = {**config, "vlm": {**config["vlm"], "base_vlm": "somewhere"}}
    with pytest.raises(ValueError, match="remove one or the other"):
        build_framework(mixed, action_dim=3, state_dim=5)
    for component in ("vision_backbone", "projector", "llm_backbone"):
        two = {key: value for key, value in config["vlm"].items() if key != component}
        with pytest.raises(ValueError, match=f"{component} is missing"):
            build_framework({**config, "vlm": two}, action_dim=3, state_dim=5)
    with pytest.raises(ValueError, match="32 image tokens for 8 placeholders"):
        vlm = compose(**config["vlm"])
        inputs = vlm.prepare(IMAGES[:1], WORDS[:1])
        inputs["input_ids"][0, 8:] = 5
        vlm(inputs)
