"""Flow matching with a diffusion transformer: every form of head against the equations in numpy, and what all promise."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from vla_bench.models.features import BackboneSizes, Features
from vla_bench.models.heads import flow
from vla_bench.models.heads.flow import flow_loss
from vla_bench.models.heads.flow_matching import DiTFlowHead, FlowMatchingHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.layerwise_flow import LayerwiseFlowMatchingHead
from vla_bench.registry import HEADS, RegistryError

T, D, S, H, L, E, B = 4, 3, 2, 12, 5, 3, 2
SIZES = HeadSizes(hidden_size=H, action_dim=D, horizon=T, state_dim=S)
SMALL = {"hidden_size": 8, "num_heads": 2, "num_layers": 3, "num_future_tokens": 2}
PADDED = torch.tensor([[False] * T, [False, False, True, True]])


@pytest.fixture
def chunks() -> tuple[torch.Tensor, torch.Tensor]:
    """Actions and padding, apart from the seeds of heads and features."""
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(5)), PADDED


# --- against the equations --------------------------------------------------------------------------------------------


def test_the_loss_equals_the_equations(case, chunks):
    head, features = case.build(), case.features()
    equations, (actions, is_pad) = case.equations(head, features), chunks
    noise, time = torch.randn(3 * B, T, D), torch.tensor([0.0, 0.13, 0.5, 0.77, 0.9985, 0.31])
    squares = []
    for row in range(3 * B):  # the draws lie behind each other
        b = row % B
        a, n, t = actions[b].double().numpy(), noise[row].double().numpy(), float(time[row])
        v, _ = equations.velocity(b, (1 - t) * n + t * a, t)
        squares += [(v[i] - (a - n)[i]) ** 2 for i in range(T) if not is_pad[b, i]]
    loss = head.loss(features, actions, is_pad, noise, time)["action_loss"]
    assert float(loss.detach()) == pytest.approx(np.mean(squares), rel=1e-5)


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
def test_the_sampler_equals_the_equations(case, inference):
    head = case.pair()[inference]
    features, noise = case.features(), torch.randn(B, T, D)
    equations = case.equations(head, features)
    with torch.no_grad():
        found = head.sample(features, noise)
    for b in range(B):
        expected, _ = equations.integrate(b, noise[b].double().numpy(), steps=5)
        np.testing.assert_allclose(found[b].numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
def test_the_attention_equals_the_equations(case, inference):
    head = case.pair()[inference]
    features, noise = case.features(), torch.randn(B, T, D)
    equations = case.equations(head, features)
    with torch.no_grad():
        looks = head.attention(features, noise)
    for b in range(B):
        _, expected = equations.integrate(b, noise[b].double().numpy(), steps=5)
        np.testing.assert_allclose(looks[b, features.mask[b]].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
def test_the_callers_noise_stays_as_it_was(case, inference):
    head, features, noise = case.pair()[inference], case.features(), torch.randn(B, T, D)
    kept = noise.clone()
    head.sample(features, noise)
    head.attention(features, noise)
    assert torch.equal(noise, kept)


def test_the_norms_have_the_epsilons_of_the_original(flow_case):
    # An epsilon shows only where the variance is as small: everything that is added to a token is shrunk.
    case = flow_case("last")
    head, features = case.build(), case.features()
    small = ("future_tokens", "positions", "state_encoder.2", "action_time.2", "to_out", "feed_forward.3")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter *= 1e-2 if any(part in name for part in small) else 1
    noise, equations = torch.randn(B, T, D), case.equations(head, features)
    with torch.no_grad():
        found, _ = head.velocity(noise, torch.tensor([0.2, 0.2]), head.encode_context(features))
    for b in range(B):
        expected, _ = equations.velocity(b, noise[b].double().numpy(), 0.2)
        np.testing.assert_allclose(found[b].numpy(), expected, atol=1e-5)


# --- promises of every head -------------------------------------------------------------------------------------------


def with_token(features: Features, b: int, i: int) -> Features:
    """Features with another token at one place, in every layer."""
    layers = [h.clone() for h in features.layers]
    for h in layers:
        h[b, i] = 30.0
    return replace(features, hidden=layers[-1], layers=tuple(layers))


def test_padding_of_the_prompt_changes_nothing(case):
    head, features, noise = case.build(), case.features(), torch.randn(B, T, D)
    before = head.sample(features, noise)
    torch.testing.assert_close(head.sample(with_token(features, 1, 0), noise), before, atol=1e-5, rtol=0)


def test_a_valid_token_changes_its_own_sample_alone(case):
    head, features, noise = case.build(), case.features(), torch.randn(B, T, D)
    before, changed = head.sample(features, noise), head.sample(with_token(features, 1, 2), noise)
    assert (changed[1] - before[1]).abs().max() > 1e-3
    torch.testing.assert_close(changed[0], before[0], atol=1e-5, rtol=0)


def test_attention_is_a_share_of_the_valid_tokens(case):
    head, features = case.build(), case.features()
    looks = head.attention(features, torch.randn(B, T, D)).detach()
    torch.testing.assert_close(looks.sum(1), torch.ones(B))
    assert float(looks[~features.mask].abs().sum()) == 0.0


def test_alone_or_in_a_batch_the_same_actions(case):
    head, features, noise = case.build(), case.features(), torch.randn(B, T, D)
    together = head.sample(features, noise)
    for b in range(B):
        valid, rows = features.mask[b], slice(b, b + 1)
        layers = tuple(h[rows, valid] for h in features.layers)
        mask = torch.ones(1, int(valid.sum()), dtype=torch.bool)
        own = {n: getattr(features, n) for n in ("state", "embodiment")}
        own = {n: None if x is None else x[rows] for n, x in own.items()}
        alone = head.sample(Features(layers[-1], mask, layers=layers, **own), noise[rows])
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=1e-5)


def test_a_gradient_reaches_every_parameter(case, chunks):
    head, features = case.build(), case.features()
    head.loss(features, *chunks)["action_loss"].backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["last, robots", "each, two robots"])
def test_a_robot_trains_its_own_weights_alone(flow_case, chunks, name):
    case = flow_case(name)
    head, features = case.build(), replace(case.features(), embodiment=torch.tensor([1, 2]))
    head.loss(features, *chunks)["action_loss"].backward()
    own = [p.grad for n, p in head.named_parameters() if n.startswith(("state_encoder", "action_"))]
    assert all([bool(g.any()) for g in grad] == [False, True, True] for grad in own)


def test_several_draws_cost_the_backbones_states_once(case, chunks):
    head, rows = case.build(), []
    for block, cross in zip(head.dit.blocks, head.dit.crosses):
        if cross:
            block.attention.to_k.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    head.loss(case.features(), *chunks)
    assert rows == [B] * sum(head.dit.crosses)  # not 3 · B


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
def test_an_observation_without_a_valid_token_gives_no_nan(case, inference):
    head = case.pair()[inference]
    features = case.features(mask=torch.tensor([[True] * L, [False] * L]))
    with torch.no_grad():
        looks = head.attention(features)
        assert head.sample(features).isfinite().all()
    assert looks.isfinite().all() and not looks[1].any()
    torch.testing.assert_close(looks[0].sum(), torch.tensor(1.0))


def test_an_observation_without_a_valid_token_trains_to_finite_gradients(case):
    head = case.build()
    features = case.features(mask=torch.tensor([[True] * L, [False] * L]))
    if features.embodiment is not None:
        features = replace(features, embodiment=torch.tensor([0, 0]))
    is_pad = torch.tensor([[False] * T, [True] * T])
    loss = head.loss(features, torch.randn(B, T, D), is_pad)["action_loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in head.parameters())


def losses_of(case, change) -> list[torch.Tensor]:
    """The loss at t = 0, where the input is noise alone, with actions and with changed actions."""
    head, features = case.build(), case.features()
    head.valid_action_dim = 2
    noise, time, actions = torch.randn(3 * B, T, D), torch.zeros(3 * B), torch.randn(B, T, D)
    other = actions.clone()
    change(other)
    is_pad = torch.tensor([[False] * T, [False, True, True, True]])
    return [head.loss(features, a, is_pad, noise, time)["action_loss"] for a in (actions, other)]


def test_dimensions_that_the_robot_does_not_have_stay_out_of_the_loss(case):
    torch.testing.assert_close(*losses_of(case, lambda actions: actions[..., 2].fill_(40.0)))


def test_steps_behind_the_episodes_end_stay_out_of_the_loss(case):
    torch.testing.assert_close(*losses_of(case, lambda actions: actions[1, 1:].fill_(40.0)))


@pytest.mark.parametrize(("name", "count"), [("last, refined", 5), ("each, narrow", 4)])
def test_blocks_to_shard_are_run_as_modules_in_training(flow_case, chunks, name, count):
    # What FSDP gathers or a checkpointing wrapper saves happens around forward; a loop that goes past it loses both.
    case, calls = flow_case(name), []
    head = case.build()
    for module in head.modules():
        if type(module) in head.layer_classes():
            module.register_forward_hook(lambda *_: calls.append(1))
    head.loss(case.features(), *chunks)
    assert len(calls) == count


def test_noise_is_drawn_in_the_shape_of_a_chunk_and_by_the_generator(case):
    head = case.build()
    first, second = (head.draw_noise(B, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (B, T, D) and torch.equal(first, second)


def test_seeds_of_the_global_generator_decide_when_nothing_is_given(case, chunks):
    head, features = case.build(), case.features()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append((head.sample(features), head.loss(features, *chunks)["action_loss"]))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    assert found[0][1] == found[1][1] != found[2][1]


# --- names and shapes that checkpoints know ---------------------------------------------------------------------------


def test_one_robot_means_ordinary_layers():
    head = FlowMatchingHead(SIZES, **SMALL)
    linears = {n for n, m in head.named_modules() if type(m) is torch.nn.Linear}
    assert {"action_in", "action_time.0", "action_time.2", "state_encoder.0", "action_out.2"} <= linears
    assert head.positions.shape == (T, 8) and head.vl is None


def test_parameters_keep_their_names_and_their_order():
    head = FlowMatchingHead(SIZES, **SMALL)
    names = [n for n, _ in head.named_parameters() if not n.startswith("dit.")]
    assert names == [
        "future_tokens",
        "positions",
        *(f"{m}.{p}" for m in ("state_encoder.0", "state_encoder.2") for p in ("weight", "bias")),
        "action_in.weight",
        "action_in.bias",
        *(f"{m}.{i}.{p}" for m in ("action_time", "action_out") for i in (0, 2) for p in ("weight", "bias")),
    ]


@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("last, refined", ["dit", "state_encoder", "action_in", "action_time", "action_out", "vl"]),
        ("each, narrow", ["dit", "state_encoder", "action_in", "action_time", "action_out", "project"]),
    ],
)
def test_modules_keep_their_order(flow_case, name, children):
    assert [n for n, _ in flow_case(name).build().named_children()] == children


def test_sizes_of_public_checkpoints_can_be_written_down():
    own = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "mlp_size": 10, "output_size": 20}
    head = FlowMatchingHead(replace(SIZES, num_embodiments=4), **own, max_positions=64)
    shapes = {n: tuple(p.shape) for n, p in head.named_parameters()}
    assert shapes["positions"] == (64, 16) and shapes["dit.out.weight"] == (20, 16)
    assert shapes["state_encoder.0.weight"] == (4, S, 10) and shapes["state_encoder.2.weight"] == (4, 10, 16)
    assert shapes["action_out.0.weight"] == (4, 20, 10) and shapes["action_out.2.weight"] == (4, 10, D)


def test_names_in_the_registry():
    assert HEADS.get("FlowMatchingHead") is FlowMatchingHead
    assert HEADS.get("LayerwiseFM") is LayerwiseFlowMatchingHead


def test_a_misspelt_argument_is_named():
    build = partial(HEADS.build, sizes=SIZES)
    with pytest.raises(RegistryError, match="did you mean 'num_layers'"):
        build({"type": "FlowMatching", "num_layer": 2})


def test_what_the_blocks_look_at_is_for_a_subclass_to_say(flow_case):
    head = flow_case("last").build()
    with pytest.raises(NotImplementedError):
        DiTFlowHead.contexts(head, flow_case("last").features())


# --- refused, with what to write instead ------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
def test_noise_of_another_shape_is_refused(case, inference):
    with pytest.raises(ValueError, match=r"noise is \[1, 4, 3\], expected \[2, 4, 3\]"):
        case.pair()[inference].sample(case.features(), torch.randn(1, T, D))


def test_training_noise_and_time_of_another_shape_are_refused(flow_case, chunks):
    case = flow_case("last")
    head, features = case.build(), case.features()
    with pytest.raises(
        ValueError, match=r"noise is \[2, 4, 3\], expected \[6, 4, 3\].*repeated_diffusion_steps"
    ):
        head.loss(features, *chunks, noise=torch.randn(2, T, D), time=torch.rand(6))
    with pytest.raises(ValueError, match=r"time is \[2\], expected \[6\]"):
        head.loss(features, *chunks, noise=torch.randn(6, T, D), time=torch.rand(2))


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
@pytest.mark.parametrize("name", ["last", "each"])
def test_a_state_of_another_size_is_refused(flow_case, name, inference):
    case = flow_case(name)
    head, features = case.pair()[inference], case.features()
    for odd in (None, features.state[:1], features.state[:, :1]):
        with pytest.raises(ValueError, match="a state of 2 numbers per sample"):
            head.sample(replace(features, state=odd))


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
@pytest.mark.parametrize(
    ("robot", "message"),
    [
        (None, "list the datasets in framework.embodiments, or set num_embodiments to 1"),
        (torch.tensor([0, E]), f"embodiment {E} is outside 0..{E - 1}"),
        (torch.tensor([0, -1]), "embodiment -1 is outside"),
        (torch.tensor([0]), r"expected int64 \[2\]"),
        (torch.tensor([0.0, 1.0]), r"torch.float32 \[2\], expected int64"),
    ],
)
@pytest.mark.parametrize("name", ["last, robots", "each, two robots"])
def test_an_embodiment_that_does_not_fit_is_named(flow_case, name, robot, message, inference):
    case = flow_case(name)
    with pytest.raises(ValueError, match=message):
        case.pair()[inference].sample(replace(case.features(), embodiment=robot))


@pytest.mark.parametrize("name", ["last", "each"])
def test_a_head_for_one_robot_reads_no_embodiment(flow_case, name):
    case = flow_case(name)
    for head in case.pair():
        noise, features = torch.randn(B, T, D), case.features()
        told = replace(features, embodiment=torch.tensor([7, 9]))
        assert torch.equal(head.sample(told, noise), head.sample(features, noise))


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("last", {"num_heads": 3}, "hidden_size=8 must be divisible by num_heads=3"),
        ("last", {"hidden_size": 9, "num_heads": 3}, "hidden_size=9 must be even"),
        ("last", {"max_positions": 3}, "max_positions=3 is less than the 4 actions"),
        ("last", {"num_vl_layers": 1, "num_vl_heads": 5}, "12 is not divisible by num_vl_heads=5"),
        ("last", {"num_layers": 0}, "num_layers=0 must be at least 1"),
        ("last", {"repeated_diffusion_steps": 0}, "repeated_diffusion_steps=0 must be at least 1"),
        ("last", {"num_inference_timesteps": 0}, "num_inference_timesteps=0 must be at least 1"),
        ("each", {"num_heads": 5}, "hidden_size=12 must be divisible by num_heads=5"),
        ("each", {"num_layers": 5}, "num_layers=5, but the backbone has 4 layers"),
        ("each", {"num_layers": 0}, "num_layers=0 must be at least 1"),
        ("each", {"num_layers": 1}, "a state token would change nothing"),
        ("each", {"interleave_self_attention": False}, "framework.prompt and set state_token"),
        (
            "each",
            {"interleave_self_attention": False, "state_token": False},
            "num_future_tokens=2 would change nothing",
        ),
    ],
)
def test_a_head_that_could_not_work_is_refused(flow_case, name, change, message, inference):
    case = flow_case(name)
    kind = type(case.pair()[inference])
    with pytest.raises(ValueError, match=message):
        kind(case.sizes, **case.arguments | change)


# --- learning ---------------------------------------------------------------------------------------------------------


def test_both_modes_are_learnt():
    torch.manual_seed(0)
    own = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_future_tokens": 1, "dropout": 0.0}
    head = FlowMatchingHead(
        HeadSizes(4, action_dim=1, horizon=1, backbone=BackboneSizes(4, 2, 10)),
        **own,
        repeated_diffusion_steps=1,
        num_inference_timesteps=10,
    )
    sides = torch.where(torch.rand(512, 1, 1) < 2 / 3, -1.0, 1.0) + 0.1 * torch.randn(512, 1, 1)
    features = Features(torch.ones(512, 1, 4), torch.ones(512, 1, dtype=torch.bool))
    optimizer = torch.optim.Adam(head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=200)
    for _ in range(200):
        optimizer.zero_grad()
        head.loss(features, sides, torch.zeros(512, 1, dtype=torch.bool))["action_loss"].backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = head.sample(features)
    assert 0.5 < (found < 0).float().mean() < 0.82
    assert (found.abs() < 0.4).float().mean() < 0.15


# --- what GR00T N1.5 and N1.7 do otherwise ----------------------------------------------------------------------------


def told(case, image: list[list[bool]]) -> Features:
    """The features of a case, with the tokens that are an image's."""
    return replace(case.features(), image=torch.tensor(image))


IMAGE = [[False, True, True, False, False], [False, False, True, False, False]]
TEXT = [[not each for each in row] for row in IMAGE]


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"num_layers": 1, "attend_text_every_n_blocks": 2}, TEXT),
        ({"num_layers": 3, "attend_text_every_n_blocks": 1}, TEXT),
        ({"num_layers": 3, "attend_text_every_n_blocks": 2}, [[True] * L] * B),
    ],
    ids=["one block: the text", "text in every block", "text, then the images"],
)
def test_turns_decide_which_tokens_matter(flow_case, change, seen, inference):
    case = flow_case("last")
    head, features, noise = case.pair(**change)[inference], told(case, IMAGE), torch.randn(B, T, D)
    before = head.sample(features, noise)
    for b, i in itertools.product(range(B), range(L)):
        after = head.sample(with_token(features, b, i), noise)
        moved = bool((after[b] - before[b]).abs().max() > 1e-4)
        assert moved == (bool(features.mask[b, i]) and seen[b][i]), (b, i)
        torch.testing.assert_close(after[1 - b], before[1 - b], atol=1e-5, rtol=0)


@pytest.mark.parametrize("inference", [False, True], ids=["training head", "inference head"])
@pytest.mark.parametrize(("mask_padding", "matters"), [(True, False), (False, True)])
def test_padding_is_looked_at_where_it_is_asked_for(flow_case, mask_padding, matters, inference):
    case = flow_case("last")
    head = case.pair(mask_padding=mask_padding)[inference]
    features, noise = case.features(), torch.randn(B, T, D)
    moved = (head.sample(with_token(features, 1, 0), noise) - head.sample(features, noise)).abs().amax((1, 2))
    assert (moved > 1e-4).tolist() == [False, matters]


@pytest.mark.parametrize(("mask_vl_padding", "matters"), [(True, False), (False, True)])
def test_padding_is_looked_at_by_the_refiner_alone(flow_case, mask_vl_padding, matters):
    case = flow_case("last, refined")
    head, features, noise = case.build(mask_vl_padding=mask_vl_padding), case.features(), torch.randn(B, T, D)
    head.eval()
    moved = (head.sample(with_token(features, 1, 0), noise) - head.sample(features, noise)).abs().amax((1, 2))
    assert (moved > 1e-4).tolist() == [False, matters]
    looks = head.attention(features, noise)
    assert not looks[~features.mask].any()  # the blocks themselves do not


def test_each_draw_of_a_batch_has_the_masks_of_its_own_sample(flow_case, chunks):
    case = flow_case("last")
    head, features = case.build(attend_text_every_n_blocks=2).eval(), told(case, IMAGE)
    noise, time, (actions, is_pad) = torch.randn(3 * B, T, D), torch.rand(3 * B), chunks
    together = head.loss(features, actions, is_pad, noise, time)["action_loss"]
    head.repeats = 1
    errors = []
    for row in range(3 * B):
        rows = slice(row % B, row % B + 1)
        fields = {n: getattr(features, n)[rows] for n in ("hidden", "mask", "state", "image")}
        alone = head.loss(
            Features(**fields), actions[rows], is_pad[rows], noise[row : row + 1], time[row : row + 1]
        )
        errors.append(alone["action_loss"] * (~is_pad[rows]).sum())
    torch.testing.assert_close(together, torch.stack(errors).sum() / (3 * (~is_pad).sum()))


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_state_is_withheld_from_a_share_of_the_samples_in_training_alone(flow_case, share):
    head, many = flow_case("last").build(state_dropout=share), 4000
    features = Features(torch.zeros(many, 1, H), torch.ones(many, 1).bool(), state=torch.ones(many, S))
    withheld = ~head.observation_tokens(features)[:, 0].any(-1)
    assert abs(float(withheld.float().mean()) - share) < 0.03
    assert head.eval().observation_tokens(features)[:, 0].any(-1).all()


@pytest.mark.parametrize(("name", "sample"), [("n15", flow.sample_time_gr00t), ("n17", flow.sample_time_n17)])
def test_training_times_are_those_that_were_asked_for(flow_case, chunks, name, sample, monkeypatch):
    case, heard = flow_case("last"), []
    head, features, given = case.build(time_sampling=name), case.features(), flow_loss
    monkeypatch.setattr(
        "vla_bench.models.heads.flow_matching.flow_loss", lambda *each: heard.append(each[3]) or given(*each)
    )
    torch.manual_seed(3)
    head.loss(features, *chunks)
    torch.manual_seed(3)
    torch.randn(3 * B, T, D)  # the noise is drawn first
    torch.testing.assert_close(heard[0], sample(3 * B))


def test_the_refiner_has_its_own_dropout(flow_case):
    head = flow_case("last, refined").build(vl_dropout=0.3)
    assert {m.p for m in head.vl.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {m.p for m in head.dit.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attend_text_every_n_blocks": 0}, "attend_text_every_n_blocks=0 must be at least 1"),
        (
            {"attend_text_every_n_blocks": 2, "interleave_self_attention": False},
            "attend_text_every_n_blocks needs interleave_self_attention",
        ),
        ({"state_dropout": 1.0}, "state_dropout=1.0 must be at least 0 and below 1"),
        ({"time_sampling": "n16"}, "unknown time_sampling 'n16'; did you mean 'n1"),
    ],
)
def test_an_option_that_cannot_be_is_refused(flow_case, change, message):
    case = flow_case("last")
    with pytest.raises(ValueError, match=message):
        case.cls(case.sizes, **case.arguments | change)


def test_turns_without_a_mask_of_images_are_refused(flow_case):
    case = flow_case("last")
    head = case.build(attend_text_every_n_blocks=2)
    assert head.separates_images and not case.build().separates_images
    with pytest.raises(
        ValueError, match="do not say which tokens are an image's; .* framework.name to GR00T"
    ):
        head.sample(case.features())
