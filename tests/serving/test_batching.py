"""The worker: nobody's answer depends on the others, nothing is computed for nobody, nothing waits for ever."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_bench.serving.batching import Batcher, BusyError, LateError


@pytest.fixture
def gate(toy):
    """A toy policy whose batches wait until they are let through."""
    ToyPolicy, _ = toy

    class Gated(ToyPolicy):
        def __init__(self, **given):
            super().__init__(**given)
            self.begun, self.open = threading.Event(), threading.Event()

        def predict_batch(self, observations, seeds):
            self.begun.set()
            assert self.open.wait(20)
            return super().predict_batch(observations, seeds)

    return Gated


def test_every_request_has_its_own_answer(toy, fuzz):
    ToyPolicy, observation = toy
    settings, _ = fuzz
    requests = st.lists(
        st.tuples(st.integers(0, 255), st.sampled_from(["a", "bb", "ccc"])), min_size=1, max_size=20
    )

    @settings
    @given(requests, st.integers(1, 5), st.sampled_from([0.0, 1.0]))
    def answered(asked, batch_size, max_wait_ms):
        policy = ToyPolicy(batch_size=batch_size)
        with Batcher(policy, max_wait_ms=max_wait_ms) as batcher:
            futures = [
                batcher.submit(observation(b, lang=lang), seed) for seed, (b, lang) in enumerate(asked)
            ]
            found = [future.result(timeout=20).actions[0].tolist() for future in futures]
        assert found == [[b + 0.25, seed] for seed, (b, _) in enumerate(asked)]
        assert max(policy.batches) <= batch_size and sum(policy.batches) == len(asked)

    answered()


def test_a_batch_holds_one_group_alone(toy):
    ToyPolicy, observation = toy
    policy = ToyPolicy(batch_size=8)
    with Batcher(policy, max_wait_ms=200) as batcher:
        futures = [batcher.submit(observation(lang=lang), 0) for lang in ("up", "down", "up", "down", "up")]
        assert [future.result(timeout=20).batch for future in futures] == [3, 2, 3, 2, 3]


def test_a_full_batch_does_not_wait(toy):
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy(batch_size=2), max_wait_ms=60_000) as batcher:
        for future in [batcher.submit(observation(), seed) for seed in range(2)]:
            assert future.result(timeout=20).batch == 2


def test_the_oldest_request_is_computed_first(gate, toy):
    _, observation = toy
    policy = gate(batch_size=2)
    order = []
    with Batcher(policy, max_wait_ms=0) as batcher:
        first = batcher.submit(observation(lang="first"), 0)
        assert policy.begun.wait(20)
        for seed, lang in enumerate(["long one", "up", "long two", "up"]):
            future = batcher.submit(observation(lang=lang), seed)
            future.add_done_callback(lambda done, lang=lang: order.append(lang))
        policy.open.set()
        first.result(timeout=20)
    assert order == ["long one", "long two", "up", "up"]


def test_a_cancelled_request_is_not_computed(gate, toy):
    _, observation = toy
    policy = gate(batch_size=1)
    with Batcher(policy) as batcher:
        first = batcher.submit(observation(), 0)
        assert policy.begun.wait(20)
        assert batcher.submit(observation(), 1).cancel()
        policy.open.set()
        first.result(timeout=20)
    assert policy.batches == [1] and batcher.pending == 0


def test_a_late_request_is_not_computed(gate, toy):
    _, observation = toy
    policy = gate(batch_size=1)
    with Batcher(policy, timeout_s=0.1) as batcher:
        first = batcher.submit(observation(), 0)
        assert policy.begun.wait(20)
        late = batcher.submit(observation(), 1)
        time.sleep(0.15)
        policy.open.set()
        with pytest.raises(LateError, match="more than 0.1 s"):
            late.result(timeout=20)
        first.result(timeout=20)
    assert policy.batches == [1]


def test_a_full_queue_refuses_at_once_and_is_free_again(gate, toy):
    _, observation = toy
    policy = gate(batch_size=1)
    with Batcher(policy, queue_size=2) as batcher:
        waiting = [batcher.submit(observation(), seed) for seed in range(2)]
        with pytest.raises(BusyError, match="2 requests wait already"):
            batcher.submit(observation(), 2)
        policy.open.set()
        for future in waiting:
            future.result(timeout=20)
        assert batcher.submit(observation(), 3).result(timeout=20).actions[0, 1] == 3


def test_closing_answers_what_waits_and_takes_nothing_more(toy):
    ToyPolicy, observation = toy
    batcher = Batcher(ToyPolicy(seconds=0.01, batch_size=2))
    futures = [batcher.submit(observation(), seed) for seed in range(7)]
    batcher.close()
    assert [future.result(timeout=0).actions[0, 1] for future in futures] == list(range(7))
    with pytest.raises(BusyError, match="about to stop"):
        batcher.submit(observation(), 0)
    batcher.close()  # a second time changes nothing


def test_one_bad_observation_spoils_nobody_elses_answer(toy):
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy(batch_size=4), max_wait_ms=200) as batcher:
        futures = [batcher.submit(observation(), seed) for seed in range(3)]
        bad = batcher.submit({**observation(), "state": ["x"]}, 3)
        with pytest.raises(TypeError):
            bad.result(timeout=20)
        assert [future.result(timeout=20).actions[0, 1] for future in futures] == [0, 1, 2]


def test_an_observation_that_cannot_be_sorted_is_told_so(toy):
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy()) as batcher:
        with pytest.raises(KeyError, match="lang"):
            batcher.submit({"image": []}, 0).result(timeout=20)
        assert batcher.submit(observation(), 1).result(timeout=20).actions[0, 1] == 1


def test_actions_are_checked_before_they_leave(toy):
    ToyPolicy, observation = toy
    policy = ToyPolicy()
    policy.predict_batch = lambda observations, seeds: [np.full((4, 2), np.inf)] * len(seeds)
    with Batcher(policy) as batcher, pytest.raises(ValueError, match="not finite at step 0"):
        batcher.submit(observation(), 0).result(timeout=20)


def test_listeners_are_told_once_per_batch(toy):
    ToyPolicy, observation = toy
    told = []
    with Batcher(ToyPolicy(batch_size=4), max_wait_ms=200) as batcher:
        futures = [batcher.submit(observation(), seed) for seed in range(4)]
        batcher.listeners.append(lambda: told.append(all(future.done() for future in futures)))
        assert futures[3].result(timeout=20)
    assert told == [True]


@pytest.mark.parametrize(
    "setting", [{"queue_size": 0}, {"max_wait_ms": -1.0}, {"timeout_s": -1.0}], ids=lambda s: min(s)
)
def test_a_setting_that_cannot_be_is_named(toy, setting):
    ToyPolicy, _ = toy
    with pytest.raises(ValueError, match=min(setting)):
        Batcher(ToyPolicy(), **setting)


@pytest.mark.parametrize("clients, waits", [(1, False), (2, True), (None, True)])
def test_a_batch_waits_only_for_those_who_may_still_ask(toy, clients, waits):
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy(batch_size=4), max_wait_ms=300) as batcher:
        batcher.clients = clients
        begin = time.monotonic()
        batcher.submit(observation(), 0).result(timeout=20)
        assert (time.monotonic() - begin > 0.25) == waits
