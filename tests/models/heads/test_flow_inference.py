"""The inference heads: the same actions from the same weights, and their work, counted."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vla_bench.models.features import Features
from vla_bench.models.heads.flow import euler_times, time_bucket
from vla_bench.models.heads.flow_inference import (
    FlowMatchingInferenceHead,
    LayerwiseFlowMatchingInference,
    make_schedule,
)
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.layers.embodiment import CategorySpecificLinear
from vla_bench.registry import HEADS

T, D, L, B = 4, 3, 5, 2


def counted(head, features: Features, noise: torch.Tensor) -> tuple[dict[str, int], int]:
    """How often each linear layer is called, and floating-point operations, for one chunk."""
    calls, hooks = {}, []
    for name, module in head.named_modules():
        if isinstance(module, torch.nn.Linear | CategorySpecificLinear):
            hooks.append(
                module.register_forward_hook(lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1}))
            )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head.sample(features, noise)
    for hook in hooks:
        hook.remove()
    return calls, counter.get_total_flops()


@pytest.mark.parametrize(("batch", "mask"), [(1, torch.ones(B, L, dtype=torch.bool)), (2, None)])
def test_the_inference_head_gives_the_same_actions(case, batch, mask):
    head, inference = case.pair(num_inference_timesteps=7)
    features, noise = case.features(seed=batch, mask=mask), torch.randn(B, T, D)
    with torch.no_grad():
        expected = head.sample(features, noise)
        torch.testing.assert_close(inference.sample(features, noise), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1


def test_the_inference_head_draws_the_same_noise(case):
    head, inference = case.pair(num_inference_timesteps=7)
    features = case.features()
    drawn = [h.draw_noise(B, torch.Generator().manual_seed(3)) for h in (head, inference)]
    assert torch.equal(*drawn)
    with torch.no_grad():
        found = [h.sample(features, noise) for h, noise in zip((head, inference), drawn)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_the_inference_head_looks_at_the_same_tokens(case):
    features, noise = case.features(), torch.randn(B, T, D)
    with torch.no_grad():
        looks = [h.attention(features, noise) for h in case.pair(num_inference_timesteps=7)]
    torch.testing.assert_close(*looks)


def test_keys_values_and_modulations_are_computed_once(case):
    steps = 7
    head, inference = case.pair(num_inference_timesteps=steps)
    features, noise = case.features(), torch.randn(B, T, D)
    (plain, slow), (once, fast) = (counted(h, features, noise) for h in (head, inference))
    assert plain.keys() == once.keys() and fast < slow
    for i, cross in enumerate(head.dit.crosses):
        for part in ("to_k", "to_v"):
            name = f"dit.blocks.{i}.attention.{part}"
            assert plain[name] == steps and once[name] == (1 if cross else steps), name
        assert plain[f"dit.blocks.{i}.adapt"] == steps and once[f"dit.blocks.{i}.adapt"] == 1
    for name, calls in once.items():
        if name.startswith(("state_encoder", "dit.time", "vl.", "project")):
            assert calls == 1, name


def test_the_training_head_too_prepares_the_backbones_states_once(case):
    head, features = case.build(num_inference_timesteps=7), case.features()
    calls, _ = counted(head, features, torch.randn(B, T, D))
    assert all(n == 1 for name, n in calls.items() if name.startswith(("vl.", "project")))


def test_the_schedule_is_what_each_step_would_compute(case):
    head, times = case.build(), euler_times(5)[:-1]
    schedule = make_schedule(head, times)
    assert list(schedule) == times
    for t, step in schedule.items():
        bucket = time_bucket(torch.tensor([t]))
        torch.testing.assert_close(step.time, head.dit.time(bucket))
        torch.testing.assert_close(step.timestep, head.timestep_embedding(bucket))
        assert len(step.modulations) == len(head.dit.blocks)


def test_operations_at_the_size_of_gr00t():
    sizes = HeadSizes(hidden_size=2048, action_dim=7, horizon=16, state_dim=8)
    with torch.device("meta"):
        valid = torch.ones(1, 600, dtype=torch.bool)
        features = Features(torch.empty(1, 600, 2048), valid, state=torch.empty(1, 8))
        found = [
            counted(cls(sizes, num_layers=2, num_inference_timesteps=10), features, torch.empty(1, 16, 7))[1]
            for cls in (FlowMatchingHead, FlowMatchingInferenceHead)
        ]
    projections = 2 * 2 * 600 * 2048 * 768  # keys and values of one block
    assert found[0] - found[1] >= 9 * projections
    assert found[0] / found[1] > 2.5


def test_nothing_is_kept_when_weights_change(flow_case):
    case = flow_case("last")
    head, inference = case.pair()
    features, noise = case.features(), torch.randn(B, T, D)
    with torch.no_grad():
        before = inference.sample(features, noise)
        for h in (head, inference):
            for parameter in h.parameters():
                parameter.mul_(0.9)
        after = inference.sample(features, noise)
        torch.testing.assert_close(after, head.sample(features, noise), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_copied_and_pickled_heads_give_the_same_actions(case):
    features, noise = case.features(), torch.randn(B, T, D)
    for head in case.pair():
        again = pickle.loads(pickle.dumps(copy.deepcopy(head)))
        torch.testing.assert_close(again.sample(features, noise), head.sample(features, noise))


@pytest.mark.parametrize(("name", "type"), [("last", "FlowMatching"), ("each", "LayerwiseFlowMatching")])
def test_an_inference_head_does_not_train(flow_case, name, type):
    case = flow_case(name)
    _, inference = case.pair()
    no_pad = torch.zeros(B, T, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"is for inference; train with .*'{type}'"):
        inference.loss(case.features(), torch.zeros(B, T, D), no_pad)


def test_names_in_the_registry():
    assert HEADS.get("FlowMatchingInferenceHead") is FlowMatchingInferenceHead
    assert HEADS.get("LayerwiseFlowMatchingInference") is LayerwiseFlowMatchingInference
    build = partial(HEADS.build, sizes=HeadSizes(hidden_size=12, action_dim=D, horizon=T))
    head = build({"type": "FlowMatchingInference", "hidden_size": 8, "num_heads": 2, "compile": True})
    assert head.compiles and isinstance(head, FlowMatchingHead)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last, robots", "each, narrow"])
@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
def test_the_sampler_is_one_graph_and_compiles(flow_case, name, inference, eager_compile):
    case = flow_case(name)
    plain = case.build(num_inference_timesteps=2)
    fast = case.pair(num_inference_timesteps=2, compile=True)[inference]
    features, noise = case.features(), torch.randn(B, T, D)
    with torch.no_grad():
        expected = plain.sample(features, noise)
        torch.testing.assert_close(fast.sample(features, noise), expected, atol=1e-5, rtol=1e-5)
        other = copy.deepcopy(fast)  # a copy runs on its own weights
        for parameter in other.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        assert (other.sample(features, noise) - expected).abs().max() > 1e-3
    assert eager_compile == [{"fullgraph": True, "dynamic": False, "mode": None}]


@pytest.fixture
def eager_compile(monkeypatch, fresh_compiler):
    """The options of every call of torch.compile, which captures graphs and generates no code."""
    options, compile = [], torch.compile

    def eager(function, **given):
        options.append(given)
        return compile(function, backend="eager", **given)

    monkeypatch.setattr(torch, "compile", eager)
    return options
