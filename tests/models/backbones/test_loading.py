"""Base checkpoints: the hub's older format, and folders that are no backbone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_composed


def write_old_format(source: Path, out: Path) -> None:
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
def test_the_hubs_old_format_gives_the_same_features(home, tmp_path, observed):
    source = tmp_path / "source"
    shutil.copytree(home / "qwen2_5_vl", source)
    weights = load_file(source / "model.safetensors")
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    save_file(rounded, source / "model.safetensors", metadata={"format": "pt"})
    write_old_format(source, tmp_path / "hub")
    assert not {"text_config", "rope_parameters"} & set(
        json.loads((tmp_path / "hub/config.json").read_text())
    )
    assert any(
        name.startswith("visual.") for name in load_file(tmp_path / "hub/model-00001-of-00002.safetensors")
    )

    new, old = load_vlm(source).eval(), load_vlm(tmp_path / "hub").eval()
    assert old.model.dtype == torch.float32 and old.model_type == "qwen2_5_vl"
    for image, text in zip(observed.images, observed.texts):
        ours, theirs = new.prepare([image], [text]), old.prepare([image], [text])
        assert set(theirs) == set(ours)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value)
        torch.testing.assert_close(old(theirs).hidden, new(ours).hidden, atol=1e-5, rtol=0)
    # the old format names no padding side, so its batches are padded on the other one
    here, there = (
        new(new.prepare(observed.images, observed.texts), observed.extra),
        old(old.prepare(observed.images, observed.texts), observed.extra),
    )
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


# --- damaged folders: each line names the folder, or nothing has changed ----------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
DAMAGES = {
    "gone": lambda whole: None,
    "empty": lambda whole: b"",
    "a pointer": lambda whole: POINTER,
    "half": lambda whole: whole[: len(whole) // 2],
    "an empty mapping": lambda whole: b"{}",
    "a list": lambda whole: b"[]",
}
FAMILIES = ("qwen2_5_vl", "paligemma", "idefics3", "florence2", "llava", "prismatic")


def features(folder: Path, observed) -> torch.Tensor:
    vlm = load_vlm(folder).eval()
    return vlm(vlm.prepare(observed.images[:1], observed.texts[:1])).hidden


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_damaged_file_is_named_in_one_line_or_makes_no_difference(tmp_path, kind, damage, observed):
    write = write_tiny_composed if kind == "prismatic" else write_tiny
    base = write(kind, tmp_path / "base", image_size=64, corpus=observed.texts, **observed.sizes)
    expected = features(base, observed)
    for file in sorted(base.iterdir()):
        whole = file.read_bytes()
        content = DAMAGES[damage](whole)
        file.unlink() if content is None else file.write_bytes(content)
        try:
            found = features(base, observed)
        except (ValueError, OSError) as error:
            assert str(base) in str(error) and "\n" not in str(error), f"{file.name}: {error}"
        else:
            assert found.equal(expected), f"{file.name} was read, and other features came out"
        file.write_bytes(whole)


def rewritten(folder: Path, change) -> Path:
    """The folder, with `change` applied to the dictionary of its weights."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(home, tmp_path) -> Path:
    return shutil.copytree(home / "qwen2_5_vl", tmp_path / "base")


def test_one_missing_weight_is_named(base):
    lost = "model.language_model.layers.0.self_attn.q_proj.weight"
    rewritten(
        base,
        lambda weights: {n: w for n, w in weights.items() if not n.endswith("0.self_attn.q_proj.weight")},
    )
    with pytest.raises(ValueError, match=rf"base lacks 1 of \d+ weights.*{lost}"):
        load_vlm(base)


def test_weights_of_another_version_are_counted(base):
    rewritten(
        base, lambda weights: {n.replace("layers.", "blocks_of_others."): w for n, w in weights.items()}
    )
    with pytest.raises(ValueError, match=r"base lacks \d\d of \d+ weights.*and \d+ more"):
        load_vlm(base)


def test_a_weight_of_another_shape_is_named(base):
    rewritten(
        base,
        lambda weights: {
            n: w[:-1].clone() if n.endswith("layers.0.mlp.up_proj.weight") else w for n, w in weights.items()
        },
    )
    with pytest.raises(
        ValueError, match="base: 1 weights have another shape than config.json says: .*0.mlp.up_proj.weight"
    ):
        load_vlm(base)


def test_a_shard_that_was_not_downloaded_is_named(base, tmp_path):
    write_old_format(base, tmp_path / "hub")
    (tmp_path / "hub/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match="index.json names 1 of 2 files that are not there: model-00002-of-00002"
    ):
        load_vlm(tmp_path / "hub")


@torch.no_grad()
def test_a_template_in_the_tokenizers_settings_is_used(base, observed):
    expected, file = features(base, observed), base / "tokenizer_config.json"
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="base: .*chat_template.jinja"):
        load_vlm(base)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    assert features(base, observed).equal(expected)


def test_an_output_matrix_may_be_missing_until_tokens_are_wanted(tmp_path, observed):
    folder = write_tiny_composed("dinosiglip", tmp_path / "llama", image_size=64, corpus=observed.texts)
    vlm = load_vlm(
        rewritten(folder, lambda weights: {n: w for n, w in weights.items() if n != "lm_head.weight"})
    )
    assert vlm.missing == ("lm_head.weight",)
    inputs = vlm.prepare(observed.images[:1], observed.texts[:1])
    assert vlm(inputs).hidden.isfinite().all()
    for read in (
        vlm.for_tokens,
        lambda: vlm.lm_loss(inputs, inputs["input_ids"]),
        lambda: vlm.generate(inputs),
    ):
        with pytest.raises(ValueError, match="lacks 1 weights that a language loss reads: lm_head.weight"):
            read()
