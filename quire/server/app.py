"""The HTTP application: routes, and what every answer has in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import Response

from quire import __version__
from quire.config import ServerConfig
from quire.errors import EngineError
from quire.server import openapi
from quire.server.anthropic.endpoint import count_tokens, messages
from quire.server.batches.routes import ROUTES
from quire.server.calls.generation import new_id
from quire.server.context import Context, context_of
from quire.server.http import errors, ids
from quire.server.http.cors import cross_origin, read_origins
from quire.server.http.errors import UnavailableError
from quire.server.http.keys import App, KeyCheck, Keys, Receive, Scope, Send
from quire.server.metrics.kv_sources import kv_event_sources
from quire.server.metrics.route import metrics
from quire.server.ollama import endpoint as ollama
from quire.server.ollama import models
from quire.server.openai import info, render
from quire.server.openai.chat import chat_completions
from quire.server.openai.chunks import json_bytes
from quire.server.openai.completions import completions
from quire.server.openai.embeddings import embeddings
from quire.server.openai.tokenization import detokenize, tokenize
from quire.server.page import routes as page
from quire.server.page.feed import Feed
from quire.server.responses.endpoint import create_response, stored_response


def around(app: App, config: ServerConfig, keys: Keys | None, refused: Callable[[str], None]) -> App:
    """What every request passes before it reaches ``app``. refused: see KeyCheck. Raises ConfigError."""
    checked: App = KeyCheck(app, keys, refused)
    if config.allowed_origins is not None:
        checked = cross_origin(checked, read_origins(config.allowed_origins))
    return RequestIds(checked)


def create_app(context: Context) -> FastAPI:
    """The ASGI application for one served model; ``around`` it goes what checks keys."""
    app = FastAPI(title="Quire", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = context
    app.state.feed = Feed(context.client, context.model)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("GET", "/v1/models", list_models),
        ("GET", "/v1/models/{model_id:path}", get_model),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/chat/completions", chat_completions),
        ("POST", "/v1/embeddings", embeddings),
        ("POST", "/v1/completions/render", render.completions),
        ("POST", "/v1/chat/completions/render", render.chat_completions),
        ("POST", "/v1/responses", create_response),
        ("GET", "/v1/responses/{response_id}", stored_response),
        ("DELETE", "/v1/responses/{response_id}", stored_response),
        ("POST", "/v1/responses/{response_id}/cancel", stored_response),
        ("GET", "/v1/responses/{response_id}/input_items", stored_response),
        ("POST", "/v1/messages", messages),
        ("POST", "/v1/messages/count_tokens", count_tokens),
        ("POST", "/api/chat", ollama.chat),
        ("POST", "/api/generate", ollama.generate),
        ("POST", "/api/embed", ollama.embed),
        ("POST", "/api/embeddings", ollama.embeddings),
        ("POST", "/api/show", models.show),
        ("GET", "/api/tags", models.tags),
        ("GET", "/api/ps", models.running),
        ("GET", "/api/version", models.version),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("GET", "/tokenizer_info", info.tokenizer_info),
        ("GET", "/health", health),
        ("GET", "/ping", health),
        ("GET", "/load", info.load),
        ("GET", "/model_info", info.model_info),
        ("GET", "/get_model_info", info.model_info),
        ("GET", "/server_info", info.server_info),
        ("GET", "/get_server_info", info.server_info),
        ("GET", "/ready", ready),
        ("GET", "/metrics", metrics),
        ("GET", "/kv_event_sources", kv_event_sources),
        ("GET", "/version", version),
        ("GET", "/", page.index),
        ("GET", "/page/events", page.events),
        ("GET", "/page/{name}", page.asset),
        *ROUTES,
    ]
    for method, path, handler in routes:
        app.add_api_route(path, handler, methods=[method], response_model=None, **openapi.describe(path, method))
        if method == "GET" and handler is not page.events:
            app.add_api_route(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)
    app.add_route("/docs", docs, include_in_schema=False)
    openapi.install(app)
    paths = list(dict.fromkeys(path.replace(":path", "") for _, path, _ in routes))
    errors.install(app, [*paths, "/docs"])
    if context.batches is not None:
        context.batches.attach(RequestIds(app), paths, context.check_model)
    return app


class RequestIds:
    """Gives every answer an X-Request-Id: the one that the client sent, in the header or in a body, or a new one."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = ids.chosen(scope) or new_id("req").encode()

        names = [b"x-request-id"]
        if errors.is_anthropic(scope["path"]):
            names.append(b"request-id")  # where Anthropic's clients look for it

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name, scope["request_id"]) for name in names)]
            await send(message)

        await self.app(scope, receive, send_with_id)


def _json(value: Any, status: int = 200) -> Response:
    return Response(json_bytes(value), status_code=status, media_type="application/json")


def _card(context: Context, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": context.created, "owned_by": "quire", "root": context.model, "parent": None,
        "max_model_len": context.max_model_len, "permission": [],
    }  # fmt: skip


async def list_models(request: Request) -> Response:
    context = context_of(request)
    return _json({"object": "list", "data": [_card(context, name) for name in context.names]})


async def get_model(request: Request) -> Response:
    context = context_of(request)
    name = request.path_params["model_id"]
    context.check_model(name)
    return _json(_card(context, name))


async def health(request: Request) -> Response:
    """Of this process: 200 while what it has taken will be answered, also while the engine is being started again; 503 once there
    will be no engine any more, or the server is being stopped."""
    client = context_of(request).client
    try:
        stats = await client.stats()
    except UnavailableError:
        raise
    except EngineError:  # a long step is not an illness
        return _json({"status": "busy" if client.up else "restarting", "engine_restarts": client.restarts})
    return _json({
        "status": "draining" if client.draining else "ok", "engine_restarts": client.restarts,
        "running": stats.running, "waiting": stats.waiting, "preemptions": stats.preemptions,
        "kv_blocks_used": stats.kv.used_blocks, "kv_blocks_total": stats.kv.num_blocks, "kv_block_size": stats.kv.block_size,
    })  # fmt: skip


async def ready(request: Request) -> Response:
    """200 while a request that comes now is started; 503 while the engine is loaded or started again or does not finish a step, and
    while the server drains."""
    context_of(request).client.check_ready()
    return _json({"status": "ready"})


async def docs(request: Request) -> Response:
    return get_swagger_ui_html(openapi_url="openapi.json", title="Quire")  # relative: the server may stand behind a path


async def version(request: Request) -> Response:
    return _json({"version": __version__})
