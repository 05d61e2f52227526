"""POST /v1/responses. Nothing is kept: a conversation is sent whole with each request."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from quire.server.calls.answers import deliver
from quire.server.calls.fields import parse
from quire.server.calls.generation import new_id
from quire.server.calls.sampling import names
from quire.server.context import caller_of, context_of
from quire.server.http.errors import NotFoundError
from quire.server.http.limits import read_json
from quire.server.openai.chat import chat_call, chat_generation
from quire.server.responses.conversation import chat_request
from quire.server.responses.reply import Reply
from quire.server.responses.schemas import IGNORED, REFUSED, ResponsesRequest
from quire.server.responses.tools import GivenTools

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema.schema": "text.format.schema",
    ".function": "",
}


async def create_response(request: Request) -> Response:
    context = context_of(request)
    body = parse(ResponsesRequest, await read_json(request, context.config.max_body_bytes), IGNORED, REFUSED)
    context.check_model(body.model)
    tools = GivenTools(body.tools or [], body.tool_choice)
    response_id = new_id("resp", "_")
    with names(_NAMES):
        chat = chat_request(body, tools)
        call = await chat_call(context, chat)
        generation = chat_generation(context, caller_of(request), response_id, chat, call)
        reply = Reply(context, body, tools, call.params, response_id, generation)
        return await deliver(request, generation, reply, bool(body.stream))


async def stored_response(request: Request) -> Response:
    raise NotFoundError(
        f"there is no response {request.path_params['response_id'][:80]!r}: this server keeps none, also not with store; send the "
        "conversation whole with each request"
    )
