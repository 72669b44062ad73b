"""The discrete diffusion head against MaskGIT's equations, written a second time in numpy."""

import math

import numpy as np
import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads.discrete_diffusion import Bins, DiscreteDiffusionHead


@pytest.mark.parametrize("valid_action_dim", [3, 2])
def test_the_loss_is_the_equation(kit, valid_action_dim):
    head, (features, actions) = kit.build("discrete"), kit.data()
    head.valid_action_dim = valid_action_dim
    given, nll = kit.training_noise(head), []
    for i, (order, u) in enumerate(zip(given["noise"].numpy(), given["time"].numpy())):
        b = i % kit.B
        real = [t * kit.D + d for t in range(kit.T) for d in range(valid_action_dim) if not kit.IS_PAD[b, t]]
        number = max(1, math.ceil(math.cos(math.pi / 2 * float(u)) * len(real)))
        hidden = sorted(real, key=lambda j: order[j])[:number]
        codes = np.clip(np.floor((actions[b].numpy().ravel() + 1) / 2 * 16), 0, 15).astype(int)
        seen = np.array([16 if j in hidden or j not in real else codes[j] for j in range(kit.T * kit.D)])
        logits = kit.token_logits(head, seen[None], kit.row(features, b))[0]
        nll += [np.log(np.exp(logits[j]).sum()) - logits[j, codes[j]] for j in hidden]
    assert kit.loss(head, features, actions) == pytest.approx(np.mean(nll), abs=1e-5)


def decoded(
    kit, head: DiscreteDiffusionHead, features: Features, noise: np.ndarray, rounds: int
) -> np.ndarray:
    """MaskGIT's decoding, one sample, one token at a time."""
    n, bins = kit.T * kit.D, head.bins.count
    chunks = np.full((kit.B, n), bins)
    hidden = n
    for k in range(rounds):
        logits = kit.token_logits(head, chunks, features)
        share = math.cos(math.pi / 2 * (k + 1) / rounds)
        hidden = min(math.floor(n * share), hidden - 1) if k < rounds - 1 else 0
        for b in range(kit.B):
            guesses = {}
            for j in np.flatnonzero(chunks[b] == bins):
                p = np.exp(logits[b, j] - logits[b, j].max())
                p /= p.sum()
                tempered = p ** (1 / head.temperature)
                mark = noise[b, k, 0, j] * tempered.sum()
                code = next(c for c in range(bins) if tempered[: c + 1].sum() > mark)
                confidence = math.log(p[code] if head.confidence == "token" else p.max())
                gumbel = -math.log(-math.log(noise[b, k, 1, j]))
                confidence += head.choice_temperature * (1 - (k + 1) / rounds) * gumbel
                guesses[j] = confidence, code
            for j in sorted(guesses, key=lambda j: -guesses[j][0])[: len(guesses) - hidden]:
                chunks[b, j] = guesses[j][1]
    return -1 + (chunks + 0.5) * 2 / bins


@pytest.mark.parametrize(
    "options", [{}, {"confidence": "token", "choice_temperature": 1.0, "temperature": 0.7}]
)
@pytest.mark.parametrize("rounds", [1, 5, 12])
def test_decoding_is_maskgit(kit, rounds, options):
    head, (features, _) = kit.build("discrete", num_steps=rounds, **options), kit.data()
    noise = kit.sampling_noise(head)
    expected = decoded(kit, head, features, noise.double().numpy(), rounds).reshape(kit.B, kit.T, kit.D)
    np.testing.assert_allclose(head.sample(features, noise).detach(), expected, atol=1e-5)


def test_more_rounds_than_tokens_are_not_run(kit):
    head, calls = kit.build("discrete", num_steps=40), []
    head.network.register_forward_hook(lambda *_: calls.append(1))
    kit.predict(head, kit.data()[0])
    assert len(calls) == kit.T * kit.D


def test_actions_outside_the_bins_are_refused(kit):
    features, actions = kit.data()
    with pytest.raises(ValueError, match=r"do not fit the bins' range \[-1, 1\]"):
        kit.loss(kit.build("discrete"), features, 2 * actions)


def test_actions_outside_the_bins_may_be_clipped(kit):
    features, actions = kit.data()
    assert math.isfinite(kit.loss(kit.build("discrete", outside="clip"), features, 2 * actions))


def test_times_that_are_not_uniform_numbers_are_refused(kit):
    features, actions = kit.data()
    with pytest.raises(ValueError, match="time must be uniform numbers"):
        kit.loss(kit.build("discrete"), features, actions, time=torch.full((6,), 3.0))


def test_one_batch_is_learnt(kit):
    torch.manual_seed(0)
    own = {"hidden_size": 64, "num_layers": 2, "num_heads": 4}
    head, (features, actions) = DiscreteDiffusionHead(kit.SIZES, **own), kit.data()
    error = lambda: (kit.sampled(head, features, 2) - actions)[~kit.IS_PAD].abs().mean().item()
    start = error()
    kit.fit(head, features, actions, 200, 3e-3, kit.IS_PAD).eval()
    assert error() < 0.05 * start


def test_samples_cover_both_modes_with_whole_chunks(kit):
    found = kit.drawn(kit.two_modes(DiscreteDiffusionHead, 4, 150, num_bins=32))
    sides = found.sign().mean(1)
    assert (sides.abs() == 1).float().mean() > 0.9, "chunks go half left and half right"
    assert 0.57 < (sides < 0).float().mean() < 0.76
    assert (found.abs() < 0.4).float().mean() < 0.03


def test_an_argmax_would_lose_a_mode(kit):
    found = kit.drawn(kit.two_modes(DiscreteDiffusionHead, 1, 60, num_bins=32, temperature=0.0))
    assert (found < 0).all()  # the fault that the test above is meant to see


def test_a_number_is_between_the_edges_of_its_bin():
    bins, edges = Bins(7, -0.5, 2.0), np.linspace(-0.5, 2.0, 8)
    x = np.random.default_rng(0).uniform(-0.5, 2.0, 500).astype(np.float32)
    codes = bins.encode(torch.from_numpy(x)).numpy()
    assert (edges[codes] - 1e-6 <= x).all() and (x <= edges[codes + 1] + 1e-6).all()


def test_a_code_comes_back_as_the_centre_of_its_bin():
    edges = np.linspace(-0.5, 2.0, 8)
    centres = Bins(7, -0.5, 2.0).decode(torch.arange(7))
    np.testing.assert_allclose(centres, (edges[1:] + edges[:-1]) / 2, atol=1e-6)
