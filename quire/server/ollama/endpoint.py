"""POST /api/chat, /api/generate, /api/embed and /api/embeddings."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.errors import InvalidRequestError
from quire.outputs import Usage, unit_vector
from quire.server.calls.answers import deliver
from quire.server.calls.fields import parse, shown
from quire.server.calls.generation import new_id
from quire.server.calls.prompts import completion_prompts
from quire.server.calls.sampling import chat_params, names
from quire.server.calls.schemas import EmbeddingRequest
from quire.server.context import Context, caller_of, context_of
from quire.server.http.ids import call_id
from quire.server.http.limits import read_json
from quire.server.http.sse import while_connected
from quire.server.ollama.conversation import chat_request, is_raw
from quire.server.ollama.models import check_model
from quire.server.ollama.reply import MEDIA_TYPE, Form, Reply
from quire.server.ollama.schemas import (
    IGNORED,
    REFUSED,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
)
from quire.server.openai.chat import ChatCall, capped_call, chat_call, chat_generation
from quire.server.openai.chunks import json_bytes, written
from quire.server.openai.embeddings import prepared, vectors

_NAMES = {
    "max_tokens": "num_predict",
    "repetition_penalty": "repeat_penalty",
    "response_format.json_schema.schema": "format",
}


async def chat(request: Request) -> Response:
    context, given = context_of(request), await _body(request)
    body = parse(OllamaChatRequest, given, IGNORED, REFUSED)
    return await _run(request, context, body, given, bool(body.messages))


async def generate(request: Request) -> Response:
    context, given = context_of(request), await _body(request)
    body = parse(OllamaGenerateRequest, given, IGNORED, REFUSED)
    return await _run(request, context, body, given, bool(body.prompt))


async def _run(
    request: Request, context: Context, body: OllamaChatRequest | OllamaGenerateRequest, given: dict[str, Any], says: bool
) -> Response:
    """says: there is something to answer."""
    check_model(context, body.model)
    form = Form(body.model or context.model, chat=isinstance(body, OllamaChatRequest))
    if not says:
        media_type = "application/json" if body.stream is False else MEDIA_TYPE
        return Response(json_bytes(form.loaded(given.get("keep_alive") in (0, "0", "0s"))) + b"\n", media_type=media_type)
    with names(_NAMES):
        chat = chat_request(context, body)
        if is_raw(context, body):
            assert isinstance(body, OllamaGenerateRequest)
            params = chat_params(chat, context.sampling_defaults)
            (prompt,) = await completion_prompts(context, body.prompt, params.num_sequences, True)
            chat.continue_final_message = True
            call = ChatCall(prompt, params, None)
        else:
            call = await chat_call(context, chat)
        call, _ = capped_call(context, call)
        generation = chat_generation(context, caller_of(request), new_id("ollama"), chat, call)
        reply = Reply(context, form, generation, call.params.logprobs)
        return await deliver(request, generation, reply, bool(chat.stream), MEDIA_TYPE)


async def embed(request: Request) -> Response:
    context = context_of(request)
    body = parse(OllamaEmbedRequest, await _body(request), IGNORED, REFUSED)
    check_model(context, body.model)
    if not isinstance(body.input, str) and not (isinstance(body.input, list) and all(isinstance(text, str) for text in body.input)):
        raise InvalidRequestError(f"input must be a text or a list of texts, got {shown(body.input)}", param="input")
    if not body.input:
        return _json({"model": body.model or context.model, "embeddings": []})
    fields: dict[str, Any] = {"input": body.input, "dimensions": body.dimensions, "truncation_side": "right"}
    if body.truncate is not False:
        fields["truncate_prompt_tokens"] = -1
    start = time.monotonic()
    made, usage = await _vectors(request, context, parse(EmbeddingRequest, fields))
    duration = round(1e9 * (time.monotonic() - start))
    return Response(await written(len(made) * context.embedding_size, lambda: {
        "model": body.model or context.model, "embeddings": [unit_vector(vector[: body.dimensions]) for vector in made],
        "total_duration": duration, "load_duration": 0, "prompt_eval_count": usage.prompt_tokens,
    }), media_type="application/json")  # fmt: skip


async def embeddings(request: Request) -> Response:
    """The older form: one text, one vector."""
    context = context_of(request)
    body = parse(OllamaEmbeddingsRequest, await _body(request), IGNORED, REFUSED)
    check_model(context, body.model)
    if not body.prompt:
        return _json({"embedding": []})
    (vector,), _ = await _vectors(request, context, parse(EmbeddingRequest, {"input": body.prompt}))
    return _json({"embedding": unit_vector(vector)})


async def _vectors(request: Request, context: Context, body: EmbeddingRequest) -> tuple[list[list[float]], Usage]:
    """One for each input, not normalised."""
    caller = caller_of(request)
    requests = await prepared(context, caller, body, call_id(request, "embd", None))
    return await while_connected(request.receive, vectors(context, caller, requests))


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")


async def _body(request: Request) -> dict[str, Any]:
    return await read_json(request, context_of(request).config.max_body_bytes)
