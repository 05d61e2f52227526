"""``quire batch run``: a file of lines through the server's own handlers and engine, without a port.

What is answered is kept in the folder ``<out>.quire-batch`` until the results are whole: whatever ends the process, the same command
goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quire.config import EngineConfig, ServerConfig
from quire.errors import ConfigError, EngineError, InvalidRequestError
from quire.server.app import create_app
from quire.server.batches.records import Answer, Batch, StorageError
from quire.server.batches.results import lines_of
from quire.server.batches.runner import ENDPOINTS, Gate, Runner
from quire.server.batches.store import Store
from quire.server.batches.validation import read_lines
from quire.server.context import Context
from quire.server.engine.client import EngineClient
from quire.server.engine.supervisor import EngineProcess, Supervisor
from quire.text.tokenizer import Tokenizer

MAX_LINES = 100_000_000
DEAD_S = 0.5
"""How often it is looked whether there will be no engine any more."""

Progress = Callable[[Sequence[Answer]], None]
"""Told of the answers that were just kept."""


class InterruptedRunError(Exception):
    """A signal came first. ``batch`` says how far it was."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch


@dataclass(slots=True)
class Job:
    """A file of lines on its way to a file of results."""

    source: Path
    target: Path
    state: Path
    store: Store
    batch: Batch

    def forget(self) -> None:
        """The results are whole, or the input is none."""
        self.store.close()
        shutil.rmtree(self.state, ignore_errors=True)


def open_job(source: Path, target: Path, names: tuple[str, ...], config: ServerConfig, overwrite: bool) -> Job:
    """Begin, or go on where the last run stopped. Raises ConfigError, and InvalidRequestError where lines are wrong."""
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file for the answers")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the input itself, which the answers would replace: choose another name for them")
    state = target.with_name(target.name + ".quire-batch")
    if target.exists() and not state.exists() and not overwrite:
        raise ConfigError(f"{target} is there already: delete it, choose another name, or add --overwrite")
    try:
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise ConfigError(f"can't read {source}: {e.strerror}") from None
    store = Store(state)
    try:
        batch = next(iter(store.batches("", None, 1)), None)
        if batch is not None and batch.model != names[0]:
            raise ConfigError(
                f"{state} holds answers of the model {batch.model!r} ({batch.total - batch.left:,} of {batch.total:,} lines), and not of "
                f"{names[0]!r}: name that one, or delete {state} to begin again"
            )
        if batch is not None and json.loads(batch.metadata)["sha256"] != digest:
            raise ConfigError(
                f"{source} is not the file that {state} holds the answers for ({batch.total - batch.left:,} of {batch.total:,} lines): "
                f"name that one, or delete {state} to begin again"
            )
        job = Job(source, target, state, store, batch or _begin(store, source, digest, names[0]))
    except BaseException:
        store.close()
        raise
    if job.batch.status == "validating":
        _validate(job, names, config)
    return job


def _begin(store: Store, source: Path, digest: str, model: str) -> Batch:
    """With a copy of the input, which nobody changes meanwhile."""
    copy = store.new_path()
    try:
        shutil.copyfile(source, copy)
    except OSError as e:
        raise StorageError(f"{source} can't be copied to {store.folder}: {e.strerror}") from None
    file = store.add_file(copy, "", source.name, "batch")
    return store.add_batch("", file.id, "", "", None, json.dumps({"sha256": digest}), model)


def _validate(job: Job, names: tuple[str, ...], config: ServerConfig) -> None:
    def check_model(name: str | None) -> None:
        if name is not None and name not in names:
            raise InvalidRequestError(f"the model is {' or '.join(map(repr, names))}, and not {name[:200]!r}: see --served-model-name")

    path = job.store.path(job.batch.input_file_id)
    lines, errors = read_lines(path, ENDPOINTS, check_model, max_lines=MAX_LINES, max_line_bytes=config.max_body_bytes)
    if errors:
        job.forget()
        listed = [f"  line {error['line']}: {error['message']}" if error["line"] else f"  {error['message']}" for error in errors]
        raise InvalidRequestError("\n".join([f"{job.source} is no batch, and nothing was run:", *listed]))
    job.store.accept(job.batch, lines)
    job.batch = job.store.batch(job.batch.id, "")


def run(
    job: Job, engine_config: EngineConfig, server_config: ServerConfig, folder: Path, names: tuple[str, ...], progress: Progress
) -> Batch:
    """Answer the lines that have no answer, and write the results. The batch as it ended.

    Raises InterruptedRunError at SIGINT or SIGTERM, and QuireError where it can't go on; the next run goes on in any case.
    """
    engine = EngineProcess(engine_config)
    try:
        tokenizer = Tokenizer.load(folder)
        loaded = engine.loaded()
        client = EngineClient(loaded.limits, engine_config.max_waiting)
        most = loaded.limits.max_num_seqs * 5 // 4 + 1  # a few wait, so that no row is ever empty
        runner = Runner(
            job.store, client, Gate(client, most, most), max_lines=MAX_LINES, max_line_bytes=server_config.max_body_bytes,
            on_progress=progress, finish=lambda store, batch: _finish(job.target, store, batch), again=False, seed=engine_config.seed,
        )  # fmt: skip
        context = Context(
            client, tokenizer, server_config, names[0], tuple(loaded.eos_token_ids), dict(loaded.sampling_defaults), aliases=names[1:],
            batches=runner,
        )  # fmt: skip
        create_app(context)
        batch = asyncio.run(_run(job, runner, client, Supervisor(engine, engine_config, server_config.engine_timeout)))
        if batch is None:  # asked only now, when no answer is kept any more
            raise InterruptedRunError(job.store.batch(job.batch.id, ""))
        return batch
    finally:
        engine.kill()


async def _run(job: Job, runner: Runner, client: EngineClient, link: Supervisor) -> Batch | None:
    """None: a signal came first."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for sig in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sig, stop.set)
    client.start(link)
    await runner.start()
    finished, stopped = asyncio.ensure_future(runner.finished()), asyncio.ensure_future(stop.wait())
    try:
        while not finished.done() and not stopped.done() and client.dead is None:
            await asyncio.wait((finished, stopped), timeout=DEAD_S, return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            finished.result()
            return await runner.on_disk(job.store.batch, job.batch.id, "")
        if client.dead is not None:
            raise EngineError(client.dead)
        return None
    finally:
        finished.cancel()
        stopped.cancel()
        await asyncio.gather(finished, stopped, return_exceptions=True)
        client.close()
        await runner.stop()
        client.stop(timeout=0)


def _finish(target: Path, store: Store, batch: Batch) -> None:
    """Write the results beside their place, and put them there when they are whole."""
    part = target.with_name(target.name + ".part")
    try:
        with open(part, "wb") as file:
            for _, text in lines_of(store, batch, "cancelled"):
                file.write(text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise StorageError(f"{target} can't be written: {e.strerror}") from None
    store.finish(batch, "completed", None, None)
