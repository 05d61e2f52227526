"""The OpenAPI document (/openapi.json, /docs). Bodies are read by hand, so they are described by hand too."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from quire.server import schemas
from quire.server.anthropic.schemas import CountTokensRequest, MessagesRequest
from quire.server.responses.schemas import ResponsesRequest

_SUMMARIES: dict[str, tuple[str, type[BaseModel] | None]] = {
    "/v1/models": ("The served model", None),
    "/v1/models/{model_id:path}": ("One model, by its id", None),
    "/v1/completions": ("Continue one or several prompts", schemas.CompletionRequest),
    "/v1/chat/completions": ("Answer a conversation", schemas.ChatCompletionRequest),
    "/v1/responses": ("Answer a conversation, in the form of OpenAI's Responses API; nothing is kept", ResponsesRequest),
    "/v1/responses/{response_id}": ("Not found: no response is kept", None),
    "/v1/responses/{response_id}/cancel": ("Not found: no response is kept", None),
    "/v1/responses/{response_id}/input_items": ("Not found: no response is kept", None),
    "/v1/messages": ("Answer a conversation, in the form of Anthropic's Messages API", MessagesRequest),
    "/v1/messages/count_tokens": ("How many tokens a conversation has", CountTokensRequest),
    "/tokenize": ("A text or a conversation as token ids", schemas.TokenizeRequest),
    "/detokenize": ("Token ids as text", schemas.DetokenizeRequest),
    "/health": ("Whether this process lives, and what is in use", None),
    "/ready": ("Whether a request that comes now is started", None),
    "/version": ("Version of Quire", None),
    "/": ("The page: a live map of the memory, the requests in it, and a prompt box", None),
    "/page/events": ("What the page shows, as server-sent events", None),
    "/page/{name}": ("A file of the page", None),
}

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
_ERRORS = {
    400: "a field, a prompt or the body's syntax is wrong; the message has the numbers and the remedy",
    404: "no such model",
    413: "the body is too large",
    415: "the content type is not application/json",
    429: "too many requests run or wait; try again after Retry-After",
    503: "the engine has died, or the server is shutting down",
}


def describe(path: str) -> dict[str, Any]:
    """Keyword arguments of ``add_api_route``."""
    summary, schema = _SUMMARIES[path]
    described: dict[str, Any] = {"summary": summary}
    if schema is not None:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
        described["responses"] = {status: {"description": text, "content": error} for status, text in _ERRORS.items()}
    return described


def install(app: FastAPI) -> None:
    """Add the schemas of bodies to the document, which is made when it is first asked for."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            from pydantic.json_schema import models_json_schema

            made = plain()
            models = [(schema, "validation") for _, schema in _SUMMARIES.values() if schema is not None]
            _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            made.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"] | {"Error": _ERROR})
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
