"""What is kept of files and batches, and how the API shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from quire.errors import ConfigError, QuireError

STATUSES = ("validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled")
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
STAMPED = tuple(status for status in STATUSES if status != "validating")
"""Statuses of which the batch remembers when it came to them, as ``<status>_at``."""


class StorageError(QuireError):
    """The disk of the store can't take any more, or fails. What was written before is whole."""

    code = "storage_failed"
    status = 507


class StoreInUseError(ConfigError):
    """Another process has the store."""


@dataclass(slots=True, frozen=True)
class StoredFile:
    id: str
    tenant: str
    filename: str
    """The client's name for it, shown and never used."""
    purpose: str
    """``batch`` or ``batch_output``."""
    bytes: int
    created_at: int
    seq: int = 0
    """Order of arrival."""

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": self.created_at, "filename": self.filename,
            "purpose": self.purpose, "status": "processed", "expires_at": None, "status_details": None,
        }  # fmt: skip


@dataclass(slots=True, frozen=True)
class Line:
    """One request of a batch: where it stands in the input file."""

    number: int
    """Of the line in the file, from 1."""
    custom_id: str
    offset: int
    length: int
    """In bytes, without the line break."""


@dataclass(slots=True, frozen=True)
class Answer:
    """What a line of a batch ended with."""

    batch: int
    number: int
    ok: bool
    """The request was answered with status 200."""
    text: bytes
    """Its line of the results, without a line break."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True, frozen=True)
class Batch:
    """A row of the table of batches; times are Unix seconds."""

    seq: int
    id: str
    tenant: str
    endpoint: str
    """Of all lines; empty where each has its own."""
    input_file_id: str
    completion_window: str
    metadata: str
    """JSON."""
    model: str
    status: str
    errors: str
    """JSON list of what was wrong with the input file."""
    created_at: int
    expires_at: int | None
    total: int = 0
    completed: int = 0
    """Lines that were answered with status 200."""
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    failed_at: int | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def left(self) -> int:
        """Lines without an answer."""
        return self.total - self.completed - self.failed

    def shown(self) -> dict[str, Any]:
        errors = json.loads(self.errors)
        return {
            "id": self.id, "object": "batch", "endpoint": self.endpoint, "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id, "completion_window": self.completion_window, "status": self.status,
            "output_file_id": self.output_file_id, "error_file_id": self.error_file_id,
            "created_at": self.created_at, "expires_at": self.expires_at,
            **{f"{status}_at": getattr(self, f"{status}_at") for status in STAMPED},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": {
                "input_tokens": self.prompt_tokens, "input_tokens_details": {"cached_tokens": self.cached_tokens},
                "output_tokens": self.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
            "metadata": json.loads(self.metadata),
        }  # fmt: skip
