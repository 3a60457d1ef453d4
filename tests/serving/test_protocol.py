"""Connections without a complete request, or without a reader, are closed, and the others answer meanwhile."""

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import uvicorn  # noqa: E402

from sparseinst.tools import serve_run  # noqa: E402
from tests.serving.service import wait_until  # noqa: E402

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
MAX_CONNECTIONS = 6
SECONDS = 2
LARGE_HEAD = b"GET /large HTTP/1.1\r\nHost: x\r\n"
# More than the system buffers.
LARGE = bytes(2**24)


async def app(scope, receive, send):
    """Answer with the body of the request, when that has arrived; to /large with LARGE."""
    body, more = LARGE if scope["path"] == "/large" else b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def connect(monkeypatch):
    """A function that connects to a server with the service's settings, and sends bytes.

    Its attribute ``open`` has the connections of the server.
    """
    monkeypatch.setattr(serve_run, "_MAX_CONNECTIONS", MAX_CONNECTIONS)
    monkeypatch.setattr(serve_run, "_KEEP_ALIVE_SECONDS", SECONDS)
    config = serve_run.server_config(app)
    config.lifespan = "off"
    server = uvicorn.Server(config)
    listener = serve_run.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started, 60)
    with contextlib.ExitStack() as stack:

        def connect(content=b""):
            connection = socket.create_connection(listener.getsockname(), timeout=20)
            stack.enter_context(contextlib.closing(connection)).sendall(content)
            return connection

        connect.open = server.server_state.connections
        yield connect
    server.should_exit = True
    thread.join()


def received(connection):
    """Everything that the server sends until it closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            parts.append(part)
    return b"".join(parts)


def answered(connection, body):
    """Whether an answer with this body arrives."""
    content = b""
    while not content.endswith(b"\r\n\r\n" + body) and (part := connection.recv(4096)):
        content += part
    return b" 200 " in content and content.endswith(body)


def test_connections_without_a_request_are_closed(connect):
    silent = [connect() for _ in range(MAX_CONNECTIONS // 2)]
    half = [connect(HEAD) for _ in range(MAX_CONNECTIONS // 2)]
    assert b" 503 " in received(connect(HEAD + b"Connection: close\r\n\r\n"))
    assert [received(connection) for connection in (*silent, *half)] == [b""] * MAX_CONNECTIONS
    assert b" 200 " in received(connect(HEAD + b"Connection: close\r\n\r\n"))


def test_a_connection_with_half_of_its_second_request_is_closed(connect):
    connection = connect(HEAD + b"\r\n" + HEAD)
    assert received(connection).count(b" 200 ") == 1


def test_a_slow_upload_and_a_second_request_are_answered(connect):
    connection = connect(HEAD + b"Content-Length: 2\r\n\r\na")
    time.sleep(1.5 * SECONDS)
    connection.sendall(b"b")
    assert answered(connection, b"ab")
    time.sleep(0.5 * SECONDS)
    connection.sendall(HEAD + b"Content-Length: 1\r\n\r\n")
    time.sleep(SECONDS)
    connection.sendall(b"c")
    assert answered(connection, b"c")


@pytest.mark.parametrize(
    "requests",
    [LARGE_HEAD + b"\r\n", LARGE_HEAD + b"Connection: close\r\n\r\n", (LARGE_HEAD + b"\r\n") * 2],
    ids=["keep-alive", "close", "two"],
)
def test_a_client_that_reads_nothing_is_left(connect, requests):
    client = connect(requests)
    wait_until(lambda: connect.open)
    wait_until(lambda: not connect.open, 5 * SECONDS)
    # This client has not closed its socket.
    assert client.fileno() >= 0 and answered(connect(HEAD + b"\r\n"), b"")


def test_a_client_that_reads_slowly_gets_its_answer(connect):
    client = connect(LARGE_HEAD + b"\r\n")
    num_received, end = 0, time.monotonic() + 4 * SECONDS
    while time.monotonic() < end:
        num_received += len(client.recv(2**19))
        time.sleep(SECONDS / 4)
    assert num_received < len(LARGE)
    assert num_received + len(received(client)) > len(LARGE)
