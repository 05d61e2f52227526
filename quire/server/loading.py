"""The server before there is an engine: it listens, checks keys, and says that it is loading."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fastapi.responses import Response

from quire.server.batches.runner import Runner
from quire.server.engine.client import EngineClient, Link
from quire.server.http.errors import UnavailableError, error_response
from quire.server.http.keys import App, Receive, Scope, Send
from quire.server.openai.chunks import json_bytes


@dataclass(slots=True, frozen=True)
class Serving:
    """What a server is made of once its engine has loaded."""

    client: EngineClient
    link: Link
    ready: Callable[[], None]
    """Called when the client talks to the engine, before the first request does."""
    batches: Runner | None = None


class Door:
    """Stands where the application will be. Until it is opened: /health answers, /metrics is empty, all else is 503."""

    def __init__(self) -> None:
        self._app: App | None = None
        self._refused: Callable[[str], None] | None = None
        self._since = time.monotonic()

    def open(self, app: App, refused: Callable[[str], None]) -> None:
        """refused: told the error's code of each call that is refused at the door from now on."""
        self._app, self._refused = app, refused

    def refused(self, code: str) -> None:
        if self._refused is not None:
            self._refused(code)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._loading(scope["path"])(scope, receive, send)

    def _loading(self, path: str) -> Response:
        seconds = time.monotonic() - self._since
        if path in ("/health", "/ping"):
            return Response(json_bytes({"status": "loading", "loading_s": round(seconds, 1)}), media_type="application/json")
        if path == "/metrics":
            return Response("# the model is being loaded\n", media_type="text/plain; version=0.0.4")
        error = UnavailableError(f"the model is being loaded, for {seconds:.0f} seconds now: try again in a moment")
        return error_response(error, path)
