"""From answers to the lines and the files of results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from quire.server.batches.inprocess import Reply
from quire.server.batches.records import Answer, Batch, Line, StorageError
from quire.server.batches.store import Store

UNANSWERED = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was answered"),
    "expired": ("batch_expired", "the batch's completion window ended before this line was answered"),
}


def answer_of(batch: Batch, line: Line, reply: Reply) -> Answer:
    body = reply.body
    value: Any = {}
    with contextlib.suppress(ValueError):
        value = json.loads(body)
    if b"\n" in body or not isinstance(value, dict):  # no JSON of ours; but a result is one line
        body = json.dumps(value or body.decode("utf-8", "replace")).encode()
    head = json.dumps({"id": request_id(batch, line.number), "custom_id": line.custom_id}, ensure_ascii=False)
    text = b'%b, "response": {"status_code": %d, "request_id": %b, "body": %b}, "error": null}' % (
        head[:-1].encode("utf-8", "backslashreplace"), reply.status, json.dumps(reply.request_id).encode(), body,
    )  # fmt: skip
    prompt, completion, cached = _usage(value)
    return Answer(batch.seq, line.number, reply.status == 200, text, prompt, completion, cached)


def request_id(batch: Batch, number: int) -> str:
    return f"batch_req_{batch.id.removeprefix('batch_')}_{number}"


def _usage(value: Any) -> tuple[int, int, int]:
    """(prompt, completion, cached) tokens of an answer, in the words of either API."""
    usage = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(usage, dict):
        return 0, 0, 0
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return (
        usage.get("prompt_tokens") or usage.get("input_tokens") or 0,
        usage.get("completion_tokens") or usage.get("output_tokens") or 0,
        details.get("cached_tokens") or 0,
    )


def finish(store: Store, batch: Batch) -> None:
    """Write a batch's files of results, and end it. Every line is in exactly one of them, in the order of the input."""
    status = "cancelled" if batch.cancelling_at is not None else "expired" if batch.left else "completed"
    output, errors = store.new_path(), store.new_path()
    try:
        with _writing(output) as good, _writing(errors) as bad:
            for ok, text in lines_of(store, batch, status):
                (good if ok else bad).write(text + b"\n")
        kept = [path if path.stat().st_size else None for path in (output, errors)]
        store.finish(batch, status, *kept)
    finally:
        output.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)


def lines_of(store: Store, batch: Batch, status: str) -> Iterator[tuple[bool, bytes]]:
    """(answered with status 200, line of the results) of every line of a batch that ends with ``status``."""
    for custom_id, number, ok, text in store.answers(batch):
        if text is None:
            code, message = UNANSWERED[status]
            value = {"id": request_id(batch, number), "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}}
            text = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")
        yield bool(ok), text


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise StorageError(f"the store of batches can't be written: {e.strerror}") from None
