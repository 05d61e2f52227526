"""From a model folder to a server that answers: open the socket, start the engine's process, serve, stop.

The engine loads the model while the HTTP stack is imported here: the time to the first answer is what the user waits for. As soon
as it is imported, whoever asks is told that the model is being loaded.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from quire.config import EngineConfig, ServerConfig
from quire.errors import ConfigError

KEEP_ALIVE_S = 75
"""Longer than common clients keep idle connections, so that it is they who close them."""
OTHER_FILES = 128
"""Open files that are no connections, with some to spare."""
GRACE_S = 5
"""Streams that end with an error end at once; a client that does not read it is cut off after this time."""


def serve(engine_config: EngineConfig, server_config: ServerConfig, folder: Path, name: str) -> int:
    """Serve the model in ``folder`` until SIGINT or SIGTERM. Returns the exit code. Raises QuireError where it can't start.

    name: of the model, where the options say none.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    with open_socket(server_config.host, server_config.port) as listener:
        from quire.server.engine.supervisor import EngineProcess

        keys = None
        if server_config.api_keys is not None:
            from quire.server.http.keys import read_keys

            keys = read_keys(server_config.api_keys)

        from quire.server.metrics.observers import open_observers

        model, *aliases = server_config.model_names or (name,)
        observers = open_observers(server_config, model)
        kv_events = None if observers.publisher is None else server_config.kv_events_format
        engine = EngineProcess(engine_config, kv_events=kv_events, measure_limits=server_config.measure_limits)
        with ExitStack() as ends:
            ends.callback(observers.close)
            ends.callback(engine.kill)
            started = time.perf_counter()
            from quire.server.app import around
            from quire.server.assembly import Start, load_model
            from quire.server.banner import base_url
            from quire.server.loading import Door
            from quire.server.uvicorn_server import EngineServer

            phases = [("HTTP stack", time.perf_counter() - started)]
            store = None
            if server_config.batch_dir is not None:
                from quire.server.batches.store import Store

                store = Store(Path(server_config.batch_dir))
            door = Door()
            start = Start(
                engine, engine_config, server_config, folder, base_url(server_config.host, listener.getsockname()[1]), phases, door, ends,
                keys=keys, store=store, model=model, aliases=tuple(aliases), observers=observers, kv_events=kv_events,
            )  # fmt: skip
            server = EngineServer(
                observers.around(around(door, server_config, keys, door.refused)),
                lambda: load_model(start),
                engine.kill,
                keep_alive_s=KEEP_ALIVE_S,
                grace_s=GRACE_S,
                drain_s=server_config.drain_timeout,
                max_connections=files_for(server_config.max_connections),
            )
            server.run(sockets=[listener])
            if server.failure is not None:
                raise server.failure
    return 0


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
        listener.listen(2048)  # the port is ours from here on; connections wait until there is somebody to answer
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


def files_for(connections: int) -> int:
    """Raise this process's limit of open files for so many connections. The number that there is room for."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= need:
        return connections
    allowed = need if hard == resource.RLIM_INFINITY else min(need, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < need:
        logging.getLogger("quire.server").warning(
            "this process may open %d files, so that it takes %d connections and not %d: raise the limit (ulimit -n), or lower "
            "--max-connections", hard, allowed - OTHER_FILES, connections,
        )  # fmt: skip
    return max(1, allowed - OTHER_FILES)


def since_process_start() -> float:
    """Seconds since the process was started, the interpreter's own start included."""
    try:
        import os

        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
