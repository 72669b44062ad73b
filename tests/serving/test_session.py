"""A session: the seeds of an episode, and what was seen before."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_bench.serving.session import Session, prediction_seed


def message(brightness: int = 1, shape=(16, 24, 3)) -> dict:
    return {
        "observation/image": np.full(shape, brightness, np.uint8),
        "observation/state": [0.5],
        "prompt": "up",
    }


def two_steps(ToyPolicy):
    from dataclasses import replace

    return replace(ToyPolicy.spec, observation_steps=2)


def test_no_two_predictions_share_a_seed():
    seeds = {prediction_seed(scene, number) for scene in range(50) for number in range(50)}
    assert len(seeds) == 2500


def test_a_seed_is_what_it_was_in_version_0_1():
    assert prediction_seed(50000, 3) == int(np.random.SeedSequence([50000, 3]).generate_state(1)[0])


def test_an_episode_has_seeds_of_its_own_however_often_it_is_begun(toy):
    ToyPolicy, _ = toy
    session = Session(ToyPolicy.spec, seed=5)
    session.begin_episode()
    found = [session.next_seed()]
    session.begin_episode()
    session.begin_episode()
    found += [session.next_seed(), session.next_seed()]
    assert found == [prediction_seed(5, 0), prediction_seed(6, 0), prediction_seed(6, 1)]


def test_a_seed_that_is_sent_counts_as_a_prediction(toy):
    ToyPolicy, _ = toy
    session = Session(ToyPolicy.spec, seed=5)
    assert session.next_seed(np.int64(9)) == 9 and session.next_seed() == prediction_seed(5, 1)


def test_every_seed_is_taken_or_refused_by_name(toy, fuzz):
    ToyPolicy, _ = toy
    settings, _ = fuzz
    session = Session(ToyPolicy.spec)
    anything = (
        st.integers()
        | st.floats()
        | st.booleans()
        | st.text(max_size=3)
        | st.lists(st.integers(), max_size=2)
    )

    @settings
    @given(anything)
    def asked(seed):
        if type(seed) is int and 0 <= seed < 2**63:
            assert session.next_seed(seed) == seed
        else:
            with pytest.raises(ValueError, match="'seed' must be a whole number"):
                session.next_seed(seed)

    asked()


def test_the_history_is_filled_with_the_first_observation(toy):
    ToyPolicy, _ = toy
    session = Session(two_steps(ToyPolicy))
    seen = [session.observation(message(level)) for level in (1, 2, 3)]
    levels = [[np.asarray(image)[0, 0, 0] for image in each["image"]] for each in seen]
    assert levels == [[1, 1], [1, 2], [2, 3]]


def test_the_history_ends_with_the_episode(toy):
    ToyPolicy, _ = toy
    session = Session(two_steps(ToyPolicy))
    session.observation(message(1))
    session.begin_episode()
    assert [np.asarray(image)[0, 0, 0] for image in session.observation(message(7))["image"]] == [7, 7]


def test_a_client_that_sends_its_history_is_taken_at_its_word(toy):
    ToyPolicy, _ = toy
    session = Session(two_steps(ToyPolicy))
    session.observation(message(1))
    sent = {**message(shape=(2, 16, 24, 3)), "observation/state": np.array([1.0, 2.0])}
    sent["observation/image"][1] = 9
    found = session.observation(sent)
    assert [np.asarray(image)[0, 0, 0] for image in found["image"]] == [1, 9]
    assert list(np.ravel(found["state"])) == [1.0, 2.0]


def test_an_observation_that_does_not_fit_is_not_remembered(toy):
    ToyPolicy, _ = toy
    session = Session(two_steps(ToyPolicy))
    session.observation(message(1))
    with pytest.raises(ValueError, match="'observation/image' is uint8"):
        session.observation(message(2, shape=(8, 8, 3)))
    assert [np.asarray(image)[0, 0, 0] for image in session.observation(message(3))["image"]] == [1, 3]
