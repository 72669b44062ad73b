"""Robots of one batch with different actions: no loss where a robot has no number, and a straight path in sampling."""

from dataclasses import replace

import pytest
import torch

from vla_bench.models.features import Features
from vla_bench.models.heads.diffusion import DiffusionHead
from vla_bench.models.heads.flow import euler_times
from vla_bench.models.heads.flow_inference import FlowMatchingInferenceHead
from vla_bench.models.heads.flow_matching import FlowMatchingHead
from vla_bench.models.heads.head import HeadSizes
from vla_bench.models.heads.mlp import MLPHead
from vla_bench.models.heads.transformer import TransformerHead

SIZES = HeadSizes(hidden_size=32, action_dim=5, horizon=4, state_dim=3)
MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
HEADS = {
    "flow": lambda: FlowMatchingHead(SIZES, **SMALL, repeated_diffusion_steps=2),
    "diffusion": lambda: DiffusionHead(SIZES, **SMALL, repeated_diffusion_steps=2, num_inference_timesteps=5),
    "mlp": lambda: MLPHead(SIZES, hidden_size=32),
    "transformer": lambda: TransformerHead(SIZES, hidden_size=32),
}


@pytest.fixture(params=HEADS)
def head(request):
    torch.manual_seed(0)
    return HEADS[request.param]().eval()


def features(head, mask=MASK) -> Features:
    torch.manual_seed(1)
    count = head.num_queries
    hidden = torch.randn(2, 6 + count, 32)
    valid = torch.ones(2, 6 + count, dtype=torch.bool)
    return Features(hidden, valid, num_extra=count, state=torch.randn(2, 3), action_mask=mask)


def loss(head, features, actions):
    torch.manual_seed(2)  # of the noise that a head draws
    is_pad = torch.tensor([[False] * 4, [False, False, True, True]])
    return head.loss(features, actions, is_pad)["action_loss"]


def padded_actions() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.rand(2, 4, 5) * MASK[:, None]


def test_every_head_that_masks_says_so(head):
    assert head.masks_actions


def test_a_mask_of_everything_changes_no_bit(head):
    everything = torch.ones_like(MASK)
    plain, masked = features(head, None), features(head, everything)
    assert torch.equal(loss(head, plain, padded_actions()), loss(head, masked, padded_actions()))
    noise = head.draw_noise(2, torch.Generator().manual_seed(0))
    assert torch.equal(head.sample(plain, noise), head.sample(masked, noise))


def test_what_a_robot_lacks_costs_nothing_and_moves_no_weight(head):
    """The gradient of the last layer's rows that only the wide robot uses comes from the wide robot alone."""
    alone = features(head)
    only_narrow = replace(alone, action_mask=torch.stack([MASK[1], MASK[1]]))
    loss(head, only_narrow, padded_actions() * MASK[1]).backward()
    last = [p for p in head.parameters() if p.grad is not None and p.shape[-1:] in ((5,), (20,))]
    for bias in (p for p in last if p.ndim == 1):
        rows = bias.grad.view(-1, 5)
        assert (rows[:, 3:] == 0).all() and (rows[:, :3] != 0).any()
    assert last


def test_the_loss_is_the_mean_over_numbers_that_exist(head):
    """Replacing the narrow robot's missing numbers by anything leaves the loss as it is (flow reads them as zero)."""
    torch.manual_seed(4)
    error, is_pad = torch.rand(2, 4, 5), torch.tensor([[False] * 4, [False, False, True, True]])
    found = head.mean(error, is_pad, MASK)
    exists = (~is_pad)[..., None] & MASK[:, None]
    assert torch.allclose(found, error[exists].sum() / exists.sum())
    repeated = head.mean(error.repeat(3, 1, 1), is_pad.repeat(3, 1), MASK)
    assert torch.allclose(found, repeated)


@pytest.mark.parametrize("kind", [FlowMatchingHead, FlowMatchingInferenceHead])
def test_a_flow_head_reads_in_sampling_what_it_read_in_training(kind, monkeypatch):
    torch.manual_seed(0)
    head = kind(SIZES, **SMALL, num_inference_timesteps=5).eval()
    noise, seen = torch.randn(2, 4, 5), []
    tokens = kind.action_tokens
    monkeypatch.setattr(
        kind, "action_tokens", lambda self, x, *rest: seen.append(x) or tokens(self, x, *rest)
    )
    sampled = head.sample(features(head), noise)
    absent = ~MASK[:, None].expand(2, 4, 5)
    for x, t in zip(seen, euler_times(5)):
        torch.testing.assert_close(x[absent], (1 - t) * noise[absent])
    torch.testing.assert_close(sampled[absent], torch.zeros(8), atol=1e-6, rtol=0)
    free = head.sample(features(head, None), noise)
    assert (free[absent].abs() > 1e-3).any()


def test_a_diffusion_head_leads_missing_numbers_to_zero():
    torch.manual_seed(0)
    head = HEADS["diffusion"]().eval()
    sampled = head.sample(features(head), head.draw_noise(2, torch.Generator().manual_seed(0)))
    assert (sampled[1, :, 3:] == 0).all() and (sampled[0, :, 3:] != 0).all()
