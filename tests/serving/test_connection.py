"""A client's websocket on a plain socket: every message whole and in order, every end said, nothing waited for too long."""

import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.server import serve

from vla_bench.serving.connection import ClientConnection


@contextmanager
def served(answer, **options):
    """The address of a server that does this with every message."""

    def handle(connection):
        for message in connection:
            answer(connection, message)

    with serve(handle, "127.0.0.1", 0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join(timeout=20)


@contextmanager
def connected(url, max_size: int = 1 << 22, headers=None):
    connection = ClientConnection(url, headers or {}, max_size, timeout=10)
    try:
        yield connection
    finally:
        connection.close()


def echo(connection, message):
    connection.send(message)


def test_every_message_comes_back_whole(fuzz):
    settings, _ = fuzz
    sizes = st.sampled_from([0, 1, 125, 126, 65_535, 65_536, 1_000_000])

    @settings
    @given(st.lists(st.binary(max_size=300) | sizes.map(bytes), min_size=1, max_size=4))
    def back(messages):
        for message in messages:  # all of them are sent before the first is read
            connection.send(message, timeout=10)
        assert [connection.recv(timeout=10) for _ in messages] == messages

    with served(echo, compression=None, max_size=None) as url, connected(url) as connection:
        back()


def test_a_message_in_pieces_is_one(toy):
    with (
        served(lambda connection, _: connection.send(iter([b"one", b"", b"two"]))) as url,
        connected(url) as connection,
    ):
        connection.send(b"go", timeout=10)
        assert connection.recv(timeout=10) == b"onetwo"


def test_a_text_is_a_text():
    with served(lambda connection, _: connection.send("größer")) as url, connected(url) as connection:
        connection.send(b"go", timeout=10)
        assert connection.recv(timeout=10) == "größer"


def test_a_ping_is_answered_while_a_reply_is_waited_for():
    answered = []

    def ping(connection, message):
        answered.append(connection.ping().wait(10))
        connection.send(message)

    with served(ping) as url, connected(url) as connection:
        connection.send(b"go", timeout=10)
        assert connection.recv(timeout=10) == b"go"
    assert answered == [True]


def test_nothing_is_waited_for_longer_than_is_told():
    with served(lambda connection, message: None) as url, connected(url) as connection:
        connection.send(b"go", timeout=10)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            connection.recv(timeout=0.2)
        assert 0.15 < time.monotonic() - begin < 5


@pytest.mark.parametrize("code", [1000, 1001, 1011])
def test_an_end_is_said_with_its_reason(code):
    with served(lambda connection, _: connection.close(code, "enough")) as url, connected(url) as connection:
        connection.send(b"go", timeout=10)
        with pytest.raises(ConnectionClosed, match=f"{code}.*enough"):
            connection.recv(timeout=10)
        with pytest.raises(ConnectionClosed):
            connection.send(b"more", timeout=10)


def test_a_socket_that_breaks_is_an_end():
    with served(lambda connection, _: connection.socket.close()) as url, connected(url) as connection:
        connection.send(b"go", timeout=10)
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=10)


def test_a_message_over_the_limit_is_not_read():
    with (
        served(lambda connection, _: connection.send(bytes(5000))) as url,
        connected(url, max_size=4096) as connection,
    ):
        connection.send(b"go", timeout=10)
        with pytest.raises(ConnectionClosed, match="1009"):
            connection.recv(timeout=10)


def test_headers_are_sent_and_a_refusal_has_its_status_and_its_words():
    def refuse(connection, request):
        return connection.respond(418, f"not with {request.headers['X-Cup']}\n")

    with served(echo, process_request=refuse) as url, pytest.raises(InvalidStatus) as told:
        ClientConnection(url, {"X-Cup": "this cup"}, 4096, timeout=10)
    assert told.value.response.status_code == 418 and told.value.response.body == b"not with this cup\n"


def test_what_speaks_no_websocket_is_told(processes):
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"ws://127.0.0.1:{listening.getsockname()[1]}"

        def answer():
            other, _ = listening.accept()
            other.recv(1000)
            other.sendall(b"220 mail.example.org\r\n\r\n")
            other.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(InvalidHandshake):
            ClientConnection(url, {}, 4096, timeout=10)
        thread.join(timeout=10)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):  # accepts, and says nothing
            ClientConnection(url, {}, 4096, timeout=0.3)
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ws:", "robot:8000"])
def test_what_is_no_address_is_told(url):
    with pytest.raises(InvalidURI):
        ClientConnection(url, {}, 4096, timeout=1)


def test_closing_does_not_wait_for_a_server_that_is_stuck():
    stuck = threading.Event()
    with served(lambda connection, _: stuck.wait(10)) as url:
        connection = ClientConnection(url, {}, 4096, timeout=10)
        connection.send(b"go", timeout=10)
        begin = time.monotonic()
        connection.close(timeout=0.2)
        assert time.monotonic() - begin < 5
        stuck.set()
