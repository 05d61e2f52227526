"""Words that the messages about checkpoints share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SHOWN: Final = 4
"""Names in one message."""


def some(names: Sequence[str], noun: str) -> str:
    """``3 tensors (a, b, c)``, the first few of them named."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({', '.join(names[:SHOWN])}{more})"
