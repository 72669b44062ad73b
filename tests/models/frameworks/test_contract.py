"""What a framework expects of somebody's head, checked when it is built and when the head answers."""

import pytest
import torch
from torch import nn

from vla_bench.models.frameworks.build import build_framework, check_fit, parse_framework
from vla_bench.models.heads.head import ActionHead
from vla_bench.registry import HEADS, RegistryError

PAIR = ("qwen2_5_vl", "GR00T")


def loss_of(*returned):
    """A `loss` that returns this; without an argument, what is right."""

    def loss(self, features, actions, is_pad, noise=None, time=None):
        right = {"action_loss": self.mean((self.chunk - actions) ** 2, is_pad)}
        return returned[0](right["action_loss"]) if returned else right

    return loss


def sample_of(change=lambda chunk: chunk):
    """A `sample` that returns a changed chunk [B, T, D]."""
    return lambda self, features, noise=None: change(self.chunk.expand(len(features.mask), -1, -1))


@pytest.fixture
def build(toy, monkeypatch):
    """A framework whose head has these members."""

    def build(**members):
        def __init__(self, sizes):
            ActionHead.__init__(self, sizes)
            self.chunk = nn.Parameter(torch.zeros(self.horizon, self.action_dim))

        whole = {"reads": "last", "__init__": __init__, "loss": loss_of(), "sample": sample_of()} | members
        cls = type("MyHead", (ActionHead,), {k: v for k, v in whole.items() if v is not None})
        monkeypatch.setattr(HEADS, "classes", dict(HEADS.classes))
        HEADS.register("Mine")(cls)
        section = toy.configuration(PAIR) | {"action_model": {"type": "Mine"}}
        return build_framework(section, **toy.sizes)

    return build


def test_a_head_that_keeps_the_contract_trains_and_predicts(build, toy):
    model = build()
    model(toy.examples)["action_loss"].backward()
    assert model.action_model.chunk.grad.any()
    assert model.predict_action(toy.examples)["normalized_actions"].shape == (3, toy.T, toy.D)


@pytest.mark.parametrize(
    "missing, named",
    [
        (["loss"], "MyHead does not define loss; "),
        (["sample"], "MyHead does not define sample; "),
        (["loss", "sample"], "MyHead does not define loss and sample; "),
    ],
    ids=" and ".join,
)
def test_a_head_without_its_methods_is_refused_when_it_is_built(build, missing, named):
    with pytest.raises(
        ValueError, match=named + r".*needs loss\(self, features, actions, is_pad, noise, time\)"
    ):
        build(**dict.fromkeys(missing))


def test_a_method_patched_in_later_is_held_to_the_contract_before_a_backbone_is_loaded(toy, monkeypatch):
    cls = type("MyHead", (ActionHead,), {"reads": "last", "sample": sample_of()})
    monkeypatch.setattr(HEADS, "classes", dict(HEADS.classes))
    HEADS.register("Mine")(cls)
    cls.loss = lambda self, features, actions: None
    section = toy.configuration(PAIR) | {
        "action_model": {"type": "Mine"},
        "vlm": {"base_vlm": "/nowhere/at/all"},
    }
    with pytest.raises(RegistryError, match=r"MyHead.loss\(self, features, actions\) cannot be called with"):
        check_fit(parse_framework(section), **toy.sizes)


LOSSES = {
    "another name": (lambda x: {"loss": x}, r"returned \['loss'\]"),
    "no dictionary": (lambda x: x, "returned a Tensor"),
    "a pair": (lambda x: (x, {}), "returned a tuple"),
    "None": (lambda x: None, "returned a NoneType"),
    "nothing": (lambda x: {}, r"returned \[\]"),
    "one per sample": (lambda x: {"action_loss": x.expand(3)}, r"'action_loss' as torch.float32 \[3\]"),
    "one in a list": (lambda x: {"action_loss": x[None]}, r"'action_loss' as torch.float32 \[1\]"),
    "a number": (lambda x: {"action_loss": x.item()}, "'action_loss' as float"),
    "whole numbers": (lambda x: {"action_loss": x.long()}, r"'action_loss' as torch.int64 \[\]"),
    "complex": (lambda x: {"action_loss": x + 1j}, r"'action_loss' as torch.complex64 \[\]"),
    "another loss": (lambda x: {"action_loss": x, "entropy": [x]}, "'entropy' as list"),
}


@pytest.mark.parametrize("returned, named", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_none_is_refused_with_the_contract(build, toy, returned, named):
    model = build(loss=loss_of(returned))
    with pytest.raises(ValueError, match=f"^the loss of MyHead .*{named}; expected a dictionary") as caught:
        model(toy.examples)
    assert "\n" not in str(caught.value)


CHUNKS = {
    "shorter": (lambda chunk: chunk[:, :-1], r"torch.float32 \[3, 3, 3\]"),
    "longer": (lambda chunk: torch.cat([chunk, chunk], 1), r"torch.float32 \[3, 8, 3\]"),
    "one action": (lambda chunk: chunk[:, 0], r"torch.float32 \[3, 3\]"),
    "narrower": (lambda chunk: chunk[..., :-1], r"torch.float32 \[3, 4, 2\]"),
    "wider": (lambda chunk: torch.cat([chunk, chunk], 2), r"torch.float32 \[3, 4, 6\]"),
    "time and width exchanged": (lambda chunk: chunk.mT, r"torch.float32 \[3, 3, 4\]"),
    "one sample": (lambda chunk: chunk[:1], r"torch.float32 \[1, 4, 3\]"),
    "flat": (lambda chunk: chunk.flatten(1), r"torch.float32 \[3, 12\]"),
    "whole numbers": (lambda chunk: chunk.long(), r"torch.int64 \[3, 4, 3\]"),
    "complex": (lambda chunk: chunk + 1j, r"torch.complex64 \[3, 4, 3\]"),
    "numpy": (lambda chunk: chunk.numpy(), "a ndarray"),
    "a dictionary": (lambda chunk: {"actions": chunk}, "a dict"),
    "None": (lambda chunk: None, "a NoneType"),
}


@pytest.mark.parametrize("change, named", CHUNKS.values(), ids=CHUNKS)
def test_a_chunk_of_another_shape_is_refused_with_what_was_expected(build, toy, change, named):
    model = build(sample=sample_of(change))
    expected = r"expected a floating-point tensor \[B, T, D\] = \[3, 4, 3\]$"
    with pytest.raises(ValueError, match=f"^MyHead sampled {named}; {expected}"):
        model.predict_action(toy.examples)
