"""The transformer, diffusion and discrete diffusion heads against their equations, written a second time in numpy."""

import math

import numpy as np
import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads import discrete_diffusion as discrete
from vla_bench.models.heads import transformer as transformer_module
from vla_bench.models.heads.diffusion import DiffusionHead, squared_cosine
from vla_bench.models.heads.discrete_diffusion import DiscreteDiffusionHead
from vla_bench.models.heads.head import ActionHead
from vla_bench.models.heads.transformer import TransformerHead

torch.set_num_threads(1)
B, L, H, T, D, S = (
    3,
    9,
    24,
    4,
    3,
    2,
)  # samples, tokens, their width, actions in a chunk, numbers in an action, state
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1, 1, 0, 0, 0, 1, 1, 0, 0]], dtype=torch.bool)
IS_PAD = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
TINY = {"hidden_size": 16, "num_heads": 2}
HEADS = {
    "transformer": (TransformerHead, TINY | {"num_layers": 2}),
    "transformer l1": (TransformerHead, TINY | {"num_layers": 1, "loss": "l1"}),
    "diffusion": (DiffusionHead, TINY | {"num_layers": 3, "dropout": 0.0, "repeated_diffusion_steps": 2}),
    "diffusion epsilon": (
        DiffusionHead,
        TINY
        | {"num_layers": 2, "dropout": 0.0, "prediction": "epsilon", "clip_sample": 1.0, "sampler": "ddpm"},
    ),
    "discrete": (
        DiscreteDiffusionHead,
        TINY | {"num_layers": 2, "dropout": 0.0, "num_bins": 16, "repeated_diffusion_steps": 2},
    ),
}
every_head = pytest.mark.parametrize("name", HEADS)


def build(name: str, *, state_dim: int = S, **arguments) -> ActionHead:
    kind, own = HEADS[name]
    torch.manual_seed(0)
    head = kind(input_size=H, action_dim=D, horizon=T, state_dim=state_dim, **own | arguments).eval()
    with torch.no_grad():  # larger weights, so that a leak or a wrong position moves the output
        for parameter in head.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return head


def data(seed: int = 0) -> tuple[Features, torch.Tensor, torch.Tensor]:
    """Features, actions within [-1, 1] and a state."""
    g = torch.Generator().manual_seed(seed)
    features = Features(torch.randn(B, L, H, generator=g), MASK.clone())
    return features, torch.rand(B, T, D, generator=g) * 2 - 1, torch.randn(B, S, generator=g)


def sampling_noise(head: ActionHead, rows: int = B, seed: int = 5) -> torch.Tensor | None:
    g = torch.Generator().manual_seed(seed)
    if isinstance(head, DiffusionHead):
        return torch.randn(rows, T, D, generator=g)
    return (
        torch.rand(rows, head.rounds, 2, T * D, generator=g)
        if isinstance(head, DiscreteDiffusionHead)
        else None
    )


def training_noise(head: ActionHead, seed: int = 6) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    if isinstance(head, TransformerHead):
        return {}
    rows = head.repeats * B
    if isinstance(head, DiffusionHead):
        noise, time = torch.randn(rows, T, D, generator=g), torch.randint(100, (rows,), generator=g)
    else:
        noise, time = torch.rand(rows, T * D, generator=g), torch.rand(rows, generator=g)
    return {"noise": noise, "time": time}


@torch.no_grad()
def predict(head: ActionHead, features: Features, state, rows: slice = slice(None)) -> torch.Tensor:
    noise = sampling_noise(head)
    draws = torch.Generator().manual_seed(7)
    return head.sample(features, state, generator=draws, noise=None if noise is None else noise[rows])


# --- the networks in numpy ---------------------------------------------------------------------------------------------


class Weights:
    """A state dictionary in double precision, read by name."""

    def __init__(self, head: ActionHead):
        self.values = {name: value.double().numpy() for name, value in head.state_dict().items()}

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.values[f"{name}.weight"].T + self.values[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return plain_norm(x) * self.values[f"{name}.weight"] + self.values[f"{name}.bias"]

    def attention(self, name: str, x, context, heads: int, mask=None) -> np.ndarray:
        q, k, v = (
            self.linear(f"{name}.to_{key}", y) for key, y in (("q", x), ("k", context), ("v", context))
        )
        out = np.zeros_like(q)
        size = q.shape[-1] // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for b in range(len(x)):
                keep = np.arange(context.shape[1]) if mask is None else np.flatnonzero(mask[b])
                scores = q[b][:, part] @ k[b][keep][:, part].T / math.sqrt(size)
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                out[b][:, part] = shares / shares.sum(-1, keepdims=True) @ v[b][keep][:, part]
        return self.linear(f"{name}.to_out", out)


def plain_norm(x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def pre_norm_block(w: Weights, name: str, x, heads: int, context=None, mask=None, keys=None) -> np.ndarray:
    y = w.norm(f"{name}.norm", x)
    x = x + w.attention(f"{name}.attention", y, y, heads, keys)
    if context is not None:
        x = x + w.attention(f"{name}.cross", w.norm(f"{name}.cross_norm", x), context, heads, mask)
    y = gelu(w.linear(f"{name}.feed_forward.1", w.norm(f"{name}.feed_forward.0", x)))
    return x + w.linear(f"{name}.feed_forward.3", y)


def transformer(head: TransformerHead, features: Features, state: torch.Tensor) -> np.ndarray:
    w, hidden = Weights(head), features.hidden.double().numpy()
    last = np.stack([hidden[b, max(i for i in range(L) if features.mask[b, i])] for b in range(len(hidden))])
    first = w.linear("state_in.layer", state.double().numpy())
    blanks = np.broadcast_to(w.values["blanks"], (len(hidden), T, 16))
    x = np.concatenate([first[:, None], w.linear("token_in", last)[:, None], blanks], 1)
    for i in range(len(head.blocks)):
        x = pre_norm_block(w, f"blocks.{i}", x, heads=2)
    return w.linear("out.1", w.norm("out.0", x[:, -T:]))


def denoiser(
    head: DiffusionHead, noisy: np.ndarray, steps: np.ndarray, features: Features, state
) -> np.ndarray:
    w, context, mask = Weights(head), features.hidden.double().numpy(), features.mask.numpy()
    angles = steps[:, None] * 10000.0 ** (-np.arange(128) / 127)
    when = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    when = w.linear("network.dit.time.layers.2", silu(w.linear("network.dit.time.layers.0", when)))
    first = w.linear("network.state_in.layer", state.double().numpy())[:, None]
    x = np.concatenate([first, w.linear("network.action_in", noisy) + w.values["network.positions"]], 1)
    for i in range(len(head.network.dit.blocks)):
        name = f"network.dit.blocks.{i}"
        scale, shift = np.split(w.linear(f"{name}.adapt", silu(when))[:, None], 2, -1)
        y = plain_norm(x) * (1 + scale) + shift
        cross = i % 2 == 0
        x = x + w.attention(f"{name}.attention", y, context if cross else y, 2, mask if cross else None)
        y = gelu_tanh(w.linear(f"{name}.feed_forward.0", plain_norm(x)))
        x = x + w.linear(f"{name}.feed_forward.3", y)
    shift, scale = np.split(w.linear("network.dit.out_adapt", silu(when))[:, None], 2, -1)
    x = w.linear("network.dit.out", plain_norm(x, 1e-6) * (1 + scale) + shift)
    return w.linear("network.action_out.1", gelu(x[:, -T:]))


def token_logits(head: DiscreteDiffusionHead, tokens: np.ndarray, features: Features, state) -> np.ndarray:
    w, context, mask = Weights(head), features.hidden.double().numpy(), features.mask.numpy()
    first = w.linear("network.state_in.layer", state.double().numpy())[:, None]
    x = w.values["network.codes.weight"][tokens] + w.values["network.positions"]
    x = np.concatenate([first, x], 1)
    keys = np.array([True] + [d < head.valid_action_dim for _ in range(T) for d in range(D)])[None].repeat(
        len(x), 0
    )
    for i in range(len(head.network.blocks)):
        x = pre_norm_block(w, f"network.blocks.{i}", x, 2, context, mask, keys)
    return w.linear("network.out.1", w.norm("network.out.0", x[:, -T * D :]))


# --- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "transformer l1"])
def test_the_transformer_head_is_its_equation(name):
    head = build(name)
    features, actions, state = data()
    expected = transformer(head, features, state)
    np.testing.assert_allclose(predict(head, features, state), expected, atol=1e-5)
    difference = (expected - actions.numpy())[~IS_PAD.numpy()]
    error = np.abs(difference).mean() if name.endswith("l1") else (difference**2).mean()
    assert head.loss(features, actions, IS_PAD, state)["action_loss"].item() == pytest.approx(error, abs=1e-5)


def cosine_schedule(count: int) -> np.ndarray:
    """alpha-bar of Nichol & Dhariwal, as in the reference implementation: betas first, then their product."""
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    u = np.arange(count) / count
    return np.cumprod(1 - np.minimum(1 - f(u + 1 / count) / f(u), 0.999))


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_the_schedule(count):
    np.testing.assert_allclose(squared_cosine(count), cosine_schedule(count), rtol=1e-9)
    assert np.all(np.diff(squared_cosine(count)) < 0)


@pytest.mark.parametrize("name", ["diffusion", "diffusion epsilon"])
def test_the_diffusion_loss_is_its_equation(name):
    head = build(name)
    features, actions, state = data()
    given = training_noise(head)
    total, count = 0.0, 0
    for i, (noise, k) in enumerate(zip(given["noise"].double().numpy(), given["time"].numpy())):
        b = i % B  # repeats lie behind each other
        one = Features(features.hidden[b : b + 1], features.mask[b : b + 1])
        clean, left = actions[b].double().numpy(), cosine_schedule(100)[k]
        noisy = math.sqrt(left) * np.where(IS_PAD[b].numpy()[:, None], 0, clean) + math.sqrt(1 - left) * noise
        said = denoiser(head, noisy[None], np.array([k]), one, state[b : b + 1])[0]
        squares = (said - (noise if head.prediction == "epsilon" else clean)) ** 2
        total, count = total + squares[~IS_PAD[b].numpy()].sum(), count + int((~IS_PAD[b]).sum()) * D
    loss = head.loss(features, actions, IS_PAD, state, **given)["action_loss"]
    assert loss.item() == pytest.approx(total / count, abs=1e-5)


def test_ten_steps_of_ddim_from_a_predicted_chunk():
    head = build("diffusion")
    features, _, state = data()
    noise, left = sampling_noise(head), cosine_schedule(100)
    x = noise.double().numpy()
    for k in range(99, -1, -10):
        clean = denoiser(head, x, np.full(B, k), features, state)
        implied = (x - np.sqrt(left[k]) * clean) / np.sqrt(1 - left[k])
        after = left[k - 10] if k >= 10 else 1.0
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * implied
    np.testing.assert_allclose(head.sample(features, state, noise=noise).detach(), x, atol=1e-5)


def test_ten_steps_of_ddim_from_a_predicted_noise():
    head = build("diffusion epsilon", sampler="ddim")
    features, _, state = data()
    noise, left = sampling_noise(head), cosine_schedule(100)
    x = noise.double().numpy()
    for k in range(99, -1, -10):
        said = denoiser(head, x, np.full(B, k), features, state)
        clean = np.clip((x - np.sqrt(1 - left[k]) * said) / np.sqrt(left[k]), -1, 1)
        implied = (x - np.sqrt(left[k]) * clean) / np.sqrt(1 - left[k])
        after = left[k - 10] if k >= 10 else 1.0
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * implied
    # the first step divides by 0.0005, so float32 rounding of the noise counts there; clipping ends it
    np.testing.assert_allclose(head.sample(features, state, noise=noise).detach(), x, atol=1e-5)


def test_ddpm_takes_the_posterior_of_every_step():
    head = build("diffusion", sampler="ddpm", num_train_timesteps=20, clip_sample=1.0)
    features, _, state = data()
    noise, left = sampling_noise(head), cosine_schedule(20)
    draws = torch.Generator().manual_seed(11)
    x = noise.double().numpy()
    for k in range(19, -1, -1):
        clean = np.clip(denoiser(head, x, np.full(B, k), features, state), -1, 1)
        before = left[k - 1] if k else 1.0
        alpha = left[k] / before
        mean = np.sqrt(before) * (1 - alpha) * clean + np.sqrt(alpha) * (1 - before) * x
        x = mean / (1 - left[k])
        if k:
            variance = (1 - alpha) * (1 - before) / (1 - left[k])
            x = x + np.sqrt(variance) * torch.randn(B, T, D, generator=draws).double().numpy()
    sampled = head.sample(features, state, noise=noise, generator=torch.Generator().manual_seed(11))
    np.testing.assert_allclose(sampled.detach(), x, atol=1e-5)
    draws = torch.Generator().manual_seed(11)
    every = torch.stack([noise, *(torch.randn(B, T, D, generator=draws) for _ in range(19))], dim=1)
    np.testing.assert_allclose(head.sample(features, state, noise=every).detach(), x, atol=1e-5)
    with pytest.raises(ValueError, match="noise"):
        head.sample(features, state, noise=every[:, 1:])


@pytest.mark.parametrize("valid_action_dim", [D, 2])
def test_the_masked_cross_entropy_is_its_equation(valid_action_dim):
    head = build("discrete")
    head.valid_action_dim = valid_action_dim
    features, actions, state = data()
    given = training_noise(head)
    nll = []
    for i, (order, u) in enumerate(zip(given["noise"].numpy(), given["time"].numpy())):
        b = i % B
        real = [t * D + d for t in range(T) for d in range(valid_action_dim) if not IS_PAD[b, t]]
        number = max(1, math.ceil(math.cos(math.pi / 2 * float(u)) * len(real)))
        hidden = sorted(real, key=lambda j: order[j])[:number]
        codes = np.clip(np.floor((actions[b].numpy().ravel() + 1) / 2 * 16), 0, 15).astype(int)
        seen = np.array([16 if j in hidden or j not in real else codes[j] for j in range(T * D)])
        one = Features(features.hidden[b : b + 1], features.mask[b : b + 1])
        logits = token_logits(head, seen[None], one, state[b : b + 1])[0]
        nll += [np.log(np.exp(logits[j]).sum()) - logits[j, codes[j]] for j in hidden]
    loss = head.loss(features, actions, IS_PAD, state, **given)["action_loss"]
    assert loss.item() == pytest.approx(np.mean(nll), abs=1e-5)


def decoded(head: DiscreteDiffusionHead, features, state, noise: np.ndarray, rounds: int) -> np.ndarray:
    """MaskGIT's decoding, one sample, one token at a time."""
    n, bins = T * D, head.bins.count
    chunks = np.full((B, n), bins)
    left = n
    for k in range(rounds):
        logits = token_logits(head, chunks, features, state)
        left = (
            min(math.floor(n * math.cos(math.pi / 2 * (k + 1) / rounds)), left - 1) if k < rounds - 1 else 0
        )
        for b in range(B):
            guesses = {}
            for j in np.flatnonzero(chunks[b] == bins):
                p = np.exp(logits[b, j] - logits[b, j].max())
                p /= p.sum()
                tempered = p ** (1 / head.temperature)
                mark = noise[b, k, 0, j] * tempered.sum()
                code = next(c for c in range(bins) if tempered[: c + 1].sum() > mark)
                sure = math.log(p[code] if head.confidence == "token" else p.max())
                gumbel = -math.log(-math.log(noise[b, k, 1, j]))
                guesses[j] = sure + head.choice_temperature * (1 - (k + 1) / rounds) * gumbel, code
            for j in sorted(guesses, key=lambda j: -guesses[j][0])[: len(guesses) - left]:
                chunks[b, j] = guesses[j][1]
    return -1 + (chunks + 0.5) * 2 / bins


@pytest.mark.parametrize(
    "options", [{}, {"confidence": "token", "choice_temperature": 1.0, "temperature": 0.7}]
)
@pytest.mark.parametrize("rounds", [1, 5, 12])
def test_decoding_is_maskgit(rounds, options):
    head = build("discrete", num_steps=rounds, **options)
    features, _, state = data()
    noise = sampling_noise(head)
    expected = decoded(head, features, state, noise.double().numpy(), rounds).reshape(B, T, D)
    np.testing.assert_allclose(head.sample(features, state, noise=noise).detach(), expected, atol=1e-5)


def test_more_rounds_than_tokens_are_not_run():
    head = build("discrete", num_steps=40)
    calls = []
    head.network.register_forward_hook(lambda *_: calls.append(1))
    predict(head, *data()[::2])
    assert len(calls) == T * D


# --- promises of every head --------------------------------------------------------------------------------------------


@every_head
def test_masked_tokens_and_padded_actions_change_nothing(name):
    head = build(name)
    features, actions, state = data()
    other = Features(torch.where(MASK[..., None], features.hidden, 30.0), MASK)
    torch.testing.assert_close(predict(head, other, state), predict(head, features, state), atol=1e-5, rtol=0)
    given = training_noise(head)
    beyond = torch.where(IS_PAD[..., None], 7.0, actions)
    loss, padded, masked = (
        head.loss(f, a, IS_PAD, state, **given)["action_loss"].item()
        for f, a in ((features, actions), (features, beyond), (other, actions))
    )
    assert padded == loss
    assert masked == pytest.approx(loss, abs=1e-5)
    seen = Features(features.hidden.clone(), MASK)
    seen.hidden[:, [0, 4, 6, 8]] += 1.0
    assert (predict(head, seen, state) - predict(head, features, state)).abs().max() > 1e-3, (
        "it reads nothing"
    )


@every_head
def test_the_padding_side_and_the_company_do_not_matter(name):
    head = build(name)
    features, _, state = data()
    together = predict(head, features, state)
    left = Features(features.hidden.clone(), MASK.clone())
    for b in range(B):
        order = torch.cat([(~MASK[b]).nonzero().flatten(), MASK[b].nonzero().flatten()])
        left.hidden[b], left.mask[b] = features.hidden[b, order], MASK[b, order]
    assert not torch.equal(left.mask, MASK)
    torch.testing.assert_close(predict(head, left, state), together, atol=1e-5, rtol=0)
    if getattr(head, "sampler", None) == "ddpm":
        return  # its later draws come from the generator, whose order depends on the size of the batch
    for b in range(B):
        one = Features(features.hidden[b : b + 1, MASK[b]], MASK[b : b + 1, MASK[b]])
        alone = predict(head, one, state[b : b + 1], slice(b, b + 1))
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=0)


def test_the_public_rule_for_the_last_token_would_be_noticed(monkeypatch):
    head = build("transformer")
    features, _, state = data()
    right = predict(head, features, state)
    monkeypatch.setattr(transformer_module, "last_valid", lambda mask: mask.sum(1) - 1)
    wrong = (predict(head, features, state) - right).abs().amax((1, 2))
    assert (wrong > 1e-3).tolist() == [False, False, True]  # right padding is all that it gets right


@every_head
@pytest.mark.parametrize("state_dim", [0, S])
def test_gradients_reach_every_parameter(name, state_dim):
    head = build(name, state_dim=state_dim).train()
    features, actions, state = data()
    features.hidden.requires_grad_()
    head.loss(features, actions, IS_PAD, state if state_dim else None)["action_loss"].backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    reached = features.hidden.grad.abs().sum(-1) > 0
    assert not reached[~MASK].any()
    assert reached.any(1).all()


@every_head
def test_only_trained_dimensions_count(name):
    head = build(name)
    head.valid_action_dim = 2
    features, actions, state = data()
    other = actions.clone()
    other[..., 2] = 7.0
    given = training_noise(head)
    losses = [head.loss(features, a, IS_PAD, state, **given)["action_loss"].item() for a in (actions, other)]
    assert losses[0] == losses[1]
    predicted = predict(head, features, state)
    assert predicted[..., :2].abs().min() > 0
    if not isinstance(
        head, TransformerHead
    ):  # those that feed their own predictions back must not see the third
        assert not predicted[..., 2].any()


@every_head
def test_given_noise_decides_and_stays(name):
    head = build(name)
    features, actions, state = data()
    if isinstance(head, TransformerHead):
        assert torch.equal(head.sample(features, state), head.sample(features, state))
        return
    noise, given = sampling_noise(head), training_noise(head)
    kept = [x.clone() for x in (noise, *given.values(), features.hidden, actions, state)]
    first, second = (predict(head, features, state) for _ in range(2))
    losses = [head.loss(features, actions, IS_PAD, state, **given)["action_loss"].item() for _ in range(2)]
    assert torch.equal(first, second) and losses[0] == losses[1]
    after = (noise, *given.values(), features.hidden, actions, state)
    assert all(torch.equal(a, b) for a, b in zip(kept, after))
    draws = [head.sample(features, state, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["diffusion", "diffusion epsilon", "discrete"])
def test_attention_is_over_valid_tokens_and_sums_to_one(name):
    head = build(name)
    features, _, state = data()
    with torch.no_grad():
        looks = head.attention(features, state, noise=sampling_noise(head))
    assert looks.shape == (B, L)
    torch.testing.assert_close(looks.sum(1), torch.ones(B), atol=1e-5, rtol=0)
    assert not looks[~MASK].any()
    assert (looks[MASK] > 0).all()


@every_head
def test_blocks_to_shard_are_in_the_head(name):
    head = build(name)
    found = {type(module) for module in head.modules()}
    assert head.layer_classes() and head.layer_classes() <= found


@every_head
def test_errors_say_what_to_write(name):
    head = build(name)
    features, actions, state = data()
    with pytest.raises(ValueError, match="a state of 2 numbers per sample, got none"):
        head.sample(features)
    with pytest.raises(ValueError, match=r"got \[\d+, 5\]"):
        head.loss(features, actions, IS_PAD, torch.zeros(B, 5))
    with pytest.raises(ValueError, match="action_horizon"):
        head.loss(features, actions[:, :2], IS_PAD[:, :2], state)
    with pytest.raises(ValueError, match="every action of the batch is padding"):
        head.loss(features, actions, torch.ones_like(IS_PAD), state)
    with pytest.raises(ValueError, match="hidden_size=16 must be divisible by num_heads=3"):
        build(name, num_heads=3)
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        build(name, num_layers=0)


def test_errors_of_one_head():
    features, actions, state = data()
    noise = torch.randn(2, T, D)
    with pytest.raises(
        ValueError, match=r"noise is \[2, 4, 3\], expected \[6, 4, 3\]: repeated_diffusion_steps=2"
    ):
        build("diffusion").loss(features, actions, IS_PAD, state, noise=noise)
    with pytest.raises(ValueError, match=r"integer steps 0 … 99, got torch.int64 from 0 to 100"):
        build("diffusion").loss(features, actions, IS_PAD, state, time=torch.tensor([0, 1, 2, 3, 4, 100]))
    with pytest.raises(ValueError, match="clip_sample to at least 3"):
        build("diffusion epsilon").loss(features, torch.full_like(actions, -3.0), IS_PAD, state)
    with pytest.raises(ValueError, match=r"do not fit the bins' range \[-1, 1\]"):
        build("discrete").loss(features, 2 * actions, IS_PAD, state)
    assert (
        build("discrete", outside="clip").loss(features, 2 * actions, IS_PAD, state)["action_loss"].isfinite()
    )
    with pytest.raises(ValueError, match="time must be uniform numbers"):
        build("discrete").loss(features, actions, IS_PAD, state, time=torch.full((6,), 3.0))
    with pytest.raises(ValueError, match="did you mean 'mse'"):
        build("transformer", loss="rmse")
    blind = Features(features.hidden, MASK & torch.tensor([[True], [False], [True]]))
    with pytest.raises(ValueError, match="sample 1 of the batch has no valid token"):
        build("transformer").sample(blind, state)


# --- learning ----------------------------------------------------------------------------------------------------------


def fit(head: ActionHead, features, actions, steps: int, rate: float, is_pad=None, state=None) -> ActionHead:
    optimizer = torch.optim.Adam(head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    is_pad = torch.zeros(actions.shape[:2], dtype=torch.bool) if is_pad is None else is_pad
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(features, actions, is_pad, state)["action_loss"].backward()
        optimizer.step()
        schedule.step()
    return head


@pytest.mark.parametrize(
    "kind, own, steps",
    [
        (TransformerHead, {}, 150),
        (TransformerHead, {"loss": "l1"}, 150),
        (DiffusionHead, {"hidden_size": 64, "num_layers": 2, "num_heads": 4}, 200),
        (DiscreteDiffusionHead, {"hidden_size": 64, "num_layers": 2, "num_heads": 4}, 200),
    ],
    ids=["transformer", "transformer l1", "diffusion", "discrete"],
)
def test_one_batch_is_learnt(kind, own, steps):
    torch.manual_seed(0)
    head = kind(input_size=H, action_dim=D, horizon=T, state_dim=S, **own)
    features, actions, state = data()
    error = lambda: (head.sample(features, state, generator=draws()) - actions)[~IS_PAD].abs().mean().item()
    draws = lambda: torch.Generator().manual_seed(2)
    start = error()
    fit(head, features, actions, steps, 3e-3, IS_PAD, state).eval()
    assert error() < 0.05 * start


COUNT = 512
SIDES = torch.where(torch.rand(COUNT, 1, 1, generator=torch.Generator().manual_seed(0)) < 2 / 3, -0.8, 0.8)
SAME = Features(torch.ones(COUNT, 1, 4), torch.ones(COUNT, 1, dtype=torch.bool))


def two_modes(kind, horizon: int, steps: int, **own) -> ActionHead:
    """A head that saw chunks on two sides, 2 to 1."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "dropout": 0.0,
        "repeated_diffusion_steps": 1,
    }
    head = kind(input_size=4, action_dim=1, horizon=horizon, state_dim=0, **sizes | own)
    return fit(head, SAME, SIDES + 0.05 * torch.randn(COUNT, horizon, 1), steps, 4e-3)


@torch.no_grad()
def drawn(head: ActionHead) -> torch.Tensor:  # [COUNT, T]
    return head.sample(SAME)[..., 0]


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_diffusion_samples_both_modes(prediction):
    head = two_modes(DiffusionHead, 1, 300, prediction=prediction, clip_sample=1.0)
    for head.sampler, head.steps in (("ddim", 10), ("ddim", 20), ("ddpm", 100)):
        found = drawn(head)
        assert 0.55 < (found < 0).float().mean() < 0.8
        assert (found.abs() < 0.4).float().mean() < 0.08


def test_maskgit_samples_both_modes_and_whole_chunks():
    found = drawn(two_modes(DiscreteDiffusionHead, 4, 150, num_bins=32))
    sides = found.sign().mean(1)
    assert (sides.abs() == 1).float().mean() > 0.9, "chunks go half left and half right"
    assert 0.57 < (sides < 0).float().mean() < 0.76
    assert (found.abs() < 0.4).float().mean() < 0.03


def test_an_argmax_would_forget_a_mode():
    found = drawn(two_modes(DiscreteDiffusionHead, 1, 60, num_bins=32, temperature=0.0))
    assert (found < 0).all()  # the fault that the test above is meant to see


def test_the_codes_of_a_bin_are_its_own():
    bins = discrete.Bins(7, -0.5, 2.0)
    edges = np.linspace(-0.5, 2.0, 8)
    x = np.random.default_rng(0).uniform(-0.5, 2.0, 500).astype(np.float32)
    codes = bins.encode(torch.from_numpy(x)).numpy()
    assert (edges[codes] - 1e-6 <= x).all() and (x <= edges[codes + 1] + 1e-6).all()
    np.testing.assert_allclose(bins.decode(torch.arange(7)), (edges[1:] + edges[:-1]) / 2, atol=1e-6)
