"""Hiding in batches gives what single passes give, and what moves is found where it went."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from vla_bench.viz.fills import fillings, hide
from vla_bench.viz.known import known_scene
from vla_bench.viz.occlusion import fixed_noise, occlude, patch_grids, unlabelled


@pytest.mark.parametrize("name", ["OFT", "GR00T"])
def test_it_equals_a_loop_of_single_passes(known, flow, name):
    model = known.model if name == "OFT" else flow
    filling = fillings("donor", known.scene, known.others, 1)[0]
    found = occlude(model, known.scene, filling, [(4, 4)], noise=fixed_noise(model), batch_size=7)
    noise = model.action_model.draw_noise(1, torch.Generator().manual_seed(0))

    def chunk(image):
        sample = {**unlabelled(known.scene), "image": [image]}
        return model.predict_action([sample], noise=noise)["normalized_actions"][0]

    whole = chunk(known.scene["image"][0])
    for row, column in np.ndindex(4, 4):
        image = known.scene["image"][0].copy()
        box = (16 * column, 16 * row, 16 * column + 16, 16 * row + 16)
        image.paste(filling.images[0].crop(box), box)
        moved = np.sqrt(((chunk(image) - whole) ** 2).mean())
        assert abs(moved - found.images[0][row, column]) < 1e-5


def test_the_state_and_the_word_that_do_nothing_are_told_from_the_word_that_does(known):
    found = occlude(known.model, known.scene, fillings("mean", known.scene, known.others)[0], [(4, 4)])
    first, *rest = (score for _, score in found.words)
    assert first > 3 * max(*rest, found.state)


TOKENS = {"qwen2_5_vl": 128, "qwen3_vl": 128, "paligemma": 64, "idefics3": 64, "internvl": 64, "gemma3": 64}


@pytest.mark.parametrize("backbone", TOKENS)
def test_a_patch_that_is_moved_shows_at_its_own_place(tiny, backbone):
    """The token of a block changes most when the block does: no order of the tower's windows is left in the grid."""
    size = TOKENS[backbone]
    model, _ = tiny(backbone, "OFT", size, spread=0.0)
    scene = unlabelled(known_scene(np.random.default_rng(0))[0])
    scene["image"] = [scene["image"][0].resize((size, size))]
    batch = model.to_batch([scene])
    ((rows, columns),) = model.vlm.image_grids(batch["inputs"])[0]
    side = model.vlm.patches_per_side()
    assert patch_grids(model, scene) == [(rows * side, columns * side)]

    def tokens(images):
        seen = []
        first = model.vlm.model.get_decoder().layers[0]
        hook = first.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        batch = model.to_batch([{**scene, "image": [image]} for image in images])
        with torch.no_grad():
            model.actions(batch, None, None)
        hook.remove()
        is_image = model.vlm.image_token_mask(batch["inputs"])
        return seen[0][:, : is_image.shape[1]][is_image].unflatten(0, (len(images), -1))

    (image,), count = scene["image"], rows * columns
    other = image.point(lambda value: 255 - value)
    variants = [hide(image, other, mask.reshape(rows, columns)) for mask in np.eye(count, dtype=bool)]
    found = tokens([image, *variants])
    moved = (found[1:] - found[0]).norm(dim=-1)  # [hidden block, token]
    own = (moved / moved.mean(0)).numpy()  # some tokens move more than others, whatever is hidden
    _, place = linear_sum_assignment(-own)  # of all ways to match blocks with tokens, the best
    assert place.tolist() == list(range(count))
