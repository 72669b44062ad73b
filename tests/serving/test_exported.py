"""An exported folder is the policy that it was exported from, and nothing that was not exported is loaded."""

import json
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch

from vla_bench.__main__ import main
from vla_bench.evaluation.program import evaluate_run
from vla_bench.files import read_json, write_json, write_manifest
from vla_bench.models.heads.head import ActionHead
from vla_bench.serving.client import PolicyClient
from vla_bench.serving.exported import Noise, check_archive, load_exported, noise_of, write_graph
from vla_bench.serving.graph import GraphError
from vla_bench.serving.policy import Policy
from vla_bench.serving.server import serve_in_thread
from vla_bench.training.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def policy(run):
    return Policy.from_pretrained(run)


@pytest.fixture(scope="module")
def folder(run, policy, tmp_path_factory):
    return write_graph(policy, find_checkpoint(run), tmp_path_factory.mktemp("graph") / "llava")


@pytest.fixture(scope="module")
def exported(folder):
    return load_exported(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_its_actions_are_those_of_the_run(policy, exported, llava_observation):
    for lang in (llava_observation["lang"], "reach the other one and then come back"):
        for state in (llava_observation["state"], -np.asarray(llava_observation["state"])):
            asked = {**llava_observation, "lang": lang, "state": state}
            found, expected = exported.predict(asked, seed=3), policy.predict(asked, seed=3)
            assert np.abs(found - expected).max() < 1e-6 and found.dtype == expected.dtype
    assert exported.spec == policy.spec


def test_it_loads_wherever_a_run_does(folder, exported):
    found = Policy.from_pretrained(folder)
    assert found.fingerprint == exported.fingerprint and found.spec.hash == exported.spec.hash


def test_it_is_served(folder, exported, llava_observation):
    with serve_in_thread(Policy.from_pretrained(folder)) as server, PolicyClient(server.url) as client:
        assert client.fingerprint == exported.fingerprint
        found = client.predict(llava_observation, seed=5)
    assert found.tobytes() == exported.predict(llava_observation, seed=5).tobytes()


def test_its_episodes_end_as_those_of_the_run(run, folder, tmp_path):
    short = [
        "evaluation.episodes=3",
        "evaluation.num_envs=1",
        "evaluation.videos_per_task=0",
        "evaluation.attention=false",
    ]
    rows = []
    for which, name in ((run, "run"), (folder, "graph")):
        results, _ = evaluate_run(which, short, tmp_path / name, show_progress=False)
        lines = map(json.loads, (results / "episodes.jsonl").read_text().splitlines())
        rows.append([(line["task"], line["seed"], line["success"], line["steps"]) for line in lines])
    assert rows[0] == rows[1] and len(rows[0]) >= 3


def test_the_command_writes_it(run, tmp_path, capsys):
    main(["graph", str(run), str(tmp_path / "out"), "--batch_size", "2"])
    told = capsys.readouterr().out
    assert "LlavaVLA on qwen2_5_vl" in told and "from the policy" in told
    assert load_exported(tmp_path / "out").batch_size == 2
    with pytest.raises(SystemExit):
        main(["graph", str(run), str(tmp_path / "out")])
    assert "exists and is never written over" in capsys.readouterr().err


def test_it_keeps_to_the_contract(exported, llava_observation):
    for change, told in (
        ({"image": llava_observation["image"] * 2}, "cameras"),
        ({"lang": ""}, "instruction"),
        ({"state": [1.0]}, "state"),
        ({"lang": "go " * 100}, "--spare_tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            exported.predict({**llava_observation, **change}, seed=0)


def test_any_instruction_can_be_in_one_batch(exported, llava_observation):
    groups = {exported.group({**llava_observation, "lang": lang}) for lang in ("up", "go up and then down")}
    assert len(groups) == 1


@pytest.mark.parametrize(
    "name", ["graph.pt2", "policy.json", "dataset_statistics.json", "graph.json", "vlm/config.json"]
)
def test_a_damaged_file_is_refused_by_name(name, copy):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} has other content"):
        load_exported(copy)
    (copy / name).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name} is missing"):
        load_exported(copy)


def test_a_folder_without_a_manifest_is_refused(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        load_exported(copy)


def test_results_beside_it_are_no_damage(copy):
    (copy / "eval/point").mkdir(parents=True)
    (copy / "eval/point/summary.json").write_text("{}")
    assert load_exported(copy).batch_size == 1


def test_other_statistics_are_refused(copy):
    content = read_json(copy / "dataset_statistics.json")
    next(iter(content.values()))["action"]["max"][0] += 1
    write_json(copy / "dataset_statistics.json", content)
    write_manifest(copy)
    with pytest.raises(ValueError, match="scaled wrongly"):
        load_exported(copy)


class Boom:
    def __reduce__(self):
        return exec, ("raise SystemExit('it was unpickled')",)


def rewritten(folder, name, change, more=()):
    """The archive with one record changed, and others added."""
    whole = zipfile.ZipFile(folder / "graph.pt2")
    records = {each: whole.read(each) for each in whole.namelist()}
    whole.close()
    with zipfile.ZipFile(folder / "graph.pt2", "w") as new:
        for each, data in records.items():
            new.writestr(each, change(data) if name and each.endswith(name) else data)
        for each, data in more:
            new.writestr(f"{next(iter(records)).partition('/')[0]}/{each}", data)
    write_manifest(folder)


LINEAR = b"torch.ops.aten.linear.default"
HARM = {
    "example inputs": ("sample_inputs/model.pt", lambda _: pickle.dumps(Boom())),
    "pickled weights": (
        "model_weights_config.json",
        lambda d: d.replace(b'pickle": false', b'pickle": true', 1),
    ),
    "pickled constants": (
        "model_constants_config.json",
        lambda d: d.replace(b'pickle": false', b'pickle": true', 1),
    ),
    "an object": ("model_constants_config.json", lambda d: d.replace(b'"tensor_0"', b'"custom_obj_0"', 1)),
    "torch.load": ("models/model.json", lambda d: d.replace(LINEAR, b"torch.load", 1)),
    "an operator of Python": ("models/model.json", lambda d: d.replace(LINEAR, b"_operator.attrgetter", 1)),
    "an operation of others": (
        "models/model.json",
        lambda d: d.replace(LINEAR, b"torch.ops.mine.linear.default", 1),
    ),
    "a guard": (
        "models/model.json",
        lambda d: d.replace(b'"guards_code": []', b'"guards_code": ["exit()"]', 1),
    ),
    "a size": (
        "models/model.json",
        lambda d: d.replace(b'{"as_int": 1}', b'{"as_expr": {"expr_str": "exit()"}}', 1),
    ),
    "a graph": ("models/model.json", lambda d: d.replace(b'"as_int": 1', b'"as_graph": 1', 1)),
}


@pytest.mark.parametrize("kind", HARM)
def test_an_archive_with_anything_else_in_it_is_not_loaded(kind, copy):
    before = (copy / "graph.pt2").stat().st_size
    rewritten(copy, *HARM[kind])
    assert (copy / "graph.pt2").stat().st_size != before or kind
    with pytest.raises(ValueError, match="no graph that `vla_bench graph` wrote, so it is not loaded"):
        load_exported(copy)


def test_other_records_are_not_loaded(copy):
    rewritten(copy, None, None, [("data/aotinductor/model/run.so", b"\x7fELF")])
    with pytest.raises(ValueError, match="it holds 'data/aotinductor/model/run.so'"):
        check_archive(copy / "graph.pt2")


def test_an_archive_that_was_only_packed_again_is_loaded(copy, exported, llava_observation):
    rewritten(copy, "models/model.json", lambda data: data)
    found = load_exported(copy).predict(llava_observation, seed=0)
    assert found.tobytes() == exported.predict(llava_observation, seed=0).tobytes()


@pytest.mark.parametrize("cut", [0, 10, -100])
def test_a_cut_archive_is_damaged(cut, copy):
    (copy / "graph.pt2").write_bytes((copy / "graph.pt2").read_bytes()[:cut])
    write_manifest(copy)
    with pytest.raises(ValueError, match="graph.pt2 is damaged"):
        load_exported(copy)


def test_what_it_was_not_exported_for_is_said(folder):
    for wrong in ({"batch_size": 4}, {"device": "cuda"}, {"dataset": "other"}, {"head": "flow"}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(
            ValueError, match=f"was exported with {name}=.*, not {value}; export the run again"
        ):
            load_exported(folder, **wrong)


def test_a_graph_that_differs_is_not_written(run, policy, tmp_path):
    with pytest.raises(GraphError, match="differs from the policy by .* --tolerance"):
        write_graph(policy, find_checkpoint(run), tmp_path / "out", tolerance=-1)
    assert list(tmp_path.iterdir()) == []


def test_noise_is_drawn_as_the_head_drew_it():
    class Head(ActionHead):
        def __init__(self, draw):
            torch.nn.Module.__init__(self)
            self.draw = draw

        def draw_noise(self, batch, generator=None, device="cpu"):
            return self.draw((batch, 2, 3), generator)

    assert noise_of(Head(lambda shape, g: torch.randn(shape, generator=g))) == Noise("normal", (2, 3))
    assert noise_of(Head(lambda shape, g: torch.rand(shape, generator=g))) == Noise("uniform", (2, 3))
    assert noise_of(Head(lambda shape, g: None)) == Noise(None)
    with pytest.raises(GraphError, match="neither as torch.randn nor as torch.rand"):
        noise_of(Head(lambda shape, g: torch.randn(shape, generator=g).clamp(-1, 1)))


def test_it_does_not_learn_and_shows_no_attention(exported, llava_observation):
    with pytest.raises(ValueError, match="does not learn"):
        exported.framework.train()
    with pytest.raises(ValueError, match="no attention maps"):
        exported.attention(llava_observation)


def test_onnx_says_what_it_needs(run, policy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"ONNX needs 'onnx': pip install \"vla_bench\[onnx\]\""):
        write_graph(policy, find_checkpoint(run), tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_onnx_computes_the_same(run, policy, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    out = write_graph(policy, find_checkpoint(run), tmp_path / "out", onnx=True)
    assert read_json(out / "graph.json")["onnx_difference"] < 1e-5
    assert (out / "graph.onnx").stat().st_size > 1000 and load_exported(out).batch_size == 1
