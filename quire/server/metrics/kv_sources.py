"""GET /kv_event_sources: where KV events are published, for routers that look for it, in the form that vllm-router reads."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from quire.server.context import context_of
from quire.server.metrics.kv_publisher import HIGH_WATER_MARK, KEPT
from quire.server.openai.chunks import json_bytes

ANYWHERE = ("0.0.0.0", "[::]")


async def kv_event_sources(request: Request) -> Response:
    """Rank → its publisher. There is one rank; none where nothing is published."""
    publisher = context_of(request).publisher
    sources = {}
    if publisher is not None:
        host = request.url.hostname or "127.0.0.1"
        sources["0"] = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": _reachable(publisher.endpoint, host),
            "replay_endpoint": None if publisher.replay_endpoint is None else _reachable(publisher.replay_endpoint, host),
            "topic": publisher.topic,
            "hwm": HIGH_WATER_MARK,
            "buffer_steps": KEPT,
        }
    return Response(json_bytes(sources), media_type="application/json")


def _reachable(endpoint: str, host: str) -> str:
    """One that listens on all addresses is found where this call found the server."""
    for anywhere in ANYWHERE:
        endpoint = endpoint.replace(f"//{anywhere}:", f"//{f'[{host}]' if ':' in host else host}:")
    return endpoint
