"""Layer-wise flow matching: which layers the blocks look at, and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from vla_bench.models.features import BackboneSizes
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead, layerwise_depth
from vla_bench.registry import HEADS

T, D, S, H, B = 4, 3, 2, 12, 2
SIZES = HeadSizes(H, D, T, state_dim=S, backbone=BackboneSizes(hidden_size=H, num_layers=4, vocab_size=10))


def layers_that_count(case, head) -> list[int]:
    """The layers of the backbone whose change moves the actions."""
    features, noise, found = case.features(), torch.randn(B, T, D), []
    with torch.no_grad():
        before = head.sample(features, noise)
        for i in range(4):
            layers = tuple(h + (i == j) * torch.randn_like(h) for j, h in enumerate(features.layers))
            after = head.sample(replace(features, hidden=layers[-1], layers=layers), noise)
            found += [i] if (after - before).abs().max() > 1e-4 else []
    return found


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("each", [0, 2]),
        ("each, narrow", [0, 2]),
        ("each, all look", [0, 1, 2, 3]),
        ("each, two robots", [1, 3]),
    ],
)
def test_only_the_declared_layers_are_read(flow_case, name, layers):
    case = flow_case(name)
    for head in case.pair():
        assert head.read_layers == layers == layers_that_count(case, head)


def test_the_widths_come_from_the_backbone():
    backbone = replace(SIZES.backbone, hidden_size=128)
    head = LayerwiseFlowMatchingHead(replace(SIZES, hidden_size=128, backbone=backbone))
    shapes = {n: tuple(p.shape) for n, p in head.named_parameters()}
    assert len(head.dit.blocks) == 4 and head.dit.blocks[0].attention.heads == 2
    assert shapes["state_encoder.0.weight"] == (1024, S) and shapes["action_out.0.weight"] == (1024, 128)


def test_without_asking_there_is_neither_projection_nor_output_layer():
    names = [n for n, _ in LayerwiseFlowMatchingHead(SIZES, num_heads=2).named_parameters()]
    assert not any(n.startswith(("project", "dit.out")) for n in names)


def test_a_layer_that_no_block_looks_at_is_not_projected():
    head = LayerwiseFlowMatchingHead(SIZES, hidden_size=8, num_heads=2)
    assert {n.split(".")[1] for n, _ in head.named_parameters() if n.startswith("project")} == {"0", "2"}


def test_features_without_layers_are_refused(flow_case):
    case = flow_case("each")
    with pytest.raises(ValueError, match="hold none; run the backbone with layers='all'"):
        case.build().sample(replace(case.features(), layers=None))


def test_features_of_another_backbone_are_refused(flow_case):
    case = flow_case("each")
    features = case.features()
    with pytest.raises(ValueError, match="4 layers of its backbone, the features hold 3"):
        case.build().sample(replace(features, layers=features.layers[1:]))


def test_without_interleaving_a_state_token_really_would_change_nothing(flow_case):
    # the reason why it is refused, shown on a transformer that was given one
    case = flow_case("each, all look")
    head, features = case.build(), case.features()
    tokens, bucket = torch.randn(B, 3, H), torch.tensor([5, 6])
    with torch.no_grad():
        alone, _ = head.dit(tokens[:, 1:], bucket, features.layers, features.mask)
        behind, _ = head.dit(tokens, bucket, features.layers, features.mask)
    torch.testing.assert_close(behind[:, 1:], alone)


def test_a_head_needs_the_sizes_of_its_backbone():
    build = partial(HEADS.build, {"type": "LayerwiseFM"})
    with pytest.raises(ValueError, match="give HeadSizes its backbone"):
        build(sizes=replace(SIZES, backbone=None))
    assert layerwise_depth(None, SIZES.backbone) == 4
