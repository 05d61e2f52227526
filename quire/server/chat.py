"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.outputs import Choice
from quire.sampling_params import SamplingParams
from quire.server.chunks import head, json_bytes, reason_json, respond, text_json, usage_object
from quire.server.context import Context, caller_of, context_of
from quire.server.fields import parse
from quire.server.generation import Generation, Piece
from quire.server.ids import call_id
from quire.server.limits import max_text_bytes, read_json
from quire.server.logprobs import Labels, chat_logprobs, prompt_logprobs
from quire.server.prompts import Prompt, chat_prompt
from quire.server.sampling import chat_names, chat_params
from quire.server.schemas import ChatCompletionRequest
from quire.server.truncation import truncated


async def chat_completions(request: Request) -> Response:
    context = context_of(request)
    body = parse(ChatCompletionRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    call = call_id(request, "chatcmpl", body.request_id)
    prompt, params = await prepared(context, body)
    with chat_names(body):
        # A message that is continued goes on in the middle of its text.
        generation = Generation(
            context, caller_of(request), call.own, body, [(prompt, params)], continues_prompt=bool(body.continue_final_message)
        )
    return await respond(request, generation, _Form(context, body, params, call.shown, prompt), body)


async def prepared(context: Context, body: ChatCompletionRequest) -> tuple[Prompt, SamplingParams]:
    """The conversation as a prompt, and its parameters. Raises InvalidRequestError or ContextLengthError."""
    params = chat_params(body, context.sampling_defaults)
    with chat_names(body):
        prompt = await chat_prompt(
            context,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            add_special_tokens=body.add_special_tokens,
            max_bytes=max_text_bytes(context.max_model_len),
        )
        output = max(1, params.min_tokens) if params.max_tokens is None else params.max_tokens
        (prompt,) = truncated([prompt], body, context.max_model_len, output)
    return prompt, params


class _Form:
    """The shape of the answer, whole or in chunks."""

    def __init__(self, context: Context, body: ChatCompletionRequest, params: SamplingParams, call_id: str, prompt: Prompt) -> None:
        self._id, self._model, self._created = call_id, context.model, int(time.time())
        self._labels = Labels(context.tokenizer, bool(body.return_tokens_as_token_ids))
        self._prompt = prompt
        self._token_ids = bool(body.return_token_ids)
        self._top, self._prompt_top = params.logprobs, params.prompt_logprobs
        self.head = head(call_id, "chat.completion.chunk", self._created, context.model)

    def choices(self, piece: Piece) -> list[bytes]:
        delta, chunks = piece.delta, []
        if piece.first:
            start = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' % piece.index
            if self._token_ids:
                start += b',"prompt_token_ids":' + json_bytes(self._prompt.token_ids)
            chunks.append(start + b"}")
        if delta.text or delta.finish_reason or self._token_ids or (self._top is not None and delta.token_ids):
            content = b'{"content":' + text_json(delta.text) + b"}" if delta.text or not delta.finish_reason else b"{}"
            logprobs = b"null"
            if delta.logprobs:
                logprobs = json_bytes(self._logprobs(delta.token_ids, delta.logprobs))
            chunks.append(
                b'{"index":%d,"delta":%b,"logprobs":%b,%b}' % (piece.index, content, logprobs, reason_json(piece, self._token_ids))
            )
        return chunks

    def _logprobs(self, token_ids: list[int], positions: list[Any]) -> dict[str, Any]:
        return chat_logprobs(self._labels, token_ids, positions, self._top or 0)

    async def whole(self, generation: Generation) -> bytes:
        choices = await generation.run()
        made: dict[str, Any] = {
            "id": self._id, "object": "chat.completion", "created": self._created, "model": self._model,
            "system_fingerprint": None,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(generation.usage), **generation.timings.describe(generation.usage),
        }  # fmt: skip
        if self._token_ids:
            made["prompt_token_ids"] = self._prompt.token_ids
        if self._prompt_top is not None:
            made["prompt_logprobs"] = prompt_logprobs(self._prompt.token_ids, generation.prompt_logprobs[0], self._prompt_top)
        return json_bytes(made)

    def _choice(self, choice: Choice) -> dict[str, Any]:
        made: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None if choice.logprobs is None else self._logprobs(choice.token_ids, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._token_ids:
            made["token_ids"] = choice.token_ids
        return made
