"""Lines and pastes from standard input."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys

QUOTES = '"""'


def read_message(prompt: str = "> ") -> tuple[str, bool] | None:
    """What the user says next: a line, a paste of several, or what stands between two lines of three quotes; None at the end.

    With it: whether it is just a line, which may be a command. At a terminal with line editing and a history; Ctrl-C drops what was
    typed so far.
    """
    line = _read(prompt)
    if line is None:
        return None
    if line.strip() != QUOTES:
        return line, "\n" not in line.strip()
    lines: list[str] = []
    while (line := _read(". ")) is not None and line.strip() != QUOTES:
        lines.append(line)
    return "\n".join(lines), False


def _read(prompt: str) -> str | None:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):
        readline = importlib.import_module("readline")  # from then on input() edits lines
        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one message, line breaks and all
    while True:
        # input() has the terminal in a mode of its own, which an exit on the spot would leave behind.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
        finally:
            signal.signal(signal.SIGINT, before)
