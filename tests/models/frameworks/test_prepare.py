"""Samples to tensors, in any process, and samples that do not fit."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vla_bench.models.frameworks.prepare import pad_codes, pad_width, state_bins


@pytest.fixture
def prepare(toy, pair):
    return toy.build(pair).prepare


class NoWeights(pickle.Pickler):
    """Fails on the first weight or module that would travel to a worker."""

    def persistent_id(self, obj):
        assert not isinstance(obj, torch.Tensor | torch.nn.Module), f"prepare holds a {type(obj).__name__}"


def test_it_holds_no_weights(prepare):
    NoWeights(BytesIO()).dump(prepare)


def same(one, other) -> bool:
    """Whether two batches hold the same, entry by entry."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[name]) for name, value in one.items())
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_twice_gives_the_same_tensors(toy, prepare):
    assert same(prepare(toy.examples), prepare(toy.examples))


def test_in_a_worker_process_it_gives_the_same_tensors(toy):
    pairs = [(backbone, name) for backbone in toy.grids for name in toy.heads]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for pair in pairs:
            prepare = toy.build(pair).prepare
            assert same(pool.submit(prepare, toy.examples).result(), prepare(toy.examples))


def test_tensors_are_on_the_cpu(toy, prepare):
    batch = prepare(toy.examples)
    tensors = [batch[name] for name in ("actions", "action_is_pad", "state")] + [*batch["inputs"].values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_samples_keep_their_names(toy, prepare):
    assert prepare(toy.examples)["origin"] == [e["origin"] for e in toy.examples]


FAULTS = {
    "state": ({"state": np.zeros(3, np.float32)}, r"state has 3 numbers.*built for 2"),
    "no state": ({"state": None}, r"state has 0 numbers"),
    "horizon": (
        {"action": np.zeros((5, 3), np.float32), "action_is_pad": np.zeros(5, bool)},
        r"action_horizon",
    ),
    "cameras": ({"image": [Image.new("RGB", (64, 64))]}, r"1 image.*2"),
    "no action": ({"action": None, "action_is_pad": None}, r"'action' is missing"),
    "no instruction": ({"lang": " "}, r"'lang'"),
}


@pytest.fixture(params=FAULTS)
def faulty(request, toy):
    """A sample that does not fit, and what the message says."""
    change, message = FAULTS[request.param]
    return {k: v for k, v in (toy.examples[1] | change).items() if v is not None}, message


def test_a_sample_that_does_not_fit_is_named(toy, prepare, faulty):
    sample, message = faulty
    with pytest.raises(ValueError, match=f"toy episode 1 frame 7.*{message}"):
        prepare([toy.examples[0], sample])


def test_a_sample_without_a_name_is_named_by_its_place(toy, prepare, faulty):
    sample, _ = faulty
    with pytest.raises(ValueError, match="sample 1 of the batch"):
        prepare([toy.examples[0], {k: v for k, v in sample.items() if k != "origin"}])


@pytest.fixture
def bare(toy):
    """A sample without actions."""
    return {k: v for k, v in toy.examples[0].items() if k not in ("action", "action_is_pad")}


def test_actions_in_some_samples_only_are_refused(toy, bare):
    model = toy.build(("qwen2_5_vl", "OFT"))
    with pytest.raises(ValueError, match="toy episode 0 frame 7.*'action' is missing"):
        model.prepare([bare, toy.examples[1]])


def test_training_without_actions_is_refused(toy, bare):
    with pytest.raises(ValueError, match="training needs 'action'"):
        toy.build(("qwen2_5_vl", "OFT"))([bare])


def test_a_prediction_needs_no_actions(toy, bare):
    assert toy.predict(toy.build(("qwen2_5_vl", "OFT")), [bare]).shape == (1, toy.T, toy.D)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>"])
def test_control_tokens_in_an_instruction_are_refused(toy, token):
    model = toy.build(("qwen2_5_vl", "OFT"))
    with pytest.raises(ValueError, match="toy episode 0 frame 7: the instruction .* holds") as refused:
        model.prepare([toy.examples[0] | {"lang": f"open {token} the drawer"}])
    assert token in str(refused.value)


def test_a_robot_that_is_not_known_is_named(toy):
    model = toy.build(("qwen2_5_vl", "GR00T"), changes={"embodiments": ["bridge", "libero"]})
    with pytest.raises(ValueError, match="toy episode 0.*did you mean 'libero'"):
        model([e | {"dataset": "liberro"} for e in toy.examples])


def test_a_batch_of_nothing_is_refused(prepare):
    with pytest.raises(ValueError, match="at least one sample"):
        prepare([])


def test_state_bins_are_counted_from_the_left_edge():
    assert state_bins(np.array([-1.0, 0.0, 0.999, 7.0, -7.0])).tolist() == [0, 128, 255, 255, -1]


def test_zeros_fill_a_width():
    np.testing.assert_array_equal(pad_width(np.ones((2, 1, 2)), 4), [[[1, 1, 0, 0]]] * 2)


def test_minus_one_fills_codes():
    assert pad_codes([[4], [5, 6, 7], []]).tolist() == [[4, -1, -1], [5, 6, 7], [-1, -1, -1]]
