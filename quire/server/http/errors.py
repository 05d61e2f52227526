"""Errors as the API's clients expect them: ``{"error": {"message", "type", "param", "code"}}``, with the right status; on Anthropic's
routes ``{"type": "error", "error": {"type", "message"}}``.

Only a QuireError's own message ever reaches a client. Anything else is logged, and answered with a fixed sentence: no
traceback, no path, no representation of an object.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response

from quire.errors import ContextLengthError, QuireError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

PROBES = ("/health", "/ready", "/ping")
"""What these answer is no call that was refused."""
INTERNAL = "internal error; the server's log has the details"


class UnavailableError(QuireError):
    """Nothing can be generated at the moment: the engine died, or the server is shutting down."""

    code = "unavailable"
    status = 503


class UnauthorizedError(QuireError):
    """No API key, or one that nobody has."""

    code = "invalid_api_key"
    status = 401


class RateLimitError(QuireError):
    """A key's limit is reached. Trying again after ``retry_after_s`` seconds may help."""

    code = "rate_limit_exceeded"
    status = 429

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotFoundError(QuireError):
    code = "not_found"
    status = 404


class MethodNotAllowedError(QuireError):
    code = "method_not_allowed"
    status = 405


class TimedOutError(QuireError):
    code = "request_timeout"
    status = 408


class DeadlineError(QuireError):
    """A request did not end in the time that it, or the server, gives it."""

    code = "deadline_exceeded"
    status = 504


class TooLargeError(QuireError):
    code = "request_too_large"
    status = 413


class MediaTypeError(QuireError):
    code = "unsupported_media_type"
    status = 415


class HeadersTooLargeError(QuireError):
    code = "headers_too_large"
    status = 431


class ClientGoneError(Exception):
    """The client has hung up: there is nobody to answer."""


def error_object(error: QuireError) -> dict[str, dict[str, str | None]]:
    kind = "rate_limit_error" if error.status == 429 else "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_bytes(error: QuireError) -> bytes:
    return json.dumps(error_object(error), ensure_ascii=False).encode("utf-8", "replace")


_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


_NO_THREADS = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""By which the official client knows that it has to send conversations whole."""


def anthropic_error_bytes(error: QuireError) -> bytes:
    """The form of Anthropic's API, which has no place for the parameter's name."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = error.message
    if isinstance(error, ContextLengthError):  # clients know by these words that it is time to shorten the conversation
        numbers = "" if error.prompt is None else f"{error.prompt} tokens > {error.most} maximum: "  # as Anthropic writes them
        message = f"prompt is too long: {numbers}{message}"
    made: dict[str, Any] = {"type": kind, "message": message}
    if error.param == "thread":
        made["details"] = _NO_THREADS
    return json.dumps({"type": "error", "error": made}, ensure_ascii=False).encode("utf-8", "replace")


def ollama_error_bytes(error: QuireError) -> bytes:
    """The form of Ollama's API: nothing but the message."""
    return json.dumps({"error": error.message}, ensure_ascii=False).encode("utf-8", "replace")


def is_ollama(path: str) -> bool:
    """Whether a route is one of Ollama's API."""
    return path.startswith("/api/")


def is_anthropic(path: str) -> bool:
    """Whether a route is one of Anthropic's API."""
    return path.startswith("/v1/messages")


def error_response(error: QuireError, path: str = "") -> Response:
    """The answer to a request of ``path``, in the form of that route's API."""
    headers = {}
    if error.status not in (408, 429, 503):
        headers["x-should-retry"] = "false"  # the same request would get the same answer
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["retry-after"] = str(math.ceil(error.retry_after_s)) if isinstance(error, RateLimitError) else "1"
    if error.status in (408, 413):
        headers["connection"] = "close"  # part of the body may still be on its way
    write = anthropic_error_bytes if is_anthropic(path) else ollama_error_bytes if is_ollama(path) else error_bytes
    return Response(write(error), status_code=error.status, media_type="application/json", headers=headers)


def install(app: FastAPI, endpoints: list[str]) -> None:
    """Answer every error of the application in the API's form. ``endpoints`` are named where a path is unknown."""
    from starlette.exceptions import HTTPException

    async def quire_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, QuireError)
        if error.status not in (500, 504) and request.url.path not in PROBES:  # else it was taken, and failed, or took too long
            request.app.state.context.client.meter.refuse(error.code)
        return error_response(error, request.url.path)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        where = f"{request.method} {path[:200]}"
        if error.status_code == 404:
            return error_response(NotFoundError(f"{where} does not exist here; this server has {', '.join(endpoints)}"), path)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            response = error_response(MethodNotAllowedError(f"{where} is not allowed; use {allowed}"), path)
            response.headers["allow"] = allowed
            return response
        return error_response(QuireError(INTERNAL), path)

    async def internal_error(request: Request, error: Exception) -> Response:
        return error_response(QuireError(INTERNAL), request.url.path)

    async def client_gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # goes nowhere

    app.add_exception_handler(QuireError, quire_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGoneError, client_gone)
    app.add_exception_handler(Exception, internal_error)
