"""Feed: one look at the engine serves everybody who watches, and there is none while nobody does.

    watchers  <--server-sent events--  Feed  <--Seen--  engine

The time between two looks is such that they take at most ``SHARE`` of the engine's time, however large the pool is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from quire import __version__
from quire.errors import EngineError, QueueFullError
from quire.server.http.errors import UnavailableError
from quire.server.http.sse import PING, PING_S
from quire.server.page.advice import advice
from quire.server.page.latency import WINDOW_S, Recent, quantile
from quire.server.page.picture import Picture, change, whole

if TYPE_CHECKING:
    from quire.core.snapshot import Snapshot
    from quire.server.engine.client import EngineClient
    from quire.server.engine.messages import Seen

LOOK_S = 0.25
"""Between two looks, at least."""
SHARE = 0.005
"""Of the engine's time, at most."""
PATIENCE_S = 2.0
"""After this long without an answer the engine counts as busy with a long step."""
RATE_S = 2.0
"""Rates are means over about this long."""
MAX_WATCHERS = 64

log = logging.getLogger("quire.server")


class Feed:
    """Pictures of one engine. Belongs to the event loop."""

    def __init__(self, client: EngineClient, model: str) -> None:
        self._client, self._model = client, model
        self._watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._picture: Picture | None = None
        self._change: bytes | None = None
        """Event that makes the picture out of the one before; None where only the whole of it does."""
        self._whole: bytes | None = None
        """Event of the whole picture, once somebody wanted it."""
        self._latencies = self._recent()
        self._numbers = 0
        self._counts: deque[tuple[float, int, int]] = deque()
        """(time, tokens sampled, positions computed), the oldest about ``RATE_S`` ago."""
        self._preemptions: deque[tuple[float, int]] = deque()
        """(time, total), the oldest a minute ago."""

    def enter(self) -> None:
        """Somebody begins to watch. Raises QueueFullError where too many do."""
        if self._watchers >= MAX_WATCHERS:
            raise QueueFullError(f"{self._watchers} watch already, which is the most: close one")
        self._watchers += 1
        if self._watchers == 1:
            self._begin()

    def leave(self) -> None:
        self._watchers -= 1
        if self._watchers == 0 and self._task is not None:
            self._task.cancel()
            self._client.unwatch()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events for one watcher, until the server stops. A slow one misses pictures, and gets a whole one then."""
        seen = 0
        while True:
            while self._picture is None or self._picture.number == seen:
                if self._picture is not None and self._picture.facts["engine"]["state"] == "stopping":
                    return
                try:
                    async with asyncio.timeout(PING_S):
                        await self._news.wait()
                except TimeoutError:
                    yield PING
            follows, seen = self._picture.number == seen + 1, self._picture.number
            if follows and self._change is not None:
                yield self._change
                continue
            if self._whole is None:
                self._whole = _event(whole(self._picture))
            yield self._whole

    def _begin(self) -> None:
        self._picture = self._change = self._whole = None
        self._counts.clear()
        self._preemptions.clear()
        self._latencies = self._recent()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def _recent(self) -> Recent:
        meter = self._client.meter
        return Recent({"first": meter.time_to_first_token, "between": meter.inter_token_latency})

    async def _run(self) -> None:
        while True:
            started = time.monotonic()
            seen = await self._look()
            try:
                self._publish(seen)
            except Exception:
                log.exception("a look at the engine failed")
            await asyncio.sleep(interval(seen) - (time.monotonic() - started))

    async def _look(self) -> Seen | None:
        try:
            return await self._client.snapshot(PATIENCE_S)
        except (EngineError, UnavailableError):
            return None

    def _publish(self, seen: Seen | None) -> None:
        self._numbers += 1
        snapshot = None if seen is None else seen.snapshot
        before = self._picture
        facts = {"engine": self._engine(seen), "server": self._server()}
        if snapshot is not None:
            facts |= self._facts(snapshot)
        self._picture = Picture(self._numbers, self._client.restarts, facts, snapshot)
        made = None if before is None else change(before, self._picture)
        self._change, self._whole = None if made is None else _event(made), None
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _server(self) -> dict[str, Any]:
        limits = self._client.limits
        return {
            "version": __version__, "model": self._model, "time": time.time(), "max_model_len": limits.max_model_len,
            "max_num_seqs": limits.max_num_seqs, "max_waiting": self._client.max_waiting, "in_flight": self._client.in_flight,
            "watchers": self._watchers,
        }  # fmt: skip

    def _engine(self, seen: Seen | None) -> dict[str, Any]:
        client = self._client
        state = "busy"
        if client.closing:
            state = "stopping"
        elif client.dead is not None:
            state = "dead"
        elif not client.up:
            state = "restarting"
        elif client.draining:
            state = "draining"
        elif seen is not None:
            state = "running"
        return {
            "state": state, "restarts": client.restarts, "last_death": client.dead or client.last_death,
            "look_s": 0.0 if seen is None else seen.cost_s, "interval_s": interval(seen),
        }  # fmt: skip

    def _facts(self, snapshot: Snapshot) -> dict[str, Any]:
        now, stats, kv, layers = time.monotonic(), snapshot.stats, snapshot.stats.kv, self._client.limits.groups
        return {
            "now": snapshot.now,
            "running": stats.running,
            "waiting": stats.waiting,
            "waiting_for": {reason: count for reason, count in asdict(stats.queue).items() if count},
            "kv": {
                "num_blocks": kv.num_blocks, "block_size": kv.block_size, "groups": kv.groups,
                "full_groups": layers.full, "window": layers.window,
                "used": kv.used_blocks, "cached": kv.cached_blocks, "shared": kv.shared_blocks, "saved": kv.saved_blocks,
                "positions_used": kv.positions_used, "empty_tail": kv.empty_tail, "host_blocks": kv.host_blocks,
                "host_blocks_used": kv.host_blocks_used,
            },
            "totals": {
                "tokens": stats.tokens_sampled, "prompt_tokens": kv.counters.prompt_tokens, "hit_tokens": kv.counters.hit_tokens,
                "copied": kv.counters.blocks_copied, "preemptions": stats.preemptions, "recomputed": stats.tokens_recomputed,
            },
            "rates": self._rates(now, stats.tokens_sampled, stats.tokens_computed),
            "latency": {"window_s": WINDOW_S} | {
                name: {"bounds_s": bounds, "counts": counts, "p50": quantile(bounds, counts, 0.5), "p95": quantile(bounds, counts, 0.95)}
                for name, (bounds, counts) in self._latencies.look(now).items()
            },
            "copied": snapshot.copied,
            "evicted": snapshot.evicted,
            "preemptions": snapshot.preemptions,
            "advice": list(advice(snapshot, self._client.limits, self._lately(now, stats.preemptions))),
        }  # fmt: skip

    def _rates(self, now: float, sampled: int, computed: int) -> dict[str, float | None]:
        """Tokens a second."""
        counts = self._counts
        if counts and sampled < counts[-1][1]:  # another engine counts anew
            counts.clear()
        counts.append((now, sampled, computed))
        while len(counts) > 2 and counts[1][0] <= now - RATE_S:
            counts.popleft()
        then, sampled_then, computed_then = counts[0]
        if now == then:
            return {"sampled": None, "computed": None}
        return {"sampled": (sampled - sampled_then) / (now - then), "computed": (computed - computed_then) / (now - then)}

    def _lately(self, now: float, total: int) -> int:
        """Preemptions of the last minute, or since somebody watches."""
        totals = self._preemptions
        if totals and total < totals[-1][1]:
            totals.clear()
        if not totals or totals[-1][1] != total:
            totals.append((now, total))
        while len(totals) > 1 and totals[1][0] <= now - 60:
            totals.popleft()
        return total - totals[0][1]


def interval(seen: Seen | None) -> float:
    """Seconds from one look to the next."""
    return LOOK_S if seen is None else max(LOOK_S, seen.cost_s / SHARE)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
