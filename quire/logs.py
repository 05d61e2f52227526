"""Logging for what may happen a thousand times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class ThrottledLog:
    """Writes at most one warning in ``every_s`` seconds; the next one says how many were left out in between."""

    def __init__(self, log: logging.Logger, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._every_s = every_s
        self._clock = clock
        self._next = -float("inf")
        self._left_out = 0

    def warning(self, message: object) -> None:
        """``message`` is turned into text only where it is written."""
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        self._next = now + self._every_s
        more = f" ({self._left_out:,} more since the last such line)" if self._left_out else ""
        self._left_out = 0
        self._log.warning("%s%s", message, more)
