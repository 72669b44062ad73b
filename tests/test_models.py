"""The backbones against transformers itself, the hub's older layout, and checkpoints opened by a fresh process.

`test_frameworks.py` holds what all four pairs of backbone and framework promise.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.frameworks.build import build_framework

KINDS = ("qwen2_5_vl", "qwen3_vl", "paligemma")
WORDS = ("open the drawer", "press the button from the top", "close the window")
SIZES = {"hidden_size": 64, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
every_kind = pytest.mark.parametrize("kind", KINDS)


def pictures(seed: int, count: int = 2, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for _ in range(count)]


IMAGES = [pictures(seed) for seed in range(len(WORDS))]
EXTRA = torch.randn(len(WORDS), 3, SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_tiny(kind, home / kind, image_size=64, corpus=WORDS, **SIZES)
    return home


def loud(vlm: VLM) -> VLM:
    """Larger random weights, so that a wrong position or a leak moves the features."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vlm.eval()


@pytest.fixture(scope="module")
def backbones(home) -> dict[str, VLM]:
    return {kind: loud(load_vlm(home / kind)) for kind in KINDS}


def type_ids(vlm: VLM, inputs: dict, answer: torch.Tensor | None = None) -> dict:
    """What transformers wants to be told besides `prepare`'s tensors: PaliGemma's prefix is 0, an answer 1."""
    if vlm.model_type != "paligemma":
        return {}
    return {"token_type_ids": torch.zeros_like(inputs["input_ids"]) if answer is None else answer.long()}


def extended(vlm: VLM, inputs: dict, ids: torch.Tensor) -> dict:
    """The inputs of one unpadded sample with ordinary tokens behind it."""
    longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids], 1))
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(ids, fill)], 1)
    return longer | type_ids(vlm, longer)


# --- features are transformers' own -----------------------------------------------------------------------------------


@every_kind
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(backbones, kind):
    vlm = backbones[kind]
    for image, text in zip(IMAGES, WORDS):
        inputs = vlm.prepare([image], [text])
        own = vlm.model(**inputs, **type_ids(vlm, inputs), output_hidden_states=True)
        ours = vlm(inputs, layers="all")
        torch.testing.assert_close(ours.hidden, own.hidden_states[-1], atol=1e-5, rtol=0)
        assert len(ours.layers) == vlm.num_layers and ours.layers[-1].equal(ours.hidden)
        for mine, theirs in zip(ours.layers, own.hidden_states[1:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@every_kind
@torch.no_grad()
def test_extra_tokens_stand_where_ordinary_tokens_would(backbones, kind):
    # Embeddings of ordinary tokens as `extra`, in a padded batch, against those tokens in transformers' own call.
    vlm = backbones[kind]
    tokens = torch.tensor([[20, 31, 42]])
    extra = vlm.model.get_input_embeddings()(tokens).expand(len(WORDS), -1, -1)
    together = vlm(vlm.prepare(IMAGES, WORDS), extra).extra
    for i, (image, text) in enumerate(zip(IMAGES, WORDS)):
        own = vlm.model.model(**extended(vlm, vlm.prepare([image], [text]), tokens)).last_hidden_state
        torch.testing.assert_close(together[i], own[0, -3:], atol=2e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


@every_kind
@torch.no_grad()
def test_the_padding_side_does_not_reach_the_extra_tokens(backbones, kind):
    vlm = backbones[kind]
    tokenizer, found, masks = vlm.processor.tokenizer, [], []
    before = tokenizer.padding_side
    try:
        for tokenizer.padding_side in ("left", "right"):
            inputs = vlm.prepare(IMAGES, WORDS)
            found.append(vlm(inputs, EXTRA).extra)
            masks.append(inputs["attention_mask"])
    finally:
        tokenizer.padding_side = before
    assert not masks[0].equal(masks[1]), "nothing was padded, so nothing was tested"
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=0)
    shifted = vlm(vlm.prepare(IMAGES, WORDS), EXTRA.flip(1)).extra.flip(1)
    assert (shifted - found[0]).abs().max() > 1e-3, "positions of extra tokens must matter"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_what_a_former_call_left_behind_does_not_leak(backbones, kind):
    vlm = backbones[kind]
    inputs = vlm.prepare(IMAGES, WORDS)
    before = vlm(inputs, EXTRA).extra
    vlm.model(**vlm.prepare([pictures(9, 1, (32, 64))], ["close"]))
    left = vlm.model.model.rope_deltas
    assert left is not None, "transformers keeps no rope_deltas any more, so this test shows nothing"
    assert vlm(inputs, EXTRA).extra.equal(before)
    vlm.model.model.rope_deltas = torch.full_like(left, 50)
    assert vlm(inputs, EXTRA).extra.equal(before)
    alone = {name: inputs[name][:1] for name in ("input_ids", "attention_mask")}
    alone["input_ids"] = alone["input_ids"].clamp(max=50)  # words only: no picture to place
    first = vlm(alone).hidden
    vlm.model.model.rope_deltas = None
    assert vlm(alone).hidden.equal(first)


@every_kind
def test_logits_are_computed_for_a_language_loss_only(backbones, kind, monkeypatch):
    vlm = backbones[kind]

    def refuse(*args):
        raise AssertionError("vocabulary logits were computed")

    monkeypatch.setattr(vlm.model.get_output_embeddings(), "forward", refuse)
    inputs = vlm.prepare(IMAGES, WORDS)
    with torch.no_grad():
        vlm(inputs, EXTRA, attention=True)
    with pytest.raises(AssertionError, match="vocabulary"):
        vlm.lm_loss(inputs, inputs["input_ids"])


@every_kind
@torch.no_grad()
def test_language_loss_is_the_cross_entropy_of_full_logits(backbones, kind):
    vlm = backbones[kind]
    inputs = vlm.prepare(IMAGES, WORDS)
    labels, answer = torch.full_like(inputs["input_ids"], -100), []
    for row, mask in enumerate(inputs["attention_mask"]):  # each sample's last tokens, 2, 3 and 4 of them
        answer.append(mask.nonzero().flatten()[-(row + 2) :])
        labels[row, answer[-1]] = inputs["input_ids"][row, answer[-1]]
    terms = []
    for row, (image, text) in enumerate(zip(IMAGES, WORDS)):  # one by one, so without any padding
        single = vlm.prepare([image], [text])
        count = len(answer[row])
        is_answer = torch.arange(single["input_ids"].shape[1])[None] >= single["input_ids"].shape[1] - count
        logits = vlm.model(**single, **type_ids(vlm, single, is_answer)).logits[0].double().numpy()
        for place in range(len(logits) - count, len(logits)):
            scores = logits[place - 1] - logits[place - 1].max()
            terms.append(np.log(np.exp(scores).sum()) - scores[int(single["input_ids"][0, place])])
    assert float(vlm.lm_loss(inputs, labels)) == pytest.approx(np.mean(terms), rel=1e-5)


@every_kind
@torch.no_grad()
def test_generation_continues_the_features(backbones, kind):
    # The hidden state that the first new word is read from, caught in front of the output matrix.
    vlm, caught = backbones[kind], []
    head = vlm.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: caught.append(args[0][:, -1]))
    try:
        for image, text in zip(IMAGES, WORDS):
            inputs = vlm.prepare([image], [text])
            caught.clear()
            assert vlm.generate(inputs, max_new_tokens=2).shape[1] in (1, 2)
            torch.testing.assert_close(caught[0], vlm(inputs).hidden[:, -1], atol=1e-4, rtol=0)
    finally:
        hook.remove()


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_in_a_padded_batch_is_generation_alone(home, kind, side):
    vlm = loud(load_vlm(home / kind))
    vlm.processor.tokenizer.padding_side = side
    inputs, firsts = vlm.prepare(IMAGES, WORDS), []
    assert (inputs["attention_mask"][:, -1 if side == "right" else 0] == 0).any()
    before = {name: value.clone() for name, value in inputs.items()}
    vlm.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: firsts.append(args[0][:, -1]))
    together = vlm.generate(inputs, max_new_tokens=3)
    state = firsts[0]
    assert all(inputs[name].equal(value) for name, value in before.items()), "the caller's batch was changed"
    for i, (image, text) in enumerate(zip(IMAGES, WORDS)):
        firsts.clear()
        alone = vlm.generate(vlm.prepare([image], [text]), max_new_tokens=3)
        torch.testing.assert_close(state[i], firsts[0][0], atol=1e-4, rtol=0)
        assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()


# --- folders ----------------------------------------------------------------------------------------------------------


def write_old_layout(source: Path, out: Path) -> None:
    """A tiny Qwen2.5-VL as the hub keeps the 3B: flat configuration, old key names, two shards in bfloat16."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "bos_token_id")
    kept += ("eos_token_id", "pad_token_id")
    flat = {name: value for name, value in config.items() if name.endswith("_token_id")}
    flat |= {name: text[name] for name in kept} | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    flat |= {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    flat |= {"rope_theta": rope["rope_theta"], "use_sliding_window": False, "transformers_version": "4.41.2"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision.pop("model_type", None)
    flat["vision_config"] = vision | {"in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    (out / "config.json").write_text(json.dumps(flat))

    processor = json.loads((source / "processor_config.json").read_text())["image_processor"]
    size = processor.pop("size")
    pixels = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    named = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    values = {name: processor[name] for name in names if name in processor}
    (out / "preprocessor_config.json").write_text(json.dumps(values | pixels | named))

    template = (source / "chat_template.jinja").read_text()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    shutil.copy(source / "tokenizer.json", out)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    (out / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(t["id"]): {"content": t["content"], **flags} for t in tokenizer["added_tokens"]}
    own = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": template, "added_tokens_decoder": added}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    (out / "tokenizer_config.json").write_text(json.dumps(own | ends | {"add_prefix_space": False}))

    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for i, (name, weight) in enumerate(load_file(source / "model.safetensors").items()):
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        shards[i % 2][old] = weight.bfloat16()
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for file, shard in zip(files, shards):
        save_file(shard, out / file, metadata={"format": "pt"})
    total = sum(w.numel() * 2 for shard in shards for w in shard.values())
    where = {name: file for file, shard in zip(files, shards) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_the_hubs_old_layout_gives_the_same_features(home, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(home / "qwen2_5_vl", source)
    weights = load_file(source / "model.safetensors")
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    save_file(rounded, source / "model.safetensors", metadata={"format": "pt"})
    write_old_layout(source, tmp_path / "hub")
    assert not {"text_config", "rope_parameters"} & set(
        json.loads((tmp_path / "hub/config.json").read_text())
    )
    assert any(
        name.startswith("visual.") for name in load_file(tmp_path / "hub/model-00001-of-00002.safetensors")
    )

    new, old = load_vlm(source).eval(), load_vlm(tmp_path / "hub").eval()
    assert old.model.dtype == torch.float32 and old.model_type == "qwen2_5_vl"
    for image, text in zip(IMAGES, WORDS):
        ours, theirs = new.prepare([image], [text]), old.prepare([image], [text])
        assert set(theirs) == set(ours)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value)
        torch.testing.assert_close(old(theirs).hidden, new(ours).hidden, atol=1e-5, rtol=0)
    # the old layout names no padding side, so its batches are padded on the other one
    here, there = new(new.prepare(IMAGES, WORDS), EXTRA), old(old.prepare(IMAGES, WORDS), EXTRA)
    assert not here.mask.equal(there.mask)
    torch.testing.assert_close(there.extra, here.extra, atol=2e-5, rtol=0)
    random = load_vlm(tmp_path / "hub", load_weights=False).eval()
    assert (random(theirs).hidden - old(theirs).hidden).abs().max() > 1e-2, "were the weights read at all?"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "folder holds no config.json"),
        ('{"model_type": "llama"}', ValueError, "folder: unknown backbone 'llama'.*PaliGemma.*qwen2_5_vl"),
        ('{"model_type": "llava"}', FileNotFoundError, "folder: no weights"),
        ('{"model_type": "qwen2_5_v"}', ValueError, r"folder/config.json.*'qwen2_5_v'.*mean 'qwen2_5_vl'"),
        ('{"hidden_size": 64}', ValueError, r"folder/config.json.*'model_type'"),
        ('{"model_type": ', ValueError, r"folder/config.json is no valid JSON"),
        ("[1]", ValueError, r"folder/config.json.*'model_type'"),
    ],
    ids=[
        "no config.json",
        "no backbone here",
        "no weights",
        "misspelt",
        "no model_type",
        "half a file",
        "a list",
    ],
)
def test_a_folder_that_is_no_backbone_says_why(tmp_path, text, error, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_vlm(folder)
    assert "\n" not in str(caught.value), "a command-line error is one line"


def test_a_path_that_does_not_exist_says_how_to_get_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*python -m vla_bench.models.backbones.tiny"):
        load_vlm(tmp_path / "nowhere")


# --- a fresh process --------------------------------------------------------------------------------------------------

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


def test_checkpoints_open_in_a_fresh_process_without_network_or_base_model(home, tmp_path):
    heads = {
        "OFT": {"type": "MLP", "hidden_size": 32},
        "GR00T": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 2, "num_heads": 4},
    }
    rng = np.random.default_rng(0)
    given = {
        "images": np.stack([[np.asarray(p) for p in pair] for pair in IMAGES]),
        "words": np.array(WORDS),
        "state": rng.normal(size=(len(WORDS), 2)).astype(np.float32),
        "noise": rng.normal(size=(len(WORDS), 4, 3)).astype(np.float32),
    }
    np.savez(tmp_path / "given.npz", **given)
    examples = [
        {"image": i, "lang": w, "state": s} for i, w, s in zip(IMAGES, WORDS, given["state"], strict=True)
    ]
    expected = {}
    for kind in ("qwen2_5_vl", "paligemma"):
        base = shutil.copytree(home / kind, tmp_path / "base" / kind)
        for name, head in heads.items():
            config = {"name": name, "vlm": {"base_vlm": str(base)}, "action_horizon": 4, "action_model": head}
            model = loud(build_framework(config, action_dim=3, state_dim=2))
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
