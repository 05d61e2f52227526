"""Which pages may use the server from a browser (CORS): none but those that the operator names with ``--allowed-origins``.

A browser asks first (a preflight, which brings no key), and shows a page the answer only if the server names the page's origin.
"""

from __future__ import annotations

import re

from quire.errors import ConfigError
from quire.server.http.keys import App

PREFLIGHT_S = 600
"""So long a browser need not ask again."""
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")


def read_origins(text: str) -> list[str]:
    """``*``, or origins with commas between them. Raises ConfigError."""
    origins = [origin.strip() for origin in text.split(",")]
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allowed-origins: {origin!r:.80} is no origin: write scheme and host, with the port where it is not the usual one "
                "(https://a.example,http://localhost:3000), or * for all",
                param="allowed_origins",
            )
    return origins


def cross_origin(app: App, origins: list[str]) -> App:
    """Goes around what checks keys. Cookies are never asked for: a page needs a key of its own where keys are on."""
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
        max_age=PREFLIGHT_S,
    )
