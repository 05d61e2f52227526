"""An end to calls of llguidance that would never return.

Its limits bound what it keeps and what it does for one token, but not a lexeme that has to go on for ever (``A: /a+/`` before
``B: /a+b/``: A takes every "a", and nothing is left for B). Such a call holds Python's lock and takes ever more memory, so nothing within
the process can end it but a signal's default action: to end the process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

CALL_S = 5.0
"""Of the process's CPU time, so that a machine that stands still is nobody's fault. A call that has reached the library's own limits takes
some 0.1 s."""
_limited = False


def limit_calls() -> None:
    """From now on a call that computes for longer than CALL_S ends this process, by SIGPROF. For processes that are started again."""
    global _limited
    _limited = True


def timed(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call``'s result."""
    if not _limited:
        return call(*args, **kwargs)
    signal.setitimer(signal.ITIMER_PROF, CALL_S)
    try:
        return call(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
