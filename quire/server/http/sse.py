"""Responses that watch their client: server-sent events, and single answers to clients that may hang up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response

from quire.server.http.errors import ClientGoneError

if TYPE_CHECKING:
    from quire.server.engine._express import Express

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PING_S = 15.0
"""After this long without a token a comment is sent, which clients skip, so that no proxy thinks the connection dead."""
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


class Push(Protocol):
    """A way to send a part of a response without waiting: an ASGI extension of our own (protocol.py)."""

    def resume(self) -> None:
        """Call this before writing, when the response has begun, and again after each part of it that was sent otherwise."""
        ...

    @property
    def ready(self) -> bool:
        """The response has begun, is not over, and the client reads it as fast as it is sent."""
        ...

    def write(self, body: bytes) -> bool:
        """False: it is not ``ready``, and nothing was written."""
        ...

    def write_rest(self, rest: bytes) -> None:
        """What the socket did not take of a part that was sent through ``express``."""
        ...

    express: Express | None
    """Is told which socket may be written to, while nothing else is on its way there."""


PUSH = "quire.push"
"""The extension's name; its "push" is a Push."""


def push_of(scope: MutableMapping[str, Any]) -> Push | None:
    push: Push | None = scope.get("extensions", {}).get(PUSH, {}).get("push")
    return push


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. Cancels it and raises ClientGoneError when the client hangs up first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(request: Request, work: Coroutine[Any, Any, bytes]) -> Response:
    """One JSON answer, unless the client hangs up before."""
    return Response(await while_connected(request.receive, work), media_type="application/json")


class EventStream(Response):
    """Events, server-sent ones if ``kind`` is not another media type. ``events`` gives whole events in bytes; ``close`` is called at the
    end, or when the client hangs up.

    A client that reads slowly stops ``events`` at its next item, through the transport's flow control.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], kind: str = media_type) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type=kind)
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with contextlib.suppress(ClientGoneError):
                await while_connected(receive, pump())
        finally:
            self._close()  # also where ``events`` was never begun
            if (close := getattr(self._events, "aclose", None)) is not None:
                await close()
