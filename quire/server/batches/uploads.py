"""Uploads: multipart/form-data, written to disk as it arrives. Of the file no more than a buffer is held in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request

from quire.errors import InvalidRequestError
from quire.server.batches.records import StorageError
from quire.server.calls.fields import shown
from quire.server.http.errors import ClientGoneError, MediaTypeError, TimedOutError, TooLargeError

FORM_BYTES = 64 << 10
"""What the form may have around the file."""
MAX_FIELD_BYTES = 1024
MAX_HEADER_BYTES = 4096
MAX_FILENAME = 255
BUFFER_BYTES = 1 << 20
PATIENCE_S = 60.0
SLOWEST_BYTES_S = 16 << 10
"""An upload may take PATIENCE_S, and a second more for each so many bytes that have arrived."""
DISCARD_BYTES, DISCARD_S = 16 << 20, 10.0
"""So much of what is too large is read and thrown away, so that a client which still writes gets to read why."""

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of every body that is not well formed: anybody can send many


@dataclass(slots=True)
class Upload:
    """A form with one file: its content is in ``path``."""

    path: Path
    filename: str = ""
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Form:
    """What the parser tells of the parts of a form, one after the other."""

    filename: str | None = None
    """Of the file; None before it came."""
    fields: dict[str, bytearray] = field(default_factory=dict)
    buffer: bytearray = field(default_factory=bytearray)
    """Content of the file that is not written yet."""
    complete: bool = False
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _disposition: bytes = b""
    _target: bytearray = field(default_factory=bytearray)

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._header = (bytearray(), bytearray())

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._header[0], data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._extend(self._header[1], data[start:end])

    def _extend(self, header: bytearray, data: bytes) -> None:
        header += data
        if len(header) > MAX_HEADER_BYTES:
            raise InvalidRequestError(f"a part of the form has a header of more than {MAX_HEADER_BYTES:,} bytes")

    def on_header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def on_headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "file":
            if self.filename is not None:
                raise InvalidRequestError("the form has two files: upload them one by one", param="file")
            self.filename = _clean(options.get(b"filename", b"").decode("utf-8", "replace"))
            self._target = self.buffer
            return
        if not name or name in self.fields or len(self.fields) == 16:
            raise InvalidRequestError(f"the form has an unexpected field {shown(name[:80])}", param=name[:80] or None)
        self._target = self.fields[name] = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._target += data[start:end]
        if self._target is not self.buffer and len(self._target) > MAX_FIELD_BYTES:
            raise InvalidRequestError(f"a field of the form has more than {MAX_FIELD_BYTES:,} bytes, and only file may have more")

    def on_end(self) -> None:
        self.complete = True


def _clean(filename: str) -> str:
    """A name to show: without folders, control characters and what does not fit."""
    name = "".join(c for c in filename.replace("\\", "/").rpartition("/")[2] if c.isprintable())
    return name[:MAX_FILENAME] or "upload.jsonl"


async def receive(request: Request, path: Path, max_bytes: int) -> Upload:
    """Write the file of a form to ``path``. Leaves nothing there where it raises the error to answer with."""
    try:
        with open(path, "wb", buffering=0) as file:
            form = await _receive(request, file, max_bytes)
    except BaseException as e:
        path.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise StorageError(f"the upload can't be kept: {e.strerror}") from None
        raise
    return Upload(path, form.filename or "", {name: bytes(value).decode("utf-8", "replace") for name, value in form.fields.items()})


async def _receive(request: Request, file: BinaryIO, max_bytes: int) -> _Form:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise MediaTypeError(f"the content type must be multipart/form-data with a boundary, got {kind[:80].decode('latin-1')!r}")
    most = max_bytes + FORM_BYTES
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > most:
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(request)
        raise _too_large(max_bytes)
    form = _Form()
    try:
        parser = MultipartParser(boundary, {
            "on_part_begin": form.on_part_begin, "on_header_field": form.on_header_field, "on_header_value": form.on_header_value,
            "on_header_end": form.on_header_end, "on_headers_finished": form.on_headers_finished, "on_part_data": form.on_part_data,
            "on_end": form.on_end,
        })  # fmt: skip
        received = written = 0
        start, more = time.monotonic(), True
        while more:
            left = start + PATIENCE_S + received / SLOWEST_BYTES_S - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left)):
                    message = await request.receive()
            except TimeoutError:
                raise TimedOutError(f"the upload is too slow: {received:,} bytes have arrived") from None
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            data = message.get("body", b"")
            more = message.get("more_body", False)
            received += len(data)
            if data:
                parser.write(data)
            if received > most or written + len(form.buffer) > max_bytes:
                if more:
                    await _discard(request)
                raise _too_large(max_bytes)
            if len(form.buffer) >= BUFFER_BYTES or not more:
                written += await _write(file, form.buffer)
        parser.finalize()
    except FormParserError:
        raise InvalidRequestError("the body is not valid multipart/form-data") from None
    if not form.complete:
        raise InvalidRequestError("the form ends before its last boundary")
    if form.filename is None:
        raise InvalidRequestError("the form has no file: send the content as 'file'", param="file")
    return form


async def _write(file: BinaryIO, buffer: bytearray) -> int:
    """On another thread: the disk may be slow."""
    data = bytes(buffer)
    buffer.clear()

    def work() -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    await asyncio.to_thread(work)
    return len(data)


def _too_large(most: int) -> TooLargeError:
    return TooLargeError(f"the file has more than {most:,} bytes: split it, or serve with a larger --max-file-bytes")


async def _discard(request: Request) -> None:
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while size < DISCARD_BYTES:
                message = await request.receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
