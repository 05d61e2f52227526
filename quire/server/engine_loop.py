"""EngineLoop: runs the engine. Inbox → step → outbox.

It sleeps on its inbox while the engine has no work; between steps it takes whatever has arrived. Only the thread that runs it
ever touches the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from quire.core.sequence import Request
from quire.core.snapshot import Watch
from quire.core.stats import EngineStats
from quire.errors import QuireError
from quire.outputs import SequenceOutput
from quire.server.messages import ALIVE_S, Abort, Add, Alive, GetSnapshot, GetStats, Outputs, Seen, Stats, Stop, ToEngine, Unwatch

QUIET_S = 1.0
"""After this long without work the engine checks its books."""


FromLoop = Outputs | Stats | Seen | Alive


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
    """Owns an engine. Messages are put into ``inbox`` by any thread; ``outbox`` is called on the thread of ``run``."""

    def __init__(self, engine: SteppedEngine, inbox: SimpleQueue[ToEngine], outbox: Callable[[FromLoop], None]) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._said = 0.0
        """When the front was last told something."""
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
        if outputs:
            self._say(Outputs(outputs))
        elif time.monotonic() - self._said > ALIVE_S:
            self._say(Alive(engine.stats().steps))
        return True

    def _say(self, message: FromLoop) -> None:
        self._said = time.monotonic()
        self._outbox(message)

    def _poll(self) -> ToEngine | None:
        try:
            return self._inbox.get_nowait()
        except Empty:
            return None

    def _wait(self) -> ToEngine:
        """The next message, however long it takes; a quiet moment is used to prove that no block was lost."""
        try:
            return self._inbox.get(timeout=QUIET_S)
        except Empty:
            self._engine.check()
            return self._inbox.get()

    def _apply(self, message: Add | Abort | GetStats | GetSnapshot | Unwatch) -> list[SequenceOutput]:
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
                self._say(Stats(ticket, self._engine.stats()))
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
