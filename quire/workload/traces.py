"""Request traces from files. What a file may be is said in ``read_trace``; anything else is refused with its line."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from quire.errors import ConfigError
from quire.workload.requests import PREFIX_BLOCK, TraceRequest

MAX_TOKENS = 100_000_000
"""In one prompt or one output."""
MAX_TIME = 1e15
"""Latest time; also milliseconds since 1970 are below it."""

_MOONCAKE = {"t": "timestamp", "i": "input_length", "o": "output_length", "h": "hash_ids"}


def read_trace(path: str | Path) -> list[TraceRequest]:
    """The requests of a trace, in the order of the file. By the name of the file, which may also end in ``.gz``:

    ``.csv``: a header with the columns ``prompt`` and ``output`` (tokens), and perhaps ``t_s`` (arrival, seconds).

    ``.jsonl``: Mooncake's format (https://github.com/kvcache-ai/Mooncake), one object a line: ``input_length`` and
    ``output_length`` (tokens), and perhaps ``timestamp`` (milliseconds) and ``hash_ids`` (one id for each 512 tokens of the
    prompt, the last of them begun); or the same as ``i``, ``o``, ``t``, ``h``.

    Other columns and keys are ignored, and so are empty lines. Raises ConfigError with the file, the line and the remedy.
    """
    path = Path(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"the trace {path} is of an unknown kind: its name must end in .csv, .jsonl, .csv.gz or .jsonl.gz")
    requests = list((_csv if suffix == ".csv" else _jsonl)(path, _lines(path)))
    if not requests:
        raise ConfigError(f"the trace {path} holds no requests: give a file with at least one")
    return requests


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not empty."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile):
        _refuse(path, number + 1, "the compressed data is damaged or cut short from here on: get the file again")
    except UnicodeDecodeError:
        _refuse(path, number, "this is not UTF-8 text: save the file as UTF-8")
    except OSError as e:
        raise ConfigError(f"can't read the trace {path}: {e.strerror or e}") from None


def _csv(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[TraceRequest]:
    header: list[str] | None = None
    for number, text in lines:
        try:
            row = [cell.strip() for cell in next(csv.reader([text], strict=True))]
        except csv.Error as e:
            _refuse(path, number, f"this is not CSV ({e}): write values with commas between them")
        if header is None:
            header = row
            for name in ("prompt", "output", "t_s"):
                if (count := header.count(name)) > 1 or (count == 0 and name != "t_s"):
                    _refuse(path, number, f"the header has {count} columns named {name}: it must name the columns prompt and output "
                            f"(tokens) and may name t_s (seconds), once each; it names {', '.join(header):.200}")  # fmt: skip
            continue
        if len(row) != len(header):
            _refuse(path, number, f"the row has {len(row)} values, but the header has {len(header)} columns: give one value a column")
        cells = {name: _number(cell) for name, cell in zip(header, row, strict=True)}
        time = _time(path, number, "t_s", cells["t_s"], "seconds") if "t_s" in cells else None
        prompt, output = (_tokens(path, number, name, cells[name]) for name in ("prompt", "output"))
        yield TraceRequest(time, prompt, output)


def _jsonl(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[TraceRequest]:
    names: dict[str, str] = {}  # ours → the file's, of the keys that every line has
    for number, text in lines:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            _refuse(path, number, "this is not a JSON object: write one object a line, and no line break inside of it")
        if not names:
            known = {short: short if "i" in row else long for short, long in _MOONCAKE.items()}
            names = {short: name for short, name in known.items() if short in "io" or name in row}
        for short, name in known.items():
            if short in names and name not in row:
                _refuse(path, number, f"there is no key {name}: every line must have {' and '.join(names.values())}")
            if short not in names and name in row:
                _refuse(path, number, f"the key {name} is in this line, but not in the first: give it in every line or in none")
        prompt, output = (_tokens(path, number, names[key], row[names[key]]) for key in "io")
        time = _time(path, number, names["t"], row[names["t"]], "milliseconds") / 1000 if "t" in names else None
        yield TraceRequest(time, prompt, output, _ids(path, number, names["h"], row[names["h"]], prompt) if "h" in names else None)


def _number(cell: str) -> int | float | str:
    """What a cell of a CSV file says; itself where that is no number."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def _tokens(path: Path, line: int, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_TOKENS:
        _refuse(path, line, f"{name} must be a number of tokens from 1 to {MAX_TOKENS:,}, got {_shown(value)}: correct or remove the line")
    return value


def _time(path: Path, line: int, name: str, value: Any, unit: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIME:
        _refuse(path, line, f"{name} must be {unit} from 0 to {MAX_TIME:g}, got {_shown(value)}: correct or remove the line")
    return float(value)


def _ids(path: Path, line: int, name: str, value: Any, prompt: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        _refuse(path, line, f"{name} must be a list of numbers from 0, got {_shown(value)}: correct or remove the line")
    if len(value) != (need := -(-prompt // PREFIX_BLOCK)):
        _refuse(path, line, f"{name} has {len(value):,} ids, but a prompt of {prompt:,} tokens has {need:,} blocks of {PREFIX_BLOCK}: "
                f"give one id for each, or leave {name} out of every line")  # fmt: skip
    return tuple(value)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number with too many digits"


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise ConfigError(f"the trace {path}, line {line:,}: {what}")
