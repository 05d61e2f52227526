"""What is checked before a request's body means anything: its type, its size, its encoding, its syntax."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import Request

from quire.errors import ContextLengthError, InvalidRequestError
from quire.server.http.errors import ClientGoneError, MediaTypeError, TimedOutError, TooLargeError, is_ollama

BODY_TIMEOUT_S = 60.0
"""A body must have arrived after this time."""
DISCARD_FACTOR = 8
"""How much of a body beyond the limit is read and thrown away, in limits: a client that is still writing when the
connection closes would see a broken connection instead of the answer."""
DISCARD_TIMEOUT_S = 10.0
MAX_BYTES_PER_TOKEN = 128
"""No prompt of the model's context has more text than this for each token. Tokens of real vocabularies are up to 128
spaces long, 4 bytes on average; text beyond the bound is refused without tokenizing it."""
MIN_TEXT_BYTES = 1 << 20
"""/tokenize counts at least this much text, however short the context is."""
MAX_SEQUENCES = 1024
"""Prompts times samples (or beams) in one request."""


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's body as a JSON object. Raises the error to answer with."""
    kind = request.headers.get("content-type", "")
    if is_ollama(request.url.path) and "origin" not in request.headers:
        pass  # Ollama looks at no content type, and its examples send none; pages of other origins send theirs
    elif kind.split(";")[0].strip().lower() != "application/json":
        raise MediaTypeError(f"the content type must be application/json, got {kind[:80]!r}: send 'Content-Type: application/json'")
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("identity", ""):
        raise MediaTypeError(f"the content encoding {encoding[:80]!r} is not supported: send the body as it is")
    return _parse(await _read(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        if request.headers.get("expect", "").lower() != "100-continue":  # such a client sends nothing unless told to
            await _discard(request, max_bytes)
        raise _too_large(f"{int(declared[:20]):,}", max_bytes)
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more and size <= max_bytes:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                more = message.get("more_body", False)
    except TimeoutError:
        raise TimedOutError(f"the request body did not arrive within {BODY_TIMEOUT_S:g} seconds ({size:,} bytes did)") from None
    if size > max_bytes:
        parts.clear()
        if more:
            await _discard(request, max_bytes)
        raise _too_large(f"more than {max_bytes:,}", max_bytes)
    return b"".join(parts)


def _too_large(size: str, most: int) -> TooLargeError:
    return TooLargeError(
        f"the request body has {size} bytes; at most {most:,} are allowed: send less, or serve with a larger --max-body-bytes"
    )


async def _discard(request: Request, max_bytes: int) -> None:
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while size < DISCARD_FACTOR * max_bytes:
                message = await request.receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _parse(body: bytes) -> dict[str, Any]:
    from pydantic_core import from_json

    if not body:
        raise InvalidRequestError("the request body is empty: send a JSON object")
    try:
        body.decode()
    except UnicodeDecodeError as e:
        raise InvalidRequestError(f"the request body is not valid UTF-8: byte {e.start:,} of {len(body):,} can't be decoded") from None
    try:
        # NaN and Infinity are let through here, so that the check of the parameter can name it.
        value = from_json(body, allow_inf_nan=True)
    except ValueError as e:
        what = f"the request body is not valid JSON: {e}"
        if "surrogate" in what or "hex escape" in what:
            what += " (half of a pair of \\u escapes is no character: was a text cut in the middle of an emoji?)"
        raise InvalidRequestError(what) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the request body must be a JSON object, got {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """What a JSON value is, in the words of JSON."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def max_text_bytes(max_model_len: int) -> int:
    """The longest text that is tokenized for a context of this length."""
    return MAX_BYTES_PER_TOKEN * max_model_len


def check_text_size(text: str, most: int, param: str) -> None:
    """Refuse, before it is tokenized, a text of more than ``most`` bytes."""
    if (size := len(text.encode("utf-8", "surrogatepass"))) > most:  # what is no Unicode is refused by the tokenizer
        raise ContextLengthError(
            f"the prompt has {size:,} bytes of text; at most {most:,} are looked at, {MAX_BYTES_PER_TOKEN} for each token of the context: "
            "shorten the prompt, or serve with a longer --max-model-len if the model allows it",
            param=param,
        )
