"""The answer to one HTTP call of a generation: in one piece, or as a stream of events, in whatever form an API has."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from time import monotonic
from typing import Protocol

from fastapi import Request
from fastapi.responses import Response

from quire.errors import QuireError
from quire.server.calls.generation import Generation, Piece
from quire.server.calls.pusher import Pusher
from quire.server.http.errors import INTERNAL
from quire.server.http.sse import PING_S, EventStream, Push, answer, push_of, while_connected

log = logging.getLogger("quire.server")


class Writer(Protocol):
    """One API's form of an answer. What it returns is whole events; nothing where there is nothing to say."""

    @property
    def ping(self) -> bytes:
        """Sent while there is nothing else to send."""
        ...

    def start(self) -> bytes:
        """Before anything was generated."""
        ...

    def write(self, pieces: list[Piece]) -> bytes:
        """What has been generated now."""
        ...

    def frame(self) -> tuple[bytes, bytes] | None:
        """What stands before and after a text as JSON, where ``write`` has nothing else to say of a token than its text, and does not
        have to know of it either. None where there are no such events. Asked once, at the start."""
        ...

    def end(self) -> bytes:
        """After everything."""
        ...

    def failed(self, error: QuireError) -> bytes:
        """Instead of the rest."""
        ...

    async def whole(self, generation: Generation) -> bytes:
        """The answer in one piece."""
        ...


async def deliver(request: Request, generation: Generation, writer: Writer, stream: bool, kind: str = EventStream.media_type) -> Response:
    """Run a generation, and answer. What can't be queued is refused before the answer begins. kind: of a stream, its media type."""
    if generation.to_compile:  # which may take a while, and others may stand before it
        await while_connected(request.receive, generation.submit())
    else:
        await generation.submit()
    if stream:
        return EventStream(events(generation, writer, push_of(request.scope)), generation.close, kind)
    with generation:
        return await answer(request, writer.whole(generation))


async def events(generation: Generation, writer: Writer, push: Push | None = None) -> AsyncIterator[bytes]:
    """The whole stream, errors included. Closing it early ends the generation.

    push: the way around this generator, for what comes while the client reads as fast as it is sent: the tokens of a step go out
    where they arrive, without waking anybody. The rest (the beginning and the end, errors, a client that is slow) comes from here.
    """
    try:
        with generation:
            if made := writer.start():
                yield made
            pusher = None if push is None else Pusher(generation, writer, push)
            sent = monotonic()
            while not generation.finished:
                if pusher is not None:
                    pusher.resume()
                pieces = await generation.next(PING_S)
                if pusher is not None and pusher.failure is not None:
                    raise pusher.failure
                made, now = writer.write(pieces), monotonic()
                if made or (pusher is not None and pusher.pushed):
                    sent = now
                elif not pieces or now - sent >= PING_S:  # tokens may come that say nothing: of a reasoning that is left out, for example
                    made, sent = writer.ping, now
                if made:
                    yield made
                if pusher is not None:
                    pusher.pushed = False
        yield writer.end()
    except QuireError as e:
        yield writer.failed(e)
    except Exception:
        log.exception("a stream failed")
        yield writer.failed(QuireError(INTERNAL))
