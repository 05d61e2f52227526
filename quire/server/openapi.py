"""The OpenAPI document (/openapi.json, /docs). Bodies are read by hand, so they are described by hand too."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from quire.config import MAX_TIMEOUT_S
from quire.sampling_params import MAX_BEAMS, MAX_LOGPROBS, MAX_N, MAX_SEED, MAX_TOKENS
from quire.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from quire.server.calls import schemas
from quire.server.http.errors import is_anthropic, is_ollama
from quire.server.ollama.reply import MEDIA_TYPE
from quire.server.ollama.schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from quire.server.responses.schemas import ResponsesRequest

_SUMMARIES: dict[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/models": ("The served model", None),
    "/v1/models/{model_id:path}": ("One model, by its id", None),
    "/v1/completions": ("Continue one or several prompts", schemas.CompletionRequest),
    "/v1/chat/completions": ("Answer a conversation", schemas.ChatCompletionRequest),
    "/v1/embeddings": ("One vector for each input", schemas.EmbeddingRequest),
    "/v1/completions/render": ("What /v1/completions would run, without running it", schemas.CompletionRequest),
    "/v1/chat/completions/render": ("What /v1/chat/completions would run, without running it", schemas.ChatCompletionRequest),
    "/tokenizer_info": ("The tokenizer's special tokens and chat template", None),
    "/ping": ("As /health", None),
    "/load": ("How many sequences run or wait", None),
    "/model_info": ("The served model, as routers ask for it", None),
    "/get_model_info": ("As /model_info", None),
    "/server_info": ("The server's limits, as routers ask for them", None),
    "/get_server_info": ("As /server_info", None),
    "/v1/responses": ("Answer a conversation, in the form of OpenAI's Responses API; nothing is kept", ResponsesRequest),
    "/v1/responses/{response_id}": ("Not found: no response is kept", None),
    "/v1/responses/{response_id}/cancel": ("Not found: no response is kept", None),
    "/v1/responses/{response_id}/input_items": ("Not found: no response is kept", None),
    "/v1/messages": ("Answer a conversation, in the form of Anthropic's Messages API", MessagesRequest),
    "/v1/messages/count_tokens": ("How many tokens a conversation has", CountTokensRequest),
    "/api/chat": ("Answer a conversation, in the form of Ollama's API", OllamaChatRequest),
    "/api/generate": ("Answer a prompt, in the form of Ollama's API", OllamaGenerateRequest),
    "/api/embed": ("One vector for each input, in the form of Ollama's API", OllamaEmbedRequest),
    "/api/embeddings": ("One vector, in the older form of Ollama's API", OllamaEmbeddingsRequest),
    "/api/show": ("The served model, as Ollama's clients ask for it", OllamaShowRequest),
    "/api/tags": ("The names of the served model, as Ollama's clients ask for them", None),
    "/api/ps": ("The served model, which is loaded, as Ollama's clients ask for it", None),
    "/api/version": ("The version of Ollama's API that is answered", None),
    "/tokenize": ("A text or a conversation as token ids", schemas.TokenizeRequest),
    "/detokenize": ("Token ids as text", schemas.DetokenizeRequest),
    "POST /v1/files": ("Upload the lines of a batch", schemas.FileUpload),
    "GET /v1/files": ("The uploaded and the written files, page by page", None),
    "/v1/files/{file_id}": ("One file", None),
    "DELETE /v1/files/{file_id}": ("Delete a file that no unfinished batch reads", None),
    "/v1/files/{file_id}/content": ("What is in a file", None),
    "POST /v1/batches": ("Run a file's lines when nobody else needs the engine", schemas.BatchRequest),
    "GET /v1/batches": ("The batches, the newest first, page by page", None),
    "/v1/batches/{batch_id}": ("One batch", None),
    "/v1/batches/{batch_id}/cancel": ("End a batch now; what was answered is kept", None),
    "/health": ("Whether this process lives, and what is in use", None),
    "/ready": ("Whether a request that comes now is started", None),
    "/metrics": ("Everything that is counted, in Prometheus' text format or OpenMetrics", None),
    "/kv_event_sources": ("Where events of the prefix cache are published", None),
    "/version": ("Version of Quire", None),
    "/": ("The page: a live map of the memory, the requests in it, and a prompt box", None),
    "/page/events": ("What the page shows, as server-sent events", None),
    "/page/{name}": ("A file of the page", None),
}

_LIMIT = {"type": "integer", "minimum": 1, "maximum": 100}
_QUERY: dict[str, dict[str, Any]] = {
    "GET /v1/files": {
        "purpose": {"enum": ["batch", "batch_output"]}, "order": {"enum": ["asc", "desc"]}, "limit": _LIMIT | {"maximum": 10_000},
        "after": {"type": "string"},
    },
    "GET /v1/batches": {"limit": _LIMIT, "after": {"type": "string"}},
}  # fmt: skip

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "properties": {"type": {"type": "string"}, "message": {"type": "string"}}},
    },
}
_OLLAMA_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}}
_ERRORS = {
    400: "a field, a prompt or the body's syntax is wrong; the message has the numbers and the remedy",
    401: "no API key, or one that nobody has (where the server asks for keys)",
    404: "no such model, or no such thing",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the content type is not the one described here",
    429: "too many requests run or wait; try again after Retry-After",
    503: "the engine is being loaded, has died, or the server is shutting down; try again after Retry-After",
    504: "the request did not end within its timeout",
}
_BODILESS = (400, 401, 404, 503)
"""Errors of routes that take no body."""
_KINDS: dict[str, tuple[str, ...]] = {
    "/v1/completions": ("text/event-stream",), "/v1/chat/completions": ("text/event-stream",), "/v1/responses": ("text/event-stream",),
    "/v1/messages": ("text/event-stream",), "/api/chat": (MEDIA_TYPE,), "/api/generate": (MEDIA_TYPE,),
    "/metrics": ("text/plain", "application/openmetrics-text"), "/": ("text/html",),
    "/page/events": ("text/event-stream",), "/page/{name}": ("text/css", "text/javascript", "image/svg+xml"),
    "/v1/files/{file_id}/content": ("application/jsonl", "application/octet-stream", "text/plain"),
}  # fmt: skip
"""Path → content types of its answers besides JSON."""
LIMITS: dict[str, tuple[float, float]] = {
    "n": (1, MAX_N), "best_of": (1, MAX_N), "beam_width": (1, MAX_BEAMS), "temperature": (0, 100), "top_p": (0, 1),
    "min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100),
    "length_penalty": (-10, 10), "top_logprobs": (0, MAX_LOGPROBS), "max_tokens": (0, MAX_TOKENS), "min_tokens": (0, MAX_TOKENS),
    "max_completion_tokens": (0, MAX_TOKENS), "priority": (-(1 << 31), (1 << 31) - 1), "seed": (-(1 << 63), MAX_SEED),
    "timeout": (0.001, MAX_TIMEOUT_S),
}  # fmt: skip
"""Field → least and most; SamplingParams checks them, and a test that they are the same."""


def describe(path: str, method: str) -> dict[str, Any]:
    """Keyword arguments of ``add_api_route``."""
    key = f"{method} {path}"
    summary, schema = _SUMMARIES[key] if key in _SUMMARIES else _SUMMARIES[path]
    described: dict[str, Any] = {"summary": summary}
    if key in _QUERY:
        described["openapi_extra"] = {
            "parameters": [{"name": name, "in": "query", "schema": kind, "required": False} for name, kind in _QUERY[key].items()]
        }
    if schema is not None:
        kind = "multipart/form-data" if schema is schemas.FileUpload else "application/json"
        content = {kind: {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    name = "AnthropicError" if is_anthropic(path) else "OllamaError" if is_ollama(path) else "Error"
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    errors = _ERRORS if schema is not None else {status: _ERRORS[status] for status in _BODILESS}
    described["responses"] = {status: {"description": text, "content": error} for status, text in errors.items()}
    if path in _KINDS:
        described["responses"][200] = {"content": {kind: {} for kind in _KINDS[path]}}
    return described


def _with_limits(schemas: dict[str, Any]) -> dict[str, Any]:
    """Say in the document what a number may be."""
    for schema in schemas.values():
        for name, (low, high) in LIMITS.items():
            if name in schema.get("properties", {}):
                schema["properties"][name] |= {"minimum": low, "maximum": high}
    return schemas


def install(app: FastAPI) -> None:
    """Add the schemas of bodies to the document, which is made when it is first asked for."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            from pydantic.json_schema import models_json_schema

            made = plain()
            models = [(schema, "validation") for _, schema in _SUMMARIES.values() if schema is not None]
            _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            made.setdefault("components", {}).setdefault("schemas", {}).update(
                _with_limits(definitions["$defs"]) | {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR, "OllamaError": _OLLAMA_ERROR}
            )
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
