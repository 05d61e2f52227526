"""The stream of a generation: chunks are bytes around a template, and JSON is made of nothing but the text.

A chunk costs a few tenths of a microsecond this way; through pydantic it would be thirty times as much, for each token of
each client.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from json.encoder import encode_basestring
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from quire.errors import QuireError
from quire.outputs import Usage
from quire.server.errors import INTERNAL, error_bytes
from quire.server.generation import Generation, Piece
from quire.server.schemas import GenerationRequest, StreamOptions
from quire.server.sse import DONE, PING, PING_S, EventStream, answer

log = logging.getLogger("quire.server")


class Writer(Protocol):
    """One API's form of a chunk."""

    head: bytes
    """``data: {...,"choices":[``"""

    def choices(self, piece: Piece) -> list[bytes]:
        """JSON objects that go into ``choices``, each in a chunk of its own; none where there is nothing to say."""
        ...

    async def whole(self, generation: Generation) -> bytes:
        """The answer in one piece."""
        ...


async def respond(request: Request, generation: Generation, writer: Writer, body: GenerationRequest) -> Response:
    """Run a generation, and answer in the form that ``body`` asks for. What can't be queued is refused before the answer begins."""
    generation.submit()
    if body.stream:
        return EventStream(events(generation, writer, body.stream_options), generation.close)
    with generation:
        return await answer(request, writer.whole(generation))


async def events(generation: Generation, writer: Writer, options: StreamOptions | None) -> AsyncIterator[bytes]:
    """The whole stream, errors and ``[DONE]`` included. Closing it early ends the generation."""
    include_usage = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    tail = b'],"usage":null' if include_usage else b"]"
    try:
        with generation:
            while not generation.finished:
                pieces = await generation.next(PING_S)
                if continuous:
                    tail = b'],"usage":' + usage_json(generation.usage)
                chunks = [writer.head + choice + tail for piece in pieces for choice in writer.choices(piece)]
                if chunks and generation.finished and not include_usage:
                    chunks[-1] += _timings_json(generation)
                if chunks or not pieces:
                    yield b"".join([chunk + b"}\n\n" for chunk in chunks]) or PING
        if include_usage:
            yield writer.head + b'],"usage":' + usage_json(generation.usage) + _timings_json(generation) + b"}\n\n"
    except QuireError as e:
        yield b"data: " + error_bytes(e) + b"\n\n"
    except Exception:
        log.exception("a stream failed")
        yield b"data: " + error_bytes(QuireError(INTERNAL)) + b"\n\n"
    yield DONE


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
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def usage_json(usage: Usage) -> bytes:
    return json_bytes(usage_object(usage))


def _timings_json(generation: Generation) -> bytes:
    """Members of the last chunk."""
    return b"," + json_bytes(generation.timings.describe(generation.usage))[1:-1]


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
