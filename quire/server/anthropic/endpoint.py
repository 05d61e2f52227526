"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from quire.server.anthropic.conversation import chat_request
from quire.server.anthropic.reply import Reply
from quire.server.anthropic.schemas import IGNORED, REFUSED, CountTokensRequest, MessagesRequest
from quire.server.anthropic.tools import GivenTools
from quire.server.calls.answers import deliver
from quire.server.calls.fields import parse
from quire.server.calls.generation import new_id
from quire.server.calls.sampling import names
from quire.server.context import caller_of, context_of
from quire.server.http.limits import read_json
from quire.server.openai.chat import capped_call, chat_call, chat_generation
from quire.server.openai.chunks import json_bytes

_NAMES = {
    "stop": "stop_sequences",
    "response_format.json_schema.schema": "output_config.format.schema",
    ".function.parameters": ".input_schema",
    ".function": "",
}


async def messages(request: Request) -> Response:
    context = context_of(request)
    body = parse(MessagesRequest, await read_json(request, context.config.max_body_bytes), IGNORED, REFUSED)
    context.check_model(body.model)
    message_id = new_id("msg", "_")
    with names(_NAMES):
        tools = GivenTools(body.tools or [])
        chat = chat_request(body, tools)
        call = await chat_call(context, chat, tools.availability)
        # As with Anthropic, who asks for more than the context has room for gets what there is, and is told at the end.
        call, capped = capped_call(context, call)
        generation = chat_generation(context, caller_of(request), message_id, chat, call)
        reply = Reply(message_id, context.model, generation, capped=capped)
        return await deliver(request, generation, reply, bool(body.stream))


async def count_tokens(request: Request) -> Response:
    context = context_of(request)
    body = parse(CountTokensRequest, await read_json(request, context.config.max_body_bytes), IGNORED, REFUSED)
    context.check_model(body.model)
    with names(_NAMES):
        tools = GivenTools(body.tools or [])
        chat = chat_request(body, tools)
        call = await chat_call(context, chat, tools.availability)
    return Response(json_bytes({"input_tokens": len(call.prompt.token_ids)}), media_type="application/json")
