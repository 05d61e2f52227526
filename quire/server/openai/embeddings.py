"""POST /v1/embeddings: the hidden states of each input as one vector of length 1, through the same queue, steps and blocks as all else."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from fastapi import Request
from fastapi.responses import Response

from quire.core.plan import Pooling
from quire.core.sequence import Request as EngineRequest
from quire.errors import EngineError, InvalidRequestError, QuireError
from quire.outputs import Usage, unit_vector
from quire.sampling_params import SamplingParams, integer
from quire.server.calls.fields import parse, shown
from quire.server.calls.prompts import completion_prompts
from quire.server.calls.schemas import EmbeddingRequest
from quire.server.calls.truncation import truncated
from quire.server.context import Context, caller_of, context_of
from quire.server.http.errors import DeadlineError
from quire.server.http.ids import CallId, call_id
from quire.server.http.keys import Caller
from quire.server.http.limits import read_json
from quire.server.http.sse import answer
from quire.server.openai.chunks import written

NOTHING = SamplingParams(max_tokens=0)


async def embeddings(request: Request) -> Response:
    context, caller = context_of(request), caller_of(request)
    body = parse(EmbeddingRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    _one_of("encoding_format", body.encoding_format, ("float", "base64"))
    call = call_id(request, "embd", body.request_id)
    requests = await prepared(context, caller, body, call)
    return await answer(request, _run(context, caller, body, call, requests))


async def prepared(context: Context, caller: Caller, body: EmbeddingRequest, call: CallId) -> list[EngineRequest]:
    """One request for each input. Raises InvalidRequestError or ContextLengthError."""
    pooling = cast(Pooling, _one_of("pooling", body.pooling, ("mean", "last")) or context.config.pooling)
    if body.dimensions is not None:
        hint = f": this model's vectors have {context.embedding_size:,} numbers"
        integer("dimensions", body.dimensions, 1, context.embedding_size, hint)
    with _input_names():
        prompts = await completion_prompts(context, body.input, 1, body.add_special_tokens is not False)
        prompts = truncated(prompts, body, context.max_model_len, 0)
        for prompt in prompts:
            context.client.limits.check(prompt.token_ids, NOTHING)
    salt = context.salts.derive(body.cache_salt, caller.tenant)
    return [
        EngineRequest(
            f"{call.own}-{i}", prompt.token_ids, NOTHING, 0, priority=caller.priority(body.priority or 0), salt=salt, pooling=pooling
        )
        for i, prompt in enumerate(prompts)
    ]


async def vectors(context: Context, caller: Caller, requests: list[EngineRequest]) -> tuple[list[list[float]], Usage]:
    """Of each request, as the model says it: not normalised. Raises EngineError."""
    usage = Usage(prompt_tokens=sum(len(request.prompt_token_ids) for request in requests))
    found: dict[str, list[float]] = {}
    caller.enter()
    try:
        stream = context.client.submit(requests, background=caller.background)
    except QuireError:
        caller.leave(0)
        raise
    seconds = 0 if caller.background else context.config.request_timeout
    late = DeadlineError(f"the request did not end within {seconds} seconds, this server's --request-timeout: send fewer inputs")
    timer = asyncio.get_running_loop().call_later(seconds, stream.fail, late) if seconds else None
    try:
        while not stream.finished:
            for output in await stream.fetch():
                if output.vector is None:
                    raise EngineError(f"the request could not be finished: {output.stop_reason}")
                found[output.request_id] = output.vector
                usage.cached_tokens += output.cached_tokens or 0
    finally:
        if timer is not None:
            timer.cancel()
        stream.close()
        caller.leave(usage.prompt_tokens)
    return [found[request.request_id] for request in requests], usage


async def _run(context: Context, caller: Caller, body: EmbeddingRequest, call: CallId, requests: list[EngineRequest]) -> bytes:
    made, usage = await vectors(context, caller, requests)
    return await written(len(made) * context.embedding_size, lambda: {
        "id": call.shown, "object": "list", "created": int(time.time()), "model": context.model,
        "data": [{"object": "embedding", "index": i, "embedding": _written(vector, body)} for i, vector in enumerate(made)],
        "usage": {
            "prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens, "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        },
    })  # fmt: skip


def _written(vector: list[float], body: EmbeddingRequest) -> list[float] | str:
    """The first ``dimensions`` numbers, divided by their length, as float32 in the wanted form."""
    numbers = unit_vector(vector[: body.dimensions])
    if body.encoding_format != "base64":
        return numbers
    packed = array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str | None:
    if value is None or value in allowed:
        return cast("str | None", value)
    raise InvalidRequestError(f"{name} must be {' or '.join(allowed)}, got {shown(value)}", param=name)


@contextmanager
def _input_names() -> Iterator[None]:
    """Errors about a prompt name the field of this API."""
    try:
        yield
    except InvalidRequestError as e:
        message = "input" + e.message.removeprefix("prompt") if e.message.startswith("prompt ") else e.message
        raise e.said(message, "input" if e.param == "prompt" else e.param) from None
