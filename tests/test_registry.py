"""What a class of somebody else must be, said at the door: when it is registered, in one line that holds the contract."""

from typing import ClassVar

import pytest
from torch import nn

from vla_bench.benchmarks.benchmark import Benchmark
from vla_bench.benchmarks.point import PointReach
from vla_bench.models.backbones.llm import LanguageModel
from vla_bench.models.backbones.vision import VisionBackbone
from vla_bench.models.backbones.vlm import VLM
from vla_bench.models.frameworks.framework import Framework
from vla_bench.models.heads.head import ActionHead
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.models.projectors.linear import Projector
from vla_bench.registry import (
    BACKBONES,
    BENCHMARKS,
    FRAMEWORKS,
    HEADS,
    LLM_BACKBONES,
    PROJECTORS,
    VISION_BACKBONES,
    Registry,
    RegistryError,
)

REGISTRIES = (FRAMEWORKS, BACKBONES, VISION_BACKBONES, PROJECTORS, LLM_BACKBONES, HEADS, BENCHMARKS)


def head(**changes) -> type:
    """A head that keeps the contract, but for the changes."""
    whole = {
        "reads": "last",
        "loss": lambda self, features, actions, is_pad, noise=None, time=None: {},
        "sample": lambda self, features, noise=None: None,
    }
    members = {name: value for name, value in {**whole, **changes}.items() if value is not ...}
    return type("MyHead", (ActionHead,), members)


class Plain(nn.Module):
    reads: ClassVar = "last"


BROKEN = {
    "head: no head": (HEADS, Plain, "Plain does not inherit from ActionHead"),
    "head: a function": (HEADS, head, "is no class"),
    "head: no reads": (HEADS, head(reads=...), "MyHead does not say its 'reads'"),
    "head: reads None": (HEADS, head(reads=None), "MyHead.reads is None"),
    "head: reads a list": (HEADS, head(reads=["last"]), r"MyHead.reads is \['last'\]"),
    "head: misspelt reads": (HEADS, head(reads="querys"), "MyHead.reads is 'querys', did you mean 'queries'?"),
    "head: reads in capitals": (HEADS, head(reads="Last"), "MyHead.reads is 'Last', did you mean 'last'?"),
    "head: no sizes": (HEADS, head(__init__=lambda self, hidden_size: None), r"MyHead\(hidden_size\) takes no argument 'sizes'"),
    "head: no arguments": (HEADS, head(__init__=lambda self: None), "takes no argument 'sizes'"),
    "head: loss of two": (HEADS, head(loss=lambda self, features, actions: None), "MyHead.loss.* cannot be called with"),
    "head: loss needs more": (HEADS, head(loss=lambda self, f, a, p, n, t, extra: None), "MyHead.loss.* cannot be called"),
    "head: loss by keyword": (HEADS, head(loss=lambda self, features, *, actions: None), "MyHead.loss.* cannot be called"),
    "head: sample of one": (HEADS, head(sample=lambda self, features: None), "MyHead.sample.* cannot be called with"),
    "head: noise without device": (HEADS, head(draw_noise=lambda self, batch: None), "MyHead.draw_noise.* cannot be called"),
    "projector: no projector": (PROJECTORS, Plain, "Plain does not inherit from Projector"),
    "projector: other sizes": (
        PROJECTORS,
        type("MyProjector", (Projector,), {"__init__": lambda self, in_dim, out_dim: None}),
        "takes no argument 'vision_size'",
    ),
    "projector: one size": (
        PROJECTORS,
        type("MyProjector", (Projector,), {"__init__": lambda self, vision_size: None}),
        "takes no argument 'text_size'",
    ),
    "projector: no grid": (
        PROJECTORS,
        type("MyProjector", (Projector,), {"forward": lambda self, features: None}),
        "MyProjector.forward.* cannot be called with",
    ),
    "backbone": (BACKBONES, Plain, "Plain does not inherit from VLM"),
    "framework": (FRAMEWORKS, Plain, "Plain does not inherit from Framework"),
    "framework: misspelt reads": (FRAMEWORKS, type("Mine", (Framework,), {"reads": "layer"}), "did you mean 'layers'?"),
    "framework: no head": (
        FRAMEWORKS,
        type("Mine", (Framework,), {"__init__": lambda self, vlm, prepare: None}),
        "takes no argument 'head'",
    ),
    "framework: features of nothing": (
        FRAMEWORKS,
        type("Mine", (Framework,), {"features": lambda self: None}),
        "Mine.features.* cannot be called with",
    ),
    "vision backbone": (VISION_BACKBONES, Plain, "Plain does not inherit from VisionBackbone"),
    "vision backbone: no loading": (
        VISION_BACKBONES,
        type("Mine", (VisionBackbone,), {"__init__": lambda self, path: None}),
        "takes no argument 'load_weights'",
    ),
    "language model": (LLM_BACKBONES, Plain, "Plain does not inherit from LanguageModel"),
    "language model: no dtype": (
        LLM_BACKBONES,
        type("Mine", (LanguageModel,), {"__init__": lambda self, path, load_weights: None}),
        "takes no argument 'dtype'",
    ),
    "benchmark": (BENCHMARKS, Plain, "Plain does not inherit from Benchmark"),
    "benchmark: half": (BENCHMARKS, type("Mine", (Benchmark,), {"__init__": lambda self, tasks: None}), "does not define .*make"),
    "benchmark: no cameras": (
        BENCHMARKS,
        type("Mine", (PointReach,), {"__init__": lambda self, tasks, image_size: None}),
        "takes no argument 'cameras'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("registry, cls, named", BROKEN.values(), ids=BROKEN)
def test_a_class_that_could_not_be_used_is_refused_with_the_contract(registry, cls, named):
    with pytest.raises(RegistryError, match=named) as caught:
        registry.register("Broken")(cls)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{registry.kind} 'Broken': ")
    assert message.endswith(f"; expected {registry.contract}") and registry.contract.base in message
    assert "Broken" not in registry.names()


WHOLE = {
    "a head": (HEADS, head()),
    "a head with other names": (
        HEADS,
        head(loss=lambda self, x, y, z, *more: None, sample=lambda self, *given: None),
    ),
    "a head whose methods are patched in later": (HEADS, head(loss=..., sample=...)),
    "a head of a head": (HEADS, type("Wider", (MLPHead,), {})),
    "a projector": (PROJECTORS, type("Mine", (Projector,), {})),
    "a backbone": (BACKBONES, type("Mine", (VLM,), {})),
    "a framework": (FRAMEWORKS, type("Mine", (Framework,), {})),
    "a benchmark": (BENCHMARKS, type("Mine", (PointReach,), {})),
}


@pytest.mark.parametrize("registry, cls", WHOLE.values(), ids=WHOLE)
def test_a_class_that_keeps_the_contract_is_registered(registry, cls, monkeypatch):
    monkeypatch.setattr(registry, "classes", dict(registry.classes))
    assert registry.register("Whole")(cls) is cls and registry.get("Whole") is cls


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_component_of_the_package_keeps_its_contract(registry):
    assert registry.contract is not None
    for name in registry.known:
        if name != "metaworld":  # its simulator may not be installed; its own tests import it
            registry.check(name, registry.get(name))


class Announced:
    """An entry point of an installed package."""

    value = "somewhere:head"

    def load(self):
        return head(reads="querys")


def test_a_class_of_an_installed_package_is_held_to_the_contract(monkeypatch):
    registry = Registry(HEADS.kind, HEADS.group, contract=HEADS.contract)
    monkeypatch.setattr(registry, "_plugins", {"Theirs": Announced()})
    with pytest.raises(
        RegistryError, match="action head 'Theirs': MyHead.reads is 'querys', did you mean 'queries'"
    ):
        registry.get("Theirs")
