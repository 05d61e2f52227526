"""EngineClient: the engine as asyncio code sees it. What it has taken ends as if there were one engine that never dies.

Everything here runs on the event loop's thread, but for ``_post``, which a link's thread may call.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from quire.core.admission import RequestLimits
from quire.core.sequence import Request
from quire.core.stats import EngineStats
from quire.errors import EngineError, QueueFullError, QuireError
from quire.outputs import SequenceOutput
from quire.server.engine._express import Express, carry
from quire.server.engine.journal import Journal
from quire.server.engine.messages import (
    Abort,
    Add,
    Died,
    Down,
    FromEngine,
    GetSnapshot,
    GetStats,
    KVEvents,
    Outputs,
    Seen,
    Stalled,
    Stats,
    ToEngine,
    Unwatch,
    Up,
)
from quire.server.engine.stream import Shortcut, Stream
from quire.server.http.errors import UnavailableError
from quire.server.metrics.meter import RequestMeter
from quire.server.metrics.totals import EngineTotals
from quire.structured import Structured

CLOSING = "the server is shutting down"
DRAINING = "the server is shutting down: it finishes what it has, and takes nothing new"
ENDLESS = "the form of the output can't be followed to any end"
MAX_ENDLESS = 1024
RESTARTING = "the engine is being started again; what is in flight goes on when it is there"


class Link(Protocol):
    """The way to an engine, which may be replaced by another one (Down, then Up)."""

    def start(self, receive: Callable[[FromEngine], None], has_work: Callable[[], bool]) -> None: ...
    def send(self, message: ToEngine) -> None: ...
    def stop(self, timeout: float) -> None: ...


class EngineClient:
    """Sends requests to an engine and brings back what it makes of them.

    max_waiting: the bound on the queue. It is kept here and not in the engine, so that a request is refused before its answer
    begins, and one that was taken is never refused later: at most ``limits.max_num_seqs + max_waiting`` sequences are in flight
    when a request is taken. A sequence counts from its submission to its end; a beam search as the outputs that it returns. What is
    done in the background does not count there, and is bounded by those who submit it.
    """

    def __init__(self, limits: RequestLimits, max_waiting: int) -> None:
        self.limits = limits
        self.max_waiting = max_waiting
        self.in_flight = 0
        """Sequences that were submitted and have not ended."""
        self.in_background = 0
        """Those of them that nobody waits for: lines of batches."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._link: Link | None = None
        self._journal = Journal()
        self._streams: dict[str, Stream] = {}
        self._ways: dict[str, Express] = {}
        """Those of streams with a shortcut, from when it is first open, by request id."""
        self._tickets = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self.dead: str | None = None
        """Why nothing can be generated any more; None while all is well."""
        self.draining = self.closing = False
        self.up = False
        """There is an engine."""
        self.stalled: float | None = None
        """Seconds for which the engine had finished no step, though it has work, when it was last looked at."""
        self.restarts = 0
        """Engines that took the place of one that died."""
        self.meter = RequestMeter()
        self.totals = EngineTotals()
        self.on_kv_events: Callable[[bytes | None], None] | None = None
        """Told what the engine says of its cache; None where it died, and its cache with it."""
        self._endless: dict[Structured, None] = {}
        """Forms that ended engines, the latest last, by whatever field they came."""
        self.last_death: str | None = None
        """How the last one died."""

    def start(self, link: Link) -> None:
        """Begin to talk to the engine, which is ready. Call on the event loop."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._link, self.up = link, True
        link.start(self._post, lambda: len(self._journal) > 0)

    def drain(self) -> None:
        """Take no new requests; those in flight go on."""
        self.draining = True

    def close(self) -> None:
        """Take no new requests; those in flight end with an error now."""
        self.closing = True
        self._fail_all(CLOSING)

    def stop(self, timeout: float = 5.0) -> None:
        """End the engine, after its current step."""
        if self._link is not None:
            self._link.stop(timeout)

    def submit(self, requests: Sequence[Request], *, background: bool) -> Stream:
        """Queue requests; close the stream in the end, whatever happens. Request ids must be unique among those in flight.

        Raises UnavailableError where nothing can be generated any more, QueueFullError where too much is in flight, InvalidRequestError
        where the form of the output is known to end engines.
        """
        self.check()
        live = self.in_flight - self.in_background
        if live >= (most := self.limits.max_num_seqs + self.max_waiting) and not background:
            raise QueueFullError(
                f"{live:,} sequences run or wait, and this server takes {most:,} (--max-num-seqs {self.limits.max_num_seqs:,} + "
                f"--max-waiting {self.max_waiting:,}): try again in a moment, or serve with a larger --max-waiting"
            )
        for request in requests:
            form = request.params.structured
            if form is not None and replace(form, source="") in self._endless:
                raise form.error(f"{ENDLESS}, as was seen before: change it")
        stream = Stream(self, requests, background)
        stream._count(len(stream._open))
        self.meter.begin(requests)
        for request in requests:
            self._streams[request.request_id] = stream
            self._journal.add(request, self.meter.now())
        self._send_due()
        return stream

    def emitted(self, request_id: str) -> list[int] | None:
        """The tokens of a request's first sequence, a list that goes on growing; None where it has ended."""
        return self._journal.emitted(request_id)

    @property
    def num_suspects(self) -> int:
        """Requests that are tried alone, since engines died while they worked on them."""
        return self._journal.num_suspects

    @property
    def num_unsent(self) -> int:
        """Sequences that the engine does not know yet: it is away, or tries a suspect alone."""
        return self._journal.num_unsent

    async def stats(self, timeout: float = 5.0) -> EngineStats:
        """The engine's counters, after all that was sent before.

        Raises UnavailableError where there will be none any more, EngineError where it is being started again, or where its current
        step takes longer than ``timeout`` seconds.
        """
        stats: EngineStats = await self._ask(GetStats, timeout)
        return stats

    async def snapshot(self, timeout: float = 5.0) -> Seen:
        """Every block and sequence; see core/snapshot.py. Raises as ``stats`` does. Call ``unwatch`` when no more are wanted."""
        seen: Seen = await self._ask(GetSnapshot, timeout)
        return seen

    def unwatch(self) -> None:
        """Nobody wants snapshots any more."""
        if self.up and self._link is not None:
            self._link.send(Unwatch())

    async def _ask(self, question: Callable[[int], ToEngine], timeout: float) -> Any:
        ticket = next(self._tickets)
        answer = self._asked[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._check_alive()
            if not self.up:
                raise EngineError(RESTARTING)
            assert self._link is not None
            self._link.send(question(ticket))
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise EngineError(f"the engine did not answer within {timeout:g} seconds: its current step takes longer") from None
        finally:
            del self._asked[ticket]

    def check(self) -> None:
        """Raises UnavailableError where nothing new is taken."""
        self._check_alive()
        if self.draining:
            raise UnavailableError(DRAINING)

    def check_ready(self) -> None:
        """Raises UnavailableError where a request that came now would not be started."""
        self.check()
        if not self.up:
            raise UnavailableError(RESTARTING)
        if self.stalled is not None:
            raise UnavailableError(
                f"the engine has not finished a step for {self.stalled:.0f} seconds, though it has work: it will be started again"
            )

    def _check_alive(self) -> None:
        if self.dead is not None or self.closing or self._link is None:
            raise UnavailableError(self.dead or (CLOSING if self.closing else "the engine has not started"))

    def _leave(self, requests: Sequence[Request], unfinished: set[str]) -> None:
        for request in requests:
            self._streams.pop(request.request_id, None)
            self._ways.pop(request.request_id, None)
        for request_id in unfinished:
            self._abort(request_id, None)

    def _abort(self, request_id: str, index: int | None) -> None:
        if self._journal.end(request_id, index) and self.up and self._link is not None:
            self._link.send(Abort(request_id, index))

    def _send_due(self) -> None:
        if self.up and self._link is not None:
            for entry in self._journal.due():
                entry.waited_s = self.meter.now() - entry.added
                self._link.send(Add(entry.request, entry.resumed))

    def _post(self, message: FromEngine) -> None:
        """Called by the link, on any thread."""
        assert self._loop is not None
        if threading.get_ident() == self._thread:
            self._receive(message)
            return
        with contextlib.suppress(RuntimeError):  # the event loop has closed: the process is ending
            self._loop.call_soon_threadsafe(self._receive, message)

    def _receive(self, message: FromEngine) -> None:
        self.stalled = None
        match message:
            case Stalled(seconds):
                self.stalled = seconds
            case Outputs(outputs, tokens):
                if self._ways:
                    tokens = self._carry(tokens)
                    self._count_carried(output.request_id for output in outputs)
                for output in outputs:
                    if output.queued_s is not None:  # by the engine's clock, since it has the request
                        output.queued_s += self._journal.waited_s(output.request_id)
                self.meter.step(outputs)
                self.meter.tokens(tokens)
                self._deliver(outputs)
                self._deliver_tokens(tokens)
                self._send_due()
            case Stats(ticket, stats, send_s):
                self.totals.heard(stats, send_s)
                self._answer(ticket, stats)
            case Seen(ticket):
                self._answer(ticket, message)
            case KVEvents(payload):
                if self.on_kv_events is not None:
                    self.on_kv_events(payload)
            case Down(reason, death):
                self.up, self.last_death = False, reason
                for way in self._ways.values():
                    way.waits = False  # the journal wants to see the next token
                self.totals.died()
                if self.on_kv_events is not None:
                    self.on_kv_events(None)
                self._fail_asked(EngineError(RESTARTING))
                for entry in self._journal.engine_died(death):
                    why = f"{entry.deaths} engines died while they worked on it, the last one alone with it; {reason}"
                    if death == "form":
                        why = f"{ENDLESS}: {reason}"
                        self._refuse(entry.request.params.structured)
                    left = [index for index, tokens in enumerate(entry.emitted) if tokens is not None]
                    failed = [SequenceOutput(entry.request.request_id, index, [], None, "error", why) for index in left]
                    self.meter.step(failed)
                    self._deliver(failed)
            case Up():
                self.up, self.dead = True, None
                self.restarts += 1
                self._send_due()
            case Died(reason):
                self.up, self.dead = False, reason
                self._fail_all(reason)

    def _refuse(self, form: Structured | None) -> None:
        """From now on: clients try again what failed, and each time would end an engine."""
        if form is not None:
            self._endless[replace(form, source="")] = None
            if len(self._endless) > MAX_ENDLESS:
                del self._endless[next(iter(self._endless))]

    def _answer(self, ticket: int, value: EngineStats | Seen) -> None:
        if (answer := self._asked.get(ticket)) is not None and not answer.done():
            answer.set_result(value)

    def _deliver_tokens(self, tokens: list[tuple[str, int, int]]) -> None:
        self._journal.note_tokens(tokens)
        self._hand_out([SequenceOutput(request_id, index, [token]) for request_id, index, token in tokens])

    def _carry(self, tokens: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        """Send the tokens that take a shortcut; the others."""
        now = self.meter.now()
        left, intervals, unsent = carry(tokens, self._ways, now)
        self.meter.carried(intervals, now)
        for request_id, rest in unsent:
            if (shortcut := self._streams[request_id].shortcut) is not None:
                shortcut.unsent(rest)
        self._count_carried(request_id for request_id, _, _ in left)
        return left

    def _count_carried(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id in self._ways and (shortcut := self._streams[request_id].shortcut) is not None:
                self._shut_way(shortcut)

    def _open_way(self, shortcut: Shortcut) -> None:
        way = self._ways.setdefault(shortcut.request_id, shortcut.express)
        way.last, way.waits = self.meter.last(shortcut.request_id), self._journal.is_clear(shortcut.request_id)

    def _shut_way(self, shortcut: Shortcut) -> None:
        """What went that way counts now."""
        way = shortcut.express
        way.waits = False
        if taken := way.taken:
            way.taken = 0
            self.meter.count(shortcut.request_id, taken, way.last)
            shortcut.taken(taken)

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            self._journal.note(output)
        self._hand_out(outputs)

    def _hand_out(self, outputs: list[SequenceOutput]) -> None:
        told: dict[Stream, None] = {}
        for output in outputs:
            if (stream := self._streams.get(output.request_id)) is not None:
                stream._deliver(output)
                told[stream] = None
        for stream in told:
            stream._tell()

    def _fail_all(self, reason: str) -> None:
        for stream in self._streams.values():
            stream._fail(UnavailableError(reason))
        self._fail_asked(UnavailableError(reason))

    def _fail_asked(self, error: QuireError) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(error)
