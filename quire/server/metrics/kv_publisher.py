"""KVPublisher: KV events over ZeroMQ, as vLLM publishes them.

    PUB      [topic, sequence number (8 bytes, big-endian), payload]    every message, to whoever listens
    ROUTER   asked [empty, first sequence number]: answers with every message from there on that is kept, [empty, number, payload],
             and with number -1 and nothing behind the last

The front publishes, and not the engine: numbers go on and the sockets stay when an engine dies; subscribers then hear that
everything is gone. A subscriber that is too slow loses messages, and nobody waits for it.

Messages hold the tokens of prompts and outputs, and ZeroMQ asks for no key: bind to an address that only the router reaches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any

from quire.config import ServerConfig
from quire.errors import ConfigError
from quire.server.metrics.kv_events import cleared

KEPT = 10_000
"""Messages that can be asked for again."""
HIGH_WATER_MARK = 100_000
"""Messages that wait for a slow subscriber; more are dropped."""
POLL_S = 0.05
LINGER_MS = 0
END = (-1).to_bytes(8, "big", signed=True)

log = logging.getLogger("quire.server")


class KVPublisher:
    """Binds at once. Raises ConfigError where pyzmq is missing or an address can't be had."""

    def __init__(self, endpoint: str, replay: str | None, topic: str, form: str, high_water_mark: int = HIGH_WATER_MARK) -> None:
        try:
            import zmq
        except ModuleNotFoundError:
            raise ConfigError("--kv-events needs pyzmq: pip install 'quire[kv-events]'", param="kv_events") from None
        self._zmq: Any = zmq
        self.topic, self._form, self._high_water_mark = topic, form, high_water_mark
        self._context: Any = zmq.Context()
        self._publisher = self._bind(zmq.PUB, endpoint, "--kv-events")
        self._replay = None if replay is None else self._bind(zmq.ROUTER, replay, "--kv-events-replay")
        self._inbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._next = 0
        self._thread = threading.Thread(target=self._run, name="quire-kv-events", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """Where subscribers connect to, with the port that was given where any was asked for."""
        address: str = self._publisher.last_endpoint.decode()
        return address

    @property
    def replay_endpoint(self) -> str | None:
        return None if self._replay is None else self._replay.last_endpoint.decode()

    def publish(self, payload: bytes | None) -> None:
        """Send a payload; None: the engine has died. Returns at once."""
        self._inbox.put(cleared(self._form) if payload is None else payload)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _bind(self, kind: int, endpoint: str, option: str) -> Any:
        socket = self._context.socket(kind)
        socket.linger = LINGER_MS
        socket.set_hwm(self._high_water_mark)
        try:
            socket.bind(endpoint)
        except self._zmq.ZMQError as e:
            raise ConfigError(
                f"{option} {endpoint}: {e.strerror or e}; write for example tcp://127.0.0.1:5557", param=option[2:].replace("-", "_")
            ) from None
        return socket

    def _run(self) -> None:
        while True:
            try:
                payload = self._inbox.get(timeout=POLL_S)
            except Empty:
                pass
            else:
                if payload is None:
                    break
                self._kept.append((self._next, payload))
                self._publisher.send_multipart([self.topic.encode(), self._next.to_bytes(8, "big"), payload])
                self._next += 1
            if self._replay is not None and self._replay.poll(0):
                self._answer(self._replay)
        for socket in (self._publisher, self._replay):
            if socket is not None:
                socket.close()
        self._context.term()

    def _answer(self, replay: Any) -> None:
        frames = replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("a replay of KV events was asked for in a form that is not known: %d frames", len(frames))
            return
        client, _, first = frames
        for number, payload in self._kept:
            if number >= int.from_bytes(first, "big"):
                replay.send_multipart([client, b"", number.to_bytes(8, "big"), payload])
        replay.send_multipart([client, b"", END, b""])


def open_publisher(config: ServerConfig) -> KVPublisher | None:
    """As the configuration says; None where it asks for none. Raises ConfigError."""
    if config.kv_events is None:
        if config.kv_events_replay is not None:
            raise ConfigError("--kv-events-replay needs --kv-events: name the address of the events too", param="kv_events_replay")
        return None
    return KVPublisher(config.kv_events, config.kv_events_replay, config.kv_events_topic, config.kv_events_format)
