"""From an uploaded file to the lines of a batch, or to what is wrong with it, line by line. Nothing runs before all of it is right."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quire.errors import QuireError
from quire.server.batches.records import Line
from quire.server.calls.fields import shown
from quire.server.http.limits import kind_of

MAX_ERRORS = 100
"""So many are listed; the last entry says how many more there are."""
MAX_CUSTOM_ID = 512
"""Characters."""
_FIELDS = ("custom_id", "method", "url", "body")


class _LineError(Exception):
    """What is wrong with one line, in OpenAI's words for the kind."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def read_lines(
    path: Path,
    endpoints: Sequence[str],
    check_model: Callable[[str | None], None],
    *,
    max_lines: int,
    max_line_bytes: int,
) -> tuple[list[Line], list[dict[str, Any]]]:
    """The lines of the file, and its errors as the API lists them; lines count only where there are none.

    endpoints: those that a line may name. check_model raises for a model that is not served. Blank lines are skipped, and so is a byte
    order mark. Raises OSError.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    found = 0
    first: dict[str, int] = {}
    for number, offset, data in _split(path, max_line_bytes):
        if len(lines) >= max_lines:
            found += 1
            errors.append(_error("too_many_tasks", f"the file has more than {max_lines:,} lines: split it", None, None))
            break
        if number == 1 and data is not None and data.startswith(BOM_UTF8):  # what some editors write before a text
            offset, data = offset + len(BOM_UTF8), data.removeprefix(BOM_UTF8)
        try:
            if data is None:
                raise _LineError("line_too_long", f"the line has more than {max_line_bytes:,} bytes")
            custom_id = _check(data, endpoints, check_model)
            if (before := first.setdefault(custom_id, number)) != number:
                raise _LineError(
                    "duplicate_custom_id", f"the custom_id {shown(custom_id)} is that of line {before:,}: each needs its own", "custom_id"
                )
            lines.append(Line(number, custom_id, offset, len(data)))
        except _LineError as e:
            found += 1
            if len(errors) < MAX_ERRORS:
                errors.append(_error(e.code, e.message, e.param, number))
    if not lines and not errors:
        errors.append(_error("empty_file", "the file has no lines: send one JSON object a line", None, None))
    if found > len(errors):
        errors.append(_error("more_errors", f"{found - len(errors):,} more lines are wrong", None, None))
    return lines, errors


def parse_line(data: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError."""
    from pydantic_core import from_json

    value = from_json(data, allow_inf_nan=True)
    if not isinstance(value, dict):
        raise ValueError(f"it is {kind_of(value)}, and not an object")
    return value


def _error(code: str, message: str, param: str | None, line: int | None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": param, "line": line}


def _split(path: Path, max_line_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(number from 1, offset, content without the line break) of each line that is not blank; None for content that is too long."""
    with open(path, "rb") as file:
        offset, number = 0, 0
        while piece := file.readline(max_line_bytes + 2):
            number += 1
            start, whole = offset, piece.rstrip(b"\r\n")
            offset += len(piece)
            too_long = len(whole) > max_line_bytes
            while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
                too_long = too_long or bool(piece.strip())
                offset += len(piece)
            if too_long:
                yield number, start, None
            elif whole.strip():
                yield number, start, whole


def _check(data: bytes, endpoints: Sequence[str], check_model: Callable[[str | None], None]) -> str:
    """The custom_id of a line in which all is right. Raises _LineError."""
    try:
        value = parse_line(data)
    except ValueError as e:
        raise _LineError("invalid_json_line", f"the line is not a JSON object: {e}") from None
    for name in _FIELDS:
        if value.get(name) is None:
            raise _LineError("missing_required_parameter", f"{name} is missing", name)
    if unknown := sorted(value.keys() - set(_FIELDS)):
        raise _LineError("unknown_parameter", f"unknown field {unknown[0][:80]!r}; known: {', '.join(_FIELDS)}", unknown[0][:80])
    custom_id, body = value["custom_id"], value["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise _LineError(
            "invalid_custom_id", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters, got {shown(custom_id)}", "custom_id"
        )
    if value["method"] != "POST":
        raise _LineError("invalid_method", f"method must be 'POST', got {shown(value['method'])}", "method")
    if value["url"] not in endpoints:
        raise _LineError("invalid_url", f"url must be {' or '.join(endpoints)}, got {shown(value['url'])}", "url")
    if not isinstance(body, dict):
        raise _LineError("invalid_body", f"body must be an object, got {kind_of(body)}", "body")
    if body.get("stream"):
        raise _LineError("invalid_body", "stream is not possible in a batch: leave it out", "body.stream")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _LineError("invalid_body", f"model must be a string, got {shown(model)}", "body.model")
    try:
        check_model(model)
    except QuireError as e:
        raise _LineError(e.code, e.message, "body.model") from None
    return custom_id
