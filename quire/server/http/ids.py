"""The ids of a call: what its client chose (``request_id``, ``X-Request-Id``), or random ones."""

from __future__ import annotations

from typing import NamedTuple

from fastapi import Request

from quire.errors import InvalidRequestError
from quire.server.calls.fields import shown
from quire.server.calls.generation import new_id
from quire.server.http.keys import Scope

MAX_REQUEST_ID = 128


class CallId(NamedTuple):
    shown: str
    """In the answer."""
    own: str
    """What the engine's requests are called by: two clients may choose the same."""


def is_sane(request_id: bytes) -> bool:
    return 0 < len(request_id) <= MAX_REQUEST_ID and all(0x20 < byte < 0x7F for byte in request_id)


def chosen(scope: Scope) -> bytes | None:
    """The id that the client has sent in X-Request-Id, if it is a sane one."""
    sent = next((bytes(value) for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return sent if is_sane(sent) else None


def call_id(request: Request, prefix: str, request_id: str | None) -> CallId:
    """``request_id``: the field of the body, which goes before the header. Raises InvalidRequestError."""
    if request_id is not None:
        if not is_sane(request_id.encode("utf-8", "replace")):
            raise InvalidRequestError(
                f"request_id must be 1 to {MAX_REQUEST_ID} visible ASCII characters, got {shown(request_id)}", param="request_id"
            )
        request.scope["request_id"] = request_id.encode()
        suffix: str | None = request_id
    else:
        header = chosen(request.scope)
        suffix = header.decode() if header is not None else None
    if suffix is None:
        made = new_id(prefix)
        return CallId(made, made)
    return CallId(f"{prefix}-{suffix}", new_id(f"{prefix}-{suffix}"))
