"""The transformer head against its equation, written a second time in numpy."""

import numpy as np
import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads import transformer as transformer_module
from vla_bench.models.heads.transformer import TransformerHead

EACH_LOSS = pytest.mark.parametrize("name", ["transformer", "transformer l1"])


@EACH_LOSS
def test_the_prediction_is_the_equation(kit, name):
    head, (features, _) = kit.build(name), kit.data()
    np.testing.assert_allclose(kit.predict(head, features), kit.transformer(head, features), atol=1e-5)


@EACH_LOSS
def test_the_loss_is_the_equation(kit, name):
    head, (features, actions) = kit.build(name), kit.data()
    difference = (kit.transformer(head, features) - actions.numpy())[~kit.IS_PAD.numpy()]
    error = np.abs(difference).mean() if name.endswith("l1") else (difference**2).mean()
    assert kit.loss(head, features, actions) == pytest.approx(error, abs=1e-5)


def test_the_public_rule_for_the_last_token_would_be_noticed(kit, monkeypatch):
    head, (features, _) = kit.build("transformer"), kit.data()
    right = kit.predict(head, features)
    monkeypatch.setattr(transformer_module, "last_valid", lambda mask: mask.sum(1) - 1)
    wrong = (kit.predict(head, features) - right).abs().amax((1, 2))
    assert (wrong > 1e-3).tolist() == [False, False, True]  # right padding is all that it gets right


def test_nothing_is_drawn(kit):
    head, (features, _) = kit.build("transformer"), kit.data()
    assert head.draw_noise(3) is None
    assert torch.equal(head.sample(features), head.sample(features))


def test_a_prompt_without_a_valid_token_is_named(kit):
    features, _ = kit.data()
    mask = kit.MASK & torch.tensor([[True], [False], [True]])
    blind = Features(features.hidden, mask, state=features.state)
    with pytest.raises(ValueError, match="sample 1 of the batch has no valid token"):
        kit.build("transformer").sample(blind)


def test_a_misspelt_loss_is_named(kit):
    with pytest.raises(ValueError, match="did you mean 'mse'"):
        kit.build("transformer", loss="rmse")


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_one_batch_is_learnt(kit, loss):
    torch.manual_seed(0)
    head, (features, actions) = TransformerHead(kit.SIZES, loss=loss), kit.data()
    error = lambda: (head.sample(features) - actions)[~kit.IS_PAD].abs().mean().item()
    start = error()
    kit.fit(head, features, actions, 150, 3e-3, kit.IS_PAD).eval()
    assert error() < 0.05 * start


# --- weights with the old name of the action queries -----------------------------------------------------------------


def old_weights(head: TransformerHead, prefix: str = "") -> dict[str, torch.Tensor]:
    """As version 0.1 saved them."""
    return {
        prefix + name.replace("action_queries", "blanks"): value for name, value in head.state_dict().items()
    }


def test_old_weights_load(kit):
    head, other = kit.build("transformer"), kit.build("transformer")
    torch.nn.init.zeros_(other.action_queries)
    other.load_state_dict(old_weights(head), strict=True)
    assert torch.equal(other.action_queries, head.action_queries)


def test_old_weights_load_inside_a_larger_module(kit):
    head = kit.build("transformer")
    outer = torch.nn.ModuleDict({"action_model": kit.build("transformer")})
    torch.nn.init.zeros_(outer["action_model"].action_queries)
    outer.load_state_dict(old_weights(head, "action_model."), strict=True)
    assert torch.equal(outer["action_model"].action_queries, head.action_queries)


def test_the_callers_weights_keep_their_names(kit):
    head = kit.build("transformer")
    weights = old_weights(head)
    head.load_state_dict(weights)
    assert "blanks" in weights and "action_queries" not in weights


def test_both_names_at_once_are_refused(kit):
    head = kit.build("transformer")
    both = old_weights(head) | {"action_queries": torch.zeros_like(head.action_queries)}
    with pytest.raises(RuntimeError, match="blanks"):
        head.load_state_dict(both, strict=True)


def test_parameters_stay_in_their_old_order(kit):
    """An optimizer's state is stored by index."""
    names = [name for name, _ in kit.build("transformer").named_parameters()]
    assert names[:5] == [
        "action_queries", "state_in.layer.weight", "state_in.layer.bias", "token_in.weight", "token_in.bias"
    ]  # fmt: skip
