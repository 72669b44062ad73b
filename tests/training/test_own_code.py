"""A head, and a benchmark, of a file that the configuration imports: trained, continued, served, rolled out."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from vla_bench.config import ConfigError, load_config
from vla_bench.registry import RegistryError
from vla_bench.serving.policy import Policy
from vla_bench.training.checkpoint import latest_checkpoint
from vla_bench.training.imitation import train

HEAD = '''
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.registry import HEADS


@HEADS.register("Doubled")
class DoubledHead(MLPHead):
    """Twice what an MLP would do."""

    def sample(self, features, noise=None):
        return 2 * super().sample(features, noise)
'''
FRESH = """
import json, sys
from PIL import Image
from vla_bench.serving.policy import Policy
policy = Policy.from_pretrained(sys.argv[1])
images = [Image.new("RGB", (32, 32), (10, 100, 200))] * 2
seen = {"image": images, "lang": "close the box", "state": [0.5, -0.5]}
print(json.dumps([type(policy.framework.action_model).__module__, policy.predict(seen, seed=0).tolist()]))
"""


@pytest.fixture
def own(tmp_path):
    """A folder with the head as a Python file, and in the exported cell of a notebook."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/doubled.py").write_text(HEAD)
    cells = [
        {"cell_type": "code", "source": [f"#| export\n{HEAD}"]},
        {"cell_type": "code", "source": ["1 / 0"]},
    ]
    text = json.dumps({"cells": cells}).replace("Doubled", "Twofold")  # a name belongs to one file
    (tmp_path / "own/20_twofold.ipynb").write_text(text)
    return tmp_path / "own"


def words(file, more="", head="Doubled") -> str:
    return f"imports=[{file}] framework.action_model.type={head} {more}"


def in_a_fresh_process(run) -> tuple[str, list]:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(run)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name, head", [("doubled.py", "Doubled"), ("20_twofold.ipynb", "Twofold")])
def test_a_run_is_served_without_the_file(own, config, name, head, observation, capsys):
    run = train(config(words(own / name, head=head)))
    assert f"{head} in place of MLP, whose arguments are left out: hidden_size=" in capsys.readouterr().out
    shutil.rmtree(own)
    module, chunk = in_a_fresh_process(shutil.move(run, run.parent / "moved"))
    assert module.startswith("vla_bench_own_")
    again = Policy.from_pretrained(run.parent / "moved")
    seen = observation(image=[Image.new("RGB", (32, 32), (10, 100, 200))] * 2)
    assert np.array_equal(again.predict(seen, seed=0), np.array(chunk))


def test_it_is_continued_without_the_file_to_the_same_bits(own, config):
    run = train(config(words(own / "doubled.py")))
    newest = latest_checkpoint(run)
    whole = load_file(newest / "model.safetensors")
    shutil.rmtree(newest)
    shutil.rmtree(own)
    train(load_config(run, "--trainer.resume true"))
    again = load_file(newest / "model.safetensors")
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_it_is_not_continued_with_other_code(own, config):
    train(config(words(own / "doubled.py")))
    (own / "doubled.py").write_text(HEAD.replace("2 *", "3 *"))
    with pytest.raises(
        ConfigError, match="was trained with other code of your own: .*code/doubled.py there and .*own/"
    ):
        train(config(words(own / "doubled.py", "trainer.resume=true")))
    with pytest.raises(ConfigError, match="doubled.py there and none here"):
        train(config("trainer.resume=true"))


def test_code_that_was_never_named_here_is_not_executed(own, config, tmp_path, monkeypatch):
    run = train(config(words(own / "doubled.py")))
    strange = run / "code/doubled.py"
    monkeypatch.setenv("VLA_BENCH_TRUSTED_CODE", str(tmp_path / "nobody.txt"))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(run)], capture_output=True, text=True, timeout=120
    )
    assert f"allow it with: vla_bench trust {latest_checkpoint(run) / 'code/doubled.py'}" in done.stderr
    subprocess.run([sys.executable, "-m", "vla_bench", "trust", str(strange)], check=True, timeout=120)
    assert in_a_fresh_process(run)[0] == "vla_bench_own_doubled"


def test_a_run_tells_two_versions_apart(own, config, observation):
    old = train(config(words(own / "doubled.py")))
    before = Policy.from_pretrained(old).predict(observation(), seed=0)
    (own / "doubled.py").write_text(HEAD.replace("2 *", "3 *"))
    train(config(words(own / "doubled.py", "run_id=new")))
    assert np.array_equal(Policy.from_pretrained(old).predict(observation(), seed=0), before)


def test_an_unknown_head_says_how_it_is_made_known(config):
    with pytest.raises(RegistryError, match=r"made known by imports: \[FILE.py\]"):
        train(config("framework.action_model.type=Trebled"))
