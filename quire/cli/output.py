"""Files that commands write their results to."""

from __future__ import annotations

from quire.errors import ConfigError


def check_writable(path: str | None) -> None:
    """Before the work: a wrong path should not cost a run. ``-`` and None are no files. Raises ConfigError."""
    if path not in (None, "-"):
        write(path, "")


def write(path: str | None, text: str) -> None:
    """Write ``text`` to the file ``path``, or to standard output for ``-``; None: nowhere. Raises ConfigError."""
    if path is None:
        return
    if path == "-":
        print(text, end="")
        return
    try:
        with open(path, "w" if text else "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise ConfigError(f"can't write {path}: {e.strerror}") from None
