"""What holds for every head that reads the last hidden states: transformer, diffusion, discrete diffusion."""

from dataclasses import replace

import pytest
import torch

from vla_bench.models.features import Features

SAMPLED = ("diffusion", "diffusion epsilon", "discrete")
every_head = pytest.mark.parametrize("name", ("transformer", "transformer l1", *SAMPLED))
sampled_head = pytest.mark.parametrize("name", SAMPLED)


@every_head
def test_masked_tokens_change_nothing(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    other = replace(features, hidden=torch.where(kit.MASK[..., None], features.hidden, 30.0))
    torch.testing.assert_close(kit.predict(head, other), kit.predict(head, features), atol=1e-5, rtol=0)
    assert kit.loss(head, other, actions) == pytest.approx(kit.loss(head, features, actions), abs=1e-5)


@every_head
def test_valid_tokens_are_read(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    other = replace(features, hidden=features.hidden.clone())
    other.hidden[:, [0, 4, 6, 8]] += 1.0
    assert (kit.predict(head, other) - kit.predict(head, features)).abs().max() > 1e-3


@every_head
def test_padded_actions_change_nothing(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    beyond = torch.where(kit.IS_PAD[..., None], 7.0, actions)
    assert kit.loss(head, features, beyond) == kit.loss(head, features, actions)


@every_head
def test_the_padding_side_does_not_matter(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    left = replace(features, hidden=features.hidden.clone(), mask=kit.MASK.clone())
    for b in range(kit.B):
        order = torch.cat([(~kit.MASK[b]).nonzero().flatten(), kit.MASK[b].nonzero().flatten()])
        left.hidden[b], left.mask[b] = features.hidden[b, order], kit.MASK[b, order]
    assert not torch.equal(left.mask, kit.MASK)
    torch.testing.assert_close(kit.predict(head, left), kit.predict(head, features), atol=1e-5, rtol=0)


@every_head
def test_the_other_samples_of_a_batch_do_not_matter(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    together, noise = kit.predict(head, features), kit.sampling_noise(head)
    for b in range(kit.B):
        valid, one = kit.MASK[b], slice(b, b + 1)
        own = Features(features.hidden[one, valid], kit.MASK[one, valid], state=features.state[one])
        with torch.no_grad():
            alone = head.sample(own, None if noise is None else noise[one])
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=0)


@every_head
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients_reach_every_parameter(kit, name, with_state):
    head, (features, actions) = kit.build(name, state_dim=kit.S if with_state else 0).train(), kit.data()
    features = features if with_state else replace(features, state=None)
    head.loss(features, actions, kit.IS_PAD)["action_loss"].backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_head
def test_gradients_reach_valid_tokens_alone(kit, name):
    head, (features, actions) = kit.build(name).train(), kit.data()
    features.hidden.requires_grad_()
    head.loss(features, actions, kit.IS_PAD)["action_loss"].backward()
    reached = features.hidden.grad.abs().sum(-1) > 0
    assert not reached[~kit.MASK].any()
    assert reached.any(1).all()


@every_head
@pytest.mark.parametrize("has", [1, 2])
def test_dimensions_that_the_robot_lacks_do_not_count(kit, name, has):
    head, (features, actions) = kit.build(name), kit.data()
    head.valid_action_dim = has
    other = actions.clone()
    other[..., has:] = 7.0
    assert kit.loss(head, features, other) == kit.loss(head, features, actions)
    assert kit.predict(head, features)[..., :has].abs().min() > 0


@sampled_head
@pytest.mark.parametrize("has", [1, 2])
def test_dimensions_that_the_robot_lacks_are_zero(kit, name, has):
    """These heads read their own predictions again and must not see them."""
    head, (features, _) = kit.build(name), kit.data()
    head.valid_action_dim = has
    assert not kit.predict(head, features)[..., has:].any()


@sampled_head
def test_given_noise_decides(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    assert torch.equal(kit.predict(head, features), kit.predict(head, features))
    assert kit.loss(head, features, actions) == kit.loss(head, features, actions)


@sampled_head
def test_arguments_stay_as_they_were(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    noise, given = kit.sampling_noise(head), kit.training_noise(head)
    arguments = (noise, *given.values(), features.hidden, features.state, features.mask, actions)
    kept = [x.clone() for x in arguments]
    head.sample(features, noise)
    head.loss(features, actions, kit.IS_PAD, **given)
    assert all(torch.equal(a, b) for a, b in zip(kept, arguments))


@sampled_head
def test_a_seed_decides(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    first, again, other = (kit.sampled(head, features, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32


@sampled_head
def test_attention_is_over_valid_tokens_and_sums_to_one(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    with torch.no_grad():
        looks = head.attention(features, kit.sampling_noise(head))
    assert head.offers_attention and looks.shape == (kit.B, kit.L)
    torch.testing.assert_close(looks.sum(1), torch.ones(kit.B), atol=1e-5, rtol=0)
    assert not looks[~kit.MASK].any()
    assert (looks[kit.MASK] > 0).all()


@every_head
def test_blocks_to_shard_are_in_the_head(kit, name):
    head = kit.build(name)
    found = {type(module) for module in head.modules()}
    assert head.layer_classes() and head.layer_classes() <= found


@every_head
def test_a_missing_state_is_named(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    with pytest.raises(ValueError, match="a state of 2 numbers per sample, got none"):
        head.sample(replace(features, state=None))


@every_head
def test_a_state_of_another_size_is_named(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    with pytest.raises(ValueError, match=r"got \[\d+, 5\]"):
        head.loss(replace(features, state=torch.zeros(kit.B, 5)), actions, kit.IS_PAD)


@every_head
def test_a_chunk_of_another_horizon_is_named(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    with pytest.raises(ValueError, match="action_horizon"):
        head.loss(features, actions[:, :2], kit.IS_PAD[:, :2])


@every_head
def test_a_batch_of_padding_alone_is_refused(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    with pytest.raises(ValueError, match="every action of the batch is padding"):
        head.loss(features, actions, torch.ones_like(kit.IS_PAD))


@every_head
def test_sizes_that_cannot_be_are_named(kit, name):
    with pytest.raises(ValueError, match="hidden_size=16 must be divisible by num_heads=3"):
        kit.build(name, num_heads=3)
    with pytest.raises(ValueError, match="num_layers=0 must be at least 1"):
        kit.build(name, num_layers=0)
