"""What is the same for every kind of head: what counts, chains, and the choice of the form that explores."""

import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads.diffusion import DiffusionHead
from vla_bench.models.heads.discrete_diffusion import DiscreteDiffusionHead
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.registry import HEADS, RegistryError
from vla_bench.rl.flow import StochasticDiTFlow
from vla_bench.rl.gaussian import StochasticRegression
from vla_bench.rl.stochastic import (
    STOCHASTIC,
    ChunkSample,
    StochasticHead,
    cat_samples,
    executed_steps,
    over_steps,
    real_dimensions,
    stochastic,
)

SIZES = HeadSizes(hidden_size=6, action_dim=3, horizon=4)
DIT = {"hidden_size": 8, "num_layers": 1, "num_heads": 1}


def features(batch=2, action_mask=None):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, 7, 6, generator=g)
    return Features(hidden, torch.ones(batch, 7, dtype=torch.bool), num_extra=4, action_mask=action_mask)


def policy(**settings):
    torch.manual_seed(0)
    return stochastic(MLPHead(SIZES), **settings)


@pytest.mark.parametrize("kind", [DiffusionHead, DiscreteDiffusionHead])
def test_a_head_without_a_stochastic_form_is_refused_with_those_that_have_one(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} has no stochastic form") as caught:
        stochastic(kind(SIZES, **DIT))
    listed = "ActionExpert, Bins, FAST, FlowMatching, LayerwiseFlowMatching, MLP, Transformer"
    assert str(caught.value).endswith(f"these heads have one: {listed}")
    assert "\n" not in str(caught.value)


def test_every_registered_form_is_of_a_registered_head():
    assert {*STOCHASTIC.names(), *STOCHASTIC.aliases} <= {*HEADS.names()}


def test_a_head_of_ones_own_has_the_form_of_the_head_that_it_builds_on():
    class Own(MLPHead):
        """Not registered anywhere."""

    assert type(stochastic(Own(SIZES))) is StochasticRegression
    assert type(stochastic(FlowMatchingInferenceHead(SIZES, **DIT))) is StochasticDiTFlow


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(RegistryError, match="takes no argument 'max_sdt'; did you mean 'max_std'"):
        policy(max_sdt=0.4)


def test_a_form_of_ones_own_is_found_by_the_name_of_its_head():
    @HEADS.register("TestOnlyHead")
    class Own(MLPHead):
        """Registered for this test."""

    @STOCHASTIC.register("TestOnlyHead")
    class OwnForm(StochasticHead):
        """Its form."""

    try:
        assert type(stochastic(Own(SIZES))) is OwnForm
    finally:
        del HEADS.classes["TestOnlyHead"], STOCHASTIC.classes["TestOnlyHead"]


def test_a_robots_own_numbers_are_those_of_the_framework_and_of_the_sample():
    head = MLPHead(SIZES)
    head.valid_action_dim = 2
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert real_dimensions(head, mask, 2).tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize("executed", [0, 5, -1])
def test_a_number_of_steps_that_a_chunk_does_not_have_is_refused(executed):
    with pytest.raises(ValueError, match=f"executed={executed} must be from 1 to 4"):
        policy().sample(features(), executed=executed)


def test_what_is_not_executed_gets_no_noise_and_does_not_count():
    own, mask = policy(), torch.tensor([[True, True, True], [True, False, True]])
    seen = features(action_mask=mask)
    drawn = own.sample(seen, executed=2, generator=torch.Generator().manual_seed(0))
    moved = drawn.actions != own.head.sample(seen)
    expected = executed_steps(torch.tensor([2, 2]), 4)[..., None] & mask[:, None]
    assert torch.equal(moved, expected)
    elsewhere = {**drawn.chain, "chunk": torch.where(expected, drawn.chain["chunk"], 99.0)}
    assert torch.equal(own.evaluate(seen, elsewhere).log_prob, own.evaluate(seen, drawn.chain).log_prob)


def test_chains_survive_being_picked_and_put_together():
    own, seen = policy(), features()
    drawn = own.sample(seen, executed=3, generator=torch.Generator().manual_seed(0))
    swapped = cat_samples([drawn[1:], drawn[:1]])
    back = Features(seen.hidden.flip(0), seen.mask, num_extra=4)
    torch.testing.assert_close(
        own.evaluate(back, swapped.chain).log_prob, drawn.log_prob.flip(0), atol=1e-5, rtol=0
    )
    assert torch.equal(swapped.actions, drawn.actions.flip(0))


def test_samples_of_two_kinds_are_not_put_together():
    one = ChunkSample(torch.zeros(1, 4, 3), {"chunk": torch.zeros(1)}, torch.zeros(1))
    other = ChunkSample(torch.zeros(1, 4, 3), {"tokens": torch.zeros(1)}, torch.zeros(1))
    with pytest.raises(ValueError, match=r"one has a chain of \['chunk'\], one of \['tokens'\]"):
        cat_samples([one, other])


def test_a_chunk_that_was_cut_has_the_likelihood_of_its_first_steps():
    own, seen = policy(), features()
    drawn = own.sample(seen, executed=4, generator=torch.Generator().manual_seed(0))
    shorter = own.cut(drawn, torch.tensor([1, 3]))
    found = own.evaluate(seen, shorter.chain)
    assert torch.equal(found.log_prob, shorter.log_prob)
    density = torch.distributions.Normal(own.head.sample(seen), own.std).log_prob(drawn.actions).sum(-1)
    by_hand = torch.stack([density[0, :1].sum(), density[1, :3].sum()])
    torch.testing.assert_close(shorter.log_prob, by_hand, atol=1e-4, rtol=0)
    assert own.cut(shorter, torch.tensor([2, 2])).chain["executed"].tolist() == [1, 2]  # never longer again


def test_nan_behind_the_executed_steps_stays_out_of_the_sum():
    each = torch.tensor([[1.0, 2.0, torch.nan]])
    assert over_steps(each, torch.tensor([2])).tolist() == [3.0]


def test_dropout_is_off_and_comes_back():
    torch.manual_seed(0)
    head = MLPHead(SIZES)
    head.layers.append(torch.nn.Dropout(0.5))
    own, seen = stochastic(head).train(), features()
    drawn = own.sample(seen, executed=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(own.evaluate(seen, drawn.chain).log_prob, drawn.log_prob)
    assert head.training and head.layers[-1].training
