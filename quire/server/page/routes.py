"""GET /, /page/{name} and /page/events."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from quire.server.http.errors import NotFoundError
from quire.server.http.sse import EventStream
from quire.server.page import assets
from quire.server.page.feed import Feed


async def index(request: Request) -> Response:
    return _answer(request, assets.INDEX)


async def asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in assets.FILES:
        raise NotFoundError(f"the page has no file {name[:80]!r}")
    return _answer(request, name)


async def events(request: Request) -> Response:
    """Pictures of the engine, as server-sent events: the first one whole, then what changes."""
    feed = request.app.state.feed
    assert isinstance(feed, Feed)
    feed.enter()
    return EventStream(feed.events(), feed.leave)


def _answer(request: Request, name: str) -> Response:
    found = assets.read(name)
    known = request.headers.get("if-none-match") == found.headers["etag"]
    return Response(b"" if known else found.body, status_code=304 if known else 200, headers=found.headers)
