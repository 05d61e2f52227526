"""A bar on the terminal for work that takes longer than a second."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

PROGRESS_AFTER_S = 1.0


class Progress:
    """Use as a context. tqdm is imported when the bar is first shown."""

    def __init__(self, what: str, total: int, unit: str = "B") -> None:
        """total: in ``unit``."""
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._start = perf_counter()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif perf_counter() - self._start > PROGRESS_AFTER_S and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, initial=self._done, desc=self._what, unit=self._unit, unit_scale=True, leave=False)
