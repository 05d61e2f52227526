"""The short way of single tokens (quire.server.engine._express), by itself and beside the journal."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from quire.core.admission import RequestLimits
from quire.core.sequence import Request
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.server.engine._express import Express, carry
from quire.server.engine.client import EngineClient
from quire.server.engine.messages import Down, FromEngine, Outputs, Up
from quire.server.engine.stream import Shortcut

LIMITS = RequestLimits(max_model_len=1000, vocab_size=100, max_num_seqs=4, num_blocks=100, block_size=16)
TEXTS: dict[int, bytes | None] = {1: b'"a"', 2: b'"bb"', 3: None}


class Failing(dict[int, bytes | None]):
    def __missing__(self, token_id: int) -> bytes:
        raise RuntimeError("no such text")


def way(emitted: list[int], connection: socket.socket | None, **fields: Any) -> Express:
    """Open, where there is a connection."""
    made = Express(emitted, fields.pop("texts", TEXTS), b"data: ", b"\n\n")
    made.fd, made.waits, made.between = -1 if connection is None else connection.fileno(), True, True
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_what_may_go_goes_and_the_rest_is_left(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    emitted: dict[str, list[int]] = {name: [] for name in ("goes", "shut", "within", "waited", "special", "failing")}
    ways = {
        "goes": way(emitted["goes"], ours, last=2.0),
        "shut": way(emitted["shut"], None),
        "within": way(emitted["within"], ours, between=False),
        "waited": way(emitted["waited"], ours, waits=False),
        "special": way(emitted["special"], ours),
        "failing": way(emitted["failing"], ours, texts=Failing()),
    }
    tokens = [("goes", 0, 1), ("shut", 0, 1), ("within", 0, 1), ("waited", 0, 1), ("special", 0, 3), ("failing", 0, 9), ("unknown", 2, 1)]
    left, intervals, unsent = carry([*tokens, ("goes", 0, 2)], ways, 5.0)
    assert left == tokens[1:]
    assert (intervals, unsent) == ([(2.0, 1), (5.0, 1)], [])
    assert theirs.recv(1000) == b'b\r\ndata: "a"\n\n\r\nc\r\ndata: "bb"\n\n\r\n'
    assert [name for name, there in emitted.items() if there] == ["goes"]
    assert (emitted["goes"], ways["goes"].taken, ways["goes"].last) == ([1, 2], 2, 5.0)


def test_what_a_socket_does_not_take_comes_back(pair: tuple[socket.socket, socket.socket]) -> None:
    """In part, where its buffer is full, or all of it, where the other end has gone: the token counts as taken either way, and no other
    goes this way before somebody says so."""
    ours, theirs = pair
    emitted: list[int] = []
    one = Express(emitted, {1: b"x" * 30_000}, b"", b"")
    one.fd, one.waits, one.between = ours.fileno(), True, True
    chunk = b"7530\r\n" + b"x" * 30_000 + b"\r\n"
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    rounds = 0
    while not (unsent := carry([("a", 0, 1)], {"a": one}, 1.0)[2]):
        rounds += 1
    ((request_id, rest),) = unsent
    assert (request_id, one.fd, one.taken, emitted) == ("a", -1, rounds + 1, [1] * (rounds + 1))
    assert carry([("a", 0, 1)], {"a": one}, 2.0)[0] == [("a", 0, 1)]
    sent, size = b"", (rounds + 1) * len(chunk) - len(rest)
    while len(sent) < size:
        sent += theirs.recv(1 << 20)
    assert sent + rest == chunk * (rounds + 1)
    theirs.close()
    one.fd = ours.fileno()
    assert carry([("a", 0, 1)], {"a": one}, 3.0)[2] == [("a", chunk)]


class Link:
    """An engine that does nothing by itself."""

    def __init__(self) -> None:
        self.post: Callable[[FromEngine], None]

    def start(self, post: Callable[[FromEngine], None], has_work: Callable[[], bool]) -> None:
        self.post = post

    def send(self, message: object) -> None: ...

    def stop(self, timeout: float) -> None: ...


def test_the_journal_sees_the_first_token_after_a_death(pair: tuple[socket.socket, socket.socket]) -> None:
    """It acquits the request, however often its reader has begun to wait anew; then the short way is open again."""

    async def run() -> None:
        client, link, counted = EngineClient(LIMITS, 10), Link(), list[int]()
        client.start(link)
        params = SamplingParams(max_tokens=100)
        stream = client.submit([Request("a", [1, 2], params, 0)], background=False)
        emitted = client.emitted("a")
        assert emitted is not None
        express = way(emitted, pair[0])
        stream.shortcut = Shortcut("a", express, lambda rest: None, counted.append)
        stream.listener = lambda: bool(stream.take())

        async def wait() -> None:
            assert await stream.fetch(0.01) == []

        def token() -> bool:
            """Whether it went the short way."""
            before = express.taken
            link.post(Outputs([], [("a", 0, 1)]))
            return express.taken > before

        reader = asyncio.ensure_future(stream.fetch())
        await asyncio.sleep(0)
        assert [token(), token()] == [True, True]
        link.post(Down("killed", "kill"))
        assert client._journal._entries["a"].deaths == 1
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert counted == [2], "what went the short way is counted when its reader wakes"
        link.post(Up())
        await wait()
        reader = asyncio.ensure_future(stream.fetch())
        await asyncio.sleep(0)
        assert [token(), token(), token()] == [False, True, True]
        assert client._journal._entries["a"].deaths == 0
        stream.close()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert (counted, emitted, client.meter.generation_tokens) == ([2, 2], [1] * 5, 5)

    asyncio.run(run())


def test_time_without_an_engine_is_time_in_the_queue() -> None:
    """The engine counts from when it has the request."""

    async def run() -> None:
        client, link = EngineClient(LIMITS, 10), Link()
        client.start(link)
        link.post(Down("killed", "kill"))
        stream = client.submit([Request("a", [1, 2], SamplingParams(max_tokens=100), 0)], background=False)
        await asyncio.sleep(0.05)
        link.post(Up())
        link.post(Outputs([SequenceOutput("a", 0, [1], cached_tokens=0, queued_s=0.01)], []))
        (output,) = await stream.fetch()
        assert output.queued_s is not None
        assert output.queued_s >= 0.06
        stream.close()

    asyncio.run(run())
