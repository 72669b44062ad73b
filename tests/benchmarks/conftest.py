"""Where a simulator is not installed, the tests that need it are skipped; `make libero` and `make simpler` run them all."""

import os
from importlib.util import find_spec

import pytest

from vla_bench.benchmarks import maniskill
from vla_bench.benchmarks.libero_files import ASSETS_VARIABLE


@pytest.fixture(scope="session")
def libero_installed():
    if find_spec("libero") is None:
        pytest.skip("LIBERO is not installed here; make libero runs this test")
    if not os.environ.get(ASSETS_VARIABLE):
        pytest.skip(f"{ASSETS_VARIABLE} names no assets; make libero fetches them and runs this test")


@pytest.fixture(scope="session")
def maniskill_installed():
    if find_spec("mani_skill") is None:
        pytest.skip("ManiSkill is not installed here; make simpler runs this test")
    if not os.environ.get(maniskill.ASSETS_VARIABLE):
        pytest.skip(
            f"{maniskill.ASSETS_VARIABLE} names no assets; make simpler fetches them and runs this test"
        )
