"""uvicorn, with the engine's life tied to the server's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from quire.server.http.protocol import LimitedProtocol
from quire.server.loading import Serving

TICK_S = 1.0
DRAIN_TICK_S = 0.1
"""While the server drains, which ends when nothing is in flight any more."""


class EngineServer(uvicorn.Server):
    """Listens at once, and serves when the engine has loaded. SIGTERM drains: nothing new is taken, and what is in flight has
    ``drain_s`` seconds to end by itself. Then, or at once after another signal or SIGINT, all streams end with an error."""

    def __init__(
        self,
        app: Any,
        load: Callable[[], Serving],
        cancel: Callable[[], None],
        *,
        keep_alive_s: int,
        grace_s: int,
        drain_s: float = 0,
        max_connections: int = 4096,
    ) -> None:
        """load: called on another thread; what it raises ends the server, see ``failure``. cancel: makes it raise soon."""
        protocol: Any = partial(LimitedProtocol, max_connections)  # uvicorn calls it as it would a class
        super().__init__(uvicorn.Config(
            app, loop="auto", http=protocol, ws="none", lifespan="off", interface="asgi3", log_config=None, log_level="error",
            access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=grace_s,
        ))  # fmt: skip
        self._load, self._cancel = load, cancel
        self._loading: asyncio.Task[None] | None = None
        self._serving: Serving | None = None
        self.failure: Exception | None = None
        """Why there is nothing to serve."""
        self._drain_s = drain_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._drained_at: float | None = None
        """When what is in flight ends at the latest."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._loading = asyncio.create_task(self._bring_up())

    async def _bring_up(self) -> None:
        try:
            serving = await asyncio.to_thread(self._load)
            if self.should_exit:
                return
            serving.client.start(serving.link)
            self._serving = serving
            if serving.batches is not None:
                await serving.batches.start()
            serving.ready()
        except Exception as e:
            if not self.should_exit:
                self.failure, self.should_exit = e, True
                self._wake()

    async def main_loop(self) -> None:
        """uvicorn looks ten times a second whether it is to end, which is more work than a slow model's tokens. Here it is told."""
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):  # which also sets the time in the headers
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S if self._drained_at is None else DRAIN_TICK_S):
                    await self._woken.wait()

    def _wake(self) -> None:
        """From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._woken.set)

    async def on_tick(self, counter: int) -> bool:
        if self._drained_at is not None and self._serving is not None:
            client = self._serving.client  # what is done in the background is done by the next server
            over = client.in_flight == client.in_background and not self._answering
            self.should_exit |= over or time.monotonic() > self._drained_at
        return await super().on_tick(counter)

    @property
    def _answering(self) -> bool:
        """Some client has not been sent all of its answer."""
        return any(isinstance(each, LimitedProtocol) and each.busy for each in self.server_state.connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        serving = self._serving
        if serving is None:
            self._cancel()
        else:
            serving.client.close()
            if serving.batches is not None:
                await serving.batches.stop()
        # Requests that have to be cut off after the grace time are no errors of the server.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets=sockets)
        if serving is not None:
            if serving.batches is not None:
                await serving.batches.close()
            serving.client.stop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn would raise the signal again afterwards, and spoil the exit code."""
        if sig == signal.SIGTERM and self._serving is not None and self._drained_at is None and not self.should_exit:
            self._serving.client.drain()
            self._drained_at = time.monotonic() + self._drain_s
        else:
            self.force_exit = self.should_exit
            self.should_exit = True
        self._wake()
