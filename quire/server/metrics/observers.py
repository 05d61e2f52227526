"""Observers: who is told outside of this process, where the configuration names them: routers (KV events) and a trace collector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.config import ServerConfig
from quire.server.metrics.kv_publisher import KVPublisher, open_publisher
from quire.server.metrics.tracing import Tracer, open_tracer

if TYPE_CHECKING:  # the engine is started before the HTTP stack is imported
    from quire.server.engine.client import EngineClient
    from quire.server.http.keys import App


@dataclass(slots=True)
class Observers:
    publisher: KVPublisher | None
    tracer: Tracer | None

    def attach(self, client: EngineClient) -> None:
        """From now on they are told what ``client`` hears."""
        if self.publisher is not None:
            client.on_kv_events = self.publisher.publish
        if self.tracer is not None:
            client.meter.begun, client.meter.ended = self.tracer.begun, self.tracer.ended

    def around(self, app: App) -> App:
        return app if self.tracer is None else self.tracer.around(app)

    def close(self) -> None:
        if self.publisher is not None:
            self.publisher.close()
        if self.tracer is not None:
            self.tracer.close()


def open_observers(config: ServerConfig, model: str) -> Observers:
    """Before anything is loaded, so that a wrong address costs no time. Raises ConfigError."""
    return Observers(open_publisher(config), open_tracer(config, model))
