"""What Ollama's clients ask of models: GET /api/tags, /api/ps and /api/version, POST /api/show."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.server.calls.fields import parse
from quire.server.context import Context, context_of
from quire.server.http.limits import read_json
from quire.server.ollama.reply import timestamp
from quire.server.ollama.schemas import IGNORED, REFUSED, OllamaShowRequest
from quire.server.openai.chunks import json_bytes

VERSION = "0.12.0"
"""Of Ollama's API that is answered here: clients refuse servers whose version is too low."""
LATEST = ":latest"
"""What Ollama adds to names without a tag, and so do some clients."""
FOREVER = 4102444800.0
"""The model stays loaded. The beginning of the year 2100, in seconds since 1970."""


def check_model(context: Context, name: str | None) -> None:
    """Raises ModelNotFoundError."""
    context.check_model(None if name is None or name.removesuffix(LATEST) in context.names else name)


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def _details(context: Context) -> dict[str, Any]:
    facts = context.facts
    return {
        "parent_model": "", "format": facts.file_format, "family": facts.family, "families": [facts.family],
        "parameter_size": facts.parameter_size, "quantization_level": facts.weights,
    }  # fmt: skip


def _card(context: Context, name: str) -> dict[str, Any]:
    facts = context.facts
    digest = hashlib.sha256(f"{context.model} {facts}".encode()).hexdigest()
    return {"name": name, "model": name, "size": facts.weight_bytes, "digest": digest, "details": _details(context)}


async def tags(request: Request) -> Response:
    context = context_of(request)
    return _json({"models": [_card(context, name) | {"modified_at": timestamp(context.created)} for name in context.names]})


async def running(request: Request) -> Response:
    context = context_of(request)
    more = {"expires_at": timestamp(FOREVER), "size_vram": context.facts.vram_bytes, "context_length": context.max_model_len}
    return _json({"models": [_card(context, name) | more for name in context.names]})


async def show(request: Request) -> Response:
    """What is known of the model; clients look at the capabilities and at the context length."""
    context = context_of(request)
    given = await read_json(request, context.config.max_body_bytes)
    body = parse(OllamaShowRequest, given, IGNORED, REFUSED | {"system": ("",), "options": ({},)})
    name = body.model or given.get("name") or None
    check_model(context, name if isinstance(name, str) else None)
    facts, template = context.facts, context.tokenizer.chat_template
    defaults = "\n".join(f"{name} {value}" for name, value in context.sampling_defaults.items())
    capabilities = ["completion", *(["tools"] if context.tool_format else []), *(["thinking"] if context.reasoning else [])]
    return _json({
        "modelfile": f"FROM {context.model}\n", "parameters": defaults, "template": template, "license": "", "details": _details(context),
        "model_info": {
            "general.architecture": facts.family, "general.parameter_count": facts.num_parameters, "general.basename": context.model,
            f"{facts.family}.context_length": context.max_model_len, f"{facts.family}.embedding_length": context.embedding_size,
        },
        "capabilities": capabilities, "modified_at": timestamp(context.created),
    })  # fmt: skip


async def version(request: Request) -> Response:
    return _json({"version": VERSION})
