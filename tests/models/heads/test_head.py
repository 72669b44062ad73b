"""What every head inherits: its sizes, the masked mean, checks, and defaults for what it declares."""

import pickle
import subprocess
import sys

import pytest
import torch

from vla_bench.models.heads.head import (
    ActionHead,
    HeadSizes,
    at_least_one,
    check_choice,
    check_shape,
    check_sizes,
    gaussian_noise,
    masked_mean,
)

B, T, D = 4, 5, 3


class Constant(ActionHead):
    """Predicts one learnt chunk."""

    def __init__(self, sizes: HeadSizes):
        super().__init__(sizes)
        self.chunk = torch.nn.Parameter(torch.zeros(self.horizon, self.action_dim))

    def sample(self, features, noise=None):
        return self.chunk.expand(len(features.hidden), -1, -1)

    def loss(self, features, actions, is_pad, noise=None, time=None):
        self.check_actions(actions, is_pad)
        return {"action_loss": self.mean((self.chunk - actions) ** 2, is_pad)}


@pytest.fixture
def head() -> Constant:
    return Constant(HeadSizes(hidden_size=8, action_dim=D, horizon=T))


def test_importing_the_interface_loads_no_transformers():
    check = "import sys, vla_bench.models.heads.head; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hidden_size", "action_dim", "horizon", "num_embodiments"])
def test_a_size_that_cannot_be_is_named(name):
    sizes = {"hidden_size": 8, "action_dim": 2, "horizon": 3, "num_embodiments": 1}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        HeadSizes(**sizes | {name: 0})


def test_no_state_is_a_size_and_a_negative_one_is_not():
    assert HeadSizes(8, 2, 3, state_dim=0).state_dim == 0
    with pytest.raises(ValueError, match="state_dim=-1 must be 0"):
        HeadSizes(8, 2, 3, state_dim=-1)


def test_a_head_has_no_state_one_robot_and_any_backbone_unless_it_is_told():
    sizes = HeadSizes(hidden_size=8, action_dim=2, horizon=3)
    assert (sizes.state_dim, sizes.num_embodiments, sizes.backbone) == (0, 1, None)
    assert (sizes.hidden_size, sizes.action_dim, sizes.horizon) == (8, 2, 3)


def test_sizes_stay_as_they_were_given(head):
    with pytest.raises(AttributeError):
        head.sizes.horizon = 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((30, 4, {}), "hidden_size=30 must be divisible by num_heads=4"),
        ((0, 4, {}), "hidden_size=0 must be divisible by num_heads=4"),
        ((32, 0, {}), "num_heads=0 must be at least 1"),
        ((32, 4, {"num_layers": 0}), "num_layers=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(*given)


def test_the_first_count_below_one_is_named():
    at_least_one(a=1, b=2)
    with pytest.raises(ValueError, match="b=0 must be at least 1"):
        at_least_one(a=1, b=0, c=-1)


def test_an_unknown_choice_is_answered_with_the_nearest():
    assert check_choice("loss", "l1", ("mse", "l1")) == "l1"
    with pytest.raises(ValueError, match="unknown loss 'mae'; did you mean 'mse'"):
        check_choice("loss", "mae", ("mse", "l1"))


# --- where padding is masked ------------------------------------------------------------------------------------------


def test_the_mean_divides_by_what_it_has_summed():
    torch.manual_seed(0)
    error, is_pad = torch.randn(B, T, D), torch.rand(B, T) < 0.5
    kept = [error[b, t, d] for b in range(B) for t in range(T) for d in range(D) if not is_pad[b, t]]
    torch.testing.assert_close(masked_mean(error, is_pad), torch.stack(kept).mean())


def test_a_batch_of_padding_is_refused():
    with pytest.raises(ValueError, match="every action of the batch is padding"):
        masked_mean(torch.zeros(B, T, D), torch.ones(B, T, dtype=torch.bool))


def test_only_the_dimensions_of_the_robot_count(head):
    head.valid_action_dim = 2
    error = torch.tensor([1.0, 3.0, 50.0]).expand(B, T, D)
    assert float(head.mean(error, torch.zeros(B, T, dtype=torch.bool))) == 2.0


# --- the contract -----------------------------------------------------------------------------------------------------


def test_a_head_that_declares_nothing_has_defaults(head):
    assert (head.reads, head.num_queries, head.read_layers) == ("last", 0, None)
    assert (head.codec, head.input_range) == (None, None)
    assert not (head.offers_attention or head.embodiment_specific or head.adaptive_norm or head.assets)
    assert not (head.separates_images or head.masks_actions or head.foreign or head.renamed_parameters)
    assert head.draw_noise(B) is None and head.layer_classes() == set()


def test_what_a_head_must_have_is_missed_when_it_is_used():
    bare = ActionHead(HeadSizes(8, D, T))
    for call in (
        lambda: bare.sample(None),
        lambda: bare.loss(None, None, None),
        lambda: bare.attention(None),
    ):
        with pytest.raises(NotImplementedError):
            call()


@pytest.mark.parametrize(
    ("actions", "is_pad", "message"),
    [
        (torch.zeros(B, 7, D), torch.zeros(B, 7, dtype=torch.bool), "must equal framework.action_horizon"),
        (torch.zeros(B, T, 2), torch.zeros(B, T, dtype=torch.bool), r"predicts \[B, 5, 3\]"),
        (
            torch.zeros(B, T, D),
            torch.zeros(B, T),
            r"is_pad is torch.float32 \[4, 5\], expected bool \[4, 5\]",
        ),
        (torch.zeros(B, T, D), torch.zeros(B, 1, dtype=torch.bool), r"expected bool \[4, 5\]"),
    ],
)
def test_actions_that_do_not_fit_are_refused(head, actions, is_pad, message):
    with pytest.raises(ValueError, match=message):
        head.loss(None, actions, is_pad)


def test_a_head_can_be_pickled(head):
    again = pickle.loads(pickle.dumps(head))
    assert again.sizes == head.sizes and torch.equal(again.chunk, head.chunk)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_follows_its_generator():
    draws = [gaussian_noise((B, T), torch.Generator().manual_seed(seed), "cpu") for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32


def test_noise_without_a_generator_follows_the_global_seed():
    torch.manual_seed(4)
    first = gaussian_noise((B, T), None, "cpu")
    torch.manual_seed(4)
    assert torch.equal(first, torch.randn(B, T))


def test_a_tensor_of_another_shape_is_refused_with_the_reason():
    given = torch.zeros(2, 3)
    assert check_shape("noise", given, (2, 3)) is given
    with pytest.raises(ValueError, match=r"noise is \[2, 3\], expected \[1, 2, 3\]: because"):
        check_shape("noise", given, (1, 2, 3), ": because")


# --- what only some heads have ----------------------------------------------------------------------------------------


def test_each_samples_own_numbers_count_in_every_draw(head):
    """Two draws behind each other, and two robots: one has all three numbers, one the first alone."""
    error = torch.arange(4 * 2 * D, dtype=torch.float32).reshape(
        4, 2, D
    )  # draws of two samples, two actions each
    mask, is_pad = torch.tensor([[True] * D, [True, False, False]]), torch.zeros(4, 2, dtype=torch.bool)
    kept = [error[row, t, d] for row in range(4) for t in range(2) for d in range(D if row % 2 == 0 else 1)]
    torch.testing.assert_close(head.mean(error, is_pad, mask), torch.stack(kept).mean())


class Renamed(Constant):
    renamed_parameters = {"piece": "chunk"}


def test_weights_under_an_old_name_are_loaded_and_the_callers_stay_as_they_were():
    head = Renamed(HeadSizes(hidden_size=8, action_dim=D, horizon=T))
    weights = {"piece": torch.ones(T, D)}
    head.load_state_dict(weights)
    assert float(head.chunk.detach().sum()) == T * D and list(weights) == ["piece"]
    with pytest.raises(RuntimeError, match="piece"):
        head.load_state_dict({"piece": torch.zeros(T, D), "chunk": torch.ones(T, D)})


def test_the_name_that_fluxvla_uses_says_what_to_call(head):
    with pytest.raises(AttributeError, match=r"here it is layer_classes\(\)"):
        head.get_fsdp_wrapping_policy()
