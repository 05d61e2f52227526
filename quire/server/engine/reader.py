"""EngineReader: what one engine says, read on the event loop. A thread that reads and hands over costs two switches of threads for each
step, which is more than all that is done with a step's message."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.server.engine.messages import FromEngine, GetStats, Loaded, NotLoaded, Stalled, decode_from_engine

if TYPE_CHECKING:
    from quire.server.engine.supervisor import EngineProcess

READ_BYTES = 1 << 18
LOOK_S = 1.0
"""So often it is looked whether the engine still finishes steps."""
UNASKED = -1
"""Ticket of the counters that are asked for only to hear something."""
LENGTH_BYTES = 4
"""multiprocessing.connection puts a message's length before it, as a big-endian number (and does else from 2 GiB on)."""


class EngineReader:
    """Reads until the engine has gone, and kills it where it says nothing for ``timeout`` seconds though there is work, or was: those
    who wait may give up sooner, all of them, again and again, and what was sent to it has to be answered all the same.

    ``receive`` is called on the loop's thread, for each message.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, engine: EngineProcess, receive: Callable[[FromEngine], None],
        has_work: Callable[[], bool], timeout: float,
    ) -> None:  # fmt: skip
        self._loop, self._engine, self._fd = loop, engine, engine.fileno()
        self._receive, self._has_work = receive, has_work
        self._timeout = timeout
        self._buffer = bytearray()
        self._heard = time.monotonic()
        self._stalled = self.hung = False
        self._owes, self._asked = True, False
        """Nothing was heard since something was sent (before this began, perhaps); and since it was asked, with nothing in flight."""
        self.gone = threading.Event()
        """The engine has closed its end."""

    def start(self) -> None:
        """On the loop's thread."""
        self._heard = time.monotonic()
        self._loop.add_reader(self._fd, self._read)
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def told(self) -> None:
        """Something was sent to it. On the loop's thread."""
        if not self._owes:
            self._owes, self._asked = True, False
            if not self._has_work():
                self._heard = time.monotonic()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            if len(self._buffer) < end:
                return
            message = decode_from_engine(self._buffer[LENGTH_BYTES:end])
            del self._buffer[:end]
            assert not isinstance(message, Loaded | NotLoaded)
            self._heard, self._stalled, self._owes = time.monotonic(), False, False
            self._receive(message)

    def _look(self) -> None:
        now = time.monotonic()
        work = self._has_work()
        if self._owes and not work and not self._asked:
            self._asked = True
            self._engine.send(GetStats(UNASKED))
        if not work and not self._owes:
            self._heard = now
        elif now - self._heard > self._timeout:
            self.hung = True
            self._engine.kill()
            return  # the end of what it says is near
        elif now - self._heard > self._timeout / 2 and not self._stalled:
            self._stalled = True
            self._receive(Stalled(now - self._heard))
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _end(self) -> None:
        self._loop.remove_reader(self._fd)
        self._timer.cancel()
        self.gone.set()
