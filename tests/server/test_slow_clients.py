"""Clients that send or read slowly, connections that are too many, headers that are too many: cut off, with an answer where there
is somebody to read it."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from quire.server import launch
from quire.server.http import limits, protocol
from quire.server.launch import OTHER_FILES, files_for
from quire.text.tokenizer import Tokenizer
from server.harness import DEADLINE_S, PacedBackend, Server, health, http, raw_request, wait_clean, wait_until

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 60, "n": 10, "logprobs": 20, "ignore_eos": True}
"""More bytes than a socket's buffers hold."""


@contextmanager
def serving(tokenizer: Tokenizer, **options: Any) -> Iterator[Server]:
    server = Server(tokenizer, PacedBackend(vocab_size=tokenizer.vocab_size), **options)
    try:
        yield server
        wait_clean(server.url)
    finally:
        server.stop()


def connect(server: Server, send: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S)
    connection.sendall(send)
    return connection


def everything(connection: socket.socket) -> bytes:
    got = b""
    while part := connection.recv(65536):
        got += part
    return got


def test_headers_that_come_slowly(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more byte now and then does not help."""
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.5)
    with serving(tokenizer) as server:
        for start in (b"", b"GET /health HTTP/1.1\r\nhost: x\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he"):
            with connect(server, start) as connection:
                connection.settimeout(0.05)
                got, end = b"", time.monotonic() + DEADLINE_S
                while time.monotonic() < end:
                    try:
                        connection.sendall(b"a" if start.endswith(b"he") else b"")
                        part = connection.recv(65536)
                    except TimeoutError:
                        continue
                    except OSError:  # closed while we sent
                        break
                    if not part:
                        break
                    got += part
                else:
                    pytest.fail("it was waited for")
                assert b"HTTP/1.1 408" in got or start.endswith(b"he")


def test_a_body_that_comes_slowly(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.5)
    with serving(tokenizer) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        for rest in (b'content-length: 100\r\n\r\n{"pro', b'transfer-encoding: chunked\r\n\r\n5\r\n{"pro\r\n'):
            with connect(server, head + rest) as connection:
                got = everything(connection)
            assert got.startswith(b"HTTP/1.1 408")
            assert b"did not arrive within 0.5 seconds (5 bytes did)" in got


def test_a_client_that_reads_nothing_is_cut_off(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests end by themselves; the connection would stay for ever, and what was written for it."""
    monkeypatch.setattr(protocol, "WRITE_TIMEOUT_S", 0.5)
    with serving(tokenizer) as server:
        asked = {**LONG, "stream": True}
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what the kernel takes is not read either
        with raw_request(server.port, COMPLETIONS, asked, receive_buffer=2048) as connection:
            wait_until(lambda: server.client.meter.received == 1, "it has begun")
            wait_until(lambda: len(connections(server)) == 0, "it was cut off")
            with contextlib.suppress(ConnectionResetError):
                assert b"[DONE]" not in everything(connection)


def test_an_answer_that_nobody_reads_does_not_keep_its_connection(tokenizer: Tokenizer) -> None:
    """The answer is written, as far as it goes; the connection is idle then, and its time is bounded too."""
    with serving(tokenizer) as server:
        server._server.config.timeout_keep_alive = 1
        server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with raw_request(server.port, COMPLETIONS, LONG, receive_buffer=2048):
            wait_until(lambda: server.client.meter.received == 1, "it has begun")
            wait_until(lambda: len(connections(server)) == 0, "it was cut off")


def connections(server: Server) -> set[Any]:
    found: set[Any] = server._server.server_state.connections
    return found


def test_one_connection_too_many(tokenizer: Tokenizer) -> None:
    with serving(tokenizer, max_connections=3) as server:
        with ExitStack() as clients:
            for _ in range(3):
                clients.enter_context(connect(server))
            wait_until(lambda: len(connections(server)) == 3, "they are connected")
            answer = http.get(server.url + "/health")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "3 connections" in answer.json()["error"]["message"]
            assert "--max-connections" in answer.json()["error"]["message"]
            with connect(server) as silent:
                assert everything(silent) == b"", "it does not stay either"
        wait_until(lambda: len(connections(server)) == 0, "they have gone")
        assert health(server.url)["status"] == "ok"


def test_many_headers(fake: Server) -> None:
    few = b"".join(b"x-%d: 1\r\n" % i for i in range(protocol.MAX_HEADERS - 2))
    with connect(fake, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + few + b"\r\n") as connection:
        assert everything(connection).startswith(b"HTTP/1.1 200")
    with connect(fake, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + few + b"y: 1\r\n\r\n") as connection:
        got = everything(connection)
    assert got.startswith(b"HTTP/1.1 431")
    assert b"more than 256 headers" in got
    assert got.count(b"HTTP/1.1") == 1


def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, values: said.append(values))
    for hard, expected, limit in ((1 << 20, 4096, 4096 + OTHER_FILES), (1000, 1000 - OTHER_FILES, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, hard=hard: (256, hard))
        assert files_for(4096) == expected
        assert said.pop() == (limit, hard)
    assert "may open 1000 files" in caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, 1 << 20))
    assert launch.files_for(4096) == 4096
    assert not said
