"""uvicorn, with the engine's life tied to the server's."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from quire.server.client import EngineClient
from quire.server.engine_loop import SteppedEngine
from quire.server.protocol import LimitedProtocol


class EngineServer(uvicorn.Server):
    """Starts the engine's loop before the first connection, ends all streams when a signal asks to stop."""

    def __init__(
        self, app: Any, client: EngineClient, engine: SteppedEngine, ready: Callable[[], None], *, keep_alive_s: int, grace_s: int
    ) -> None:
        super().__init__(uvicorn.Config(
            app, loop="auto", http=LimitedProtocol, ws="none", lifespan="off", interface="asgi3", log_config=None, log_level="error",
            access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=grace_s,
        ))  # fmt: skip
        self._client, self._engine, self._ready = client, engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._client.start(self._engine)
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._client.close()
        # Requests that have to be cut off after the grace time are no errors of the server.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets=sockets)
        self._client.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at the second signal without waiting. uvicorn would raise the signal again afterwards, and spoil the exit code."""
        self.force_exit = self.should_exit
        self.should_exit = True
