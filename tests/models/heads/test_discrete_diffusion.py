"""The discrete diffusion head against MaskGIT's equations, written a second time in numpy."""

import math

import numpy as np
import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads.discrete_diffusion import (
    Bins,
    DiscreteDiffusionHead,
    guess,
    gumbel,
    hidden_after,
    hide,
    reveal,
    uniform_noise,
)


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


# --- each part of the training and of the decoding, in numbers -------------------------------------------------------


def test_actions_up_to_half_a_bin_outside_the_range_are_allowed():
    bins = Bins(4, -1.0, 1.0)  # half a bin is a quarter
    bins.check(torch.tensor([-1.25, 0.0, 1.25]))
    for outside in (-1.2501, 1.2501):
        with pytest.raises(ValueError, match=r"do not fit the bins' range \[-1, 1\]"):
            bins.check(torch.tensor([0.0, outside]))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("u", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_so_many_valid_tokens_are_hidden_and_those_with_the_smallest_numbers(count, u):
    order = torch.rand(2, 12, generator=torch.Generator().manual_seed(count))
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[0, 12 - count :], valid[1] = True, True
    for row, found in enumerate(hide(order, torch.tensor([u, u]), valid)):
        places = [j for j in range(12) if valid[row, j]]
        number = max(1, math.ceil(float(torch.cos(torch.tensor(math.pi / 2 * u))) * len(places)))
        expected = sorted(sorted(places, key=lambda j: float(order[row, j]))[:number])
        assert found.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize(
    "tokens, rounds, hidden",
    [(12, 4, [11, 8, 4, 0]), (12, 1, [0]), (12, 2, [8, 0]), (3, 8, [2, 1, 0]), (1, 5, [0]), (5, 5, [4, 3, 2, 1, 0])],
)  # fmt: skip
def test_so_many_tokens_stay_hidden_after_each_round(tokens, rounds, hidden):
    assert hidden_after(tokens, rounds) == hidden


@pytest.mark.parametrize("temperature, shares", [(1.0, (0.2, 0.5, 0.3)), (0.5, (4 / 38, 25 / 38, 9 / 38))])
@pytest.mark.parametrize("u", [0.0, 0.1, 0.21, 0.5, 0.69, 0.71, 0.9, 0.999, 1.0])
def test_a_guess_is_where_the_distribution_reaches_the_uniform_number(temperature, shares, u):
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(1, 1, 3)
    codes, confidence = guess(logits, torch.tensor([[u]]), temperature, "token")
    expected = min(int(np.searchsorted(np.cumsum(shares), u, side="right")), 2)
    assert int(codes) == expected
    assert float(confidence) == pytest.approx(math.log((0.2, 0.5, 0.3)[expected]), abs=1e-6)
    _, confidence = guess(logits, torch.tensor([[u]]), temperature, "position")
    assert float(confidence) == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("confidence", ["token", "position"])
def test_a_temperature_of_zero_takes_the_likeliest(confidence):
    logits = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]]]).log()
    codes, found = guess(logits, torch.full((1, 2), 0.99), 0.0, confidence)
    assert codes.tolist() == [[1, 0]]
    assert found[0].exp().tolist() == pytest.approx([0.5, 0.6])


def test_a_code_without_probability_is_never_drawn():
    logits = torch.tensor([[[-torch.inf, 0.0, 0.0, -torch.inf]]])
    for u, expected in ((0.0, 1), (0.49, 1), (0.5, 2), (0.99, 2)):
        assert int(guess(logits, torch.tensor([[u]]), 1.0, "token")[0]) == expected


def test_what_is_known_stays_and_the_most_confident_guesses_are_kept():
    tokens, codes = torch.tensor([[9, 2, 9, 9, 9]]), torch.tensor([[0, 1, 2, 3, 4]])
    confidence = torch.tensor([[0.1, 5.0, 0.4, 0.3, 0.4]])
    kept = [reveal(tokens, codes, confidence, hidden, 9).tolist()[0] for hidden in range(5)]
    assert kept == [[0, 2, 2, 3, 4], [9, 2, 2, 3, 4], [9, 2, 2, 9, 4], [9, 2, 2, 9, 9], [9, 2, 9, 9, 9]]


def test_gumbel_noise_is_finite_at_both_ends():
    found = gumbel(torch.tensor([0.0, 0.5, 1.0]))
    expected = [-math.log(-math.log(1e-9)), -math.log(-math.log(0.5)), -math.log(-math.log1p(-1e-7))]
    assert found.tolist() == pytest.approx(expected, rel=0.02)


def test_uniform_numbers_may_reach_both_ends_and_no_further():
    given = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    found = uniform_noise("noise", given, (3,), None, "cpu")
    assert found.dtype == torch.float32 and found.tolist() == [0.0, 0.25, 1.0]
    for wrong in (torch.tensor([-0.001, 0.5]), torch.tensor([0.5, 1.001]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"noise must be uniform numbers in \[0, 1\]"):
            uniform_noise("noise", wrong, (2,), None, "cpu")
    with pytest.raises(ValueError, match=r"time is \[2\], expected \[3\]: because"):
        uniform_noise("time", torch.zeros(2), (3,), None, "cpu", ": because")


@pytest.mark.parametrize("has", [1, 2, 3])
def test_every_token_of_a_dimension_that_the_robot_has_is_decoded_and_no_other(kit, has):
    head, (features, _) = kit.build("discrete", num_steps=3), kit.data()
    head.valid_action_dim = has
    tokens, _ = head.decode(features, kit.sampling_noise(head))
    known = (tokens != head.mask_token).reshape(kit.B, kit.T, kit.D)
    assert known[..., :has].all() and not known[..., has:].any()
