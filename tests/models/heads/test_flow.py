"""The two equations of flow matching, the times, and the compiled loop, without any network."""

import numpy as np
import pytest
import torch
from scipy import stats

from vla_bench.models.features import Features
from vla_bench.models.heads import flow
from vla_bench.models.heads.flow import (
    euler,
    euler_times,
    flow_loss,
    initial_noise,
    noise_and_time,
    run_compiled,
    sample_time_gr00t,
    sample_time_n17,
    sample_time_pi0,
    time_bucket,
)
from vla_bench.models.heads.head import ActionHead, HeadSizes, gaussian_noise

B, T, D = 5, 4, 3


def curved(x: torch.Tensor, t) -> torch.Tensor:
    """A velocity that depends on everything."""
    t = t[:, None, None] if isinstance(t, torch.Tensor) else t
    return torch.sin(3 * x) + t


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["gr00t", "pi0"])
def test_the_loss_equals_the_equation_in_both_conventions(direction):
    torch.manual_seed(0)
    noise, actions, time = torch.randn(B, T, D), torch.randn(B, T, D), torch.rand(B)
    start, end = (noise, actions) if direction == "gr00t" else (actions, noise)
    found = flow_loss(curved, start, end, time).numpy()
    for b in range(B):
        t, a, n = float(time[b]), actions[b].double().numpy(), noise[b].double().numpy()
        if direction == "gr00t":
            x, target = (1 - t) * n + t * a, a - n
        else:
            x, target = t * n + (1 - t) * a, n - a
        np.testing.assert_allclose(found[b], (np.sin(3 * x) + t - target) ** 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [sample_time_gr00t, sample_time_n17, sample_time_pi0])
def test_times_are_drawn_in_float32_under_mixed_precision(given):
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        times = given(100_000)
    assert times.dtype == torch.float32 and 0 <= times.min() and times.max() <= 1
    assert len((times * 1000).long().unique()) > 990  # bfloat16 reaches 501


def test_gr00ts_times_have_the_papers_share_near_the_noise():
    torch.manual_seed(0)
    times = sample_time_gr00t(100_000)
    assert float((times < 0.1).float().mean()) == pytest.approx(1 - (0.999 * 0.9) ** 1.5, abs=0.005)


def test_pi0s_times_are_a_beta_and_stay_off_zero():
    torch.manual_seed(1)
    times = sample_time_pi0(20_000).double()
    assert times.min() >= 0.001
    assert stats.kstest((times - 0.001) / 0.999, stats.beta(1.5, 1).cdf).pvalue > 1e-3


def test_gr00ts_times_are_a_beta_turned_round():
    torch.manual_seed(1)
    times = sample_time_gr00t(20_000).double()
    beta = 0.999 * (1 - times[times > 0])  # clamped ones left out
    assert stats.kstest(beta, lambda x: stats.beta(1.5, 1).cdf(x / 0.999)).pvalue > 1e-3


TIMES = {  # from the same draws of Beta(1.5, 1), in the words of each original
    sample_time_gr00t: lambda beta: np.maximum((0.999 - beta) / 0.999, 0),
    sample_time_n17: lambda beta: 0.999 * (1 - beta),
    sample_time_pi0: lambda beta: 0.999 * beta + 0.001,
}


@pytest.mark.parametrize("sample", TIMES, ids=lambda sample: sample.__name__)
def test_times_are_those_of_the_original_to_the_digit(sample):
    torch.manual_seed(0)
    found = sample(200)
    torch.manual_seed(0)
    beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0)).sample((200,)).double().numpy()
    np.testing.assert_allclose(found.numpy(), TIMES[sample](beta), atol=1e-6)


def test_a_bucket_is_a_thousandth_and_the_last_one_holds_one():
    assert time_bucket(torch.tensor([0.0, 0.0015, 0.5, 0.9999, 1.0])).tolist() == [0, 1, 500, 999, 999]


def test_noise_is_drawn_before_time():
    # the order of draws belongs to a seed
    actions = torch.zeros(B, T, D)
    torch.manual_seed(3)
    noise, time = noise_and_time(actions, None, None, sample_time_gr00t, 1)
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn_like(actions)) and torch.equal(time, sample_time_gr00t(B))


def test_given_noise_and_time_are_taken_as_they_are():
    given = torch.randn(B, T, D), torch.rand(B)
    found = noise_and_time(torch.zeros(B, T, D), *given, sample_time_gr00t, 1)
    assert found[0] is given[0] and found[1] is given[1]


@pytest.mark.parametrize(
    ("noise", "time", "message"),
    [
        (
            torch.zeros(1, T, D),
            None,
            r"noise is \[1, 4, 3\], expected \[5, 4, 3\]: repeated_diffusion_steps=2",
        ),
        (None, torch.zeros(1), r"time is \[1\], expected \[5\]: repeated_diffusion_steps=2"),
        (None, torch.zeros(5, 1), r"time is \[5, 1\], expected \[5\]"),
    ],
)
def test_noise_and_time_of_another_shape_are_refused(noise, time, message):
    with pytest.raises(ValueError, match=message):
        noise_and_time(torch.zeros(B, T, D), noise, time, sample_time_gr00t, 2)


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("steps", [1, 4, 7, 10])
def test_euler_is_the_loop_to_the_last_bit(start, end, steps):
    torch.manual_seed(0)
    noise = torch.randn(B, T, D)
    x = noise
    for k in range(steps):
        if end > start:
            x = x + curved(x, k / steps) / steps
        else:
            x = x - curved(x, 1 - k / steps) / steps
    assert torch.equal(euler(curved, noise, euler_times(steps, start, end)), x)


def test_euler_leaves_its_start_as_it_was():
    noise = torch.randn(B, T, D)
    kept = noise.clone()
    euler(curved, noise, euler_times(3))
    assert torch.equal(noise, kept)


def test_euler_comes_close_to_the_solution_in_both_directions():
    x = torch.ones(1, 1, 1)
    there = euler(lambda x, t: -x, x, euler_times(1000))
    torch.testing.assert_close(there, torch.exp(-x), atol=1e-3, rtol=0)
    back = euler(lambda x, t: -x, there, euler_times(1000, 1.0, 0.0))
    torch.testing.assert_close(back, x, atol=2e-3, rtol=0)


class Shrinking(ActionHead):
    def draw_noise(self, batch, generator=None, device="cpu"):
        return gaussian_noise((batch, self.horizon, self.action_dim), generator, device)

    def denoise(self, x, encoded):
        return euler(lambda x, t: -x * encoded.hidden.mean(), x, euler_times(4))


HEAD = Shrinking(HeadSizes(hidden_size=1, action_dim=D, horizon=T))


def test_sampling_starts_from_the_heads_noise_or_from_the_callers():
    assert initial_noise(HEAD, None, B, "cpu").shape == (B, T, D)
    given = torch.randn(B, T, D)
    assert initial_noise(HEAD, given, B, "cpu") is given
    with pytest.raises(ValueError, match=r"noise is \[5, 4, 3\], expected \[2, 4, 3\]"):
        initial_noise(HEAD, given, 2, "cpu")


def test_a_machine_that_cannot_compile_says_so(monkeypatch, fresh_compiler):
    import torch._dynamo.exc

    def no_compiler(function, **options):
        def fail(*args):
            raise torch._dynamo.exc.InternalTorchDynamoError("no working C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    features = Features(torch.ones(B, 1, 1), torch.ones(B, 1, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"cpu.*no working C\+\+ compiler.*action_model.compile to false"):
        run_compiled(HEAD, torch.randn(B, T, D), features)


def test_noise_is_drawn_where_the_features_are():
    class Head:
        def draw_noise(self, batch, generator=None, device="cpu"):
            return batch, generator, device

    assert initial_noise(Head(), None, 3, "meta") == (3, None, "meta")


@pytest.mark.parametrize("graphs, mode", [(True, "reduce-overhead"), (False, None)])
def test_a_sampler_is_compiled_whole_for_one_shape_and_into_a_graph_on_a_gpu(graphs, mode, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda denoise, **more: asked.append(more))
    flow._compiled.__wrapped__(lambda head, x, encoded: x, graphs)
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": mode}]
