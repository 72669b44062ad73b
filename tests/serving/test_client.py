"""A policy that is somewhere else: patient with a server that is away, never with a wrong answer."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vla_bench.evaluation.rollout import EvaluationSettings, evaluate
from vla_bench.serving.checks import message_from
from vla_bench.serving.client import ClientEpisode, PolicyClient, RefusedError, ServerError, pause
from vla_bench.serving.policy import Policy
from vla_bench.serving.protocol import ProtocolError
from vla_bench.serving.server import serve_in_thread
from vla_bench.serving.session import prediction_seed

RUN = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "runs" / "llava"


def test_the_client_needs_no_torch():
    code = "import sys, vla_bench.serving.client; print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "[]\n"


def test_a_request_outlives_its_server(toy, toy_process, processes):
    """kill -9 while the answer is computed; the question is asked again when the next server is there."""
    _, observation = toy
    _, free_port = processes
    port = free_port()
    with toy_process(port, seconds=0.6) as (first, url), PolicyClient(url, connect_s=30) as client:
        again = []

        def kill():
            first.kill()
            first.join(timeout=20)
            again.append(toy_process(port))
            again[0].__enter__()

        timer = threading.Timer(0.3, kill)
        timer.start()
        chunk = client.predict(observation(30), seed=8)
        timer.join(timeout=20)
        assert chunk[0].tolist() == [30.25, 8] and first.exitcode == -signal.SIGKILL
        assert client.predict(observation(), seed=9)[0, 1] == 9
        again[0].__exit__(None, None, None)


def test_a_server_that_is_away_is_waited_for(toy, toy_process, processes):
    _, observation = toy
    _, free_port = processes
    port, later = free_port(), []

    def start():
        later.append(toy_process(port))
        later[0].__enter__()

    timer = threading.Timer(0.5, start)
    timer.start()
    with PolicyClient(f"ws://127.0.0.1:{port}", connect_s=30) as client:
        assert client.predict(observation(), seed=2)[0, 1] == 2
    timer.join(timeout=20)
    later[0].__exit__(None, None, None)


def test_nobody_is_waited_for_longer_than_agreed(processes):
    _, free_port = processes
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="within 0.3 s"):
        PolicyClient(f"ws://127.0.0.1:{free_port()}", connect_s=0.3)
    assert time.monotonic() - begin < 5


def test_a_wrong_key_is_told_at_once(toy):
    ToyPolicy, _ = toy
    with serve_in_thread(ToyPolicy(), api_key="secret") as server:
        begin = time.monotonic()
        with pytest.raises(ConnectionError, match="401"):
            PolicyClient(server.url, api_key="other", connect_s=60)
        assert time.monotonic() - begin < 20
        PolicyClient(server.url, api_key="secret", connect_s=20).close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "ws:", ""])
def test_what_is_no_address_is_told_at_once(url):
    with pytest.raises(ValueError, match="no address of a server"):
        PolicyClient(url, connect_s=60)


def test_another_policy_is_not_asked_in_its_place(toy, toy_process, processes):
    ToyPolicy, observation = toy
    _, free_port = processes
    port = free_port()
    with toy_process(port) as (first, url), PolicyClient(url, connect_s=20) as client:
        first.kill()
        first.join(timeout=20)
        other = ToyPolicy()
        other.fingerprint = "other"
        with (
            serve_in_thread(other, port=port),
            pytest.raises(ConnectionError, match="served the policy toy and serves other"),
        ):
            client.predict(observation(), seed=0)


def test_an_answer_that_does_not_come_is_given_up(toy, toy_process):
    """A server that is stopped, not ended; and the answer that comes late is nobody else's."""
    _, observation = toy
    with toy_process() as (process, url), PolicyClient(url, connect_s=20, timeout_s=0.5) as client:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="within 0.5 s"):
            client.predict(observation(), seed=1)
        os.kill(process.pid, signal.SIGCONT)
        assert client.predict(observation(), seed=2)[0, 1] == 2


def test_a_busy_server_is_asked_again(toy):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy(seconds=0.3, batch_size=1), queue_size=1) as server:
        with PolicyClient(server.url) as first, PolicyClient(server.url) as second:
            other = threading.Thread(target=first.predict, args=(observation(),), kwargs={"seed": 1})
            other.start()
            time.sleep(0.1)
            assert second.predict(observation(), seed=2)[0, 1] == 2
            other.join(timeout=20)


def test_a_server_that_stays_busy_is_given_up(toy):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy(seconds=1.2, batch_size=1), queue_size=1) as server:
        with PolicyClient(server.url) as first, PolicyClient(server.url, timeout_s=0.3) as second:
            other = threading.Thread(target=first.predict, args=(observation(),), kwargs={"seed": 1})
            other.start()
            time.sleep(0.2)
            with pytest.raises(ServerError, match="wait already") as told:
                second.predict(observation(), seed=2)
            other.join(timeout=20)
    assert told.value.code == "busy"


def test_an_answer_to_another_question_is_not_taken(toy, monkeypatch):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy()) as server, PolicyClient(server.url) as client:
        monkeypatch.setattr(client, "request", lambda message: {"actions": np.zeros((4, 2)), "seed": 8})
        with pytest.raises(ServerError, match="another question"):
            client.predict(observation(), seed=7)


def test_a_refusal_names_the_field_and_the_connection_goes_on(toy):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy()) as server, PolicyClient(server.url) as client:
        message = {**message_from(observation(), ToyPolicy.spec), "observation/state": [1.0, 2.0], "seed": 1}
        with pytest.raises(RefusedError, match="'observation/state' is"):
            client.request(message)
        assert client.predict(observation(), seed=2)[0, 1] == 2


def test_an_observation_that_does_not_fit_is_not_sent(toy):
    ToyPolicy, observation = toy
    policy = ToyPolicy()
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        with pytest.raises(ValueError, match="2 images, the policy sees 1 cameras"):
            client.predict({**observation(), "image": observation()["image"] * 2}, seed=0)
    assert policy.batches == []


@pytest.mark.parametrize("images", [None, "png"])
def test_images_arrive_as_they_were(toy, images):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy()) as server, PolicyClient(server.url, images=images) as client:
        assert client.predict(observation(77), seed=1)[0].tolist() == [77.25, 1]


def test_an_episode_counts_its_predictions(toy):
    ToyPolicy, observation = toy
    with serve_in_thread(ToyPolicy()) as server, PolicyClient(server.url) as client:
        episode = ClientEpisode(client, seed=5)
        seeds = [episode.predict(observation())[0, 1] for _ in range(3)]
    assert seeds == [prediction_seed(5, number) for number in range(3)]


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_questions_that_are_asked_together_get_their_own_answers(toy, count):
    policy_class, observation = toy
    policy = policy_class(seconds=0.02)
    with serve_in_thread(policy, max_wait_ms=500.0) as server, PolicyClient(server.url) as client:
        found = client.predict_batch([observation(10 * row) for row in range(count)], range(100, 100 + count))
        assert len(client.others) == max(min(count, 4) - 1, 0)
    assert [chunk[0].tolist() for chunk in found] == [[10 * row + 0.25, 100 + row] for row in range(count)]
    assert sum(policy.batches) == count and max(policy.batches, default=0) == min(count, 4)
    assert not client.others


def test_a_further_connection_asks_no_other_policy(toy, monkeypatch):
    policy_class, observation = toy
    with serve_in_thread(policy_class()) as server, PolicyClient(server.url) as client:
        client.fingerprint = "the one before"
        with pytest.raises(ConnectionError, match="served the policy the one before and serves toy now"):
            client.predict_batch([observation(1), observation(2)], [0, 1])


def test_an_evaluation_in_batches_over_a_server_is_that_of_one_process(tmp_path):
    settings = EvaluationSettings(
        benchmark="point", episodes=2, n_action_steps=2, max_steps=4, batch_size=4, num_envs=2
    )
    policy = Policy.from_pretrained(RUN, batch_size=4)
    evaluate(policy, None, settings, tmp_path / "here", show_progress=False)
    with serve_in_thread(policy) as server, PolicyClient(server.url) as client:
        evaluate(client, None, settings, tmp_path / "there", show_progress=False)
        with pytest.raises(
            ValueError, match="evaluation.batch_size is 2, but the policy was loaded with batch_size=4"
        ):
            evaluate(client, None, replace(settings, batch_size=2), tmp_path / "other", show_progress=False)
    for name in ("episodes.jsonl", "summary.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_another_kind_of_server_is_not_taken_for_one(toy):
    from websockets.sync.server import serve

    with serve(lambda connection: connection.send(b"\x80"), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ProtocolError, match="no server of this package"):
            PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", connect_s=20)
        server.shutdown()


def test_pauses_grow_and_stay_short():
    assert all(0.07 <= pause(0) <= 0.13 and pause(attempt) <= 2.5 for attempt in range(20) for _ in range(20))
