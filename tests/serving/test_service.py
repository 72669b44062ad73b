"""The one request path: what a client is told, and how an answer comes from the worker's thread into the loop."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from vla_bench.serving.batching import Answer, Batcher, BusyError, LateError
from vla_bench.serving.protocol import ProtocolError
from vla_bench.serving.service import Mailbox, Service, refusal


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


@pytest.mark.parametrize(
    "error, code",
    [(BusyError("b"), "busy"), (LateError("l"), "late"), (ProtocolError("p"), "malformed"), (ValueError("v"), "refused"),
     (RuntimeError("r"), "failed"), (MemoryError("m"), "failed")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_every_error_has_its_code(error, code):
    assert refusal(error).code == code


def test_a_message_is_one_line_and_not_a_long_one():
    assert len(refusal(ValueError("x" * 10**6)).message) == 1000
    assert refusal(ValueError("first\n  second\tthird")).message == "first second third"


def test_what_the_server_must_not_tell_is_in_its_log_under_a_number(caplog):
    told = refusal(RuntimeError("weights of /secret/place"))
    assert "secret" not in told.message and "/secret/place" in caplog.text
    assert told.message.split()[-1] in caplog.text


def test_many_requests_of_one_loop_each_get_their_own_answer(toy):
    ToyPolicy, observation = toy

    async def ask(service):
        answers = await asyncio.gather(*(service.predict(observation(b), b) for b in range(60)))
        return [answer.actions[0].tolist() for answer in answers]

    with Batcher(ToyPolicy()) as batcher:
        assert run(ask(Service(batcher))) == [[b + 0.25, b] for b in range(60)]


def test_an_answer_that_is_there_at_once_is_not_waited_for(toy):
    """The worker may be done before the loop has begun to wait."""
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy()) as batcher:
        service, done = Service(batcher), Future()
        done.set_result(Answer("chunk", 0.0, 0.0, 1))
        batcher.submit = lambda observation, seed: done
        assert run(service.predict(observation(), 0)).actions == "chunk"


def test_a_service_serves_one_loop_after_the_other(toy):
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy()) as batcher:
        service = Service(batcher)
        assert [run(service.predict(observation(), seed)).actions[0, 1] for seed in (1, 2, 3)] == [1, 2, 3]


def test_an_error_of_the_worker_arrives_where_it_was_asked(toy):
    ToyPolicy, observation = toy
    with Batcher(ToyPolicy()) as batcher:
        service = Service(batcher)
        with pytest.raises(TypeError):
            run(service.predict({**observation(), "state": [None]}, 0))
        with pytest.raises(KeyError, match="lang"):
            run(service.predict({}, 0))


def test_a_cancelled_request_is_given_up(toy):
    ToyPolicy, observation = toy
    policy = ToyPolicy(seconds=0.2, batch_size=1)

    async def cancel(service):
        first = asyncio.create_task(service.predict(observation(), 0))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(service.predict(observation(), 1))
        await asyncio.sleep(0.05)
        second.cancel()
        return (await first).actions[0, 1]

    with Batcher(policy) as batcher:
        assert run(cancel(Service(batcher))) == 0
    assert policy.batches == [1] and batcher.pending == 0


def test_the_mailbox_loses_nothing_however_threads_take_turns():
    async def gather(count):
        loop = asyncio.get_running_loop()
        mailbox, waiters = Mailbox(loop), [loop.create_future() for _ in range(count)]

        def post(part):
            for number in part:
                done = Future()
                done.set_result(number)
                mailbox.post(waiters[number], done)
                mailbox.call()

        threads = [threading.Thread(target=post, args=(range(start, count, 4),)) for start in range(4)]
        for thread in threads:
            thread.start()
        found = await asyncio.wait_for(asyncio.gather(*waiters), 20)
        for thread in threads:
            thread.join()
        return found

    assert run(gather(2000)) == list(range(2000))


@pytest.mark.parametrize("options, named", [({"n_action_steps": 0}, "n_action_steps"), ({"n_action_steps": 5}, "n_action_steps"),
                                            ({"renamed": {"cam": "front"}}, "rename")], ids=["none", "many", "name"])  # fmt: skip
def test_an_option_that_does_not_fit_the_policy_is_named(toy, options, named):
    ToyPolicy, _ = toy
    with Batcher(ToyPolicy()) as batcher, pytest.raises(ValueError, match=named):
        Service(batcher, **options)
