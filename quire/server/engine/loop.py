"""EngineLoop: runs the engine. Inbox → step → outbox.

It sleeps on its inbox while the engine has no work; between steps it takes whatever has arrived. Only the thread that runs it
ever touches the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from quire.core.sequence import Request
from quire.core.snapshot import Watch
from quire.core.stats import EngineStats
from quire.errors import QuireError
from quire.outputs import SequenceOutput
from quire.server.engine.messages import (
    ALIVE_S,
    STATS_S,
    UNASKED,
    Abort,
    Add,
    Alive,
    GetSnapshot,
    GetStats,
    KVEvents,
    Outputs,
    Seen,
    Stats,
    Stop,
    ToEngine,
    Unwatch,
)  # fmt: skip
from quire.server.metrics.kv_events import EventLog

QUIET_S = 1.0
"""After this long without work the engine checks its books."""
PAUSE_S = 0.05
"""After this long without work it says what it has counted."""


FromLoop = Outputs | Stats | KVEvents | Seen | Alive


class SteppedEngine(Protocol):
    """What the loop needs of an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request, resumed: Sequence[list[int] | None] = ()) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]: ...
    def step(self) -> list[SequenceOutput]: ...
    def stats(self) -> EngineStats: ...
    def watch(self) -> Watch: ...
    def check(self) -> None: ...


class EngineLoop:
    """Owns an engine. Messages are put into ``inbox`` by any thread; ``outbox`` is called on the thread of ``run``.

    events: listens to the engine; what it has written down goes out after each step.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        inbox: SimpleQueue[ToEngine],
        outbox: Callable[[FromLoop], None],
        events: EventLog | None = None,
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._said = 0.0
        """When the front was last told something."""
        self._counted = 0.0
        """When it was last told what the engine has counted."""
        self._stale = False
        """Something has happened since."""
        self._send_s = 0.0
        self._events = events
        self._watch: Watch | None = None
        self._snapshot_s = 0.0

    def run(self) -> None:
        """Until Stop. Raises what the engine raises: it can't go on then."""
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Apply what has arrived, run one step. False: stop."""
        engine = self._engine
        outputs: list[SequenceOutput] = []
        message = self._poll() if engine.has_work else self._wait()
        while message is not None:
            if isinstance(message, Stop):
                return False
            outputs += self._apply(message)
            message = self._poll()
        if engine.has_work:
            outputs += engine.step()
            self._stale = True
        if outputs:
            self._say(Outputs.of(outputs))
        elif time.monotonic() - self._said > ALIVE_S:
            self._say(Alive(engine.stats().steps))
        if self._events is not None and (payload := self._events.take()):
            self._say(KVEvents(payload))
        if self._said - self._counted > STATS_S:
            self._count(UNASKED)
        return True

    def _say(self, message: FromLoop) -> None:
        began = time.monotonic()
        self._outbox(message)
        self._said = time.monotonic()
        self._send_s += self._said - began

    def _count(self, ticket: int) -> None:
        self._say(Stats(ticket, self._engine.stats(), self._send_s))
        self._counted, self._stale = self._said, False

    def _poll(self) -> ToEngine | None:
        try:
            return self._inbox.get_nowait()
        except Empty:
            return None

    def _wait(self) -> ToEngine:
        """The next message, however long it takes; a quiet moment is used to prove that no block was lost."""
        with suppress(Empty):
            return self._inbox.get(timeout=PAUSE_S)
        if self._stale:
            self._count(UNASKED)
        with suppress(Empty):
            return self._inbox.get(timeout=QUIET_S)
        self._engine.check()
        return self._inbox.get()

    def _apply(self, message: Add | Abort | GetStats | GetSnapshot | Unwatch) -> list[SequenceOutput]:
        self._stale = self._stale or isinstance(message, Add | Abort)
        match message:
            case Add():
                request = message.read()
                try:
                    self._engine.add(request, message.resumed)
                except QuireError as e:
                    return [SequenceOutput(request.request_id, i, [], None, "error", e.message) for i in range(request.params.num_outputs)]
            case Abort(request_id, index):
                return self._engine.abort(request_id, index)
            case GetStats(ticket):
                self._count(ticket)
            case GetSnapshot(ticket):
                start = time.thread_time()
                if self._watch is None:
                    self._watch = self._engine.watch()
                self._say(Seen(ticket, self._watch.snapshot(), self._snapshot_s))
                self._snapshot_s = time.thread_time() - start
            case Unwatch() if self._watch is not None:
                self._watch.close()
                self._watch = None
        return []
