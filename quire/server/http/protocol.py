"""HTTP/1.1 on a socket, with limits that uvicorn's parser does not have: the number of connections, the size and number of headers,
the time that they take, and the time for which a client may read nothing of its answer.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quire.errors import InvalidRequestError, QuireError
from quire.server.http.errors import HeadersTooLargeError, TimedOutError, UnavailableError, error_bytes
from quire.server.http.sse import PUSH

if TYPE_CHECKING:
    from quire.server.engine._express import Express

MAX_HEADER_BYTES = 64 << 10
MAX_HEADERS = 256
HEADER_TIMEOUT_S = 30.0
"""A request's headers must be complete this long after its first byte, or after the connection was made."""
WRITE_TIMEOUT_S = 120.0
"""A connection is cut off where so long nothing could be written to it: its client lives, and reads nothing."""
REFUSAL_S = 2.0
"""So long a connection that is one too many may wait before it sends the request that it is refused with."""
FRAMING_FACTOR = 8
"""A chunked body may have this many bytes of framing for each byte of content (chunks of one byte need 5)."""

MAX_PIPELINED = 16
"""Requests that a client may send before the first of them is answered."""
ENDLESS = "/page/events"
END_OF_HEADERS = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)
CHUNK_HEADS = [b"%x\r\n" % size for size in range(1024)]
"""Of the sizes that chunks have: to write the number costs more than all else that is done with the bytes of a token."""


class _Push:
    """See sse.Push. What RequestResponseCycle.send does for a part of a body, where it need not wait.

    While nothing waits in the transport's buffer, and the connection is not closing, bytes go straight to the socket: the transport's own
    way takes three times as long. Many streams take turns here, and what one step has touched is in no cache when the next one comes: so
    ``resume`` looks at the transport, and ``write`` at nothing but this object.
    """

    __slots__ = ("_cycle", "_direct", "_fd", "_transport", "express")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self._direct = False
        self.express: Express | None = None
        encrypted = self._transport.get_extra_info("sslcontext") is not None
        self._fd: int = -1 if encrypted else self._transport.get_extra_info("socket").fileno()

    def resume(self) -> None:
        self._go(self._fd >= 0 and self.ready and not self._transport.get_write_buffer_size())

    def close(self) -> None:
        """The connection closes, and its file descriptor will be another's."""
        self._go(False)
        self._fd = -1

    def _go(self, direct: bool) -> None:
        self._direct = direct
        if self.express is not None:
            self.express.fd = self._fd if direct else -1

    @property
    def over(self) -> bool:
        return self._cycle.response_complete

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        gone = cycle.disconnected or self._transport.is_closing()
        return bool(cycle.chunked_encoding) and not (gone or cycle.flow.write_paused or cycle.response_complete)

    def write(self, body: bytes) -> bool:
        size = len(body)
        chunk = b"".join((CHUNK_HEADS[size] if size < len(CHUNK_HEADS) else b"%x\r\n" % size, body, b"\r\n"))
        if not self._direct:
            self.resume()  # what waited may be gone
        if not self._direct:
            if not self.ready:
                return False
            self._transport.write(chunk)
            return True
        try:
            sent = os.write(self._fd, chunk)
        except OSError:  # the transport will meet it too, and knows what to do
            sent = 0
        if sent < len(chunk):
            self.write_rest(chunk[sent:])
        return True

    def write_rest(self, rest: bytes) -> None:
        self._go(False)
        self._transport.write(rest)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. What is not content (request line, headers, framing, trailers) is counted, and bounded."""

    def __init__(self, max_connections: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._one_too_many = False
        self._received = 0
        self._content = 0
        self._head_bytes = 0
        """Of the headers of the request that has begun."""
        self._held = b""
        """The end of what has arrived of the headers: a line that is not complete."""
        self._between = True
        """No request has begun, or not all of its headers are there."""
        self._fault: QuireError | None = None
        self._pushes: list[_Push] = []
        """Of the response that is on its way, and of those to requests that were sent before its end."""
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        # Refused when its request has begun: an answer before the question would be lost in a reset.
        self._one_too_many = len(self.connections) > self._max_connections
        self._start_timer(REFUSAL_S if self._one_too_many else HEADER_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_pushing()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._one_too_many:
            self._refuse(UnavailableError(
                f"this server has {self._max_connections:,} connections, which is all that it takes: try again in a moment, or serve with "
                "a larger --max-connections"
            ))  # fmt: skip
            return
        self._received += len(data)
        if self._between:
            data = self._without_upgrade(data)
        super().data_received(data)
        answered = self.cycle is not None and self.cycle.response_complete and not self.pipeline and self._headers_timer is None
        if answered and self.timeout_keep_alive_task is None and not self.transport.is_closing():  # uvicorn has stopped it for this data
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if self._received - self._content > MAX_HEADER_BYTES + FRAMING_FACTOR * self._content and not self.transport.is_closing():
            self._refuse(_too_large())

    def _without_upgrade(self, data: bytes) -> bytes:
        """Nobody is given another protocol, and httptools would throw away the body of who asks for one (HTTP/2): the header gets another
        name. So lines of headers are passed on whole."""
        data, self._held = self._held + data, b""
        head, end, rest = data.partition(END_OF_HEADERS)
        if not end and (line := head.rfind(b"\r\n")) >= 0:
            head, self._held = head[:line], head[line:]
        return _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest

    def _unsupported_upgrade_warning(self) -> None:
        """One that was sent together with the request before it, or CONNECT. What follows could be read as another request."""
        self._refuse(InvalidRequestError("this server speaks nothing but HTTP/1.1: leave out the header Upgrade, or wait for each answer"))

    @property
    def busy(self) -> bool:
        """A request is not answered to its end, or the answer not sent. The page's feed, which has no end, does not count."""
        if self.cycle is None or self.cycle.scope["path"] == ENDLESS:
            return False
        return not self.cycle.response_complete or self.transport.get_write_buffer_size() > 0

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()
        self._start_timer(HEADER_TIMEOUT_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._between:  # a trailer: those whom the request passed have not seen it as a header (RFC 9110, section 6.5.1)
            return
        if len(self.headers) == MAX_HEADERS:
            self._fault = HeadersTooLargeError(f"the request has more than {MAX_HEADERS} headers, which is what this server allows")
            raise self._fault  # ends the parser, which then calls send_400_response
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEADER_BYTES:
            self._fault = _too_large()
            raise self._fault
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._between = False
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _unframed(self.cycle)
        if len(self.pipeline) > MAX_PIPELINED:
            self._fault = InvalidRequestError(f"more than {MAX_PIPELINED} requests were sent before the first was answered")
            raise self._fault
        push = _Push(self.cycle)  # a later request on this connection has a cycle of its own
        self._pushes = [push, *(other for other in self._pushes if not other.over)]
        self.scope["extensions"] = {PUSH: {"push": push}}

    def on_body(self, body: bytes) -> None:
        self._content += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._received = self._content = 0
        self._between = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._fault or InvalidRequestError("this is not an HTTP/1.1 request that the server can read"))

    def _refuse(self, error: QuireError) -> None:
        body = error_bytes(error)
        start = (
            f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
            + ("retry-after: 1\r\n\r\n" if error.status == 503 else "\r\n")
        )
        self._stop_pushing()
        self.transport.write(start.encode() + body)
        self.transport.close()

    def _stop_pushing(self) -> None:
        for push in self._pushes:
            push.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits until everything is written, which a client that reads nothing can put off for ever."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _start_timer(self, seconds: float) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _too_slow(self) -> None:
        if self._one_too_many:
            self.transport.abort()
        elif not self.transport.is_closing():
            self._refuse(TimedOutError(f"the request's headers did not arrive within {HEADER_TIMEOUT_S:g} seconds"))


def _unframed(cycle: RequestResponseCycle) -> None:
    """For a client of HTTP/1.0, which knows no chunks: what has no length ends with the connection (RFC 9112, sections 6.1 and 6.3)."""
    cycle.chunked_encoding = False
    send = cycle.send

    async def send_plainly(message: Any) -> None:
        if message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plainly  # type: ignore[method-assign]


def _too_large() -> QuireError:
    return HeadersTooLargeError(f"the request's headers are longer than {MAX_HEADER_BYTES:,} bytes, which is what this server allows")
