"""Token heads that explore: every answer that can come sums to one, and the likelihood is that of torch."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from vla_bench.models.backbones.tiny import write_tiny
from vla_bench.models.frameworks.build import build_framework
from vla_bench.models.frameworks.framework import evaluating
from vla_bench.rl.stochastic import stochastic
from vla_bench.rl.tokens import TokenPrompt, draw_index, whole_answer

T, D = 2, 2
SMALL = {"image_size": 64, "hidden_size": 32, "num_layers": 1, "vision_hidden_size": 32, "vision_layers": 1}
KINDS = {
    "Bins": ("OpenVLA", {"type": "Bins", "num_bins": 3}),
    "FAST": ("FAST", {"type": "FAST", "max_tokens": 5}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokens")
    for backbone in ("qwen2_5_vl", "florence2"):
        write_tiny(backbone, home / backbone, **SMALL, reserved_tokens=512)
    return home


def example(seed, lang):
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    return {"image": [Image.fromarray(pixels)], "lang": lang, "origin": "toy"}


EXAMPLES = [example(0, "open the drawer"), example(1, "press the button from the top")]


def built(home, kind, backbone="qwen2_5_vl"):
    """A framework whose language model has preferences."""
    torch.manual_seed(0)
    name, head = KINDS[kind]
    section = {
        "name": name,
        "vlm": {"base_vlm": str(home / backbone)},
        "action_horizon": T,
        "action_model": head,
    }
    framework = build_framework(section, action_dim=D, state_dim=0)
    with torch.no_grad():
        framework.vlm.output_matrix().weight[framework.token_ids] *= (
            1 + torch.arange(len(framework.token_ids))[:, None] % 5
        )
    return framework


def policy_of(home, kind, backbone="qwen2_5_vl", **settings):
    framework = built(home, kind, backbone)
    policy = stochastic(framework.action_model, **settings)
    return framework, policy, policy.read(framework, framework.to_batch(EXAMPLES))


@pytest.mark.parametrize("temperature", [0.5, 1.6])
def test_all_answers_that_bins_can_give_sum_to_one(home, temperature):
    framework, policy, _ = policy_of(home, "Bins", temperature=temperature)
    codes = torch.tensor(list(itertools.product(range(3), repeat=T * D)))  # 81
    tokens = framework.token_ids[codes]
    read = policy.read(framework, framework.to_batch([EXAMPLES[0]] * len(tokens)))
    chain = {"tokens": tokens, "executed": torch.full((81,), T), "real": torch.ones(81, D, dtype=torch.bool)}
    with torch.no_grad():
        assert policy.evaluate(read, chain).log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
        first = (
            policy.evaluate(read, chain | {"executed": torch.full((81,), 1)})
            .log_prob.exp()
            .unflatten(0, (9, 9))
        )
    assert first[:, 0].sum().item() == pytest.approx(1, abs=1e-4)  # over the nine first steps
    assert (first - first[:, :1]).abs().max() < 1e-5  # which do not depend on the second


def test_draws_come_as_often_as_the_likelihood_says(home):
    framework, policy, _ = policy_of(home, "Bins")
    read = policy.read(framework, framework.to_batch([EXAMPLES[0]] * 600))
    drawn = policy.sample(read, executed=T, generator=torch.Generator().manual_seed(0))
    found, inverse, counts = drawn.chain["tokens"][:, 0].unique(return_inverse=True, return_counts=True)
    first = torch.zeros(3)
    with torch.no_grad(), evaluating(framework):
        states = framework.vlm.answer_states(
            TokenPrompt(framework, framework.to_batch(EXAMPLES[:1])["inputs"]).inputs,
            drawn.chain["tokens"][:1],
        )
        logits = framework.vlm.output_matrix()(states[:, 0])[0, framework.token_ids]
    for token, count in zip(found, counts):
        first[framework.token_ids == token] = count / 600
    torch.testing.assert_close(first, logits.softmax(-1), atol=0.06, rtol=0)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "florence2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_comes_back_bit_for_bit(home, kind, backbone):
    _, policy, read = policy_of(home, kind, backbone, temperature=1.6)
    drawn = policy.sample(read, executed=1, generator=torch.Generator().manual_seed(0))
    found = policy.evaluate(read, drawn.chain)
    assert torch.equal(found.log_prob, drawn.log_prob) and found.log_prob.dtype == torch.float32
    assert found.log_prob.requires_grad and found.entropy.min() > 0


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "florence2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_that_draws_is_the_one_that_is_evaluated(home, kind, backbone):
    """Token by token with kept keys and values, or in one pass: the same logits but for rounding."""
    framework, policy, read = policy_of(home, kind, backbone, temperature=1.3)
    noise, logits = policy.draw_noise(2, torch.Generator().manual_seed(0)), []

    def choose(given, step):
        logits.append(given / 1.3)
        return draw_index(given / 1.3, noise["uniform"][:, step])

    with evaluating(framework):
        places = {"allowed": framework.token_ids, "stop": framework.stop, "max_tokens": read.longest}
        tokens = framework.vlm.decode(read.inputs, **places, choose=choose)
    drawn = policy.sample(read, executed=T, noise=noise)
    assert torch.equal(drawn.chain["tokens"][:, : tokens.shape[1]], tokens)
    answer, valid = whole_answer(read, tokens)
    index = (answer[..., None] == read.allowed_ids).int().argmax(-1)
    each = torch.stack([z.log_softmax(-1).gather(-1, i[:, None])[:, 0] for z, i in zip(logits, index.T)], 1)
    torch.testing.assert_close(drawn.log_prob, (each * valid[:, : each.shape[1]]).sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cold_policy_is_the_framework_itself(home, kind):
    framework, policy, read = policy_of(home, kind, temperature=1e-5)
    drawn = policy.sample(read, executed=T, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(drawn.actions.numpy(), framework.predict_action(EXAMPLES)["normalized_actions"])


def test_bins_behind_the_executed_steps_are_the_likeliest_and_do_not_count(home):
    framework, policy, read = policy_of(home, "Bins")
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    drawn = policy.sample(read, executed=1, noise=noise)
    other = policy.sample(
        read, executed=1, noise={"uniform": torch.cat([noise["uniform"][:, :D], torch.rand(2, D)], 1)}
    )
    assert torch.equal(drawn.chain["tokens"], other.chain["tokens"])
    assert torch.equal(drawn.log_prob, drawn.chain["each"][:, 0])


def test_a_chunk_of_bins_is_cut_and_one_of_fast_is_not(home):
    for kind, cuts in (("Bins", True), ("FAST", False)):
        _, policy, read = policy_of(home, kind)
        drawn = policy.sample(read, executed=T, generator=torch.Generator().manual_seed(0))
        shorter = policy.cut(drawn, torch.tensor([1, 2]))
        assert (shorter is drawn) != cuts
        if cuts:
            assert torch.equal(shorter.log_prob[0], drawn.chain["each"][0, 0])


def test_the_whole_sequence_of_fast_counts_whatever_is_executed(home):
    _, policy, read = policy_of(home, "FAST")
    noise = policy.draw_noise(2, torch.Generator().manual_seed(0))
    one, all_of_it = (policy.sample(read, executed=n, noise=noise) for n in (1, T))
    assert torch.equal(one.log_prob, all_of_it.log_prob) and torch.equal(one.actions, all_of_it.actions)


def test_an_answer_that_stopped_has_its_stop_token_and_one_that_was_cut_off_has_none(home):
    framework, _, read = policy_of(home, "FAST")
    tokens = torch.full((2, read.longest), -1)
    tokens[0, :2], tokens[1] = framework.token_ids[:2], framework.token_ids[3]
    answer, valid = whole_answer(read, tokens)
    assert valid.sum(1).tolist() == [3, read.longest]
    assert (answer == framework.stop).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_the_language_model(home, kind):
    framework, policy, read = policy_of(home, kind)
    drawn = policy.sample(read, executed=T, generator=torch.Generator().manual_seed(0))
    policy.evaluate(read, drawn.chain).log_prob.sum().backward()
    silent = [
        n for n, p in framework.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert [name for name in silent if "visual" not in name] == []


def test_the_policy_gradient_is_that_of_the_expectation(home):
    """Over all 81 answers: the sum of p R ∇log p is the gradient of the sum of p R."""
    framework, policy, _ = policy_of(home, "Bins")
    tokens = framework.token_ids[torch.tensor(list(itertools.product(range(3), repeat=T * D)))]
    read = policy.read(framework, framework.to_batch([EXAMPLES[0]] * 81))
    chain = {"tokens": tokens, "executed": torch.full((81,), T), "real": torch.ones(81, D, dtype=torch.bool)}
    reward, weight = torch.linspace(-1, 1, 81) ** 2, framework.vlm.model.lm_head.weight
    log_prob = policy.evaluate(read, chain).log_prob
    estimate = torch.autograd.grad(
        (log_prob.detach().exp() * reward * log_prob).sum(), weight, retain_graph=True
    )[0]
    exact = torch.autograd.grad((log_prob.exp() * reward).sum(), weight)[0]
    torch.testing.assert_close(estimate, exact, atol=1e-6, rtol=1e-4)


def test_temperature_zero_is_refused(home):
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        stochastic(built(home, "Bins").action_model, temperature=0)
