"""Tensor parallelism: rank 0 is the engine's process, and starts one process for each other device. It sends them every StepPlan; they do
what it says, and decide nothing. One that dies ends the engine, with a reason; when the engine ends, they do.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import quire
from quire.backends.cuda.plans import decode, encode
from quire.config import EngineConfig
from quire.core.plan import StepPlan
from quire.errors import QuireError

log = logging.getLogger("quire.engine")
DEAD_RANK = 70
"""Exit status of an engine that has lost a rank (EX_SOFTWARE)."""
GRACE_S = 2.0
"""In which rank 0 says itself what is wrong with the configuration, where the others have found it first."""


class Ranks:
    """The processes of ranks 1 to size - 1, and their meeting place."""

    def __init__(self, config: EngineConfig, size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="quire-"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._closing = threading.Event()
        self._grace_s = [GRACE_S]
        for rank in range(1, size):
            self._start(rank, size, config)
        self.close = weakref.finalize(self, _close, self._closing, self._connections, self._processes, self.folder)

    def send(self, plan: StepPlan) -> None:
        data = encode(plan)
        for connection in self._connections:
            connection.send_bytes(data)

    def loaded(self) -> None:
        """From now on nothing is wrong that rank 0 could say."""
        self._grace_s[0] = 0.0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all ranks do: where it fails because one of them died, that is what ends the engine."""
        try:
            yield
        except (RuntimeError, OSError):
            if not self._closing.is_set():
                time.sleep(GRACE_S)  # _watch is about to
            raise

    def _start(self, rank: int, size: int, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        package = str(Path(quire.__file__).parent.parent)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from quire.backends.cuda.ranks import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))},
            )
        connection = Connection(ours.detach())
        connection.send_bytes(json.dumps([rank, str(self.folder), asdict(config)]).encode())
        self._processes.append(process)
        self._connections.append(connection)
        threading.Thread(target=_watch, args=(process, rank, size, self._closing, self._grace_s, self.folder), daemon=True).start()


def _watch(process: subprocess.Popen[bytes], rank: int, size: int, closing: threading.Event, grace_s: list[float], folder: Path) -> None:
    """An engine that waits for a device that is gone would wait for ever, in a call that nothing can interrupt: it ends."""
    code = process.wait()
    if closing.wait(grace_s[0]):
        return
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
    log.error("rank %d of %d, process %d, %s: the engine can't go on without it", rank, size, process.pid, how)
    sys.stderr.flush()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(DEAD_RANK)


def _close(closing: threading.Event, connections: list[Connection], processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    closing.set()
    for connection in connections:
        connection.close()
    for process in processes:
        process.kill()  # it holds nothing that anybody needs
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Entry of a rank's process; its argument is the socket's file descriptor."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # the engine's business
        signal.signal(sig, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.WARNING)
    code = 1
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        code = 0  # the engine has gone
    except QuireError as e:
        log.error("%s", e.message)
    except Exception:
        log.exception("a rank died")
    finally:
        sys.stderr.flush()
        os._exit(code)  # a collective operation may be in the way of an orderly end


def _serve(connection: Connection) -> None:
    rank, folder, options = json.loads(connection.recv_bytes())
    plans: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        try:
            while True:
                plans.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the engine is gone, and nobody else wants what is being loaded or computed

    threading.Thread(target=read, name="quire-plans", daemon=True).start()
    from quire.backends.cuda.opening import open_rank

    backend = open_rank(EngineConfig(**options), rank, Path(folder))
    while True:
        backend.follow(decode(plans.get()))
