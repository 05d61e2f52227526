"""The store of files and batches: a folder with an SQLite database (WAL) and the files' contents.

    FOLDER/lock           held by the process that has the store
    FOLDER/batches.db     files, batches, lines and their answers
    FOLDER/files/<id>     contents; what has no row in the database is rubbish of a process that was killed

Used by one thread at a time; every method is one transaction, on disk when it returns. Raises StorageError where the disk is full
or fails, and has changed nothing then.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from quire.errors import ConfigError, InvalidRequestError
from quire.server.batches.records import STAMPED, UNFINISHED, Answer, Batch, Line, StorageError, StoredFile, StoreInUseError
from quire.server.http.errors import NotFoundError

VERSION = 1
_OURS = re.compile("file-[0-9a-f]{24}|new-[0-9a-f]{16}")
"""Names of files that this store makes."""
_SCHEMA = f"""
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT NOT NULL, model TEXT NOT NULL,
    status TEXT NOT NULL, errors TEXT NOT NULL DEFAULT '[]', created_at INTEGER NOT NULL, expires_at INTEGER,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_file_id TEXT, error_file_id TEXT, {", ".join(f"{status}_at INTEGER" for status in STAMPED)}
);
CREATE TABLE lines (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, custom_id TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    ok INTEGER, answer BLOB, PRIMARY KEY (batch, number)
);
PRAGMA user_version = {VERSION};
"""
_BATCH = ", ".join(field.name for field in fields(Batch))
_FILE = ", ".join(field.name for field in fields(StoredFile))


class Store:
    """Takes the folder for this process, until ``close``. Raises ConfigError where it can't be used, StoreInUseError where another
    process has it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files = folder, folder / "files"
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "a+", encoding="ascii")  # noqa: SIM115
        except OSError as e:
            raise ConfigError(f"the folder for batches, {folder}, can't be written: {e.strerror}", param="batch_dir") from None
        try:
            self._take()
            self._db = self._open()
            self._sweep()
        except BaseException:
            self._lock.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            raise StoreInUseError(
                f"the folder for batches, {self.folder}, is in use by another process ({self._lock.read(20).strip() or 'unknown'}): stop "
                "it first, or name another folder",
                param="batch_dir",
            ) from None
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
        except OSError as e:
            raise ConfigError(f"the folder for batches, {self.folder}, can't be written: {e.strerror}", param="batch_dir") from None

    def _open(self) -> sqlite3.Connection:
        path = self.folder / "batches.db"
        try:
            # One thread at a time, not always the same one. isolation_level=None: transactions are begun where we say so.
            db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            elif version != VERSION:
                raise ConfigError(
                    f"{path} was made by another version of Quire (format {version}, this one has {VERSION}): use that one, or name "
                    "another folder",
                    param="batch_dir",
                )
        except sqlite3.Error as e:
            raise ConfigError(f"{path} can't be used: {e}", param="batch_dir") from None
        return db

    def _sweep(self) -> None:
        """Remove what was written and not finished. The folder may hold other people's files as well."""
        known = {row[0] for row in self._db.execute("SELECT id FROM files")}
        for path in self._files.iterdir():
            if path.name not in known and _OURS.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except sqlite3.Error as e:
            self._roll_back()
            raise StorageError(f"the store of batches can't be written: {e}") from None
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    # Files.

    def path(self, file_id: str) -> Path:
        """Of a file's content; ``file_id`` is one of ours."""
        return self._files / file_id

    def new_path(self) -> Path:
        """For content that is being written; ``add_file`` makes a file of it, and the next start removes what is none."""
        return self._files / f"new-{secrets.token_hex(8)}"

    def add_file(self, written: Path, tenant: str, filename: str, purpose: str) -> StoredFile:
        """Make what was written to ``new_path()`` a file."""
        file = self._keep(written, tenant, filename, purpose)
        with self._or_gone([file]), self._transaction() as db:
            _insert_file(db, file)
        return file

    @contextmanager
    def _or_gone(self, files: Iterable[StoredFile]) -> Iterator[None]:
        """Their contents go where it is not written down whose they are."""
        try:
            yield
        except BaseException:
            for file in files:
                self.path(file.id).unlink(missing_ok=True)
            raise

    def _keep(self, written: Path, tenant: str, filename: str, purpose: str) -> StoredFile:
        """Give what was written its place; it is there after a power cut too."""
        file = StoredFile(f"file-{secrets.token_hex(12)}", tenant, filename, purpose, written.stat().st_size, int(time.time()))
        try:
            with open(written, "rb") as content:
                os.fsync(content.fileno())
            written.rename(self.path(file.id))
            folder = os.open(self._files, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except OSError as e:
            raise StorageError(f"the store of batches can't be written: {e.strerror}") from None
        return file

    def file(self, file_id: str, tenant: str) -> StoredFile:
        """Raises NotFoundError, also where it is another tenant's."""
        row = self._db.execute(f"SELECT {_FILE} FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no file {file_id[:80]!r}", param="file_id")
        return StoredFile(*row)

    def files(self, tenant: str, purpose: str | None, after: str | None, limit: int, oldest_first: bool) -> list[StoredFile]:
        start = self.file(after, tenant).seq if after is not None else None
        where, values = _page(start, oldest_first)
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        order = "ASC" if oldest_first else "DESC"
        rows = self._db.execute(f"SELECT {_FILE} FROM files WHERE tenant = ? AND {where} ORDER BY seq {order} LIMIT ?",
                                (tenant, *values, limit))  # fmt: skip
        return [StoredFile(*row) for row in rows]

    def delete_file(self, file_id: str, tenant: str) -> None:
        """Raises NotFoundError, or InvalidRequestError where a batch still reads it."""
        with self._transaction() as db:
            self.file(file_id, tenant)
            marks = ", ".join("?" for _ in UNFINISHED)
            user = db.execute(f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({marks})", (file_id, *UNFINISHED)).fetchone()
            if user is not None:
                raise InvalidRequestError(
                    f"the batch {user[0]} still reads the file {file_id}: wait for it, or cancel it first", param="file_id"
                )
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    # Batches.

    def add_batch(self, tenant: str, file_id: str, endpoint: str, window: str, expires_at: int | None, metadata: str, model: str) -> Batch:
        """Raises NotFoundError where the tenant has no such file."""
        with self._transaction() as db:
            file = self.file(file_id, tenant)
            if file.purpose != "batch":
                raise InvalidRequestError(
                    f"the file {file_id} has the purpose {file.purpose!r}: upload the lines with the purpose 'batch'", param="input_file_id"
                )
            batch_id = f"batch_{secrets.token_hex(12)}"
            db.execute(
                "INSERT INTO batches (id, tenant, endpoint, input_file_id, completion_window, metadata, model, status, created_at, "
                "expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, 'validating', ?, ?)",
                (batch_id, tenant, endpoint, file_id, window, metadata, model, int(time.time()), expires_at),
            )
        return self.batch(batch_id, tenant)

    def batch(self, batch_id: str, tenant: str) -> Batch:
        """Raises NotFoundError, also where it is another tenant's."""
        row = self._db.execute(f"SELECT {_BATCH} FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)).fetchone()
        if row is None:
            raise NotFoundError(f"there is no batch {batch_id[:80]!r}", param="batch_id")
        return Batch(*row)

    def batches(self, tenant: str, after: str | None, limit: int) -> list[Batch]:
        """The newest first."""
        where, values = _page(self.batch(after, tenant).seq if after is not None else None, oldest_first=False)
        rows = self._db.execute(f"SELECT {_BATCH} FROM batches WHERE tenant = ? AND {where} ORDER BY seq DESC LIMIT ?",
                                (tenant, *values, limit))  # fmt: skip
        return [Batch(*row) for row in rows]

    def unfinished(self) -> list[Batch]:
        """Everybody's, the oldest first."""
        marks = ", ".join("?" for _ in UNFINISHED)
        query = f"SELECT {_BATCH} FROM batches WHERE status IN ({marks}) ORDER BY seq"
        try:
            return [Batch(*row) for row in self._db.execute(query, UNFINISHED)]
        except sqlite3.Error as e:
            raise StorageError(f"{self.folder / 'batches.db'} can't be read ({e}): put it elsewhere, or name another folder") from None

    def fail(self, batch: Batch, errors: str) -> None:
        """The input file is no batch; ``errors``: JSON."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET errors = ? WHERE seq = ?", (errors, batch.seq))
            _set_status(db, batch.seq, "failed")

    def accept(self, batch: Batch, lines: Sequence[Line]) -> None:
        """The batch has these lines, and can be run. One that was cancelled meanwhile stays so."""
        with self._transaction() as db:
            db.executemany("INSERT INTO lines (batch, number, custom_id, offset, length) VALUES (?, ?, ?, ?, ?)",
                           ((batch.seq, line.number, line.custom_id, line.offset, line.length) for line in lines))  # fmt: skip
            db.execute("UPDATE batches SET total = ? WHERE seq = ?", (len(lines), batch.seq))
            _set_status(db, batch.seq, "in_progress", only_from="validating")

    def pending(self, batch: Batch, after: int, limit: int) -> list[Line]:
        """The next lines without an answer, from the line ``after`` on."""
        rows = self._db.execute(
            "SELECT number, custom_id, offset, length FROM lines WHERE batch = ? AND number > ? AND ok IS NULL ORDER BY number LIMIT ?",
            (batch.seq, after, limit),
        )
        return [Line(*row) for row in rows]

    def record(self, answers: Sequence[Answer]) -> None:
        """Keep answers and count them; a line that has one keeps it."""
        with self._transaction() as db:
            for a in answers:
                done = db.execute(
                    "UPDATE lines SET ok = ?, answer = ? WHERE batch = ? AND number = ? AND ok IS NULL", (a.ok, a.text, a.batch, a.number)
                )
                if done.rowcount:
                    db.execute(
                        "UPDATE batches SET completed = completed + ?, failed = failed + ?, prompt_tokens = prompt_tokens + ?, "
                        "completion_tokens = completion_tokens + ?, cached_tokens = cached_tokens + ? WHERE seq = ?",
                        (a.ok, not a.ok, a.prompt_tokens, a.completion_tokens, a.cached_tokens, a.batch),
                    )

    def cancel(self, batch_id: str, tenant: str) -> Batch:
        """Raises NotFoundError, or InvalidRequestError where it has ended."""
        with self._transaction() as db:
            batch = self.batch(batch_id, tenant)
            if batch.status not in UNFINISHED:
                raise InvalidRequestError(f"the batch {batch_id} has ended ({batch.status}): it can't be cancelled", param="batch_id")
            if batch.status in ("validating", "in_progress"):  # what is being finished is finished
                _set_status(db, batch.seq, "cancelling")
        return self.batch(batch_id, tenant)

    def finalize(self, batch: Batch) -> None:
        """Its lines have run, or its time is up."""
        with self._transaction() as db:
            _set_status(db, batch.seq, "finalizing", only_from="in_progress")

    def answers(self, batch: Batch) -> Iterator[tuple[str, int, bool | None, bytes | None]]:
        """(custom_id, line, ok, answer) of every line, in the order of the input; None for one without an answer."""
        yield from self._db.execute("SELECT custom_id, number, ok, answer FROM lines WHERE batch = ? ORDER BY number", (batch.seq,))

    def finish(self, batch: Batch, status: str, output: Path | None, errors: Path | None) -> None:
        """The batch ends: what was written to the two paths become its files."""
        output_file, error_file = (
            None if written is None else self._keep(written, batch.tenant, f"{batch.id}_{kind}.jsonl", "batch_output")
            for written, kind in ((output, "output"), (errors, "error"))
        )
        files = [file for file in (output_file, error_file) if file is not None]
        with self._or_gone(files), self._transaction() as db:
            for file in files:
                _insert_file(db, file)
            db.execute(
                "UPDATE batches SET output_file_id = ?, error_file_id = ? WHERE seq = ?",
                (output_file and output_file.id, error_file and error_file.id, batch.seq),
            )
            _set_status(db, batch.seq, status)
            db.execute("DELETE FROM lines WHERE batch = ?", (batch.seq,))


def _page(start: int | None, oldest_first: bool) -> tuple[str, list[Any]]:
    if start is None:
        return "1", []
    return f"seq {'>' if oldest_first else '<'} ?", [start]


def _insert_file(db: sqlite3.Connection, file: StoredFile) -> None:
    db.execute(
        "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (file.id, file.tenant, file.filename, file.purpose, file.bytes, file.created_at),
    )


def _set_status(db: sqlite3.Connection, seq: int, status: str, only_from: str | None = None) -> None:
    db.execute(
        f"UPDATE batches SET status = ?, {status}_at = ? WHERE seq = ? AND ? IN (status, '')",
        (status, int(time.time()), seq, only_from or ""),
    )
