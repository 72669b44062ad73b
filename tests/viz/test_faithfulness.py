"""Curves, gains and bands of the check of maps."""

import numpy as np
import pytest

from vla_bench.viz.faithfulness import NO_MODEL, average_of, curves, episode_band, order_of, study
from vla_bench.viz.fills import fillings, hide
from vla_bench.viz.occlusion import unlabelled


def test_a_curve_hides_and_shows_the_patches_in_order(known):
    order = np.random.default_rng(2).permutation(16)
    filling = fillings("donor", known.scene, known.others, 1)[0]
    found = curves(known.model, known.scene, filling, [(4, 4)], {"some": order}, most=5)["some"]
    chunk = lambda image: known.model.predict_action([{**unlabelled(known.scene), "image": [image]}])
    reference = chunk(known.scene["image"][0])["normalized_actions"][0]
    for share, deletion, insertion in zip(found.shares, found.deletion, found.insertion):
        hidden = np.zeros(16, bool)
        hidden[order[: round(share * 16)]] = True
        for mask, expected in ((hidden, deletion), (~hidden, insertion)):
            image = hide(known.scene["image"][0], filling.images[0], mask.reshape(4, 4))
            moved = np.sqrt(((chunk(image)["normalized_actions"][0] - reference) ** 2).mean())
            assert abs(moved - expected) < 1e-5


def test_ties_are_broken_by_the_generator_and_by_nothing_else():
    scores = np.array([0.0, 1.0, 0.0, 1.0])
    orders = [order_of(scores, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1] and len(set(map(tuple, orders))) > 1
    assert all({*order[:2]} == {1, 3} for order in orders)


def test_a_band_over_episodes_holds_the_truth_as_often_as_it_says():
    rng, episodes, hits = np.random.default_rng(0), np.repeat(np.arange(30), 2), 0
    for seed in range(200):
        values = np.repeat(rng.normal(1.0, 1.0, 30), 2) + rng.normal(0, 0.1, 60)
        band = episode_band(values, episodes, draws=400, seed=seed)
        hits += band.low <= 1.0 <= band.high
    assert 0.9 < hits / 200 < 0.98


def test_a_map_is_not_tested_with_the_fill_that_it_was_made_with(known):
    with pytest.raises(ValueError, match="it cannot test them"):
        study(known.model, [known.scene], [0], known.others, ["occlusion"], fills=("mean", "donor"))


def test_a_study_measures_every_map_and_every_null_on_every_frame(known):
    frames = known.others[:6]
    found = study(
        known.model, frames, range(6), known.others[6:], ["occlusion", "attention"], most=3, draws=2
    )
    names = {"occlusion", "attention", NO_MODEL, average_of("occlusion"), average_of("attention")}
    assert set(found.gains) == {"donor", "blur"} == set(found.random)
    assert all(set(each) == names for each in found.gains.values())
    assert {len(values) for each in found.gains.values() for values in each.values()} == {6}
    assert found.band("donor", "occlusion", "attention").mean > 0
