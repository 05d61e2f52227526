"""The engine's process: loads the model, says what it has loaded, and runs the engine's loop for the front at the other end of a
socket. It owns nothing that can't be rebuilt, and ends when the front does.
"""

from __future__ import annotations

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
from quire.logs import ThrottledLog
from quire.server.messages import Load, Loaded, NotLoaded, ToEngine, decode_to_engine, encode

if TYPE_CHECKING:
    from quire.backends.base import Backend
    from quire.core.engine import Engine, Executor

UNBOUNDED = 1 << 20
"""As ``max_waiting``: the most that it may be."""


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

    def read() -> None:
        try:
            while True:
                message = decode_to_engine(connection.recv_bytes())
                assert not isinstance(message, Load)
                inbox.put(message)
        except (EOFError, OSError):
            os._exit(0)  # the front is gone, and nobody else wants what is being loaded or computed

    threading.Thread(target=read, name="quire-inbox", daemon=True).start()
    try:
        engine, loaded = load_engine(EngineConfig(**load.config))
    except QuireError as e:
        connection.send_bytes(encode(NotLoaded(e.message, e.param, type(e).__name__)))
        return
    connection.send_bytes(encode(loaded))
    from quire.server.engine_loop import EngineLoop

    EngineLoop(engine, inbox, lambda message: connection.send_bytes(encode(message))).run()


def load_engine(config: EngineConfig) -> tuple[Engine, Loaded]:
    """Raises QuireError."""
    phases: list[tuple[str, float]] = []
    from quire.backends.base import open_backend

    backend = open_backend(config, lambda name, seconds: phases.append((name, seconds)))
    start = time.perf_counter()
    from quire.server.poison import poisoned

    engine = make_engine(poisoned(backend, config), config)
    phases.append(("engine", time.perf_counter() - start))
    return engine, describe(engine, backend, config, phases)


def make_engine(backend: Executor, config: EngineConfig) -> Engine:
    """An engine whose queue the front bounds: what it has taken, the engine takes too. Raises CapacityError."""
    from quire.core.engine import Engine

    engine = Engine(backend, replace(config, max_waiting=UNBOUNDED), time.monotonic)
    engine.on_preemption(ThrottledLog(logging.getLogger("quire.engine")).warning)
    return engine


def describe(engine: Engine, backend: Backend, config: EngineConfig, phases: list[tuple[str, float]]) -> Loaded:
    spec = backend.spec
    return Loaded(
        limits=engine.limits,
        eos_token_ids=list(spec.eos_token_ids),
        sampling_defaults=dict(spec.sampling_defaults),
        architecture=spec.architecture,
        num_parameters=spec.num_parameters(),
        dtype=spec.dtype,
        kv_bytes_per_token=spec.kv_bytes_per_token(config.kv_dtype),
        num_host_blocks=backend.num_host_blocks,
        max_num_seqs=engine.limits.max_num_seqs,
        policy=type(engine.scheduler.policy).__name__,
        weight_note=backend.weight_note,
        memory_note=backend.memory_note,
        phases=phases,
    )
