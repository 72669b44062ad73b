"""Every head that can explore, in its own framework on a tiny backbone: what holds for all of them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.features import Features
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import Framework
from vla_bench.rl.stochastic import STOCHASTIC, stochastic

T, D, S, B = 3, 2, 2, 2
TINY = {"image_size": 64, "hidden_size": 32, "num_layers": 2, "vision_hidden_size": 32, "vision_layers": 2}
FLOW = {"num_heads": 4, "num_future_tokens": 2, "num_inference_timesteps": 4}  # with dropout, as by default
EXPERT = {
    "type": "ActionExpert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "num_inference_timesteps": 4,
}
# the framework, its head, and how the head explores
CASES = {
    "MLP": ("OFT", {"type": "MLP", "hidden_size": 32}, {}),
    "Transformer": ("LlavaVLA", {"type": "Transformer", "hidden_size": 32, "dropout": 0.1}, {}),
    "FAST": ("FAST", {"type": "FAST", "max_tokens": 6}, {"temperature": 1.6}),
    "Bins": ("OpenVLA", {"type": "Bins"}, {"temperature": 1.6}),
    "FlowMatching": ("GR00T", {"type": "FlowMatching", "hidden_size": 32, "num_layers": 2, **FLOW}, {}),
    "FlowMatching, cps": (
        "GR00T",
        {"type": "FlowMatching", "hidden_size": 32, "num_layers": 2, **FLOW},
        {"method": "flow_cps"},
    ),
    "LayerwiseFlowMatching": ("PI", {"type": "LayerwiseFlowMatching", **FLOW}, {}),
    "LayerwiseFlowMatching, noise": (
        "PI",
        {"type": "LayerwiseFlowMatching", **FLOW},
        {"method": "flow_noise"},
    ),
    "ActionExpert": ("PI0", EXPERT, {}),
    "ActionExpert, noise": ("PI0", EXPERT, {"method": "flow_noise"}),
    "ActionExpert, adaptive": ("PI05", EXPERT, {}),
}
NAMES = [name for name in CASES]


def example(seed: int, lang: str) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    return {
        "image": [Image.fromarray(pixels)],
        "lang": lang,
        "origin": "toy",
        "state": np.float32([0.3, seed]),
    }


EXAMPLES = [example(0, "open the drawer"), example(1, "press the button from the top")]


@dataclass
class Case:
    """A framework, its head as a policy that explores, and two observations."""

    framework: Framework
    policy: torch.nn.Module
    batch: dict

    def read(self):
        return self.policy.read(self.framework, self.batch)

    def sample(self, executed: int = 2, seed: int = 0, batch: dict | None = None):
        with torch.no_grad():
            read = self.policy.read(self.framework, self.batch if batch is None else batch)
        return self.policy.sample(read, executed=executed, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("every_head")
    write_tiny("qwen2_5_vl", home / "tiny", **TINY, reserved_tokens=512)
    return home


@pytest.fixture(params=NAMES)
def case(request, home) -> Case:
    return build(home, request.param)


@cache
def build(home: Path, name: str) -> Case:
    """Built once; tests leave the weights as they are."""
    framework_name, head, settings = CASES[name]
    torch.manual_seed(0)
    section = {
        "name": framework_name,
        "vlm": {"base_vlm": str(home / "tiny")},
        "action_horizon": T,
        "action_model": head,
    }
    tokens = head["type"] in ("FAST", "Bins")
    framework = build_framework(section, action_dim=D, state_dim=0 if tokens else S)
    with torch.no_grad():
        for parameter in framework.action_model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    examples = [{k: v for k, v in each.items() if k != "state"} for each in EXAMPLES] if tokens else EXAMPLES
    policy = stochastic(framework.action_model, **settings)
    return Case(framework.train(), policy.train(), framework.to_batch(framework.prepare(examples)))


def test_every_form_is_tested_here():
    assert {head["type"] for _, head, _ in CASES.values()} == {*STOCHASTIC.names(), *STOCHASTIC.aliases}


def test_the_likelihood_of_a_sample_comes_back_bit_for_bit(case):
    drawn = case.sample()
    with torch.no_grad():
        found = case.policy.evaluate(case.read(), drawn.chain)
    assert torch.equal(found.log_prob, drawn.log_prob)
    assert drawn.log_prob.dtype == torch.float32 and drawn.log_prob.isfinite().all()
    assert case.framework.training and case.policy.training  # dropout was off in between, and is on again


def test_a_backbone_that_learns_gives_the_same_likelihood_but_for_rounding(case):
    """With gradient its attention is computed by another kernel."""
    drawn = case.sample()
    found = case.policy.evaluate(case.read(), drawn.chain)
    torch.testing.assert_close(found.log_prob, drawn.log_prob, atol=2e-5, rtol=0)


def test_samples_are_chunks_as_the_head_gives_them_and_are_drawn_by_the_generator(case):
    drawn, again, other = case.sample(seed=0), case.sample(seed=0), case.sample(seed=1)
    assert drawn.actions.shape == (B, T, D) and drawn.actions.dtype == torch.float32
    assert torch.equal(drawn.actions, again.actions)
    assert not torch.equal(drawn.actions, other.actions)


def test_every_tensor_of_a_chain_begins_with_the_batch(case):
    drawn = case.sample()
    assert {len(value) for value in drawn.chain.values()} == {B}
    part = drawn[1:]
    assert len(part) == 1 and torch.equal(part.log_prob, drawn.log_prob[1:])
    assert drawn.chain["executed"].tolist() == [2, 2]


def test_a_gradient_reaches_every_trainable_weight_of_the_head(case):
    case.framework.zero_grad()
    case.policy.zero_grad()
    last = dict(case.policy.named_parameters()).get("noise.layers.2.weight")
    if last is not None:
        torch.nn.init.normal_(last, std=0.01)  # zeros at the start let nothing through to the layer before
    found = case.policy.evaluate(case.read(), case.sample().chain)
    entropy = 0 if found.entropy is None else found.entropy.sum()
    (found.log_prob.sum() + entropy).backward()
    silent = [
        n
        for n, p in case.policy.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert silent == []


def test_the_backbone_learns_too(case):
    case.framework.zero_grad()
    case.policy.evaluate(case.read(), case.sample().chain).log_prob.sum().backward()
    grads = [
        p.grad is not None and bool(p.grad.any()) for p in case.framework.vlm.parameters() if p.requires_grad
    ]
    assert sum(grads) > len(grads) / 2


def test_one_small_step_up_the_likelihood_makes_the_sample_likelier(case):
    drawn, weights = case.sample(), {n: p.detach().clone() for n, p in case.framework.named_parameters()}
    case.framework.zero_grad()
    before = case.policy.evaluate(case.read(), drawn.chain).log_prob.sum()
    before.backward()
    norm = sum(p.grad.square().sum() for p in case.framework.parameters() if p.grad is not None).sqrt()
    with torch.no_grad():
        for parameter in case.framework.parameters():
            if parameter.grad is not None:
                parameter += 1e-3 * parameter.grad / norm
        after = case.policy.evaluate(case.read(), drawn.chain).log_prob.sum()
        for name, parameter in case.framework.named_parameters():
            parameter.copy_(weights[name])
    assert after.item() - before.item() == pytest.approx(1e-3 * norm.item(), rel=0.2)


def test_a_sample_alone_is_the_sample_in_its_batch(case):
    with torch.no_grad():
        read = case.read()
    noise = case.policy.draw_noise(B, torch.Generator().manual_seed(0))
    whole = case.policy.sample(read, executed=2, noise=noise)
    one = {key: value for key, value in EXAMPLES[1].items() if key != "state" or case.framework.state_dim}
    alone = case.policy.read(case.framework, case.framework.to_batch(case.framework.prepare([one])))
    drawn = case.policy.sample(alone, executed=2, noise={name: value[1:] for name, value in noise.items()})
    torch.testing.assert_close(drawn.actions, whole.actions[1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn.log_prob, whole.log_prob[1:], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("FAST", "Bins")])
def test_numbers_that_the_model_has_and_the_robot_lacks_do_not_count(home, name):
    case = build(home, name)
    head = case.framework.action_model
    head.valid_action_dim = 1
    try:
        drawn = case.sample(executed=T)
        assert drawn.chain["real"].tolist() == [[True, False]] * B
        kept = {n: v for n, v in drawn.chain.items()}
        for end in ("chunk", "after"):
            if end in kept:
                kept[end] = torch.cat([kept[end][..., :1], torch.full_like(kept[end][..., 1:], 7.0)], -1)
        with torch.no_grad():
            assert torch.equal(case.policy.evaluate(case.read(), kept).log_prob, drawn.log_prob)
    finally:
        head.valid_action_dim = D


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("FAST", "Bins")])
def test_without_noise_the_policy_is_what_the_framework_predicts(home, name):
    case = build(home, name)
    noise = case.policy.draw_noise(B, torch.Generator().manual_seed(0))
    with torch.no_grad():
        read, nowhere = case.read(), torch.zeros(B, T, D, dtype=torch.bool)
        case.policy.head.eval()
        chunk, _ = case.policy.draw(read, nowhere, noise)
        case.policy.head.train()
    predicted = case.framework.predict_action(case.batch, noise=noise.get("start"))["normalized_actions"]
    assert np.array_equal(chunk.numpy(), predicted)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("FAST", "Bins")])
def test_a_model_under_autocast_has_a_likelihood_in_float32(home, name):
    case = build(home, name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        read = case.read()
        drawn = case.policy.sample(read, executed=2, generator=torch.Generator().manual_seed(0))
        found = case.policy.evaluate(read, drawn.chain)
    assert {drawn.actions.dtype, drawn.log_prob.dtype, found.log_prob.dtype} == {torch.float32}
    assert torch.equal(found.log_prob, drawn.log_prob)
    assert (drawn.log_prob != drawn.log_prob.bfloat16().float()).any()  # not a bfloat16 number in disguise


def test_features_that_are_kept_give_the_same_likelihood(home):
    """With a frozen backbone features are kept, and joined to other batches."""
    case = build(home, "FlowMatching")
    with torch.no_grad():
        read = case.read()
    drawn = case.sample()
    kept = Features(read.hidden.clone(), read.mask.clone(), state=read.state.clone())
    assert torch.equal(case.policy.evaluate(kept, drawn.chain).log_prob, drawn.log_prob)
