"""The runner: every batch that has not ended, from its file to its results, on the event loop.

    validating --> in_progress --> finalizing --> completed
        |              |               '--------> expired, where the window ended before all lines had an answer
        v              v
      failed       cancelling --> cancelled

The store is the only memory: what is in flight when this process dies has no answer there, and is run by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quire.config import ServerConfig
from quire.core.sequence import request_seed
from quire.errors import QuireError
from quire.logs import ThrottledLog
from quire.server.batches import results
from quire.server.batches.inprocess import Reply, post
from quire.server.batches.records import Answer, Batch, Line, StorageError
from quire.server.batches.store import Store
from quire.server.batches.validation import parse_line, read_lines
from quire.server.engine.client import EngineClient
from quire.server.http.errors import INTERNAL, error_bytes
from quire.server.http.keys import App, Caller
from quire.server.openai.chunks import json_bytes

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""That a line may name, where the server has them."""
MAX_LINES = 50_000
"""Of a batch; OpenAI's bound."""
RETRY_S = 2.0
"""After this time a full disk, and a server that takes nothing, is tried again."""
LOOK_S = 0.05
"""How often it is looked whether live requests have left room."""
PAGE = 500
"""Lines that are taken from the store at a time."""

T = TypeVar("T")
log = logging.getLogger("quire.batches")


class Gate:
    """How many lines may be in flight: at most ``most``, and none that would have to wait behind live requests anyway."""

    def __init__(self, client: EngineClient, most: int, sequences: int) -> None:
        """sequences: in flight, live ones included, from which on no line is started."""
        self._client, self._most, self._sequences = client, most, sequences
        self._turn = asyncio.Lock()
        """Batches that wait stand in line."""
        self._left = asyncio.Event()
        self.inside = 0

    async def enter(self) -> None:
        async with self._turn:
            while not self._open:
                self._left.clear()
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._left.wait()
                except TimeoutError:
                    continue
            self.inside += 1

    def leave(self) -> None:
        self.inside -= 1
        self._left.set()

    @property
    def _open(self) -> bool:
        client = self._client
        return self.inside < self._most and client.in_flight < self._sequences and client.up and not (client.draining or client.closing)


@dataclass(slots=True)
class _Running:
    """A batch that this process works on."""

    task: asyncio.Task[None] | None = None
    lines: asyncio.Task[None] | None = None
    """Set while its lines run."""


@dataclass(slots=True)
class Runner:
    """Give it an application, ``start`` it on the event loop, tell it of new batches, ``stop`` and ``close`` it. It owns the store, and
    the thread that uses it."""

    store: Store
    client: EngineClient
    gate: Gate
    max_lines: int = MAX_LINES
    max_line_bytes: int = 8 << 20
    on_progress: Callable[[Sequence[Answer]], None] = lambda answers: None
    """Called with what was just kept."""
    finish: Callable[[Store, Batch], None] = results.finish
    """Writes the results, and ends the batch; called again where it was interrupted."""
    again: bool = True
    """Go on with a batch whose files can't be read, when they can; else ``finished`` raises what it met."""
    seed: int | None = None
    """What the seeds of lines that bring none are made of; None: they are random."""
    endpoints: Sequence[str] = ()
    """That the application has, of ENDPOINTS."""
    _app: App | None = None
    _check_model: Callable[[str | None], None] = lambda name: None
    _stopped: bool = False
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "quire-batches"))
    _running: dict[str, _Running] = field(default_factory=dict)
    _answers: list[tuple[Answer, asyncio.Future[None]]] = field(default_factory=list)
    """On their way to the store."""
    _recorder: asyncio.Task[None] | None = None
    _failures: list[Exception] = field(default_factory=list)
    _warnings: ThrottledLog = field(default_factory=lambda: ThrottledLog(log, 60.0))

    def attach(self, app: App, paths: Sequence[str], check_model: Callable[[str | None], None]) -> None:
        """app: what lines are sent to, without its check of keys. paths: its routes. check_model: raises for what is not served."""
        self._app, self._check_model = app, check_model
        self.endpoints = [endpoint for endpoint in ENDPOINTS if endpoint in paths]

    async def start(self) -> None:
        for batch in await self.on_disk(self.store.unfinished):
            self.begin(batch)

    def begin(self, batch: Batch) -> None:
        """Work on a batch from where it stands."""
        if self._stopped:
            return
        running = self._running[batch.id] = _Running()
        running.task = asyncio.ensure_future(self._work(batch, running))

    def cancel(self, batch_id: str) -> None:
        """The store says that it is cancelled: its lines end now."""
        running = self._running.get(batch_id)
        if running is not None and running.lines is not None:
            running.lines.cancel()

    async def finished(self) -> None:
        """Every batch has ended. Raises what kept one from its end."""
        await asyncio.gather(*self._tasks())
        if self._failures:
            raise self._failures[0]

    async def stop(self) -> None:
        """Drop what is in flight, and keep what was answered."""
        self._stopped = True
        for task in self._tasks():
            task.cancel()
        await asyncio.gather(*self._tasks(), return_exceptions=True)
        if self._recorder is not None:
            await asyncio.wait((self._recorder,), timeout=RETRY_S)
            self._recorder.cancel()
            await asyncio.gather(self._recorder, return_exceptions=True)

    async def close(self) -> None:
        """Leave the store to others."""
        await self.on_disk(self.store.close)
        self._disk.shutdown()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [running.task for running in self._running.values() if running.task is not None]

    async def on_disk(self, work: Callable[..., T], *args: Any) -> T:
        """Do something with the store, on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)

    async def _patiently(self, work: Callable[..., T], *args: Any) -> T:
        """``on_disk``, again and again while the disk is full: nothing that was computed is thrown away for that."""
        while True:
            try:
                return await self.on_disk(work, *args)
            except StorageError as e:
                self._warnings.warning(f"{e.message}; batches wait until it can be written again")
                await asyncio.sleep(RETRY_S)

    async def _work(self, batch: Batch, running: _Running) -> None:
        try:
            while True:
                try:
                    await self._bring_to_end(batch, running)
                    return
                except (OSError, sqlite3.Error) as e:  # a network's disk is away for a moment; a cancelled batch ends nevertheless
                    if not self.again:
                        raise
                    self._warnings.warning(f"the batch {batch.id} waits until its files can be read: {e}")
                    await asyncio.sleep(RETRY_S)
        except Exception as e:
            log.exception("the batch %s stopped; the next start goes on with it", batch.id)
            self._failures.append(e)
        finally:
            self._running.pop(batch.id, None)

    async def _bring_to_end(self, batch: Batch, running: _Running) -> None:
        """From where it stands by now."""
        batch = await self.on_disk(self.store.batch, batch.id, batch.tenant)
        if batch.status == "validating":
            await self._validate(batch)
            batch = await self.on_disk(self.store.batch, batch.id, batch.tenant)
        if batch.status == "in_progress":
            running.lines = asyncio.ensure_future(self._run_lines(batch))
            try:
                await asyncio.wait((running.lines,))
            finally:
                running.lines.cancel()
                ended = (await asyncio.gather(running.lines, return_exceptions=True))[0]
                running.lines = None
            if isinstance(ended, Exception):
                raise ended
            await self._patiently(self.store.finalize, batch)
            batch = await self.on_disk(self.store.batch, batch.id, batch.tenant)
        if batch.status in ("finalizing", "cancelling"):
            await self._patiently(self.finish, self.store, batch)

    async def _validate(self, batch: Batch) -> None:
        endpoints = [batch.endpoint] if batch.endpoint else self.endpoints
        lines, errors = await asyncio.to_thread(
            read_lines, self.store.path(batch.input_file_id), endpoints, self._check_model,
            max_lines=self.max_lines, max_line_bytes=self.max_line_bytes,
        )  # fmt: skip
        if errors:
            await self._patiently(self.store.fail, batch, json_bytes(errors).decode())
        else:
            await self._patiently(self.store.accept, batch, lines)

    async def _run_lines(self, batch: Batch) -> None:
        """Until every line has an answer, or the window ends. Cancelled: drops what is in flight."""
        tasks: set[asyncio.Task[None]] = set()
        left_s = None if batch.expires_at is None else max(0.0, batch.expires_at - time.time())
        source = os.open(self.store.path(batch.input_file_id), os.O_RDONLY)
        failed: list[BaseException] = []

        def left(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            self.gate.leave()
            if not task.cancelled() and (error := task.exception()) is not None:
                failed.append(error)

        try:
            async with asyncio.timeout(left_s):
                after = 0
                while not failed and (lines := await self.on_disk(self.store.pending, batch, after, PAGE)):
                    after = lines[-1].number
                    for line in lines:
                        await self.gate.enter()
                        task = asyncio.ensure_future(self._run_line(batch, line, source))
                        tasks.add(task)
                        task.add_done_callback(left)
                while tasks:
                    await asyncio.wait(tasks)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            os.close(source)
        if failed:
            raise failed[0]

    async def _run_line(self, batch: Batch, line: Line, source: int) -> None:
        data = await asyncio.to_thread(os.pread, source, line.length, line.offset)
        value = parse_line(data)  # as it was validated
        body = value["body"]
        if self.seed is not None and value["url"] != "/v1/embeddings" and body.get("seed") is None:
            body["seed"] = request_seed(self.seed, line.number)
        body, caller = json_bytes(body), Caller(batch.tenant, background=True)
        while True:
            reply = await self._post(value["url"], body, caller)
            if reply.status not in (429, 499, 503):
                break
            await asyncio.sleep(RETRY_S)  # the server is full, stops, or has no engine: this line was not answered
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answers.append((results.answer_of(batch, line, reply), kept))
        if self._recorder is None or self._recorder.done():
            self._recorder = asyncio.ensure_future(self._record())
        await kept

    async def _post(self, url: str, body: bytes, caller: Caller) -> Reply:
        assert self._app is not None
        try:
            return await post(self._app, url, body, caller)
        except Exception:
            log.exception("a line of a batch failed")
            return Reply(500, "", error_bytes(QuireError(INTERNAL)))

    async def _record(self) -> None:
        """Keep all answers that have arrived, in one transaction, and again those that arrived meanwhile."""
        while self._answers:
            taken = list(self._answers)
            answers = [answer for answer, _ in taken]
            try:
                await self._patiently(self.store.record, answers)
            except Exception as e:
                error: Exception | None = e
            else:
                error = None
            del self._answers[: len(taken)]
            for _, kept in taken:
                if not kept.done():
                    kept.set_result(None) if error is None else kept.set_exception(error)
            self.on_progress(answers if error is None else [])


def open_runner(store: Store, client: EngineClient, config: ServerConfig) -> Runner:
    """For a server that has live requests too."""
    most = client.limits.max_num_seqs
    gate = Gate(client, config.batch_concurrency or most, most)
    return Runner(store, client, gate, max_line_bytes=config.max_body_bytes)
