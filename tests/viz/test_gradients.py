"""Integrated gradients: complete, and equal to the textbook's sum."""

import numpy as np
import pytest
import torch

from vla_bench.viz.fills import fillings
from vla_bench.viz.gradients import integrated_gradients, ownership
from vla_bench.viz.occlusion import fixed_noise, unlabelled, with_images, word_places


def total(found) -> float:
    return sum(i.sum() for i in found.images) + sum(v for _, v in found.words) + found.state


def test_it_is_complete(known):
    filling = fillings("mean", known.scene, known.others)[0]
    found = integrated_gradients(known.model, known.scene, filling, [(4, 4)], points=64)
    assert found.difference > 0.3
    assert abs(total(found) / found.difference - 1) < 0.01


def test_it_is_complete_through_all_steps_of_a_flow(flow, known):
    filling = fillings("mean", known.scene, known.others)[0]
    noise = fixed_noise(flow)
    found = integrated_gradients(flow, known.scene, filling, [(4, 4)], noise=noise, points=64)
    assert abs(total(found) / found.difference - 1) < 0.03


def by_hand(model, scene, filling, points=32):
    """One point of the path after the other, with the embeddings themselves as leaves: the textbook's sum."""
    here = unlabelled(scene)
    there = with_images(here, filling, [np.ones((4, 4), bool)])
    last, first = model.to_batch([here]), model.to_batch([there])
    x, x0 = last["inputs"]["pixel_values"], first["inputs"]["pixel_values"]
    state0 = torch.from_numpy(filling.state)[None]
    places = [place for _, each in word_places(model, scene) for place in each]
    embedding = model.vlm.model.get_input_embeddings()
    nothing = embedding(torch.arange(embedding.weight.shape[0])).mean(0).detach()
    own = embedding(last["inputs"]["input_ids"]).detach()
    ends = []
    for alpha in (0.0, 1.0):
        ends.append(run(model, last, x0 + alpha * (x - x0), state0 + alpha * (last["state"] - state0),
                        mixed(own, nothing, places, alpha)).detach())  # fmt: skip
    direction = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
    pixels, words, state = torch.zeros_like(x), torch.zeros(own.shape[1]), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(points)):
        alpha, share = (node + 1) / 2, weight / 2
        leaves = [
            (x0 + alpha * (x - x0)).requires_grad_(),
            (state0 + alpha * (last["state"] - state0)).requires_grad_(),
            mixed(own, nothing, places, alpha).requires_grad_(),
        ]
        slopes = torch.autograd.grad((run(model, last, *leaves) * direction).sum(), leaves)
        pixels += slopes[0] * (x - x0) * share
        state += float((slopes[1] * (last["state"] - state0)).sum()) * share
        words[places] += (slopes[2] * (own - nothing)).sum(-1)[0, places] * share
    return pixels, words[places], state


def mixed(own, nothing, places, alpha):
    found = own.clone()
    found[:, places] = nothing + alpha * (own[:, places] - nothing)
    return found


def run(model, batch, pixels, state, embeddings):
    """The chunk [T, D] from pixels, state and embeddings that are given."""
    embedding = model.vlm.model.get_input_embeddings()
    ids = batch["inputs"]["input_ids"]
    hook = embedding.register_forward_hook(lambda _, args, out: embeddings if args[0] is ids else out)
    inputs = {**batch["inputs"], "pixel_values": pixels}
    chunk = model.actions({**batch, "inputs": inputs, "state": state}, None, None)[0]
    hook.remove()
    return chunk


def test_it_equals_the_sum_by_hand_on_two_layers(known):
    filling = fillings("mean", known.scene, known.others)[0]
    pixels, words, state = by_hand(known.model, known.scene, filling)
    found = integrated_gradients(known.model, known.scene, filling, [(4, 4)], points=32)
    by_patch = pixels[0].unflatten(1, (4, 16)).unflatten(3, (4, 16))  # [3, rows, 16, columns, 16]
    scale = found.difference
    np.testing.assert_allclose(found.images[0], by_patch.sum((0, 2, 4)).numpy(), atol=1e-3 * scale)
    np.testing.assert_allclose(found.absolute[0], by_patch.abs().sum((0, 2, 4)).numpy(), atol=1e-3 * scale)
    np.testing.assert_allclose([v for _, v in found.words], words.numpy(), atol=1e-3 * scale)
    assert abs(found.state - state) < 1e-3 * scale


@pytest.mark.parametrize("backbone", ["qwen2_5_vl", "idefics3", "florence2"])
def test_every_value_belongs_to_its_patches_and_is_counted_once(tiny, known, backbone):
    model, _ = tiny(backbone, "OFT")
    for path, parts in ownership(model, unlabelled(known.scene), [(4, 4)]).items():
        size = model.prepare([unlabelled(known.scene)])["inputs"][path[1]].numel()
        whole = torch.zeros(size)
        for places, part in parts:
            whole.index_add_(0, places, part)
        assert ((whole - 1).abs().lt(1e-5) | whole.eq(0)).all() and whole.mean() > 0.5
