"""What a source is: its numbers are counted, its weight is given, and a run without one is refused."""

from types import SimpleNamespace

import pytest
import torch

from vla_bench.config import ConfigError, load_config
from vla_bench.training.imitation import micro_batches, update
from vla_bench.training.run import set_up
from vla_bench.training.sources import (
    Objective,
    Source,
    action_losses,
    check_insulation,
    count_actions,
    framework_weights,
    head_counts,
    robot_source,
    robots_alone,
    weighted,
)


def source(name: str, weight: float = 1.0) -> Source:
    return Source(
        name, [], list, lambda framework, batch: {name: framework(batch)}, f"{name}_loss", len, 2, weight
    )


def test_actions_that_are_there_are_counted():
    is_pad = torch.tensor([[False, False, True], [True, True, True], [False, True, True]])
    assert count_actions({"action_is_pad": is_pad}) == 3
    mask = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    assert count_actions({"action_is_pad": is_pad, "action_mask": mask}) == 2 * 2 + 1
    assert type(count_actions({"action_is_pad": is_pad})) is int


def test_what_is_decided_already_is_not_counted():
    """Two draws of three samples; of each the delay is its own, and never longer than what is there."""
    is_pad = torch.tensor([[False, False, True], [True, True, True], [False, False, False]])
    delay = torch.tensor([1, 0, 2, 0, 0, 1])
    assert count_actions({"action_is_pad": is_pad, "delay": delay}) == (1 + 0 + 1) + (2 + 0 + 2)
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    found = count_actions({"action_is_pad": is_pad, "delay": delay, "action_mask": mask})
    assert found == (2 + 0 + 1) + (4 + 0 + 2)


@pytest.mark.parametrize("framework", ["GR00T", "PI05"])
def test_accumulation_is_exact_although_actions_are_decided_already(config, framework, monkeypatch):
    """Two micro-batches of four against plain autograd on the eight samples, with the same noise, times and delays."""
    options = "--trainer.gradient_clipping 1e9 --trainer.gradient_accumulation_steps 2"
    options += " --framework.action_model.rtc_max_delay 3"
    spelt = (
        "--datasets.vla_data.normalization.state min_max --framework.action_model.repeated_diffusion_steps 2"
    )
    run = set_up(config(f"{options} {spelt}", framework))
    stream, head = micro_batches(run), run.framework.action_model
    batches = [next(stream), next(stream)]
    delays = [micro["vla"]["delay"].view(2, 4) for micro in batches]
    counts = [count_actions(micro["vla"]) for micro in batches]
    assert counts[0] != counts[1], "choose another seed: this test needs unequal numbers of actions"
    noise, time = torch.randn(2, 8, head.horizon, head.action_dim), torch.rand(2, 8)
    parts, clean = iter([slice(0, 8), slice(0, 4), slice(4, 8)]), type(head).loss

    def given(features, actions, is_pad, *_):
        part = next(parts)
        return clean(head, features, actions, is_pad, noise[:, part].flatten(0, 1), time[:, part].flatten())

    monkeypatch.setattr(head, "loss", given)
    run.model.eval()
    keys = run.sampler().batch(0) + run.sampler().batch(1)
    whole = run.framework.prepare([run.view[key] for key in keys])
    expected_loss = run.framework({**whole, "delay": torch.cat(delays, 1).flatten()})["action_loss"]
    expected_loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in run.framework.parameters()]
    run.framework.zero_grad()
    run.optimizer.zero_grad = lambda: None
    loss, _ = update(run, batches)
    for parameter, gradient in zip(run.framework.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(expected_loss.item(), abs=1e-6)


def test_accumulation_is_exact_for_heads_that_count_other_actions(config, monkeypatch):
    """Three heads, of which two are given decided actions, each its own: two micro-batches of four against the eight."""
    tree = config("--trainer.gradient_clipping 1e9 --trainer.gradient_accumulation_steps 2").to_dict()
    tree["framework"] |= {
        "name": "GR00T",
        "action_model": {
            "oft": {"type": "MLP", "hidden_size": 32, "num_queries": 2},
            "gr00t": {"type": "FlowMatching", "hidden_size": 32, "num_layers": 1, "num_heads": 2,
                      "dropout": 0.0, "rtc_max_delay": 3,
                      "repeated_diffusion_steps": 2, "weight": 0.5},
            "pi0": {"type": "ActionExpert", "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "rtc_max_delay": 2},
        },
    }  # fmt: skip
    run = set_up(load_config(tree))
    stream, draws = micro_batches(run), {"gr00t": 2, "pi0": 1}
    batches = [next(stream), next(stream)]
    counts = [head_counts(micro["vla"]) for micro in batches]
    assert [*counts[0]] == [*draws] and all(counts[0][name] != counts[1][name] for name in draws)
    parts = [slice(0, 8), slice(0, 4), slice(4, 8)]
    for name, repeats in draws.items():
        head = run.framework.action_model.get(name)
        noise, time = torch.randn(repeats, 8, head.horizon, head.action_dim), torch.rand(repeats, 8)
        turn, clean = iter(parts), type(head).loss

        def given(features, actions, is_pad, *_, head=head, noise=noise, time=time, turn=turn, clean=clean):
            part = next(turn)
            return clean(
                head, features, actions, is_pad, noise[:, part].flatten(0, 1), time[:, part].flatten()
            )

        monkeypatch.setattr(head, "loss", given)
    run.model.eval()
    keys = run.sampler().batch(0) + run.sampler().batch(1)
    whole = run.framework.prepare([run.view[key] for key in keys])
    joined = {
        n: torch.cat([b["vla"]["delay"][n].view(r, 4) for b in batches], 1).flatten()
        for n, r in draws.items()
    }
    expected_losses = run.framework({**whole, "delay": joined})
    expected_losses["action_loss"].backward()
    expected = [None if p.grad is None else p.grad.clone() for p in run.framework.parameters()]
    run.framework.zero_grad()
    run.optimizer.zero_grad = lambda: None
    loss, _ = update(run, batches)
    for parameter, gradient in zip(run.framework.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(expected_losses["action_loss"].item(), abs=1e-6)
    for name, value in expected_losses.items():
        assert run.losses[name] == pytest.approx(value.item(), abs=1e-6)


def test_without_a_delay_a_batch_is_what_it_was(config):
    run = set_up(config("", "GR00T"))
    batch = run.framework.prepare([run.view[key] for key in run.sampler().batch(0)])
    state = torch.get_rng_state()
    assert run.sources["vla"].draw(run.framework, batch) is batch
    assert torch.equal(state, torch.get_rng_state())


def test_robots_are_this_source():
    found = robot_source("prepare", "view", 3, "order")
    assert (found.name, found.loss, found.batch_size, found.weight) == ("vla", "action_loss", 3, 1.0)
    assert (found.prepare, found.view, found.order, found.files) == ("prepare", "view", "order", {})
    assert found.losses is action_losses and found.count is count_actions
    assert robot_source("prepare", "view", 3).order is None
    assert action_losses(lambda batch: {"action_loss": batch + 1}, 4) == {"action_loss": 5}


@pytest.mark.parametrize(
    "scale, expected",
    [
        ({}, {"vla": 1.0, "vlm": 0.1}),
        ({"vlm": 2}, {"vla": 1.0, "vlm": 2.0}),
        ({"vla": 0.5, "vlm": 0.25}, {"vla": 0.5, "vlm": 0.25}),
        ({"vlm": 0}, {"vla": 1.0}),
        ({"vla": 0}, {"vlm": 0.1}),
    ],
)
def test_a_weight_of_zero_leaves_a_source_out(scale, expected):
    found = weighted([source("vla"), source("vlm", 0.1)], scale)
    assert {name: each.weight for name, each in found.items()} == expected
    assert all(each.name == name and each.loss == f"{name}_loss" for name, each in found.items())


def test_weights_that_cannot_be_are_refused():
    both = [source("vla"), source("vlm", 0.1)]
    with pytest.raises(
        ConfigError, match="trainer.loss_scale.vml is the weight of no source.*did you mean 'vlm'"
    ):
        weighted(both, {"vml": 1})
    with pytest.raises(ConfigError, match="0 for every source, so there is nothing to learn"):
        weighted(both, {"vla": 0, "vlm": 0})


def test_every_source_gives_the_losses_of_its_own_batch():
    framework = torch.nn.Linear(1, 1)
    objective = Objective(framework, {"vla": source("vla"), "vlm": source("vlm")})
    batches = {"vla": torch.ones(1, 1), "vlm": torch.zeros(1, 1)}
    found = objective(batches)
    assert {name: list(losses) for name, losses in found.items()} == {"vla": ["vla"], "vlm": ["vlm"]}
    for name, batch in batches.items():
        assert torch.equal(found[name][name], framework(batch))
    assert list(objective({"vlm": batches["vlm"]})) == ["vlm"]
    weights = framework_weights(objective.state_dict())
    assert list(weights) == ["weight", "bias"] and torch.equal(weights["bias"], framework.bias)


def test_robots_alone_read_no_conversations():
    plain = load_config({"datasets": {"vla_data": {"root": "a"}}})
    assert robots_alone(plain)(None) == ()
    with pytest.raises(ConfigError, match="datasets.vlm_data: imitation learns from robots alone"):
        robots_alone(load_config({"datasets": {"vla_data": {"root": "a"}, "vlm_data": {"dataset_use": "a"}}}))
    with pytest.raises(ConfigError, match="vla_dta"):
        robots_alone(load_config({"datasets": {"vla_dta": {"root": "a"}}}))


@pytest.mark.parametrize("insulated", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("names", [["vla"], ["vla", "vlm"], ["vlm"]])
def test_a_backbone_that_nothing_trains_is_refused(insulated, frozen, names):
    vlm = torch.nn.Linear(1, 1).requires_grad_(not frozen)
    framework = SimpleNamespace(vlm=vlm, knowledge_insulation=insulated)
    sources = dict.fromkeys(names)
    if insulated and not frozen and names == ["vla"]:
        with pytest.raises(ConfigError, match="knowledge_insulation keeps the gradient of the actions out"):
            check_insulation(framework, sources)
        return
    check_insulation(framework, sources)
