"""Who asks the network, and when: nobody for a path, everybody once for organisation/name, nobody for a whole cache."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.errors
import pytest
import torch
from huggingface_hub import constants

from vla_bench.models.backbones import hub
from vla_bench.models.backbones.loading import load_vlm
from vla_bench.models.backbones.processor import load_processor, model_type
from vla_bench.models.backbones.tiny import BUILDERS, write_tiny
from vla_bench.models.backbones.tiny_composed import write_tiny_component
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.fast import FASTCodec
from vla_bench.models.interop.checkpoint_formats import CHECKPOINT_FORMATS
from vla_bench.models.interop.convert import find_source_files
from vla_bench.models.interop.weights import read_weights
from vla_bench.serving.policy import Policy

SIZES = {"image_size": 64, "hidden_size": 32, "num_layers": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    write_tiny("qwen2_5_vl", home / "qwen2_5_vl", vision_hidden_size=32, vision_layers=2, **SIZES)
    write_tiny_component("siglip", home / "siglip", **SIZES)
    write_tiny_component("llama", home / "llama", hidden_size=32, num_layers=2)
    return home


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """The hosts that are asked for, while the hub may be asked and nothing can be reached; an empty cache."""
    hosts: list[str] = []

    def unreachable(host, *args, **options):
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: unreachable(address))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.announce.cache_clear()
    (tmp_path / "here/runs/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return hosts


def composed(whole: Path, **path: str) -> None:
    places = {"siglip": str(whole / "siglip"), "llama": str(whole / "llama")} | path
    vision, llm = ({"type": kind, "path": places[kind.lower()]} for kind in ("SigLIP", "Llama"))
    load_vlm(vision_backbone=vision, projector={"type": "MLP"}, llm_backbone=llm)


def built(name: str) -> None:
    section = {"name": "OFT", "vlm": {"base_vlm": name}, "action_horizon": 4, "action_model": {"type": "MLP"}}
    build_framework(section, action_dim=2, state_dim=0)


GIVEN: dict[str, Callable[[Path, str], object]] = {  # everywhere that a model can be named
    "a backbone": lambda whole, name: load_vlm(name),
    "a backbone without weights": lambda whole, name: load_vlm(name, load_weights=False),
    "a kind": lambda whole, name: model_type(name),
    "a processor": lambda whole, name: load_processor(name),
    "a vision backbone": lambda whole, name: composed(whole, siglip=name),
    "a language model": lambda whole, name: composed(whole, llama=name),
    "a framework's backbone": lambda whole, name: built(name),
    "a FAST tokenizer": lambda whole, name: FASTCodec.from_pretrained(name, horizon=4, action_dim=2),
    "weights of others": lambda whole, name: read_weights(name),
    "a checkpoint to convert": lambda whole, name: find_source_files(name, CHECKPOINT_FORMATS["openpi_pi0"]),
}
PATHS = (
    "qwen",
    "./base",
    "../base",
    "~/no-such-base",
    "/no/such/base",
    "runs\\base",
    "runs/foo/base",
    "runs/bse",
)
PATHS += ("base/model.safetensors", "a--b/c", "a/b..c", "a b/c", "")


@pytest.mark.parametrize("given", GIVEN)
def test_a_path_is_never_asked_for(whole, asked, capsys, given):
    for name in PATHS:
        with pytest.raises((ValueError, OSError)) as caught:
            GIVEN[given](whole, name)
        message = str(caught.value)
        assert (name in message or repr(name) in message) and "\n" not in message
    assert asked == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("given", GIVEN)
def test_a_name_is_asked_for_once_and_said_in_one_line(whole, asked, capsys, given):
    for _ in range(2):
        with pytest.raises(FileNotFoundError) as caught:
            GIVEN[given](whole, "someone/some-model")
    assert 1 <= len(set(asked)) and len(asked) <= 4, "a request for each of two tries, no further ones"
    assert capsys.readouterr().err == "asking the hub for someone/some-model (HF_HUB_OFFLINE=1 forbids it)\n"
    message = str(caught.value)
    assert "hf download someone/some-model --local-dir FOLDER" in message and "HF_HOME" in message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize("given", GIVEN)
def test_nobody_is_asked_offline(whole, asked, capsys, monkeypatch, given):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set.*hf download someone/some-model"):
        GIVEN[given](whole, "someone/some-model")
    assert asked == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("load", [Framework.from_pretrained, Policy.from_pretrained])
def test_a_checkpoint_of_ours_is_never_asked_for(asked, load):
    for name in (*PATHS[1:], "someone/some-model"):
        with pytest.raises(FileNotFoundError):
            load(name)
    assert asked == []


@pytest.mark.parametrize("kind", BUILDERS)
def test_no_family_asks_for_anything_beside_its_folder(home, asked, kind):
    load_vlm(home / kind)
    assert asked == []


def test_the_nearest_folder_is_named(asked):
    for name in ("runs/bse", "./runs/bse"):
        with pytest.raises(FileNotFoundError, match="did you mean 'base'"):
            load_vlm(name)


def test_a_name_that_a_folder_here_makes_a_path_says_so(asked):
    with pytest.raises(
        FileNotFoundError, match="not asked for on the hub, since there is a folder 'runs' here"
    ):
        load_vlm("runs/some-model")
    assert asked == []


def test_a_file_in_place_of_a_folder_is_named(asked):
    Path("runs/model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="it is a file, expected the folder that it is in"):
        load_vlm("runs/model.safetensors")


# --- the cache -------------------------------------------------------------------------------------------------------


def in_cache(folder: Path, name: str, cache: Path) -> Path:
    """Puts a folder into a cache of the hub, as a version of the repository `name`."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0123")
    return shutil.copytree(folder, place / "snapshots/0123")


@torch.no_grad()
def test_a_whole_snapshot_is_used_without_a_request(whole, asked, tmp_path, capsys):
    in_cache(whole / "qwen2_5_vl", "someone/tiny", tmp_path / "cache")
    expected, found = load_vlm(whole / "qwen2_5_vl"), load_vlm("someone/tiny")
    assert all(a.equal(b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))
    assert asked == [] and capsys.readouterr().err == ""


def test_whole_components_are_used_without_a_request(whole, asked, tmp_path):
    for kind in ("siglip", "llama"):
        in_cache(whole / kind, f"someone/{kind}", tmp_path / "cache")
    composed(whole, siglip="someone/siglip", llama="someone/llama")
    assert asked == []


@pytest.mark.parametrize(
    "lost", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors"]
)
def test_a_snapshot_that_lacks_a_file_is_asked_for(whole, asked, tmp_path, lost):
    (in_cache(whole / "qwen2_5_vl", "someone/tiny", tmp_path / "cache") / lost).unlink()
    with pytest.raises(FileNotFoundError, match="not whole in the cache"):
        load_vlm("someone/tiny")
    assert asked


def test_a_configuration_is_enough_where_nothing_else_is_read(whole, asked, tmp_path):
    snapshot = in_cache(whole / "qwen2_5_vl", "someone/tiny", tmp_path / "cache")
    for file in snapshot.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert model_type("someone/tiny") == "qwen2_5_vl"
    assert asked == []


# --- a hub that answers ----------------------------------------------------------------------------------------------


@pytest.fixture
def served(whole, asked, monkeypatch) -> list[tuple[str, ...]]:
    """The patterns of each download from a hub that has everything."""
    patterns: list[tuple[str, ...]] = []

    def download(name, allow_patterns, local_files_only=False, etag_timeout=None):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        patterns.append(tuple(allow_patterns))
        return str(whole / name.partition("/")[2])

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda self, name, timeout: None)
    return patterns


def test_weights_are_not_fetched_to_know_the_kind(served):
    assert model_type("someone/qwen2_5_vl") == "qwen2_5_vl"
    assert served and not any("safetensors" in pattern for pattern in served[0])


def test_weights_are_fetched_as_safetensors(served):
    load_vlm("someone/qwen2_5_vl")
    wanted = {pattern for patterns in served for pattern in patterns}
    assert "*.safetensors" in wanted and not any(pattern.endswith((".bin", ".py", "*")) for pattern in wanted)


REFUSALS = {
    huggingface_hub.errors.RepositoryNotFoundError: "the hub has none of that name, or a private one",
    huggingface_hub.errors.GatedRepoError: "only to those who accepted its terms",
    huggingface_hub.errors.HfHubHTTPError: "not reachable on the hub .HfHubHTTPError",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_of_the_hub_says_which(asked, monkeypatch, kind):
    def refuse(self, name, timeout):
        raise kind(
            "401 Client Error.\n\nAccess denied.",
            response=SimpleNamespace(headers={}, status_code=401, request=None),
        )

    monkeypatch.setattr(hub.HfApi, "model_info", refuse)
    with pytest.raises(FileNotFoundError, match=REFUSALS[kind]) as caught:
        load_vlm("someone/some-model")
    assert "\n" not in str(caught.value)
