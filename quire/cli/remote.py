"""A running server, as commands of the terminal see it: JSON and streams over HTTP, with errors in its own words."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from quire.errors import ConfigError, QuireError

TIMEOUT_S = 60.0
"""Without a byte. A server that streams says something every 15 seconds."""


class RemoteError(QuireError):
    """The server can't be reached, or says no."""

    code = "remote_error"


class Remote:
    """One server. ``url``: with or without /v1. One request at a time."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            parts, self._host = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not self._host:
            raise ConfigError(f"--url {url!r:.100} is not the address of a server: write for example http://127.0.0.1:8000", param="url")
        self._secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._connection: http.client.HTTPConnection | None = None
        self._gone = False

    def get(self, path: str) -> dict[str, Any]:
        """Raises RemoteError."""
        with self._errors():
            answer = self._request("GET", path, None)
            return _object(answer.read())
        raise AssertionError("nobody hangs up here")

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream, up to [DONE], or to ``hang_up``. Raises RemoteError."""
        with self._errors():
            answer = self._request("POST", path, body)
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    break
                event = _object(data)
                if "error" in event:
                    raise RemoteError(_message(event))
                yield event

    def hang_up(self) -> None:
        """From a signal's handler, while a stream is read: it ends then. (It may not be closed in the middle of a read.)"""
        self._gone = True
        if self._connection is not None and self._connection.sock is not None:
            with suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        self._gone = False
        self._connection = connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers if body is None else self._headers | {"content-type": "application/json"}
        connection.request(method, self._path + path, data, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RemoteError(_message(_object(answer.read())))
        return answer

    def _errors(self) -> _Errors:
        return _Errors(self)


class _Errors:
    """Turns what a connection may raise into RemoteError; what a closed one raises is its end."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._remote._close()
        if isinstance(error, OSError | http.client.HTTPException | ValueError):
            if self._remote._gone:
                return True
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
            raise RemoteError(f"{self._remote.url} does not answer as a Quire server does: {what}. Is it running?") from None
        return False


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _message(value: dict[str, Any]) -> str:
    error = value.get("error")
    return str(error["message"]) if isinstance(error, dict) and "message" in error else "the server answers with an error of its own form"
