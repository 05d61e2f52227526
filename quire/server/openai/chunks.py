"""The stream of a generation: chunks are bytes around a template, and JSON is made of nothing but the text.

A chunk costs a few tenths of a microsecond this way; through pydantic it would be thirty times as much, for each token of
each client.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from quire.errors import QuireError
from quire.outputs import Usage
from quire.server.calls.answers import deliver
from quire.server.calls.generation import Generation, Piece
from quire.server.calls.schemas import GenerationRequest, StreamOptions
from quire.server.http.errors import error_bytes
from quire.server.http.sse import DONE, PING

MANY_VALUES = 4096
"""From so many on an answer takes milliseconds to write."""
SLICE = 16
"""Entries of a list that are written at a time: positions with twenty log-probabilities each, or vectors."""


class Form(Protocol):
    """One API's form of a chunk."""

    head: bytes
    """``data: {...,"choices":[``"""

    def choices(self, piece: Piece) -> list[bytes]:
        """JSON objects that go into ``choices``, each in a chunk of its own; none where there is nothing to say."""
        ...

    def frame(self) -> tuple[bytes, bytes] | None:
        """What stands before and after the text in a choice that brings nothing but text; None where choices bring more."""
        ...

    async def whole(self, generation: Generation) -> bytes:
        """The answer in one piece."""
        ...


async def respond(request: Request, generation: Generation, form: Form, body: GenerationRequest) -> Response:
    """Run a generation, and answer in the form that ``body`` asks for. What can't be queued is refused before the answer begins."""
    return await deliver(request, generation, _Chunks(generation, form, body.stream_options), bool(body.stream))


class _Chunks:
    """The stream of OpenAI's older APIs: chunks of choices, the usage where it is asked for, ``[DONE]`` in any case."""

    ping = PING

    def __init__(self, generation: Generation, form: Form, options: StreamOptions | None) -> None:
        self._generation, self._form = generation, form
        self._include_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._tail = b'],"usage":null' if self._include_usage else b"]"
        self.whole = form.whole

    def start(self) -> bytes:
        return b""

    def write(self, pieces: list[Piece]) -> bytes:
        head, tail, choices = self._form.head, self._tail, self._form.choices
        if self._continuous:
            tail = b'],"usage":' + usage_json(self._generation.usage)
        chunks = [head + choice + tail for piece in pieces for choice in choices(piece)]
        if chunks and self._generation.finished and not self._include_usage:
            chunks[-1] += self._timings()
        return b"".join([chunk + b"}\n\n" for chunk in chunks])

    def frame(self) -> tuple[bytes, bytes] | None:
        frame = self._form.frame()
        if frame is None or self._continuous:
            return None
        return self._form.head + frame[0], frame[1] + self._tail + b"}\n\n"

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return self._form.head + b'],"usage":' + usage_json(self._generation.usage) + self._timings() + b"}\n\n" + DONE

    def _timings(self) -> bytes:
        """Members of the last chunk."""
        return b"," + json_bytes(self._generation.timings.describe(self._generation.usage))[1:-1]

    def failed(self, error: QuireError) -> bytes:
        return b"data: " + error_bytes(error) + b"\n\n" + DONE


def head(call_id: str, kind: str, created: int, model: str) -> bytes:
    start = json_bytes({"id": call_id, "object": kind, "created": created, "model": model})
    return b"data: " + start[:-1] + b',"choices":['


def text_json(text: str) -> bytes:
    """A JSON string, in UTF-8 and not in escapes: streams are read by people too."""
    return encode_basestring(text).encode()


def reason_json(piece: Piece, token_ids: bool) -> bytes:
    """``"finish_reason":...`` and what follows it at the end of every choice."""
    delta = piece.delta
    end = b'"finish_reason":null'
    if delta.finish_reason is not None:
        end = b'"finish_reason":"' + delta.finish_reason.encode() + b'","stop_reason":' + json_bytes(delta.stop_reason)
    if token_ids:
        end += b',"token_ids":' + json_bytes(delta.token_ids)
    return end


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def usage_json(usage: Usage) -> bytes:
    return json_bytes(usage_object(usage))


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


async def written(values: int, make: Callable[[], Any]) -> bytes:
    """What ``make`` gives as JSON. values: about how many numbers and texts are in it; where they are many it is made on another thread,
    and others are answered meanwhile."""
    return json_bytes(make()) if values < MANY_VALUES else await asyncio.to_thread(lambda: _in_slices(make()))


def _in_slices(value: Any) -> bytes:
    """``json_bytes``, which lets no other thread run before it returns, of small parts."""
    if isinstance(value, dict):
        return b"{" + b",".join([json_bytes(key) + b":" + _in_slices(item) for key, item in value.items()]) + b"}"
    if not isinstance(value, list):
        return json_bytes(value)
    if len(value) < SLICE:
        return b"[" + b",".join([_in_slices(item) for item in value]) + b"]"
    return b"[" + b",".join([json_bytes(value[at : at + SLICE])[1:-1] for at in range(0, len(value), SLICE)]) + b"]"
