"""EngineLoop: runs the engine on a thread of its own. Inbox → step → outbox.

The kernels release the GIL, so sockets are served while a step computes. The loop sleeps on its inbox while the engine
has no work; between steps it takes whatever has arrived. Only this thread ever touches the engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from quire.core.sequence import Request
from quire.core.stats import EngineStats
from quire.errors import QuireError
from quire.outputs import SequenceOutput
from quire.server.messages import Abort, Add, Died, FromEngine, GetStats, Outputs, Stats, Stop, ToEngine

QUIET_S = 1.0
"""After this long without work the engine checks its books."""

log = logging.getLogger("quire.engine")


class SteppedEngine(Protocol):
    """What the loop needs of an engine."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]: ...
    def step(self) -> list[SequenceOutput]: ...
    def stats(self) -> EngineStats: ...
    def check(self) -> None: ...


class EngineLoop:
    """Owns an engine. ``send`` may be called from any thread; ``outbox`` is called on the engine's thread."""

    def __init__(self, engine: SteppedEngine, outbox: Callable[[FromEngine], None]) -> None:
        self._engine = engine
        self._outbox = outbox
        self._inbox: SimpleQueue[ToEngine] = SimpleQueue()
        # A daemon: a step that hangs must not keep a stopping process alive.
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def stop(self, timeout: float) -> None:
        """Leave after the current step; waits for at most ``timeout`` seconds."""
        self.send(Stop())
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            # Whoever is waiting learns it now; whoever comes later is refused by the front.
            log.exception("the engine died")
            self._outbox(Died("the engine has stopped after an internal error; the server's log has the details"))

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
            self._outbox(Outputs(outputs))
        return True

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

    def _apply(self, message: Add | Abort | GetStats) -> list[SequenceOutput]:
        match message:
            case Add(request):
                try:
                    self._engine.add(request)
                except QuireError as e:
                    return [SequenceOutput(request.request_id, i, [], None, "error", e.message) for i in range(request.params.num_outputs)]
            case Abort(request_id, index):
                return self._engine.abort(request_id, index)
            case GetStats(ticket):
                self._outbox(Stats(ticket, self._engine.stats()))
        return []
