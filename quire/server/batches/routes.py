"""/v1/files and /v1/batches, in OpenAI's form. Everybody sees what belongs to their own key."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import FileResponse, Response

from quire.errors import InvalidRequestError
from quire.server.batches.runner import Runner
from quire.server.batches.uploads import receive
from quire.server.calls.fields import parse, shown
from quire.server.calls.schemas import BatchRequest
from quire.server.context import caller_of, context_of
from quire.server.http.errors import NotFoundError
from quire.server.http.limits import read_json
from quire.server.openai.chunks import json_bytes

MAX_LIST, MAX_FILES_LIST = 100, 10_000
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
MAX_WINDOW_H = 720
PURPOSES = ("batch", "batch_output")


def runner_of(request: Request) -> Runner:
    """Raises NotFoundError where the server keeps no batches."""
    runner = context_of(request).batches
    if runner is None:
        raise NotFoundError("this server keeps no files and no batches: serve with --batch-dir FOLDER, in which they survive a restart")
    return runner


async def upload_file(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    most = context_of(request).config.max_file_bytes
    upload = await receive(request, runner.store.new_path(), most)
    try:
        purpose = upload.fields.pop("purpose", None)
        if purpose != "batch":
            raise InvalidRequestError(f"purpose must be 'batch', got {shown(purpose)}", param="purpose")
        if upload.fields:
            name = next(iter(upload.fields))[:80]
            raise InvalidRequestError(f"{name} is not supported here: send purpose and file only", param=name)
        file = await runner.on_disk(runner.store.add_file, upload.path, tenant, upload.filename, purpose)
    finally:
        upload.path.unlink(missing_ok=True)
    return _json(file.shown())


async def list_files(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    limit, after = _limit(request, MAX_FILES_LIST, MAX_FILES_LIST), request.query_params.get("after")
    purpose, order = request.query_params.get("purpose"), request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, got {shown(order)}", param="order")
    if purpose is not None and purpose not in PURPOSES:
        raise InvalidRequestError(f"purpose must be {' or '.join(PURPOSES)}, got {shown(purpose)}", param="purpose")
    found = await runner.on_disk(runner.store.files, tenant, purpose, after, limit + 1, order == "asc")
    return _list([file.shown() for file in found], limit)


async def get_file(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    file = await runner.on_disk(runner.store.file, request.path_params["file_id"], tenant)
    return _json(file.shown())


async def get_file_content(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    file = await runner.on_disk(runner.store.file, request.path_params["file_id"], tenant)
    return FileResponse(runner.store.path(file.id), media_type="application/octet-stream")


async def delete_file(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    file_id = request.path_params["file_id"]
    await runner.on_disk(runner.store.delete_file, file_id, tenant)
    return _json({"id": file_id, "object": "file", "deleted": True})


async def create_batch(request: Request) -> Response:
    runner, tenant, context = runner_of(request), caller_of(request).name, context_of(request)
    fields = await read_json(request, context.config.max_body_bytes)
    if fields.pop("output_expires_after", None) is not None:
        raise InvalidRequestError("output_expires_after is not supported: delete files when you have them", param="output_expires_after")
    body = parse(BatchRequest, fields)
    if body.endpoint not in runner.endpoints:
        raise InvalidRequestError(f"endpoint must be {' or '.join(runner.endpoints)}, got {shown(body.endpoint)}", param="endpoint")
    window = re.fullmatch(r"([1-9][0-9]{0,2})h", body.completion_window)
    if window is None or int(window[1]) > MAX_WINDOW_H:
        raise InvalidRequestError(
            f'completion_window must be "24h", or another number of hours up to {MAX_WINDOW_H}, got {shown(body.completion_window)}',
            param="completion_window",
        )
    metadata = _metadata(body.metadata)
    expires_at = int(time.time()) + int(window[1]) * 3600
    batch = await runner.on_disk(
        runner.store.add_batch, tenant, body.input_file_id, body.endpoint, body.completion_window, expires_at, metadata, context.model
    )
    runner.begin(batch)
    return _json(batch.shown())


async def list_batches(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    limit = _limit(request, 20, MAX_LIST)
    found = await runner.on_disk(runner.store.batches, tenant, request.query_params.get("after"), limit + 1)
    return _list([batch.shown() for batch in found], limit)


async def get_batch(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    batch = await runner.on_disk(runner.store.batch, request.path_params["batch_id"], tenant)
    return _json(batch.shown())


async def cancel_batch(request: Request) -> Response:
    runner, tenant = runner_of(request), caller_of(request).name
    batch = await runner.on_disk(runner.store.cancel, request.path_params["batch_id"], tenant)
    runner.cancel(batch.id)
    return _json(batch.shown())


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def _list(found: list[dict[str, Any]], limit: int) -> Response:
    """``found``: one more than ``limit``, where there are more."""
    data = found[:limit]
    ids = [item["id"] for item in data]
    return _json({
        "object": "list", "data": data, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
        "has_more": len(found) > limit,
    })  # fmt: skip


def _limit(request: Request, default: int, most: int) -> int:
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise InvalidRequestError(f"limit must be an integer from 1 to {most:,}, got {shown(text)}", param="limit")
    return int(text)


def _metadata(value: dict[str, str] | None) -> str:
    metadata = value or {}
    if len(metadata) > MAX_METADATA:
        raise InvalidRequestError(f"metadata holds {len(metadata):,} texts; at most {MAX_METADATA} are allowed", param="metadata")
    for key, text in metadata.items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            raise InvalidRequestError(
                f"metadata: names have at most {MAX_METADATA_KEY} characters and texts {MAX_METADATA_VALUE}, got {shown({key: text})}",
                param="metadata",
            )
    return json.dumps(metadata)


ROUTES: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
    ("POST", "/v1/files", upload_file),
    ("GET", "/v1/files", list_files),
    ("GET", "/v1/files/{file_id}", get_file),
    ("DELETE", "/v1/files/{file_id}", delete_file),
    ("GET", "/v1/files/{file_id}/content", get_file_content),
    ("POST", "/v1/batches", create_batch),
    ("GET", "/v1/batches", list_batches),
    ("GET", "/v1/batches/{batch_id}", get_batch),
    ("POST", "/v1/batches/{batch_id}/cancel", cancel_batch),
]
