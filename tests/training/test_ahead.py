"""A batch is received while the step before computes: the same batches, one ahead, and nothing is left running."""

import threading
import time

import pytest

from vla_bench.training import ahead, imitation
from vla_bench.training.ahead import received
from vla_bench.training.imitation import train
from vla_bench.training.run import set_up

WAIT = 10.0  # seconds in which a thread surely does something


def threads() -> list[threading.Thread]:
    """Those that receive."""
    return [thread for thread in threading.enumerate() if thread.name == "received"]


def gone() -> bool:
    """Whether all of them have ended."""
    for thread in threads():
        thread.join(WAIT)
    return not threads()


def test_every_item_comes_once_and_in_order():
    assert list(received(range(100))) == list(range(100)) and gone()
    assert list(received([])) == [] and gone()


def test_the_next_item_is_taken_without_being_asked_for_and_the_one_after_is_not():
    taken = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(taken):
            event.set()
            yield number

    stream = received(items())
    for number in range(3):
        assert next(stream) == number
        assert taken[number + 1].wait(WAIT)
        assert not any(event.is_set() for event in taken[number + 2 :])
    stream.close()
    assert gone()


@pytest.mark.parametrize("error", [ValueError("damaged"), SystemExit(3), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it_and_is_the_same_one(error):
    def items():
        yield 1
        raise error

    stream = received(items())
    assert next(stream) == 1
    with pytest.raises(type(error)) as found:
        next(stream)
    assert found.value is error and gone()


def test_whoever_leaves_early_leaves_no_thread():
    with pytest.raises(RuntimeError, match="mine"):
        for number in received(range(100)):
            if number == 2:
                raise RuntimeError("mine")
    assert gone()


def test_a_loader_that_hangs_does_not_keep_anybody(monkeypatch):
    monkeypatch.setattr(ahead, "PATIENCE_S", 0.05)
    ready = threading.Event()

    def items():
        yield 1
        ready.wait(WAIT)

    stream = received(items())
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < WAIT / 2
    ready.set()
    assert gone()


def test_a_run_with_workers_receives_ahead_and_learns_the_same(config, straight, losses, monkeypatch):
    seen, original = [], imitation.guarded_update

    def watched(run, batches):
        seen.append(len(threads()))
        return original(run, batches)

    monkeypatch.setattr(imitation, "guarded_update", watched)
    run = train(config("--trainer.num_workers 2", straight.framework))
    assert losses(run) == straight.losses
    assert seen == [1] * 6 and gone()


def test_a_run_without_workers_computes_its_batches_where_it_always_did(config):
    stream = imitation.micro_batches(set_up(config("--trainer.num_workers 0")))
    next(stream)
    assert not threads()
