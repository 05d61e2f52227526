"""What front and engine say to each other: nothing of an output is lost on its way, however the bytes are cut."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from quire.outputs import SequenceOutput, TokenLogprobs
from quire.server.engine.messages import Alive, FromEngine, Outputs, Stalled, decode_from_engine, encode
from quire.server.engine.reader import EngineReader

MORE: dict[str, Any] = {
    "logprobs": [TokenLogprobs((-1.0, 1), [])],
    "finish_reason": "length",
    "cached_tokens": 0,
    "queued_s": 0.0,
    "prompt_logprobs": [],
    "vector": [1.0],
    "preemptions": 0,
}


def test_an_output_with_more_to_it_than_a_token_is_sent_whole() -> None:
    fields = {field.name for field in dataclasses.fields(SequenceOutput)}
    assert fields == {"request_id", "index", "token_ids", "stop_reason", "end_token", *MORE}, "the last two mean nothing before the end"
    others = [SequenceOutput("a", 1, [5], **{name: value}) for name, value in MORE.items()]
    others += [SequenceOutput("b", 0, [5, 6]), SequenceOutput("c", 0, [], None, "abort")]
    message = Outputs.of([*others[:3], SequenceOutput("d", 2, [7]), *others[3:], SequenceOutput("e", 0, [8])])
    assert message == Outputs(others, [("d", 2, 7), ("e", 0, 8)])
    assert decode_from_engine(encode(message)) == message


class Engine:
    """The end of a socket, and what EngineReader wants of a process."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.killed = False
        self.asked: list[object] = []

    def send(self, message: object) -> None:
        self.asked.append(message)

    def fileno(self) -> int:
        return self.ours.fileno()

    def kill(self) -> None:
        self.killed = True
        self.theirs.close()


def read(engine: Engine, parts: list[bytes], timeout: float = 60.0, has_work: bool = False) -> tuple[list[FromEngine], EngineReader]:
    """What is heard of ``parts`` until the engine has gone: after them, or, where it has work, when it is killed."""
    heard: list[FromEngine] = []

    async def run() -> EngineReader:
        reader = EngineReader(asyncio.get_running_loop(), engine, heard.append, lambda: has_work, timeout)  # type: ignore[arg-type]
        reader.start()
        for part in parts:
            engine.theirs.sendall(part)
            await asyncio.sleep(0.001)
        if not has_work:
            engine.theirs.close()
        async with asyncio.timeout(60):
            while not reader.gone.is_set():
                await asyncio.sleep(0.001)
        return reader

    return heard, asyncio.run(run())


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_messages_in_pieces(size: int) -> None:
    messages: list[FromEngine] = [Alive(1), Outputs([SequenceOutput("a", 0, [1, 2])], [("b", 0, 3)] * 20), Alive(2)]
    stream = b"".join(struct.pack("!i", len(data)) + data for data in map(encode, messages))
    heard, reader = read(Engine(), [stream[i : i + size] for i in range(0, len(stream), size)])
    assert heard == messages
    assert not reader.hung


def test_an_engine_that_says_nothing_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.server.engine.reader.LOOK_S", 0.02)
    engine = Engine()
    (stalled,), reader = read(engine, [], timeout=0.2, has_work=True)
    assert isinstance(stalled, Stalled)
    assert stalled.seconds > 0.1
    assert engine.killed
    assert reader.hung


def test_an_engine_that_says_nothing_is_killed_though_all_who_waited_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them sooner than the timeout, with nothing in flight between them; what was sent has to be answered, and is asked for."""
    monkeypatch.setattr("quire.server.engine.reader.LOOK_S", 0.01)
    engine, work, heard = Engine(), [False], list[FromEngine]()

    async def run() -> None:
        reader = EngineReader(asyncio.get_running_loop(), engine, heard.append, lambda: work[0], 0.5)  # type: ignore[arg-type]
        reader.start()
        await _wait(lambda: bool(engine.asked))  # it has begun: what was sent before is not known
        answer = encode(Alive(1))
        engine.theirs.sendall(struct.pack("!i", len(answer)) + answer)
        await _wait(lambda: bool(heard))
        await asyncio.sleep(1.0)
        assert not engine.killed, "it owes nothing"
        assert len(engine.asked) == 1
        while not reader.gone.is_set():
            for work[0] in (True, False):
                reader.told()
                await asyncio.sleep(0.05)
        assert reader.hung

    asyncio.run(asyncio.wait_for(run(), 60))
    assert engine.killed
    assert len(engine.asked) == 2


async def _wait(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)
