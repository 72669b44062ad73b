"""The arguments of every head: what holds when nothing is said, and that each one changed alone changes the head.

The defaults are the papers' or the published code's, so they are written down here a second time.
"""

import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads.bins import BinsCodec
from vla_bench.models.heads.head import ActionHead, HeadSizes
from vla_bench.registry import HEADS

BACKBONE = BackboneSizes(24, 3, 64, num_key_value_heads=2, head_dim=6, rope_theta=100.0)
SIZES = HeadSizes(hidden_size=24, action_dim=3, horizon=4, state_dim=2, backbone=BACKBONE)

FLOW = {
    "hidden_size": 768, "num_layers": 16, "num_heads": 12, "num_future_tokens": 32, "dropout": 0.2,
    "repeated_diffusion_steps": 8, "num_inference_timesteps": 4, "num_vl_layers": 0, "num_vl_heads": None,
    "max_positions": None, "mlp_size": None, "output_size": None, "compile": False, "interleave_self_attention": True,
    "mask_padding": True, "mask_vl_padding": True, "attend_text_every_n_blocks": None, "vl_dropout": None,
    "state_dropout": 0.0, "time_sampling": "n15", "rtc_max_delay": 0,
}  # fmt: skip
LAYERWISE = {
    "hidden_size": None, "num_layers": None, "num_heads": None, "interleave_self_attention": True,
    "output_layer": False, "num_future_tokens": None, "state_token": True, "dropout": 0.2,
    "repeated_diffusion_steps": 2, "num_inference_timesteps": 4, "max_positions": None, "mlp_size": 1024,
    "compile": False, "rtc_max_delay": 0,
}  # fmt: skip
DEFAULTS = {
    "ActionExpert": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 8, "adaptive_norm": False,
        "num_inference_timesteps": 10, "repeated_diffusion_steps": 1, "rtc_max_delay": 0,
    },
    "Bins": {"num_bins": 256, "first_token_id": None, "skip": 0, "descending": True},
    "Diffusion": {
        "prediction": "sample", "sampler": "ddim", "num_train_timesteps": 100, "num_inference_timesteps": None,
        "clip_sample": None, "repeated_diffusion_steps": 8, "hidden_size": 768, "num_layers": 16, "num_heads": 12,
        "dropout": 0.1,
    },
    "DiscreteDiffusion": {
        "hidden_size": 512, "num_layers": 6, "num_heads": 8, "dropout": 0.1, "num_bins": 256, "low": -1.0,
        "high": 1.0, "outside": "error", "num_steps": 8, "temperature": 1.0, "confidence": "position",
        "choice_temperature": 4.5, "repeated_diffusion_steps": 4,
    },
    "FAST": {"tokenizer": None, "first_token_id": None, "skip": 0, "descending": False, "max_tokens": None},
    "FlowMatching": FLOW,
    "FlowMatchingInference": FLOW,
    "LayerwiseFlowMatching": LAYERWISE,
    "LayerwiseFlowMatchingInference": LAYERWISE,
    "MLP": {"num_queries": None, "hidden_size": None, "num_layers": 2, "num_residual_blocks": 0},
    "Transformer": {"hidden_size": 64, "num_layers": 1, "num_heads": 4, "dropout": 0.0, "loss": "mse"},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_is_not_said_has_these_values(name):
    parameters = list(inspect.signature(HEADS.get(name)).parameters.values())
    assert {each.name: each.default for each in parameters[1:]} == DEFAULTS[name]


def test_every_head_of_this_package_is_in_the_table():
    ours = [
        name for name in HEADS.names() if HEADS.get(name).__module__.startswith("vla_bench.models.heads.")
    ]
    assert sorted(DEFAULTS) == sorted(ours)


# a small head of each kind, and another value of each of its arguments
SMALL_FLOW = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_future_tokens": 3, "num_vl_layers": 1}
OTHER_FLOW = {
    "hidden_size": 24, "num_layers": 4, "num_heads": 4, "num_future_tokens": 5, "dropout": 0.35,
    "repeated_diffusion_steps": 3, "num_inference_timesteps": 7, "num_vl_layers": 2, "num_vl_heads": 3,
    "max_positions": 9, "mlp_size": 20, "output_size": 12, "compile": True,
    "mask_padding": False, "mask_vl_padding": False, "attend_text_every_n_blocks": 1, "vl_dropout": 0.05,
    "state_dropout": 0.25, "time_sampling": "n17", "rtc_max_delay": 2,
}  # fmt: skip
SMALL = {
    "ActionExpert": {"hidden_size": 16, "intermediate_size": 20, "num_heads": 4},
    "Bins": {},
    "Diffusion": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "DiscreteDiffusion": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_bins": 8},
    "FlowMatching": SMALL_FLOW,
    "LayerwiseFlowMatching": {"hidden_size": 16, "num_heads": 2},
    "MLP": {"num_layers": 2},
    "Transformer": {"hidden_size": 16, "num_heads": 2},
}
OTHER = {
    "ActionExpert": {
        "hidden_size": 24, "intermediate_size": 28, "num_heads": 2, "adaptive_norm": True,
        "num_inference_timesteps": 3, "repeated_diffusion_steps": 2, "rtc_max_delay": 2,
    },
    "Bins": {"num_bins": 16, "first_token_id": 5, "skip": 3, "descending": False},
    "Diffusion": {
        "prediction": "epsilon", "sampler": "ddpm", "num_train_timesteps": 50, "num_inference_timesteps": 5,
        "clip_sample": 2.0, "repeated_diffusion_steps": 3, "hidden_size": 24, "num_layers": 3, "num_heads": 4,
        "dropout": 0.35,
    },
    "DiscreteDiffusion": {
        "hidden_size": 24, "num_layers": 3, "num_heads": 4, "dropout": 0.35, "num_bins": 9, "low": -2.0, "high": 3.0,
        "outside": "clip", "num_steps": 5, "temperature": 0.5, "confidence": "token", "choice_temperature": 1.5,
        "repeated_diffusion_steps": 2,
    },
    "FlowMatching": OTHER_FLOW,
    "LayerwiseFlowMatching": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "interleave_self_attention": False, "output_layer": True,
        "num_future_tokens": 5, "state_token": False, "dropout": 0.35, "repeated_diffusion_steps": 5,
        "num_inference_timesteps": 7, "max_positions": 9, "mlp_size": 20, "compile": True, "rtc_max_delay": 2,
    },
    "MLP": {"num_queries": 2, "hidden_size": 10, "num_layers": 3, "num_residual_blocks": 1},
    "Transformer": {"hidden_size": 24, "num_layers": 3, "num_heads": 4, "dropout": 0.35, "loss": "l1"},
}  # fmt: skip
ALSO = {  # what else must be said for it to be allowed
    ("Diffusion", "prediction"): {"clip_sample": 1.0},
    ("LayerwiseFlowMatching", "interleave_self_attention"): {"state_token": False, "num_future_tokens": 0},
}


def described(module: nn.Module) -> dict[str, object]:
    """All that can be told apart of a head without running it: shapes of weights, and plain values, part by part."""
    found: dict[str, object] = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for where, part in module.named_modules():
        plain = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        for name, value in plain.items():
            if name not in ("sizes", "training"):
                kept = vars(value) if type(value).__module__.startswith("vla_bench") else value
                found[f"{where}.{name}"] = str(kept)
    return found


def changed(name: str, argument: str) -> set[str]:
    """What differs between a small head and the same with another value of one argument."""
    also = ALSO.get((name, argument), {})
    ours, theirs = (
        described(HEADS.get(name)(SIZES, **SMALL[name] | also | more))
        for more in ({}, {argument: OTHER[name][argument]})
    )
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


@pytest.mark.parametrize("name, argument", [(name, argument) for name in OTHER for argument in OTHER[name]])
def test_each_argument_alone_reaches_what_it_controls(name, argument):
    assert changed(name, argument)


@pytest.mark.parametrize("name", OTHER)
def test_no_argument_is_left_out_above(name):
    assert OTHER[name].keys() | {"interleave_self_attention"} >= DEFAULTS[name].keys()


@pytest.mark.parametrize(
    "name, attribute, value, given",
    [
        ("ActionExpert", "steps", 3, {"num_inference_timesteps": 3}),
        ("ActionExpert", "repeats", 2, {"repeated_diffusion_steps": 2}),
        ("Diffusion", "steps", 10, {}),
        ("Diffusion", "steps", 5, {"num_inference_timesteps": 5}),
        ("Diffusion", "steps", 50, {"sampler": "ddpm", "num_train_timesteps": 50}),
        ("Diffusion", "steps", 6, {"num_train_timesteps": 6}),
        ("Diffusion", "repeats", 3, {"repeated_diffusion_steps": 3}),
        ("DiscreteDiffusion", "rounds", 5, {"num_steps": 5}),
        ("DiscreteDiffusion", "repeats", 2, {"repeated_diffusion_steps": 2}),
        ("DiscreteDiffusion", "num_tokens", 12, {}),
        ("FlowMatching", "steps", 7, {"num_inference_timesteps": 7}),
        ("FlowMatching", "repeats", 3, {"repeated_diffusion_steps": 3}),
        ("LayerwiseFlowMatching", "steps", 7, {"num_inference_timesteps": 7}),
        ("LayerwiseFlowMatching", "repeats", 5, {"repeated_diffusion_steps": 5}),
        ("MLP", "num_queries", 2, {"num_queries": 2}),
        ("MLP", "num_queries", 4, {}),
    ],
)
def test_a_count_is_the_one_that_was_asked_for(name, attribute, value, given):
    assert getattr(HEADS.get(name)(SIZES, **SMALL[name] | given), attribute) == value


@pytest.mark.parametrize(
    "name", ["Diffusion", "DiscreteDiffusion", "FlowMatching", "LayerwiseFlowMatching", "Transformer"]
)
def test_dropout_is_the_one_that_was_asked_for_everywhere(name):
    head = HEADS.get(name)(SIZES, **SMALL[name] | {"dropout": 0.35})
    rates = {part.p for part in head.modules() if isinstance(part, nn.Dropout)}
    rates |= {value for part in head.modules() for key, value in vars(part).items() if key == "dropout"}
    assert rates - {0.0} == {0.35}


@pytest.mark.parametrize(
    "name", ["ActionExpert", "Diffusion", "DiscreteDiffusion", "FlowMatching", "LayerwiseFlowMatching"]
)
@pytest.mark.parametrize(
    "argument", ["repeated_diffusion_steps", "num_inference_timesteps", "num_layers", "num_heads"]
)
def test_a_count_below_one_is_refused_and_one_is_not(name, argument):
    argument = {"DiscreteDiffusion": {"num_inference_timesteps": "num_steps"}}.get(name, {}).get(
        argument, argument
    )
    if argument not in DEFAULTS[name] or (name, argument) in {
        ("ActionExpert", "num_heads"),
        ("LayerwiseFlowMatching", "num_heads"),
    }:
        return
    with pytest.raises(ValueError, match=f"{argument}=0"):
        HEADS.get(name)(SIZES, **SMALL[name] | {argument: 0})
    one = (
        {"num_future_tokens": 0, "state_token": False}
        if (name, argument) == ("LayerwiseFlowMatching", "num_layers")
        else {}
    )
    HEADS.get(name)(SIZES, **SMALL[name] | one | {argument: 1})


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("wrong", [{"horizon": 5}, {"action_dim": 2}, {"padding": 3}], ids=str)
def test_a_loss_of_actions_that_do_not_fit_is_refused(name, wrong):
    head = HEADS.get(name)(SIZES, **SMALL[name])
    if head.reads == "tokens":  # the language model's loss is of codes
        return
    horizon, action_dim = wrong.get("horizon", SIZES.horizon), wrong.get("action_dim", SIZES.action_dim)
    actions, is_pad = (
        torch.zeros(2, horizon, action_dim),
        torch.zeros(2, wrong.get("padding", horizon), dtype=torch.bool),
    )
    features = Features(
        torch.zeros(2, 8, 24), torch.ones(2, 8, dtype=torch.bool), num_extra=4, state=torch.zeros(2, 2)
    )
    with pytest.raises(ValueError, match="is_pad is" if "padding" in wrong else "this head predicts"):
        head.loss(features, actions, is_pad)


DECLARED = {  # what a framework asks of each head
    "ActionExpert": {"reads": "cache", "offers_attention": True, "masks_actions": True},
    "Bins": {"reads": "tokens", "input_range": (-1.0, 1.0)},
    "Diffusion": {"reads": "last", "offers_attention": True, "masks_actions": True},
    "DiscreteDiffusion": {"reads": "last", "offers_attention": True},
    "FlowMatching": {"reads": "last", "offers_attention": True, "masks_actions": True, "embodiment_specific": True},
    "LayerwiseFlowMatching": {
        "reads": "layers", "read_layers": [0, 2], "offers_attention": True, "masks_actions": True, "embodiment_specific": True,
    },
    "MLP": {"reads": "queries", "masks_actions": True, "num_queries": 4},
    "Transformer": {"reads": "last", "masks_actions": True},
}  # fmt: skip
ASKED = ("reads", "num_queries", "read_layers", "input_range", "offers_attention", "embodiment_specific",
         "adaptive_norm", "assets", "foreign", "masks_actions")  # fmt: skip


@pytest.mark.parametrize("name", DECLARED)
def test_a_head_declares_this_and_no_more(name):
    head = HEADS.get(name)(SIZES, **SMALL[name])
    expected = {key: getattr(ActionHead, key) for key in ASKED} | DECLARED[name]
    assert {key: getattr(head, key) for key in ASKED} == expected


def test_codes_of_bins_are_of_one_length_and_those_of_fast_are_not():
    assert not HEADS.get("Bins")(SIZES).codec.stops and HEADS.get("FAST")(SIZES).codec.stops


@pytest.mark.parametrize("given", [{"horizon": 0}, {"action_dim": 0}, {"num_bins": 1}])
def test_a_codec_of_bins_has_something_to_encode(given):
    with pytest.raises(ValueError, match="must be positive, num_bins=.* at least 2"):
        BinsCodec(**{"horizon": 1, "action_dim": 1, "num_bins": 2} | given)
    BinsCodec(horizon=1, action_dim=1, num_bins=2)


# the least and the most that an argument may be, and what lies just beyond
FLOW_BOUNDS = [
    ({"hidden_size": 2, "num_heads": 1}, {"hidden_size": 3, "num_heads": 1}, "must be even"),
    ({"max_positions": 4}, {"max_positions": 3}, "max_positions=3 is less"),
]
BOUNDS = {
    "ActionExpert": [
        ({"hidden_size": 2}, {"hidden_size": 0}, "hidden_size=0 must be even"),
        ({"hidden_size": 4}, {"hidden_size": 5}, "hidden_size=5 must be even"),
        ({"num_heads": 2}, {"num_heads": 0}, "num_heads=0 must be a multiple"),
        ({"num_heads": 6}, {"num_heads": 5}, "num_heads=5 must be a multiple"),
    ],
    "Diffusion": [
        ({"clip_sample": 1e-6}, {"clip_sample": 0.0}, "clip_sample=0.0"),
        ({"clip_sample": 1.0, "prediction": "epsilon"}, {"prediction": "epsilon"}, "clip_sample=None"),
        ({"num_inference_timesteps": 100}, {"num_inference_timesteps": 101}, "must not exceed num_train_timesteps=100"),
        ({"num_train_timesteps": 1}, {"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_inference_timesteps": 1}, {"num_inference_timesteps": 0}, "num_inference_timesteps=0"),
    ],
    "DiscreteDiffusion": [
        ({"num_bins": 2}, {"num_bins": 1}, "num_bins=1 must be at least 2"),
        ({"low": 0.9}, {"low": 1.0}, "must go upwards"),
        ({"high": 2.0}, {"low": 2.0}, "must go upwards"),
        ({"temperature": 0.0}, {"temperature": -0.1}, "temperatures must not be negative"),
        ({"choice_temperature": 0.0}, {"choice_temperature": -0.1}, "temperatures must not be negative"),
    ],
    "FlowMatching": [
        *FLOW_BOUNDS,
        ({"state_dropout": 0.0}, {"state_dropout": -0.1}, "state_dropout=-0.1"),
        ({"state_dropout": 0.99}, {"state_dropout": 1.0}, "state_dropout=1.0"),
        ({"attend_text_every_n_blocks": 1}, {"attend_text_every_n_blocks": 0}, "attend_text_every_n_blocks=0"),
        ({"num_future_tokens": 0}, {"num_vl_heads": 5}, "num_vl_heads=5"),
    ],
    "LayerwiseFlowMatching": [
        *FLOW_BOUNDS,
        ({"num_layers": 3}, {"num_layers": 4}, "num_layers=4, but the backbone has 3"),
        ({"num_layers": 2}, {"num_layers": 1}, "a state token would change nothing"),
        ({"num_layers": 2}, {"num_layers": 0}, "num_layers=0 must be at least 1"),
        (
            {"num_layers": 1, "state_token": False},
            {"num_layers": 1, "state_token": False, "num_future_tokens": 1},
            "num_future_tokens=1 would change nothing",
        ),
    ],
    "MLP": [
        ({"num_layers": 1}, {"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_residual_blocks": 0}, {"num_residual_blocks": -1}, "num_residual_blocks=-1"),
        ({"num_residual_blocks": 1}, {"num_residual_blocks": 1, "num_layers": 3}, "set one"),
        ({"num_layers": 3}, {"num_residual_blocks": 2, "num_layers": 1}, "set one"),
        ({"num_queries": 1}, {"num_queries": 0}, r"num_queries=0 must divide the horizon 4: one of \[1, 2, 4\]"),
        ({"num_queries": 4}, {"num_queries": 8}, r"num_queries=8 must divide the horizon 4: one of \[1, 2, 4\]"),
        ({"num_queries": 2}, {"num_queries": 3}, r"num_queries=3 must divide the horizon 4: one of \[1, 2, 4\]"),
    ],
    "Transformer": [({"num_heads": 1}, {"num_heads": 0}, "num_heads=0 must be at least 1")],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, allowed, refused, named", [(name, *each) for name in BOUNDS for each in BOUNDS[name]]
)
def test_an_argument_is_allowed_up_to_its_bound(name, allowed, refused, named):
    HEADS.get(name)(SIZES, **SMALL[name] | allowed)
    with pytest.raises(ValueError, match=named):
        HEADS.get(name)(SIZES, **SMALL[name] | refused)


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 24, "state_dim": 2}, {"hidden_size": 24, "state_dim": 0}], ids=str
)
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("tokens", [0, 3])
def test_tokens_that_no_block_would_read_are_refused(sizes, interleave, tokens):
    """A state or scratch tokens need a block in which the tokens look at each other; without either none is needed."""
    arguments = SMALL["FlowMatching"] | {"interleave_self_attention": interleave, "num_future_tokens": tokens}
    build = lambda: HEADS.get("FlowMatching")(replace(SIZES, **sizes), **arguments)
    if interleave or not (sizes["state_dim"] or tokens):
        head = build()
        assert head.dit.crosses == [i % 2 == 0 or not interleave for i in range(2)]
        return
    with pytest.raises(
        ValueError, match=f"the state \\({sizes['state_dim']} numbers\\) or the num_future_tokens={tokens}"
    ):
        build()


SPREAD = {  # of fresh weights that are no layer's own, as published or as the page says
    ("FlowMatching", "positions"): 0.02,
    ("FlowMatching", "future_tokens"): 0.02,
    ("LayerwiseFlowMatching", "positions"): 0.02,
    ("LayerwiseFlowMatching", "future_tokens"): 0.02,
    ("Diffusion", "network.positions"): 0.5,
    ("DiscreteDiffusion", "network.positions"): 1.0,
    ("Transformer", "action_queries"): 0.02,
}


@pytest.mark.parametrize("name, parameter", SPREAD)
def test_fresh_weights_are_spread_around_zero_as_they_should(name, parameter):
    torch.manual_seed(0)
    arguments = SMALL[name] | ({"num_future_tokens": 40} if parameter == "future_tokens" else {})
    weights = dict(HEADS.get(name)(replace(SIZES, horizon=40), **arguments).named_parameters())[parameter]
    assert weights.std().item() == pytest.approx(SPREAD[name, parameter], rel=0.15)
    assert abs(weights.mean().item()) < 0.15 * SPREAD[name, parameter]


@pytest.mark.parametrize("name", ["FlowMatching", "LayerwiseFlowMatching"])
@pytest.mark.parametrize("width, heads", [(24, 1), (64, 1), (127, 1), (128, 2), (192, 3)])
def test_an_attention_head_is_64_wide_unless_something_else_is_asked_for(name, width, heads):
    sizes = replace(SIZES, hidden_size=width, backbone=replace(BACKBONE, hidden_size=width))
    if name == "FlowMatching":
        vl = HEADS.get(name)(sizes, **SMALL[name]).vl
        assert vl.blocks[0].attention.heads == heads
    elif width % 2 == 0:
        head = HEADS.get(name)(sizes, mlp_size=8)
        assert head.dit.blocks[0].attention.heads == heads
