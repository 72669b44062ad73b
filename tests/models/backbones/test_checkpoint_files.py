"""Folders from strangers: whatever is wrong, one line names folder and file, and nothing is executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component, write_tiny_composed
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework

SIZES = {"image_size": 64, "hidden_size": 32, "num_layers": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Backbones and components as they should be, by kind."""
    home = tmp_path_factory.mktemp("whole")
    for kind in ("qwen2_5_vl", "llava"):
        write_tiny(kind, home / kind, vision_hidden_size=32, vision_layers=2, **SIZES)
    write_tiny_composed("prismatic", home / "prismatic", **SIZES)
    write_tiny_component("siglip", home / "siglip", **SIZES)
    write_tiny_component("llama", home / "llama", hidden_size=32, num_layers=2)
    return home


def load(whole: Path, kind: str, base: Path, load_weights: bool = True) -> VLM:
    """Loads a folder as what it is: a whole backbone, or one component among whole ones."""
    if kind not in ("siglip", "llama"):
        return load_vlm(base, load_weights=load_weights)
    path = {"siglip": str(whole / "siglip"), "llama": str(whole / "llama"), kind: str(base)}
    vision, llm = ({"type": name, "path": path[name.lower()]} for name in ("SigLIP", "Llama"))
    return load_vlm(
        vision_backbone=vision, projector={"type": "MLP"}, llm_backbone=llm, load_weights=load_weights
    )


# --- every small file, damaged in every way --------------------------------------------------------------------------

FILES = {
    "qwen2_5_vl": ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"),
    "llava": ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json"),
    "prismatic": ("config.json", "tokenizer.json", "tokenizer_config.json", "prismatic_processor.json"),
    "siglip": ("config.json", "preprocessor_config.json"),
    "llama": ("config.json", "tokenizer.json", "tokenizer_config.json"),
}


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("../blobs/5b3c")


def link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "a pointer": lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 123\n"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "no text": lambda file: file.write_bytes(b'{"a": "\xff\xfe"}'),
    "a mark in front": lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes()),
    "null": lambda file: file.write_text("null"),
    "a list": lambda file: file.write_text("[1]"),
    "brackets without end": lambda file: file.write_text("[" * 100_000),
    "a link to nothing": link_to_nothing,
    "a link to itself": link_to_itself,
    "a folder": folder_in_its_place,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_named_with_its_folder_in_one_line(whole, tmp_path, kind, damage):
    for name in FILES[kind]:
        base = shutil.copytree(whole / kind, tmp_path / name)
        DAMAGES[damage](base / name)
        with pytest.raises((ValueError, OSError)) as caught:
            load(whole, kind, base)
        message = str(caught.value)
        assert str(base / name) in message or f"{base} holds no {name}" in message, message
        assert "\n" not in message


# --- valid files that ask for what there is not ----------------------------------------------------------------------


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(content | values))

    return change


def in_section(name: str, section: str, **values: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        content = json.loads((base / name).read_text())
        content[section] |= values
        (base / name).write_text(json.dumps(content))

    return change


def without(*names: str) -> Callable[[Path], None]:
    return lambda base: [(base / name).unlink() for name in names]


def template(text: str) -> Callable[[Path], object]:
    return lambda base: (base / "chat_template.jinja").write_text(text)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ODD: dict[str, tuple[str, Callable[[Path], object], str]] = {  # kind, change, and what the message has
    "model_type": (
        "qwen2_5_vl",
        edited("config.json", model_type="qwen9"),
        "config.json: .*model_type 'qwen9'",
    ),
    "architecture": ("qwen2_5_vl", edited("config.json", model_type="llama"), "unknown backbone 'llama'"),
    "no section": (
        "qwen2_5_vl",
        edited("config.json", vision_config=None),
        "config.json: 'vision_config' is None",
    ),
    "empty section": (
        "qwen2_5_vl",
        edited("config.json", text_config={}),
        "config.json: 'text_config' is {}",
    ),
    "a size": ("qwen2_5_vl", in_section("config.json", "text_config", hidden_size=-1), "compare config.json"),
    "activation": (
        "qwen2_5_vl",
        in_section("config.json", "text_config", hidden_act="x"),
        "compare config.json",
    ),
    "fewer layers": (
        "qwen2_5_vl",
        in_section("config.json", "vision_config", depth=1),
        "config.json says fewer",
    ),
    "processor_class": (
        "qwen2_5_vl",
        edited("processor_config.json", processor_class="Qwen2_5VLProcessor"),
        "processor_config.json: transformers .* no processor_class 'Qwen2_5VLProcessor'; did you mean "
        "'Qwen2_5_VLProcessor'",
    ),
    "another class": (
        "qwen2_5_vl",
        edited("processor_config.json", processor_class="AutoModel"),
        "processor_config.json: transformers .* no processor_class 'AutoModel'",
    ),
    "tokenizer_class": (
        "qwen2_5_vl",
        edited("tokenizer_config.json", tokenizer_class="Trainer"),
        "tokenizer_config",
    ),
    "image_processor": (
        "qwen2_5_vl",
        edited("processor_config.json", image_processor=7),
        "processor_config.json",
    ),
    "image_mean": (
        "siglip",
        edited("preprocessor_config.json", image_mean=[1]),
        "preprocessor_config.json: image_mean",
    ),
    "image_std": (
        "siglip",
        edited("preprocessor_config.json", image_std=[0, 1, 1]),
        "_config.json: image_std",
    ),
    "pixels": (
        "prismatic",
        edited("prismatic_processor.json", pixels={}),
        "compare prismatic_processor.json",
    ),
    "no tokenizer": ("qwen2_5_vl", without(*TOKENIZER), "holds no tokenizer, expected tokenizer.json"),
    "no tokenizer of an LLM": ("llama", without(*TOKENIZER), "holds no tokenizer, expected tokenizer.json"),
    "no tokenizer, composed": (
        "prismatic",
        without(*TOKENIZER),
        "holds no tokenizer, expected tokenizer.json",
    ),
    "no image processor": (
        "qwen2_5_vl",
        without("processor_config.json"),
        "holds no image processor, expected preprocessor_config.json or processor_config.json",
    ),
    "no processor, composed": (
        "prismatic",
        without("prismatic_processor.json"),
        "holds no prismatic_processor.json",
    ),
    "no template": (
        "qwen2_5_vl",
        without("chat_template.jinja"),
        "no chat template; copy chat_template.jinja",
    ),
    "broken template": (
        "qwen2_5_vl",
        template("{% for m in messages %}"),
        "chat_template.jinja: .*SyntaxError",
    ),
    "refused template": (
        "qwen2_5_vl",
        template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "chat_template.jinja: .*SecurityError",
    ),
    "endless template": (
        "llava",
        template("{% for i in range(10**9) %}x{% endfor %}"),
        "chat_template.jinja: .*Overf",
    ),
    "template of text": (
        "llava",
        template("{{ raise_exception('only text') }}"),
        "chat_template.jinja: .*only text",
    ),
    "template of a number": (
        "qwen2_5_vl",
        template("{{ 1 / 0 }}"),
        "chat_template.jinja: .*ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_there_is_not_is_named_with_file_and_remedy(whole, tmp_path, case):
    kind, change, expected = ODD[case]
    base = shutil.copytree(whole / kind, tmp_path / "base")
    change(base)
    with pytest.raises((ValueError, OSError), match=expected) as caught:
        load(whole, kind, base)
    message = str(caught.value)
    assert str(base) in message and "\n" not in message and len(message) < 700


@pytest.mark.parametrize("case", ["a size", "activation", "no section", "processor_class", "broken template"])
def test_it_is_also_named_where_no_weights_are_read(whole, tmp_path, case):
    kind, change, expected = ODD[case]
    base = shutil.copytree(whole / kind, tmp_path / "base")
    change(base)
    with pytest.raises(ValueError, match=expected):
        load(whole, kind, base, load_weights=False)


# --- weights ---------------------------------------------------------------------------------------------------------


class Executed:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def in_shards(base: Path) -> dict[str, str]:
    """Splits the weights into two files; returns the index's map."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        shard = {name: weights[name] for name in where if where[name] == file}
        save_file(shard, base / file, metadata={"format": "pt"})
    return where


def write_index(base: Path, where: object) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(content))


SECOND = "model-00002-of-00002.safetensors"
ENTRIES = {  # what stands in the index for the second shard
    "above": lambda base: f"../{SECOND}",
    "absolute": lambda base: str(base / SECOND),
    "below": lambda base: f"shards/{SECOND}",
    "another kind": lambda base: "config.json",
    "a pickle": lambda base: "evil.bin",
    "a number": lambda base: 7,
    "nothing": lambda base: "",
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama", "siglip"])
def test_an_index_that_names_something_else_is_not_followed(whole, tmp_path, kind, entry):
    base = shutil.copytree(whole / kind, tmp_path / "base")
    (base / "shards").mkdir()
    where = in_shards(base)
    for place in (base.parent, base / "shards"):
        shutil.copy(base / SECOND, place)
    torch.save({"a": Executed(tmp_path / "EXECUTED")}, base / "evil.bin")
    write_index(
        base, {name: ENTRIES[entry](base) if file == SECOND else file for name, file in where.items()}
    )
    with pytest.raises(ValueError, match=r"base/model.safetensors.index.json names .*nothing else is read"):
        load(whole, kind, base)
    assert not (tmp_path / "EXECUTED").exists()


def test_shards_beside_their_index_are_read(whole, tmp_path):
    base = shutil.copytree(whole / "qwen2_5_vl", tmp_path / "base")
    write_index(base, in_shards(base))
    shutil.move(base / SECOND, tmp_path / SECOND)
    (base / SECOND).symlink_to(tmp_path / SECOND)  # as in the hub's cache
    expected = load_vlm(whole / "qwen2_5_vl").model.state_dict()
    assert all(expected[name].equal(weight) for name, weight in load_vlm(base).model.state_dict().items())


@pytest.mark.parametrize("damage", ["gone", "half", "a list", "an empty map"])
def test_an_index_that_does_not_fit_its_files_is_named(whole, tmp_path, damage):
    base = shutil.copytree(whole / "llama", tmp_path / "base")
    where = in_shards(base)
    write_index(base, {"an empty map": {}, "a list": []}.get(damage, where))
    if damage == "gone":
        (base / SECOND).unlink()
    if damage == "half":
        (base / SECOND).write_bytes((base / SECOND).read_bytes()[:100])
    with pytest.raises(ValueError, match="base/model.safetensors.index.json (names|has no)"):
        load(whole, "llama", base)


PICKLES = {
    "pytorch_model.bin": {},
    "pytorch_model.bin, legacy": {"_use_new_zipfile_serialization": False},
    "pytorch_model.bin, bare": None,
    "model.pt": {},
    "model.pkl": None,
    "model.ckpt": {},
}


@pytest.mark.parametrize("pickled", PICKLES)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama", "siglip", "prismatic"])
def test_a_pickle_is_never_executed(whole, tmp_path, kind, pickled):
    base = shutil.copytree(whole / kind, tmp_path / "base")
    (base / "model.safetensors").unlink()
    file, content = base / pickled.partition(",")[0], {"a": Executed(tmp_path / "EXECUTED")}
    if PICKLES[pickled] is None:
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, **PICKLES[pickled])
    with pytest.raises((ValueError, OSError)) as caught:
        load(whole, kind, base)
    message = str(caught.value)
    assert not (tmp_path / "EXECUTED").exists()
    assert str(base) in message and file.name in message and "safetensors" in message and "\n" not in message


def test_weights_of_tensors_alone_are_read_from_a_pickle(whole, tmp_path):
    base = shutil.copytree(whole / "llama", tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    found, expected = (
        dict(load(whole, "llama", each).named_parameters()) for each in (base, whole / "llama")
    )
    of_llama = [name for name in expected if "language_model" in name]
    assert of_llama and all(torch.equal(found[name], expected[name]) for name in of_llama)


CODE = {
    kind: "evil.Evil"
    for kind in (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoTokenizer",
        "AutoProcessor",
        "AutoImageProcessor",
    )
}


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama", "siglip"])
def test_code_that_comes_with_a_checkpoint_is_never_executed(whole, tmp_path, kind, unknown):
    for name in FILES[kind]:
        if name == "tokenizer.json":
            continue  # the tokenizers library refuses a further key
        base = shutil.copytree(whole / kind, tmp_path / name)
        (base / "evil.py").write_text(
            f"import os\nos.mkdir({str(tmp_path / 'EXECUTED')!r})\nclass Evil: ...\n"
        )
        own = {"model_type": "evil"} if name == "config.json" else {"tokenizer_class": "Evil"}
        edited(name, auto_map=CODE, **(own if unknown else {}))(base)
        try:
            load(whole, kind, base)
        except (ValueError, OSError) as error:
            assert unknown and str(base) in str(error) and "\n" not in str(error), error
        assert not (tmp_path / "EXECUTED").exists()


def test_a_kernel_that_the_configuration_names_is_not_fetched(whole, tmp_path):
    for values in ({"_attn_implementation": "evil/kernel"}, {"attn_implementation": "evil/kernel"}):
        base = shutil.copytree(whole / "qwen2_5_vl", tmp_path / next(iter(values)))
        edited("config.json", **values)(base)
        with pytest.raises(ValueError, match="config.json: .*'evil/kernel', code from the hub"):
            load_vlm(base)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama", "siglip"])
def test_an_adapter_is_no_model(whole, tmp_path, kind):
    base = shutil.copytree(whole / kind, tmp_path / "base")
    (base / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "someone/base"}'
    )
    with pytest.raises(ValueError, match="base/adapter_config.json .*merge it into its base"):
        load(whole, kind, base)


# --- a checkpoint of ours --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(whole, tmp_path_factory) -> Path:
    section = {"name": "OFT", "vlm": {"base_vlm": str(whole / "qwen2_5_vl")}, "action_horizon": 4}
    section["action_model"] = {"type": "MLP", "hidden_size": 8}
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    build_framework(section, action_dim=2, state_dim=0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["half", "null", "a link to nothing"])
def test_a_damaged_file_of_a_trained_checkpoint_is_named(trained, tmp_path, damage):
    for name in ("framework.json", *(f"vlm/{name}" for name in FILES["qwen2_5_vl"])):
        folder = shutil.copytree(trained, tmp_path / name.replace("/", "-"))
        DAMAGES[damage](folder / name)
        with pytest.raises((ValueError, OSError)) as caught:
            Framework.from_pretrained(folder)
        message = str(caught.value)
        assert str(folder) in message and name.rpartition("/")[2] in message and "\n" not in message, message


def test_a_trained_checkpoint_without_its_backbones_files_asks_nobody(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoint")
    shutil.rmtree(folder / "vlm")
    with pytest.raises(FileNotFoundError, match="checkpoint/vlm': not a folder, and no name on the hub"):
        Framework.from_pretrained(folder)
