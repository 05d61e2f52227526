"""From a model folder to a server that answers: open the socket, load, start the engine's loop, serve, stop.

The model is loaded on one thread while the HTTP stack is imported on another: the time to the first answer is what the
user waits for.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quire.config import EngineConfig, ServerConfig
from quire.errors import ConfigError, QuireError
from quire.logs import ThrottledLog

if TYPE_CHECKING:
    from quire.backends.base import Backend
    from quire.core.engine import Engine, Executor
    from quire.server.client import EngineClient

KEEP_ALIVE_S = 75
"""Longer than common clients keep idle connections, so that it is they who close them."""
UNBOUNDED = 1 << 20
"""As ``max_waiting``: the most that it may be."""
GRACE_S = 5
"""After a signal, streams end with an error at once; a client that does not read it is cut off after this time."""


def serve(engine_config: EngineConfig, server_config: ServerConfig, folder: Path) -> int:
    """Serve the model in ``folder`` until SIGINT or SIGTERM. Returns the exit code. Raises QuireError where it can't start."""
    phases: list[tuple[str, float]] = []
    listener = open_socket(server_config.host, server_config.port)
    with listener:
        loading = _Loading(engine_config, phases)
        started = time.perf_counter()
        from quire.server.uvicorn_server import EngineServer

        phases.append(("HTTP stack", time.perf_counter() - started))
        started = time.perf_counter()
        from quire.text.tokenizer import Tokenizer

        try:
            tokenizer = Tokenizer.load(folder)
        except QuireError:
            loading.result()  # a folder that is no model at all is reported as that
            raise
        phases.append(("tokenizer", time.perf_counter() - started))
        backend = loading.result()
        started = time.perf_counter()
        from quire.server.app import create_app
        from quire.server.banner import banner, base_url
        from quire.server.context import Context

        engine, client = make_engine(backend, engine_config)
        model = server_config.served_model_name or folder.resolve().name
        app = create_app(Context(client, tokenizer, server_config, model, backend.spec.eos_token_ids, dict(backend.spec.sampling_defaults)))
        phases.append(("engine", time.perf_counter() - started))

        def ready() -> None:
            url = base_url(server_config.host, listener.getsockname()[1])
            policy = type(engine.scheduler.policy).__name__
            print(banner(url, model, backend, engine_config, policy, phases, since_process_start()), flush=True)

        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
        EngineServer(app, client, engine, ready, keep_alive_s=KEEP_ALIVE_S, grace_s=GRACE_S).run(sockets=[listener])
    return 0


def make_engine(backend: Executor, config: EngineConfig) -> tuple[Engine, EngineClient]:
    """An engine, and the front's side of it. Raises CapacityError."""
    from quire.core.engine import Engine
    from quire.server.client import EngineClient

    # The front bounds the queue: what it has taken, the engine takes too.
    engine = Engine(backend, replace(config, max_waiting=UNBOUNDED), time.monotonic)
    engine.on_preemption(ThrottledLog(logging.getLogger("quire.engine")).warning)
    return engine, EngineClient(engine.limits, config.max_waiting)


class _Loading:
    """Opens the backend on another thread; a daemon, so that Ctrl-C does not wait for it."""

    def __init__(self, config: EngineConfig, phases: list[tuple[str, float]]) -> None:
        self._config, self._phases = config, phases
        self._backend: Backend | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="quire-load", daemon=True)
        self._thread.start()

    def result(self) -> Backend:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._backend is not None
        return self._backend

    def _run(self) -> None:
        try:
            from quire.backends.base import open_backend

            self._backend = open_backend(self._config, lambda name, seconds: self._phases.append((name, seconds)))
        except BaseException as e:
            self._error = e


def open_socket(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded, so that a wrong address costs no time. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise ConfigError(
            f"--host {host!r} is not an address or a known name: use 127.0.0.1, or 0.0.0.0 for all interfaces", param="host"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # the port is ours from here on; connections wait until the model is there
    except OSError as e:
        listener.close()
        if isinstance(e, PermissionError):
            raise ConfigError(f"port {port} needs more rights than this process has: choose a --port from 1024 on", param="port") from None
        import errno

        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use by another process: choose another --port, or 0 for any free one", param="port"
            ) from None
        raise ConfigError(f"can't listen on {host} port {port}: {e.strerror}", param="host") from None
    return listener


def since_process_start() -> float:
    """Seconds since the process was started, the interpreter's own start included."""
    try:
        import os

        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
