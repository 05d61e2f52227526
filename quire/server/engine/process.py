"""The engine's process: loads the model, says what it has loaded, and runs the engine's loop for the front at the other end of a
socket. It owns nothing that can't be rebuilt, and ends when the front does.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

from quire.config import EngineConfig
from quire.errors import QuireError
from quire.grammar.watch import limit_calls
from quire.logs import ThrottledLog
from quire.server.engine.messages import Abort, Add, Load, Loaded, NotLoaded, ToEngine, decode_to_engine, encode

if TYPE_CHECKING:
    from quire.backends.base import Backend
    from quire.core.engine import Engine, Executor
    from quire.grammar.constraints import Constraints
    from quire.text.tokenizer import Tokenizer

UNBOUNDED = 1 << 20
"""As ``max_waiting``: the most that it may be."""
FULL_COLLECTIONS = 1000
"""Of garbage: each comes after so many smaller ones (Python's own number is 10)."""


def main() -> None:
    """Entry of the process; its argument is the socket's file descriptor."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # a terminal or a service manager sends them to all processes: the front decides
        signal.signal(sig, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    code = 1
    try:
        run(Connection(int(sys.argv[1])))
        code = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the front has gone
    except Exception:
        logging.getLogger("quire.engine").exception("the engine died")
    finally:
        sys.stderr.flush()
        os._exit(code)  # threads may be busy in native code, which Python can't stop


def run(connection: Connection) -> None:
    """Serve one front until it says Stop or goes away."""
    load = decode_to_engine(connection.recv_bytes())
    assert isinstance(load, Load)
    inbox: SimpleQueue[ToEngine] = SimpleQueue()
    constrained = Preparation(inbox)

    def read() -> None:
        try:
            while True:
                message = decode_to_engine(connection.recv_bytes())
                assert not isinstance(message, Load)
                if isinstance(message, Add):
                    message = Add(message.read(), message.resumed)
                if not constrained.takes(message):
                    inbox.put(message)
        except (EOFError, OSError):
            os._exit(0)  # the front is gone, and nobody else wants what is being loaded or computed

    threading.Thread(target=read, name="quire-inbox", daemon=True).start()
    try:
        engine, loaded = load_engine(EngineConfig(**load.config), load.measure_limits)
        if load.constrained and engine.constraints is not None:
            engine.constraints.prepare(None)
    except QuireError as e:
        connection.send_bytes(encode(NotLoaded(e.message, e.param, type(e).__name__)))
        return
    limit_calls()
    constrained.start(engine)
    connection.send_bytes(encode(loaded))
    from quire.server.engine.loop import EngineLoop

    events = None
    if load.kv_events is not None:
        from quire.server.metrics.kv_events import EventLog

        events = EventLog(engine.backend.block_size, load.kv_events)
        engine.listen(events)
    # A full collection looks at every block that the cache knows, in the middle of a step, and finds nothing: the core makes no cycles.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTIONS)
    EngineLoop(engine, inbox, lambda message: connection.send_bytes(encode(message)), events).run()


class Preparation:
    """Where requests with constraints wait until what they need is loaded and compiled, on a thread of its own: neither the engine's
    steps nor other requests wait for that."""

    def __init__(self, inbox: SimpleQueue[ToEngine]) -> None:
        self._inbox = inbox
        self._queue: SimpleQueue[Add | Abort] = SimpleQueue()
        self._waiting: set[str] = set()
        self._gone: set[str] = set()
        """Of them, those that nobody wants any more: the engine does not hear of them."""

    def start(self, engine: Engine) -> None:
        threading.Thread(target=self._run, args=(engine,), name="quire-constraints", daemon=True).start()

    def takes(self, message: ToEngine) -> bool:
        """Whether the message goes to the engine this way. An Abort does not overtake its request."""
        match message:
            case Add(request, _):
                if not request.params.constrained:
                    return False
                self._waiting.add(request.request_id)
            case Abort(request_id, _):
                if request_id not in self._waiting:
                    return False
                if message.index is None:
                    self._gone.add(request_id)
            case _:
                return False
        self._queue.put(message)
        return True

    def _run(self, engine: Engine) -> None:
        while True:
            message = self._queue.get()
            if isinstance(message, Abort):
                self._gone.discard(message.request_id)
                self._inbox.put(message)
                continue
            request = message.request
            if request.request_id not in self._gone:
                if engine.constraints is not None:
                    with contextlib.suppress(QuireError):  # the engine meets it again, and says so
                        engine.constraints.prepare(request.params.structured)
                self._inbox.put(message)
            self._waiting.discard(request.request_id)


def load_engine(config: EngineConfig, measure_limits: bool = False) -> tuple[Engine, Loaded]:
    """Raises QuireError."""
    phases: list[tuple[str, float]] = []
    from quire.backends.base import open_backend

    backend = open_backend(config, lambda name, seconds: phases.append((name, seconds)))
    start = time.perf_counter()
    from quire.server.engine.poison import poisoned

    engine = make_engine(poisoned(backend, config), config, constraints_of(backend))
    phases.append(("engine", time.perf_counter() - start))
    limits = None
    if measure_limits:
        start = time.perf_counter()
        limits = backend.limits()
        phases.append(("measure limits", time.perf_counter() - start))
    return engine, describe(engine, backend, config, phases, limits)


def constraints_of(backend: Backend) -> Constraints:
    """Of the backend's model; its tokenizer is loaded when the first request needs it."""
    from quire.grammar.constraints import Constraints

    def load() -> Tokenizer:
        from quire.text.tokenizer import Tokenizer

        return Tokenizer.load(backend.folder)

    return Constraints(load, backend.spec.vocab_size, backend.spec.eos_token_ids)


def make_engine(backend: Executor, config: EngineConfig, constraints: Constraints | None = None) -> Engine:
    """An engine whose queue the front bounds: what it has taken, the engine takes too. Raises CapacityError."""
    from quire.core.engine import Engine

    engine = Engine(backend, replace(config, max_waiting=UNBOUNDED), time.monotonic, constraints=constraints)
    engine.on_preemption(ThrottledLog(logging.getLogger("quire.engine")).warning)
    return engine


def describe(
    engine: Engine, backend: Backend, config: EngineConfig, phases: list[tuple[str, float]], limits: tuple[float, float] | None
) -> Loaded:
    spec = backend.spec
    return Loaded(
        limits=engine.limits,
        eos_token_ids=list(spec.eos_token_ids),
        sampling_defaults=dict(spec.sampling_defaults),
        architecture=spec.architecture,
        num_parameters=spec.num_parameters(),
        dtype=spec.dtype,
        kv_layers=backend.kv_layers,
        num_host_blocks=backend.num_host_blocks,
        max_num_seqs=engine.limits.max_num_seqs,
        policy=type(engine.scheduler.policy).__name__,
        weight_note=backend.weight_note,
        memory_note=backend.memory_note,
        phases=phases,
        spec=spec,
        weight_bytes=backend.weight_bytes(),
        head_bytes=backend.head_bytes(),
        expert_bytes=backend.expert_bytes(),
        machine_limits=limits,
    )
