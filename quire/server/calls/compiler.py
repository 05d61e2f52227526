"""Compiler: tries forms of structured output before their requests are queued, in processes that may be killed (compile_worker.py).

Where it says yes, the engine compiles the form too, and does not meet anything worse than the worker did.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

import quire
from quire.errors import InvalidRequestError, QueueFullError
from quire.server.calls.compile_worker import CPU_S, MEMORY_BYTES, Setup
from quire.server.http.errors import UnavailableError
from quire.structured import Structured

WORKERS = 2
"""A form that takes all of its time holds up one of them."""
MAX_PENDING = 64
MAX_REMEMBERED = 256
START_TIMEOUT_S = 120.0
TIMEOUT_S = 60.0
"""For one form, whatever the machine does meanwhile."""
TRIES = 2
"""Of a form whose worker was killed by somebody else, or was held up: that says nothing of the form."""


class Compiler:
    """Belongs to the event loop. Workers are started when they are needed, and stay."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._setup = Setup(str(folder.resolve()), vocab_size, list(eos_token_ids))
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="quire-compiler")
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers: set[_Worker] = set()
        self._running: dict[Structured, asyncio.Future[str]] = {}
        self._known: OrderedDict[Structured, str] = OrderedDict()
        """Form → what is wrong with it, or ""."""
        self._closed = False

    async def check(self, structured: Structured) -> None:
        """Raises InvalidRequestError where the form can't be used, QueueFullError where too many wait to be tried."""
        wrong = self._known.get(structured)
        if wrong is None:
            running = self._running.get(structured)
            if running is None:
                if len(self._running) >= MAX_PENDING:
                    raise QueueFullError(f"{len(self._running)} forms of structured output wait to be compiled: try again in a moment")
                running = asyncio.get_running_loop().run_in_executor(self._threads, self._try, structured)
                self._running[structured] = running
                running.add_done_callback(lambda done: self._note(structured, done))
            wrong = await asyncio.shield(running)
        else:
            self._known.move_to_end(structured)
        if wrong:
            raise InvalidRequestError(wrong, param=structured.source)

    def close(self) -> None:
        """End the workers, and what they do."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()

    def _note(self, structured: Structured, done: asyncio.Future[str]) -> None:
        del self._running[structured]
        if not done.cancelled() and done.exception() is None:
            self._known[structured] = done.result()
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)

    def _try(self, structured: Structured) -> str:
        """On a thread of its own. Raises UnavailableError where a worker can't be had."""
        for _ in range(TRIES):
            worker = self._worker()
            answer = worker.ask(structured)
            if worker.alive:
                self._idle.put(worker)
            else:
                self._workers.discard(worker)
            if answer is not None:
                return answer
        raise UnavailableError(f"{structured.source}: the process that was to compile it was killed, {TRIES} times: try again in a moment")

    def _worker(self) -> _Worker:
        """One that is idle, or a new one. Raises UnavailableError."""
        with contextlib.suppress(Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.alive:
                    return worker
                self._workers.discard(worker)
        worker = _Worker(self._setup)
        self._workers.add(worker)
        if self._closed:
            worker.kill()
        try:
            worker.wait_ready()
        except UnavailableError:
            self._workers.discard(worker)
            raise
        return worker


class _Worker:
    """One process, and the socket to it. It ends when the socket is closed, thus also when this process dies."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        package = str(Path(quire.__file__).parent.parent)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from quire.server.calls.compile_worker import main; main()", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what it dies of is told by its exit
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))},
            )
        self._connection = Connection(ours.detach())
        self._setup = setup

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Until it has loaded the vocabulary. Raises UnavailableError."""
        if self._send(msgspec.msgpack.encode(self._setup), START_TIMEOUT_S) is None:
            raise UnavailableError("the process that compiles structured output could not start; the request was not tried: try again")

    def ask(self, structured: Structured) -> str | None:
        """What is wrong with the form, or ""; None where nobody knows, since the worker was killed. It may have ended in any case."""
        answer = self._send(msgspec.msgpack.encode(structured), TIMEOUT_S)
        if answer is not None:
            return answer.decode()
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return None
        if code == -signal.SIGXCPU:
            cost = f"took more than {CPU_S} s of CPU time"
        else:
            cost = f"needed more than {MEMORY_BYTES >> 20} MiB of memory, or more nesting than there is"
        return f"{structured.source}: compiling it {cost}, which is the limit: make it simpler"

    def kill(self) -> None:
        self._process.kill()

    def _send(self, message: bytes, timeout: float) -> bytes | None:
        """The answer. None where there is none, and the worker has ended."""
        try:
            self._connection.send_bytes(message)
            if self._connection.poll(timeout):
                return self._connection.recv_bytes()
        except (OSError, EOFError):
            pass
        self._process.kill()
        self._process.wait()
        self._connection.close()
        return None
