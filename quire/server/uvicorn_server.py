"""uvicorn, with the engine's life tied to the server's."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from quire.server.batches.runner import Runner
from quire.server.client import EngineClient, Link
from quire.server.protocol import LimitedProtocol


class EngineServer(uvicorn.Server):
    """Begins to talk to the engine before the first connection. SIGTERM drains: nothing new is taken, and what is in flight has
    ``drain_s`` seconds to end by itself. Then, or at once after another signal or SIGINT, all streams end with an error."""

    def __init__(
        self,
        app: Any,
        client: EngineClient,
        link: Link,
        ready: Callable[[], None],
        *,
        keep_alive_s: int,
        grace_s: int,
        drain_s: float = 0,
        batches: Runner | None = None,
    ) -> None:
        super().__init__(uvicorn.Config(
            app, loop="auto", http=LimitedProtocol, ws="none", lifespan="off", interface="asgi3", log_config=None, log_level="error",
            access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=grace_s,
        ))  # fmt: skip
        self._client, self._link, self._ready = client, link, ready
        self._drain_s, self._batches = drain_s, batches
        self._drained_at: float | None = None
        """When what is in flight ends at the latest."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._client.start(self._link)
        if self._batches is not None:
            await self._batches.start()
        await super().startup(sockets=sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        if self._drained_at is not None and (self._client.in_flight == 0 or time.monotonic() > self._drained_at):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._client.close()
        if self._batches is not None:
            await self._batches.stop()
        # Requests that have to be cut off after the grace time are no errors of the server.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets=sockets)
        if self._batches is not None:
            await self._batches.close()
        self._client.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again afterwards, and spoil the exit code."""
        if sig == signal.SIGTERM and self._drained_at is None and not self.should_exit:
            self._client.drain()
            self._drained_at = time.monotonic() + self._drain_s
            return
        self.force_exit = self.should_exit
        self.should_exit = True
