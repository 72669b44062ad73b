"""`kit`: small heads on hidden states, inputs, and their equations in numpy."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    """The helper module `hidden_state_heads.py` beside this file."""
    path = Path(__file__).with_name("hidden_state_heads.py")
    spec = importlib.util.spec_from_file_location("hidden_state_heads", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
