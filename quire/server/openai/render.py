"""POST /v1/completions/render and /v1/chat/completions/render: the tokens and parameters of a request, in vLLM's form, without
running it. Routers ask for them to find the server that has a prompt in its cache.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.sampling_params import SamplingParams
from quire.server.calls.fields import parse
from quire.server.calls.prompts import Prompt
from quire.server.calls.sampling import chat_names
from quire.server.calls.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from quire.server.context import Context, context_of
from quire.server.http.ids import call_id
from quire.server.http.limits import read_json
from quire.server.openai import chat
from quire.server.openai import completions as plain
from quire.server.openai.chunks import json_bytes


async def completions(request: Request) -> Response:
    """A list, with an object for each prompt."""
    context = context_of(request)
    body = parse(CompletionRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    call = call_id(request, "cmpl", body.request_id).shown
    made = await plain.prepared(context, body)
    rendered = [_rendered(context, body, f"{call}-{number}", *one) for number, one in enumerate(made)]
    return Response(json_bytes(rendered), media_type="application/json")


async def chat_completions(request: Request) -> Response:
    context = context_of(request)
    body = parse(ChatCompletionRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    call = call_id(request, "chatcmpl", body.request_id).shown
    made = await chat.chat_call(context, body)
    with chat_names(body):
        rendered = _rendered(context, body, call, made.prompt, made.params)
    return Response(json_bytes(rendered), media_type="application/json")


def _rendered(context: Context, body: GenerationRequest, request_id: str, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
    """Raises InvalidRequestError or ContextLengthError, as the request itself would."""
    context.client.limits.check(prompt.token_ids, params)
    return {
        "request_id": request_id, "model": context.model, "token_ids": prompt.token_ids, "features": None,
        "sampling_params": {name: value for name, value in asdict(params).items() if name != "stop_strings"},
        "stream": bool(body.stream), "cache_salt": body.cache_salt, "priority": body.priority or 0,
    }  # fmt: skip
