"""From a model folder to a server that answers: open the socket, start the engine's process, serve, stop.

The engine loads the model while the HTTP stack is imported here: the time to the first answer is what the user waits for.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from pathlib import Path

from quire.config import EngineConfig, ServerConfig
from quire.errors import ConfigError, QuireError

KEEP_ALIVE_S = 75
"""Longer than common clients keep idle connections, so that it is they who close them."""
GRACE_S = 5
"""Streams that end with an error end at once; a client that does not read it is cut off after this time."""


def serve(engine_config: EngineConfig, server_config: ServerConfig, folder: Path) -> int:
    """Serve the model in ``folder`` until SIGINT or SIGTERM. Returns the exit code. Raises QuireError where it can't start."""
    phases: list[tuple[str, float]] = []
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    with open_socket(server_config.host, server_config.port) as listener:
        from quire.server.supervisor import EngineProcess, Supervisor

        keys = None
        if server_config.api_keys is not None:
            from quire.server.keys import read_keys

            keys = read_keys(server_config.api_keys)

        from quire.server.observers import open_observers

        model, *aliases = server_config.model_names or (folder.resolve().name,)
        observers = open_observers(server_config, model)
        kv_events = None if observers.publisher is None else server_config.kv_events_format
        engine = EngineProcess(engine_config, kv_events=kv_events, measure_limits=server_config.measure_limits)
        compiler = None
        try:
            started = time.perf_counter()
            from quire.server.app import create_app
            from quire.server.banner import banner, base_url
            from quire.server.batches.runner import open_runner
            from quire.server.client import EngineClient
            from quire.server.compiler import Compiler
            from quire.server.context import Context
            from quire.server.metrics.totals import Machine
            from quire.server.uvicorn_server import EngineServer

            phases.append(("HTTP stack", time.perf_counter() - started))
            store = None
            if server_config.batch_dir is not None:
                from quire.server.batches.store import Store

                store = Store(Path(server_config.batch_dir))
            started = time.perf_counter()
            from quire.text.tokenizer import Tokenizer

            try:
                tokenizer = Tokenizer.load(folder)
            except QuireError:
                engine.loaded()  # a folder that is no model at all is reported as that
                raise
            phases.append(("tokenizer", time.perf_counter() - started))
            loaded = engine.loaded()
            phases += loaded.phases
            client = EngineClient(loaded.limits, engine_config.max_waiting)
            observers.attach(client)
            compiler = Compiler(folder, loaded.limits.vocab_size, loaded.eos_token_ids)
            machine = Machine(loaded.spec, engine_config.kv_dtype, loaded.weight_bytes, loaded.head_bytes, loaded.machine_limits)
            batches = None if store is None else open_runner(store, client, server_config)
            context = Context(
                client, tokenizer, server_config, model, tuple(loaded.eos_token_ids), dict(loaded.sampling_defaults),
                embedding_size=loaded.spec.embedding_size, aliases=tuple(aliases), keys=keys, machine=machine,
                publisher=observers.publisher, compiler=compiler, batches=batches,
            )  # fmt: skip
            app = observers.around(create_app(context))

            def ready() -> None:
                url = base_url(server_config.host, listener.getsockname()[1])
                print(banner(url, model, loaded, engine_config, phases, since_process_start()), flush=True)

            link = Supervisor(engine, engine_config, server_config.engine_timeout, kv_events)
            EngineServer(
                app, client, link, ready, keep_alive_s=KEEP_ALIVE_S, grace_s=GRACE_S, drain_s=server_config.drain_timeout, batches=batches
            ).run(sockets=[listener])
        finally:
            engine.kill()
            observers.close()
            if compiler is not None:
                compiler.close()
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
