"""Loading by a name mapping: all or nothing, and files that are damaged or unsafe."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vla_bench.models.interop.weights import TensorRule, load_mapped, read_weights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.vlm, self.vlm_extra = nn.Linear(2, 2), nn.Linear(2, 2)
        self.a = nn.ModuleDict({"vlm": nn.Linear(2, 2)})
        self.register_buffer("mean", torch.zeros(2))


def small_weights(**change):
    """The weights of `Small` with `backbone` in the place of `vlm`, filled with 0, 1, 2, and 7 for the buffer."""
    weights = {"mean": torch.full((2,), 7.0)}
    for i, name in enumerate(("backbone", "vlm_extra", "a.vlm")):
        weights |= {
            f"{name}.weight": torch.full((2, 2), float(i)),
            f"{name}.bias": torch.full((2,), float(i)),
        }
    return weights | change


# ---------------------------------------------------------------- mappings


def test_prefixes_are_not_substrings():
    model = Small()
    load_mapped(model, small_weights(), {"vlm": "backbone"})
    filled = [float(m.weight.detach()[0, 0]) for m in (model.vlm, model.vlm_extra, model.a["vlm"])]
    assert filled == [0.0, 1.0, 2.0]


def test_every_tensor_is_loaded_and_buffers_too():
    model = Small()
    assert len(load_mapped(model, small_weights(), {"vlm": "backbone"}).loaded) == 7
    assert model.mean[0] == 7


@pytest.mark.parametrize(
    ("weights", "mapping", "message"),
    [
        (
            small_weights(),
            {"vlm": "backbon"},
            "nothing in the checkpoint begins with 'backbon'; did you mean 'backbone'",
        ),
        (small_weights(), {"vl": "backbone"}, "nothing in the model begins with 'vl'; did you mean 'vlm'"),
        (small_weights(), {}, "did you mean|2 missing"),
        (
            small_weights(**{"backbone.weight": torch.ones(2, 3)}),
            {"vlm": "backbone"},
            r"vlm.weight: \[2, 2\] here, \[2, 3\]",
        ),
        (small_weights(extra=torch.ones(1)), {"vlm": "backbone"}, "1 unexpected"),
        (small_weights(), {"vlm": "backbone", "vlm_extra": "backbone"}, "would both be filled from"),
        ({"q": torch.ones(1)}, {}, "not one weight was loaded"),
    ],
)
def test_a_refused_checkpoint_changes_nothing(weights, mapping, message):
    model = Small()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_mapped(model, weights, mapping)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_parts_of_one_matrix_are_loaded_in_order():
    model = nn.ModuleDict({n: nn.Linear(2, 2, bias=False) for n in "qkv"})
    stacked = torch.arange(12.0).reshape(6, 2)
    rules = {n: TensorRule("attn.qkv", part=(i, 3)) for i, n in enumerate("qkv")}
    load_mapped(model, {"attn.qkv.weight": stacked}, rules)
    assert torch.equal(torch.cat([model[n].weight.data for n in "qkv"]), stacked)


RULES_THAT_DO_NOT_FIT = [
    (
        TensorRule("w", index=31),
        torch.ones(4, 2, 2),
        r"\[2, 2\] here, \[4, 2, 2\] in w \(index 31 is out of bounds",
    ),
    (TensorRule("w", transpose=True), torch.ones(4), r"\[2, 2\] here, \[4\] in w \(Dimension out of range"),
    (TensorRule("w", first_rows=True), torch.tensor(1.0), r"\[2, 2\] here, \[\] in w \("),
    (TensorRule("w", squeeze=True), torch.tensor(1.0), r"\[2, 2\] here, \[\] in w \("),
    (TensorRule("w", part=(0, 3)), torch.tensor(1.0), r"\[2, 2\] here, \[\] in w \("),
    (TensorRule("w", index=4), torch.ones(2, 2), r"\[2, 2\] here, \[2, 2\] in w \(index 4 is out of bounds"),
]


@pytest.mark.parametrize(("rule", "tensor", "message"), RULES_THAT_DO_NOT_FIT)
def test_a_rule_that_does_not_fit_is_reported(rule, tensor, message):
    weights = {"w": tensor, "bias": torch.full((2,), 7.0)}
    with pytest.raises(ValueError, match=message):
        load_mapped(nn.Linear(2, 2), weights, {"weight": rule})


@pytest.mark.parametrize(("rule", "tensor", "message"), RULES_THAT_DO_NOT_FIT)
def test_a_rule_that_does_not_fit_leaves_its_tensor_alone(rule, tensor, message):
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    weights = {"w": tensor, "bias": torch.full((2,), 7.0)}
    report = load_mapped(model, weights, {"weight": rule}, strict=False)
    assert (report.wrong_shape, report.loaded) == (("weight",), ("bias",))
    assert torch.equal(model.weight, before) and model.bias[0] == 7


# ---------------------------------------------------------------- files


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_executed(tmp_path):
    torch.save({"w": torch.ones(1), "x": Bomb(tmp_path / "boom")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="may use to run code"):
        read_weights(tmp_path / "bomb.pth")
    assert not (tmp_path / "boom").exists()


def test_a_file_that_was_cut_short_is_called_damaged(tmp_path):
    save_file({"w": torch.ones(64)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.safetensors is damaged"):
        read_weights(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_every_damaged_pickle_is_called_damaged(tmp_path, zipped):
    path, draw = tmp_path / "w.pt", random.Random(0)
    content = {"model": {"a": torch.ones(3, 3)}} if zipped else {"a": torch.ones(3, 3)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(ValueError, match="w.pt is damaged"):
            read_weights(path)


@pytest.fixture
def sharded(tmp_path):
    """A folder with an index over two shards, of which the first is there."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, folder / "1.safetensors")
    return folder


def test_a_missing_shard_is_named(sharded):
    with pytest.raises(FileNotFoundError, match="not there: 2.safetensors"):
        read_weights(sharded)


def test_a_tensor_that_no_shard_holds_is_named(sharded):
    save_file({"c": torch.ones(1)}, sharded / "2.safetensors")
    with pytest.raises(ValueError, match="do not hold: b"):
        read_weights(sharded)


NO_INDEX = [{}, [1], {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": "/etc/hosts"}}]


@pytest.mark.parametrize("content", [*map(json.dumps, NO_INDEX), "{"])
def test_a_file_that_is_no_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        read_weights(sharded)


def test_an_index_that_is_no_json_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="model.safetensors.index.json is not JSON"):
        read_weights(sharded)


def test_an_index_names_no_file_outside_its_folder(sharded):
    save_file({"a": torch.ones(1)}, sharded.parent / "outside.safetensors")
    index = {"weight_map": {"a": "sub/../../outside.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a file in this folder"):
        read_weights(sharded)


@pytest.mark.parametrize("beside", [{}, {"step": 5, "note": "x"}])
def test_the_only_dictionary_of_a_file_is_taken(tmp_path, beside):
    torch.save({"sd": {"x": torch.ones(2)}, **beside}, tmp_path / "only.pt")
    assert list(read_weights(tmp_path / "only.pt")) == ["x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, "several dictionaries: a, b"),
        ({"a": {"x": torch.ones(1)}, "y": torch.ones(1)}, "tensors beside a dictionary: a"),
    ],
)
def test_a_file_with_more_than_one_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "more.pt")
