"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from quire.errors import InvalidRequestError
from quire.server.calls.fields import parse
from quire.server.calls.prompts import chat_prompt, in_thread
from quire.server.calls.schemas import DetokenizeRequest, TokenizeRequest
from quire.server.calls.tools import check_tools, history
from quire.server.context import context_of
from quire.server.http.limits import MIN_TEXT_BYTES, check_text_size, max_text_bytes, read_json
from quire.server.openai.chunks import json_bytes, written


async def tokenize(request: Request) -> Response:
    context = context_of(request)
    body = parse(TokenizeRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages, and not both", param="prompt")
    most = max(MIN_TEXT_BYTES, max_text_bytes(context.max_model_len))
    tokenizer = context.tokenizer
    if body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
        check_text_size(text, most, "prompt")
        ids = await in_thread(len(text), lambda: tokenizer.encode(text, special))
    else:
        assert body.messages is not None
        tools = None if body.tools is None else check_tools(body.tools, "tools")
        prompt = await chat_prompt(
            context,
            history(body.messages, short_ids=context.tool_format == "mistral"),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            add_special_tokens=body.add_special_tokens,
            max_bytes=most,
            tools=tools,
        )
        ids = prompt.token_ids
    return Response(await written(len(ids), lambda: {
        "count": len(ids), "max_model_len": context.max_model_len, "tokens": ids,
        "token_strs": [tokenizer.token_text(i) for i in ids] if body.return_token_strs else None,
    }), media_type="application/json")  # fmt: skip


async def detokenize(request: Request) -> Response:
    context = context_of(request)
    body = parse(DetokenizeRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    # The inverse of /tokenize: what the tokenizer puts before every prompt is no part of the prompt.
    before = context.tokenizer.encode("")
    tokens = body.tokens[len(before) :] if body.tokens[: len(before)] == before else body.tokens
    text = await in_thread(len(tokens), lambda: context.tokenizer.decode(tokens, skip_special_tokens=False))
    return Response(json_bytes({"prompt": text}), media_type="application/json")
