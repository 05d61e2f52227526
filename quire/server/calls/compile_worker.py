"""The process that tries forms of structured output: whether they compile, within limits of time and memory that the kernel keeps.

A grammar can be small and still ask for any amount of work. So it is compiled first where nothing else suffers: the limit of CPU
time or of memory ends this process, and its front starts another one for the next form.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from quire.errors import QuireError
from quire.structured import Structured

CPU_S = 2
"""CPU time for one form, a second more or less; common ones take milliseconds."""
MEMORY_BYTES = 512 << 20
"""Beside what the vocabulary takes."""
STACK_BYTES = 2 << 20
"""A quarter of what the engine's threads usually have: what recurses too deeply does it here."""


class Setup(msgspec.Struct, array_like=True):
    """The first message."""

    folder: str
    vocab_size: int
    eos_token_ids: list[int]


def main() -> None:
    """Entry of the process; its argument is the socket's file descriptor. Each form is answered with "" or with what is wrong."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # the front decides
        signal.signal(sig, signal.SIG_IGN)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_run, args=(Connection(int(sys.argv[1])),))
    thread.start()
    thread.join()


def _run(connection: Connection) -> None:
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the front has gone
        _answer(connection)


def _answer(connection: Connection) -> None:
    from quire.grammar.program import compile_structured, rehearse
    from quire.grammar.vocabulary import Vocabulary
    from quire.text.tokenizer import Tokenizer

    setup = msgspec.msgpack.decode(connection.recv_bytes(), type=Setup)
    vocabulary = Vocabulary(Tokenizer.load(Path(setup.folder)), setup.vocab_size, setup.eos_token_ids)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + MEMORY_BYTES, hard))
    connection.send_bytes(b"")
    while True:
        structured = msgspec.msgpack.decode(connection.recv_bytes(), type=Structured)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime) + CPU_S, hard))
        try:
            rehearse(structured, compile_structured(structured, vocabulary), vocabulary)
            answer = ""
        except QuireError as e:
            answer = e.message
        except MemoryError:
            os.abort()
        connection.send_bytes(answer.encode())


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
