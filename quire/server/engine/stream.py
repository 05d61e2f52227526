"""Stream: what the engine makes of the requests of one call, on its way to whoever reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.core.sequence import Request
from quire.errors import QuireError
from quire.outputs import SequenceOutput

if TYPE_CHECKING:
    from quire.server.engine._express import Express
    from quire.server.engine.client import EngineClient


@dataclass(slots=True, frozen=True)
class Shortcut:
    """The way of a sequence's tokens past its stream."""

    request_id: str
    express: Express
    unsent: Callable[[bytes], None]
    """Told what the socket did not take: it is to be sent some other way, before anything else."""
    taken: Callable[[int], None]
    """Told how many tokens have gone this way, before anything else is read of the stream."""


class Stream:
    """What the engine makes of some requests. ``close`` ends all of them that have not ended.

    Outputs that nobody has fetched wait here, and are fetched together: a slow reader gets fewer, larger pieces, and what
    waits for it is bounded by the tokens that its requests may generate.

    A reader that waits in ``fetch`` is woken by what arrives, which costs more than all the rest of a token's way. So it may leave a
    ``listener``, which is called first: where that one takes what has arrived, the reader sleeps on. And a ``shortcut``, for tokens
    with nothing else to them.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request], background: bool) -> None:
        self._client = client
        self._background = background
        self._requests = requests
        self._open = {(r.request_id, i) for r in requests for i in range(r.params.num_outputs)}
        self._arrived: list[SequenceOutput] = []
        self._news = asyncio.Event()
        self._failure: QuireError | None = None
        self.listener: Callable[[], bool] | None = None
        """Called after a step that brought something, while ``fetch`` waits. True: it has taken all of it, and there is more to come.
        Must not raise."""
        self.shortcut: Shortcut | None = None
        """Only where there is but one sequence."""
        self._waiting = False

    def close(self) -> None:
        """Nothing more is wanted of any of the requests. May be called twice."""
        self._pause()
        self._client._leave(self._requests, {request_id for request_id, _ in self._open})
        reason = "abort" if self._failure is None else "error"  # the client's doing, or the server's
        for request_id, index in self._open:
            self._client.meter.end(request_id, index, reason)
        self._count(-len(self._open))
        self._open.clear()

    @property
    def finished(self) -> bool:
        """Every sequence has ended, and everything was fetched."""
        return not self._open and not self._arrived and self._failure is None

    def fail(self, error: QuireError) -> None:
        """End what has not ended, and free its blocks now; ``fetch`` raises ``error`` after what has arrived."""
        if self._open:
            self._fail(error)
            self.close()

    def end(self, request_id: str, index: int) -> None:
        """Nothing more is wanted of one sequence (a stop string was found in its text): free its blocks now."""
        if (request_id, index) in self._open:
            self._ended((request_id, index))
            self._client.meter.end(request_id, index, "stop")
            self._client._abort(request_id, index)

    async def fetch(self, timeout: float | None = None) -> list[SequenceOutput]:
        """All that has arrived since the last call, at least one output; empty after ``timeout`` seconds without any.

        Raises UnavailableError where the engine died or the server is stopping, and what ``fail`` was told.
        """
        if not self._arrived and self._failure is None:
            self._news.clear()
            self._wait()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return []
            finally:
                self._pause()
        if not self._arrived and self._failure is not None:
            raise self._failure
        return self.take()

    def take(self) -> list[SequenceOutput]:
        """What has arrived since the last call, or nothing."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def _deliver(self, output: SequenceOutput) -> None:
        key = (output.request_id, output.index)
        if key not in self._open:  # ended by its reader
            return
        if output.finish_reason is not None:
            self._ended(key)
        self._arrived.append(output)
        self._shut()

    def _tell(self) -> None:
        """A step has brought something."""
        if self._waiting and self.listener is not None and self.listener():
            self._wait()
        else:
            self._news.set()

    def _ended(self, key: tuple[str, int]) -> None:
        self._open.discard(key)
        self._shut()
        self._count(-1)

    def _count(self, sequences: int) -> None:
        self._client.in_flight += sequences
        if self._background:
            self._client.in_background += sequences

    def _fail(self, error: QuireError) -> None:
        if self._open:
            self._failure = error
            self._shut()
            self._news.set()

    def _wait(self) -> None:
        """All that has arrived was read; whoever reads it waits."""
        self._waiting = True
        if self.shortcut is not None and self._open:
            self._client._open_way(self.shortcut)

    def _pause(self) -> None:
        self._waiting = False
        self._shut()

    def _shut(self) -> None:
        if self.shortcut is not None:
            self._client._shut_way(self.shortcut)
