"""Tiny models of each family, and `published`: what other codebases write and compute, from their equations."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vla_bench.models.backbones.tiny import CORPUS, write_tiny

SIZES = {"image_size": 32, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 1}


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """The helper module `published.py` beside this file."""
    spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def vlms(tmp_path_factory) -> dict[str, Path]:
    """A tiny model per family, written once: {kind: folder}."""
    home = tmp_path_factory.mktemp("vlms")
    corpus = (*CORPUS, "🔍")
    return {
        kind: write_tiny(kind, home / kind, corpus=corpus, **SIZES)
        for kind in ("qwen2_5_vl", "qwen3_vl", "paligemma")
    }
