"""The supervisor: keeps an engine running in a process of its own, and starts another one when it dies or hangs.

    front (asyncio)  --Add, Abort, ...-->  socket  -->  engine process
                     <--Outputs, Stats--   socket  <--

What the engine says is read on the event loop (reader.py). One thread waits until it has gone, and brings up the next; another one
writes, so that an engine that does not read can't hold up the front. What was in flight is the client's to send again (journal.py),
once it hears Up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import quire
from quire import errors
from quire.config import EngineConfig
from quire.errors import EngineError, QuireError
from quire.grammar.watch import CALL_S
from quire.server.engine.messages import (
    Add,
    Death,
    Died,
    Down,
    FromEngine,
    Load,
    Loaded,
    NotLoaded,
    Stop,
    ToEngine,
    Up,
    decode_from_engine,
    encode,
)
from quire.server.engine.reader import EngineReader

STARTS = 3
"""So many times in a row an engine is started while requests wait for it. Then they end with an error, and others are refused, until one
starts: what was missing may come back."""
PAUSE_S = 1.0
"""Before the second start, twice that before the third, and so on, up to"""
LONGEST_PAUSE_S = 60.0

WHY = {
    "SIGKILL": " (where nobody did that by hand, the machine has run out of memory)",
    "SIGPROF": f" (to follow a form of structured output took more than {CALL_S:g} seconds for one token)",
}
"""What signals may mean."""

log = logging.getLogger("quire.supervisor")


class EngineProcess:
    """One engine process, and the socket to it. It ends when the socket is closed, thus also when this process dies."""

    def __init__(
        self, config: EngineConfig, *, kv_events: str | None = None, measure_limits: bool = False, constrained: bool = False
    ) -> None:
        """kv_events, measure_limits, constrained: see Load."""
        ours, theirs = socket.socketpair()
        package = str(Path(quire.__file__).parent.parent)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from quire.server.engine.process import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,  # Ctrl-C in the terminal is the front's business
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))},
            )
        self._connection = Connection(ours.detach())
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        threading.Thread(target=self._write, name="quire-outbox", daemon=True).start()
        self._outbox.put(encode(Load(asdict(config), measure_limits, kv_events, constrained)))

    @property
    def pid(self) -> int:
        return self._process.pid

    def loaded(self) -> Loaded:
        """Waits until the model is loaded. Raises the QuireError that the engine met, or EngineError where it died."""
        try:
            message = decode_from_engine(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise EngineError(f"the engine could not start: its process {self.obituary()} while it loaded the model") from None
        if isinstance(message, NotLoaded):
            kind = getattr(errors, message.kind, QuireError)
            raise kind(message.message, param=message.param)
        assert isinstance(message, Loaded)
        return message

    def send(self, message: ToEngine) -> None:
        self._outbox.put(encode(message))

    def fileno(self) -> int:
        """Of the socket."""
        return self._connection.fileno()

    def kill(self) -> None:
        self._process.kill()

    def close(self, timeout: float) -> None:
        """End it: at once, or where it is asked to stop, after ``timeout`` seconds."""
        self.send(Stop())
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._outbox.put(None)

    def obituary(self) -> str:
        """How it ended, for a sentence that begins with "its process"."""
        self._outbox.put(None)
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was killed by {name}{WHY.get(name, '')}"

    @property
    def death(self) -> Death:
        """Known after the obituary."""
        deaths: dict[int | None, Death] = {-signal.SIGKILL: "kill", -signal.SIGPROF: "form"}
        return deaths.get(self._process.returncode, "crash")

    def _write(self) -> None:
        try:
            while (data := self._outbox.get()) is not None:
                self._connection.send_bytes(data)
        except OSError:
            pass  # it has gone; the reader sees that too


def _started(config: EngineConfig, kv_events: str | None, constrained: bool) -> EngineProcess:
    """One that has loaded. Raises QuireError, and leaves nothing."""
    try:
        engine = EngineProcess(config, kv_events=kv_events, constrained=constrained)
    except (OSError, RuntimeError) as e:  # no descriptor, no memory, no process, no thread left: there may be again
        raise EngineError(f"the engine's process could not be started: {e}") from None
    try:
        engine.loaded()
    except QuireError:
        engine.close(0)
        raise
    return engine


class Supervisor:
    """A link to an engine that is replaced when it dies. ``first`` has been loaded.

    timeout: seconds without a finished step, while there is work, after which an engine counts as hung.
    """

    def __init__(self, first: EngineProcess, config: EngineConfig, timeout: float, kv_events: str | None = None) -> None:
        self._kv_events = kv_events
        self._engine, self._config, self._timeout = first, config, timeout
        self._receive: Callable[[FromEngine], None] = lambda message: None
        self._has_work: Callable[[], bool] = lambda: False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: EngineReader | None = None
        self._constrained = False
        """Some request had constraints."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="quire-supervisor", daemon=True)

    def start(self, receive: Callable[[FromEngine], None], has_work: Callable[[], bool]) -> None:
        """On the event loop. ``receive`` is called there, and on the supervisor's thread. ``has_work``: whether anything is in flight."""
        self._loop = asyncio.get_running_loop()
        self._receive, self._has_work = receive, has_work
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._engine.pid

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Add):
            self._constrained |= message.request.params.constrained
        self._engine.send(message)
        if self._reader is not None:
            self._reader.told()

    def stop(self, timeout: float) -> None:
        """End the engine, after its current step if that takes less than ``timeout`` seconds."""
        self._stopping.set()
        self._engine.close(timeout)

    def _watch(self) -> None:
        while True:
            end = self._relay()
            if self._stopping.is_set():
                return
            log.warning("%s; starting another one", end.reason)
            self._receive(end)
            if not self._restart():
                return
            self._receive(Up())

    def _relay(self) -> Down:
        """Have what the engine says handed on until it has gone. How it ended."""
        assert self._loop is not None
        reader = self._reader = EngineReader(self._loop, self._engine, self._receive, self._has_work, self._timeout)
        with contextlib.suppress(RuntimeError):  # the event loop has closed: the process is ending
            self._loop.call_soon_threadsafe(reader.start)
        reader.gone.wait()
        how = self._engine.obituary()
        if reader.hung:
            return Down(f"the engine's process did not finish a step for {self._timeout:g} seconds and was killed")
        return Down(f"the engine's process {how}", self._engine.death)

    def _restart(self) -> bool:
        """Until there is another engine; False where the server stops before that."""
        attempt = 0
        while True:
            attempt += 1
            started = time.monotonic()
            try:
                engine = _started(self._config, self._kv_events, self._constrained)
            except QuireError as e:
                pause = min(PAUSE_S * attempt, LONGEST_PAUSE_S)
                log.error("attempt %d: %s; another one in %.0f s", attempt, e.message, pause)
                if attempt >= STARTS:
                    if attempt == STARTS:
                        log.error("requests are refused until an engine can be started")
                    self._receive(Died(f"the engine could not be started again: {e.message}"))
                if self._stopping.wait(pause):
                    return False
            else:
                self._engine = engine
                if self._stopping.is_set():  # in the meantime
                    engine.close(0)
                    return False
                log.warning("another engine is ready after %.1f s", time.monotonic() - started)
                return True
