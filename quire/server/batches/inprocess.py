"""A request that comes from this process: it takes the way of one from a socket, with the same checks and the same bytes."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from quire.server.http.keys import App, Caller


@dataclass(slots=True, frozen=True)
class Reply:
    status: int
    request_id: str
    body: bytes


async def post(app: App, path: str, body: bytes, caller: Caller) -> Reply:
    """POST a JSON body to the application, as ``caller``. To cancel it is to hang up. Raises RuntimeError where nothing is answered."""
    sent, status, request_id = False, 0, ""
    parts: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.get_running_loop().create_future()  # this client never hangs up by itself
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, request_id
        if message["type"] == "http.response.start":
            status = message["status"]
            request_id = next((value.decode("latin-1") for name, value in message["headers"] if name == b"x-request-id"), "")
        else:
            parts.append(message.get("body", b""))

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": None, "server": None,
        "caller": caller,
    }  # fmt: skip
    try:
        await app(scope, receive, send)
    except Exception:
        if not status:  # else it was answered, with status 500, before it came here
            raise
    if not status:
        raise RuntimeError(f"{path} answered nothing")
    return Reply(status, request_id, b"".join(parts))
