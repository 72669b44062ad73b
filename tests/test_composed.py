"""Composed backbones against transformers' own parts, called one by one, and checkpoints that outlive their parts.

Every expected value is computed here from the equations: loops for pixel shuffle, the two vision models called
apart, a forward that embeds, replaces token by token and calls the language model.
"""

import json
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
from torch.nn.functional import cross_entropy, gelu, layer_norm
from transformers import AutoModel, AutoModelForCausalLM

from vla_bench.models.backbones.eagle import compose_eagle, public_names
from vla_bench.models.backbones.component_loading import quiet
from vla_bench.models.backbones.prismatic import compose
from vla_bench.models.backbones.tiny_composed import write_tiny_composed, write_tiny_component
from vla_bench.models.backbones.vision import VisionBackbone
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.projectors.pixel_shuffle import pixel_shuffle
from vla_bench.models.interop.weights import load_mapped
from vla_bench.registry import LLM_BACKBONES, PROJECTORS, VISION_BACKBONES, RegistryError

WORDS = ("open the drawer", "press the button from the top", "close the window")
KINDS = ("siglip_linear_gemma", "siglip_mlp_qwen2", "dinosiglip_fused_llama", "eagle_qwen3")
every_kind = pytest.mark.parametrize("kind", KINDS)
SIZE, WIDTH = 64, 64


def picture(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


RNG = np.random.default_rng(0)
IMAGES = [[picture(RNG), picture(RNG, 48, 80)] for _ in WORDS]
EXTRA = torch.randn(len(WORDS), 3, WIDTH, generator=torch.Generator().manual_seed(3))


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
    eye = {"type": "SigLIP", "path": str(home / "siglip")}
    if kind == "siglip_linear_gemma":
        return compose(eye, {"type": "Linear"}, {"type": "Gemma", "path": str(home / "gemma")})
    if kind == "siglip_mlp_qwen2":
        return compose(eye | {"layer": -2}, {"type": "MLP"}, {"type": "Qwen2", "path": str(home / "qwen2")})
    if kind == "eagle_qwen3":
        return compose_eagle(home / "siglip", home / "qwen3", select_layer=2)
    eyes = {"dinov2_path": str(home / "dinov2_with_registers"), "siglip_path": str(home / "siglip")}
    llama = {"type": "Llama", "path": str(home / "llama")}
    return compose({"type": "DinoSigLIP", **eyes}, {"type": "FusedMLP"}, llama)


@pytest.fixture(scope="module")
def backbones(home) -> dict[str, VLM]:
    torch.manual_seed(0)
    return {kind: loud(composed(home, kind)) for kind in KINDS}


# --- projectors -------------------------------------------------------------------------------------------------------


def shuffled_by_hand(features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = []
    for one in features:
        grid = one.reshape(rows, columns, -1)
        blocks = [(r, c) for r in range(0, rows, 2) for c in range(0, columns, 2)]
        corners = ((0, 0), (0, 1), (1, 0), (1, 1))
        out.append(torch.stack([torch.cat([grid[r + i, c + j] for i, j in corners]) for r, c in blocks]))
    return torch.stack(out)


@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (6, 4)])
def test_pixel_shuffle_joins_each_block_row_by_row(grid):
    features = torch.randn(3, grid[0] * grid[1], 5)
    assert torch.equal(pixel_shuffle(features, grid), shuffled_by_hand(features, *grid))
    assert grid == (2, 2) or not torch.equal(
        pixel_shuffle(features, grid), shuffled_by_hand(features, *grid[::-1])
    )


@pytest.mark.parametrize("kind", ["Linear", "MLP", "FusedMLP", "PixelShuffleMLP"])
def test_projectors_are_their_equations_and_tell_their_grid(kind):
    projector = PROJECTORS.build(kind, vision_size=6, text_size=10)
    features, p = torch.randn(2, 24, 6), dict(projector.named_parameters())
    if kind == "Linear":
        expected = features @ p["linear.weight"].T + p["linear.bias"]
    elif kind == "PixelShuffleMLP":
        hidden = shuffled_by_hand(features, 4, 6)
        hidden = layer_norm(hidden, (24,), p["layers.0.weight"], p["layers.0.bias"])
        hidden = gelu(hidden @ p["layers.1.weight"].T + p["layers.1.bias"])
        expected = hidden @ p["layers.3.weight"].T + p["layers.3.bias"]
    else:
        expected, last = features, {"MLP": 2, "FusedMLP": 3}[kind]
        for i in range(1, last + 1):
            expected = expected @ p[f"fc{i}.weight"].T + p[f"fc{i}.bias"]
            expected = gelu(expected) if i < last else expected
    rows, columns = projector.token_grid((4, 6))
    assert projector(features, (4, 6)).shape == (2, rows * columns, 10)
    torch.testing.assert_close(projector(features, (4, 6)), expected, atol=1e-5, rtol=1e-5)


# --- vision -----------------------------------------------------------------------------------------------------------


def normal(image: Image.Image, mean: list[float], std: list[float], size: int = SIZE) -> torch.Tensor:
    """One picture, pixel by pixel."""
    values = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    return torch.tensor((values - mean) / std, dtype=torch.float32).permute(2, 0, 1)


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("dino", ["dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("size", [SIZE, 96])
@torch.no_grad()
def test_fused_features_are_the_second_to_last_layers_of_both_models_dino_first(home, dino, size):
    config = {
        "type": "DinoSigLIP",
        "dinov2_path": home / dino,
        "siglip_path": home / "siglip",
        "image_size": size,
    }
    both = VISION_BACKBONES.build(config).eval()
    images = [image for pictures in IMAGES for image in pictures]
    with quiet():
        models = [AutoModel.from_pretrained(home / name).eval() for name in (dino, "siglip")]
    options, expected = ({}, {"interpolate_pos_encoding": True}), []
    for model, norm, more in zip(models, (IMAGENET, HALF), options):
        views = torch.stack([normal(image, *norm, size) for image in images])
        states = model(views, output_hidden_states=True, **more).hidden_states
        assert len(states) == 4  # the embedding and three layers
        expected.append(states[-2][:, -((size // 16) ** 2) :])
    ours = both(both.pixels(images))
    torch.testing.assert_close(ours, torch.cat(expected, dim=-1), atol=1e-5, rtol=1e-5)
    assert both.width == 80 and (ours[..., :32] - expected[1]).abs().max() > 0.1  # DINOv2 stands first


@torch.no_grad()
def test_a_backbone_is_restored_from_plain_settings_and_holds_nothing_unread(home):
    for config in (
        {"type": "SigLIP", "path": home / "siglip"},
        {"type": "SigLIP", "path": home / "siglip", "layer": -3},
        {"type": "DINOv2", "path": home / "dinov2_with_registers", "layer": -2},
    ):
        first = VISION_BACKBONES.build(config).eval()
        again = type(first).restore(json.loads(json.dumps(first.settings()))).eval()
        again.load_state_dict(first.state_dict())
        values = first.pixels(IMAGES[0])
        assert isinstance(again, VisionBackbone) and torch.equal(again(values), first(values))
        unread = [n for n, _ in first.named_parameters() if n.split(".")[1] in ("head",) or "mask_token" in n]
        assert not unread
        norms = [n for n, _ in first.named_parameters() if n.split(".")[1] in ("post_layernorm", "layernorm")]
        assert bool(norms) == (config.get("layer", -1) == -1)


# --- language models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_a_shortened_language_model_is_the_beginning_of_the_whole(home, kind):
    path, ids = home / kind.lower(), torch.tensor([[5, 9, 13, 7]])
    with quiet():
        whole = AutoModelForCausalLM.from_pretrained(path).eval().model
    states = whole(ids, output_hidden_states=True).hidden_states
    for count in (1, 2):
        cut = LLM_BACKBONES.build({"type": kind, "path": path, "num_layers": count}).model.eval()
        assert len(cut.model.layers) == count
        torch.testing.assert_close(
            cut.model(ids).last_hidden_state, whole.norm(states[count]), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@torch.no_grad()
def test_new_words_change_no_old_one(home, kind):
    with quiet():
        before = AutoModelForCausalLM.from_pretrained(home / kind.lower()).eval()
    llm = LLM_BACKBONES.build({"type": kind, "path": home / kind.lower()})
    old = len(llm.tokenizer)
    assert llm.add_tokens("<image>")[0] >= old and llm.tokenizer.pad_token is not None
    rows = llm.model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and rows >= len(llm.tokenizer) and llm.model.config.vocab_size == rows
    ids = torch.tensor([[5, 9, 13, 7]])
    logits = llm.model.eval()(ids).logits
    torch.testing.assert_close(logits[..., :old], before(ids).logits, atol=1e-6, rtol=1e-6)


# --- the composed network ---------------------------------------------------------------------------------------------


def by_hand(vlm: VLM, inputs: dict, row: int, first: int, count: int) -> torch.Tensor:
    """Hidden states of one sample, without padding: its pictures are `first` to `first + count` of the batch."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    eyes, rows = vlm.vision_backbone, SIZE // 16
    tokens = []
    for k in range(first, first + count):
        views = inputs["pixel_values"][k : k + 1].split(3, 1)
        parts = []
        for name, view in zip([name for name, _ in eyes.named_children()], views, strict=True):
            parts.append(getattr(eyes, name)(view).last_hidden_state[:, -(rows**2) :])
        tokens += list(vlm.projector(torch.cat(parts, -1), (rows, rows))[0])
    sequence, queue = [], iter(tokens)
    for i in ids.tolist():
        is_picture = i == vlm.config.image_token_id
        sequence.append(next(queue) if is_picture else vlm.llm_backbone.embed_tokens(torch.tensor(i)))
    assert next(queue, None) is None
    return vlm.llm_backbone(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0]


@every_kind
@torch.no_grad()
def test_hidden_states_are_a_straightforward_forward(backbones, kind):
    vlm = backbones[kind]
    counts = (2, 1, 0)  # pictures per sample
    inputs = vlm.prepare([pictures[:n] for pictures, n in zip(IMAGES, counts)], WORDS)
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


def test_shards_and_parts_can_be_found(backbones):
    for kind, vlm in backbones.items():
        names = {layer.__name__ for layer in vlm.layer_classes()}
        assert "SiglipEncoderLayer" in names and any(name.endswith("DecoderLayer") for name in names), kind
        parts = [vlm.vision_backbone, vlm.projector, vlm.llm_backbone]
        counted = sum(p.numel() for part in parts for p in part.parameters())
        head = vlm.model.lm_head.weight
        counted += 0 if head is vlm.llm_backbone.embed_tokens.weight else head.numel()
        assert counted == sum(p.numel() for p in vlm.parameters())


# --- frameworks and checkpoints ---------------------------------------------------------------------------------------


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
def test_a_framework_is_built_from_three_parts_and_outlives_them(home, tmp_path, name):
    parts = tmp_path / "parts"
    shutil.copytree(home, parts)
    torch.manual_seed(0)
    model = build_framework(framework_config(parts, name), action_dim=3, state_dim=5)
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
    shutil.rmtree(parts)
    again = Framework.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(
        again.predict_action(examples, noise=noise)["normalized_actions"], before, atol=1e-6
    )


def test_a_fresh_process_loads_a_checkpoint_without_parts_or_network(home, tmp_path):
    torch.manual_seed(0)
    eyes = {"dinov2_path": str(home / "dinov2_with_registers"), "siglip_path": str(home / "siglip")}
    config = framework_config(home, "OFT")
    config["vlm"] |= {"vision_backbone": {"type": "DinoSigLIP", **eyes}, "projector": {"type": "FusedMLP"}}
    config["vlm"]["llm_backbone"] = {"type": "Llama", "path": str(home / "llama")}
    model = build_framework(config, action_dim=3, state_dim=5)
    model.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved" / "vlm").glob("*.json"):
        assert str(home) not in file.read_text(encoding="utf-8"), file.name
    plain = [
        {"lang": e["lang"], "state": torch.from_numpy(e["state"])}
        | {"image": [torch.from_numpy(np.array(picture)) for picture in e["image"]]}
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


@pytest.mark.parametrize("part", ["vision_backbone", "projector", "llm_backbone"])
def test_a_part_can_be_frozen_alone(home, part):
    model = build_framework(
        framework_config(home, "OFT", **{f"freeze_{part}": True}), action_dim=3, state_dim=5
    )
    frozen = {id(p) for p in getattr(model.vlm, part).parameters()}
    assert frozen == {id(p) for p in model.parameters() if not p.requires_grad}
    model(samples())["action_loss"].backward()
    assert all((p.grad is None) == (id(p) in frozen) for p in model.vlm.parameters())


@pytest.mark.parametrize("kind", ["prismatic", "dinosiglip", "eagle2_5_vl"])
@torch.no_grad()
def test_tiny_compositions_load_in_half_precision_and_without_weights(tmp_path, kind):
    sizes = {"hidden_size": WIDTH, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 1}
    path = write_tiny_composed(kind, tmp_path / kind, image_size=SIZE, reserved_tokens=64, **sizes)
    full, half = load_vlm(path).eval(), load_vlm(path, dtype="bfloat16").eval()
    inputs = full.prepare(IMAGES, WORDS)
    exact, rough = full(inputs, EXTRA).extra, half(inputs, EXTRA).extra
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
    bare = load_vlm(path, load_weights=False).eval()
    bare.load_state_dict(full.state_dict())
    torch.testing.assert_close(bare(inputs, EXTRA).extra, exact, atol=1e-6, rtol=1e-6)
    assert len(full.processor.tokenizer) + 64 <= full.sizes.vocab_size


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


# --- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_backbone", {"type": "SigLip"}, "did you mean 'SigLIP'"),
        ("vision_backbone", {"type": "DINOv2"}, "write type: SigLIP"),
        ("vision_backbone", {"layer": -9}, "vision layer -9; expected -1"),
        ("vision_backbone", {"path": "no/such/folder"}, "tiny_parts siglip --out FOLDER"),
        ("projector", {"type": "MLPs"}, "did you mean 'MLP"),
        ("projector", {"text_size": 3}, "'text_size' is set from the backbone"),
        ("projector", {"fused_vision_dim": 3}, "takes no argument 'fused_vision_dim'"),
        ("llm_backbone", {"type": "Llama"}, "holds a 'qwen2', expected 'llama'; write type: Qwen2"),
        ("llm_backbone", {"num_layers": 9}, "has 3 layers; 9 cannot be kept"),
        ("llm_backbone", {"select_layer": 2}, "takes no argument 'select_layer'"),
    ],
)
def test_parts_that_do_not_fit_are_named(home, part, change, message):
    config = framework_config(home, "OFT")
    config["vlm"][part] = config["vlm"][part] | change
    with pytest.raises((RegistryError, ValueError, FileNotFoundError)) as caught:
        build_framework(config, action_dim=3, state_dim=5)
    assert message in str(caught.value)


def test_the_two_ways_of_composing_are_not_mixed(home):
    config = framework_config(home, "OFT")
    mixed = {**config, "vlm": {**config["vlm"], "base_vlm": "somewhere"}}
    with pytest.raises(ValueError, match="remove one or the other"):
        build_framework(mixed, action_dim=3, state_dim=5)
    for part in ("vision_backbone", "projector", "llm_backbone"):
        two = {key: value for key, value in config["vlm"].items() if key != part}
        with pytest.raises(ValueError, match=f"{part} is missing"):
            build_framework({**config, "vlm": two}, action_dim=3, state_dim=5)
    with pytest.raises(ValueError, match="32 image tokens for 8 placeholders"):
        vlm = compose(**config["vlm"])
        inputs = vlm.prepare(IMAGES[:1], WORDS[:1])
        inputs["input_ids"][0, 8:] = 5
        vlm(inputs)
