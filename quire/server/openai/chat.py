"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.outputs import Choice
from quire.sampling_params import SamplingParams
from quire.server.calls.fields import parse
from quire.server.calls.generation import Generation, Piece
from quire.server.calls.logprobs import Labels, chat_logprobs, prompt_logprobs
from quire.server.calls.prompts import Prompt, chat_prompt
from quire.server.calls.reading import Reading, calls_or_form, check_format, reading_for
from quire.server.calls.sampling import chat_names, chat_params
from quire.server.calls.schemas import ChatCompletionRequest
from quire.server.calls.tools import ALWAYS, Availability, history, read_tools
from quire.server.calls.truncation import truncated
from quire.server.context import Context, caller_of, context_of
from quire.server.http.ids import call_id
from quire.server.http.keys import Caller
from quire.server.http.limits import max_text_bytes, read_json
from quire.server.openai.chunks import head, json_bytes, reason_json, respond, text_json, usage_object, written
from quire.server.openai.message_form import MessageForm
from quire.text.output import Delta
from quire.text.tools import Message, MessageDelta


async def chat_completions(request: Request) -> Response:
    context = context_of(request)
    body = parse(ChatCompletionRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    ids = call_id(request, "chatcmpl", body.request_id)
    call = await chat_call(context, body)
    generation = chat_generation(context, caller_of(request), ids.own, body, call)
    form = _Form(context, body, ids.shown, call)
    return await respond(request, generation, form, body)


def thinks(wanted: bool) -> dict[str, bool]:
    """The variables by which the templates of models that may think, or not, are told (Qwen3; DeepSeek, Granite)."""
    return {"enable_thinking": wanted, "thinking": wanted}


def template_variables(body: ChatCompletionRequest) -> dict[str, Any]:
    """For the chat template. Templates know one name or the other of how much is to be thought, or neither."""
    effort = body.reasoning_effort
    thinking = {} if effort is None else {"reasoning_effort": effort, **thinks(effort != "none")}
    return thinking | (body.chat_template_kwargs or {})


@dataclass(slots=True, frozen=True)
class ChatCall:
    """What a conversation asks of the engine, and how its answer is read."""

    prompt: Prompt
    params: SamplingParams
    reading: Reading | None


async def chat_call(context: Context, body: ChatCompletionRequest, availability: Availability = ALWAYS) -> ChatCall:
    """Raises InvalidRequestError or ContextLengthError."""
    params = chat_params(body, context.sampling_defaults)
    tools = read_tools(body, availability)
    if tools is not None:
        check_format(context)
    with chat_names(body):
        prompt = await chat_prompt(
            context,
            history(body.messages, short_ids=context.tool_format == "mistral"),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=template_variables(body),
            add_special_tokens=body.add_special_tokens,
            max_bytes=max_text_bytes(context.max_model_len),
            tools=None if tools is None else tools.listed,
        )
        output = max(1, params.min_tokens) if params.max_tokens is None else params.max_tokens
        (prompt,) = truncated([prompt], body, context.max_model_len, output)
    continued = body.messages[-1].get("content") if body.continue_final_message else None
    reading = reading_for(context, tools, params, prompt, continued)
    if reading is not None:
        with chat_names(body):
            params = calls_or_form(context, reading, params)
    return ChatCall(prompt, params, reading)


def capped_call(context: Context, call: ChatCall) -> tuple[ChatCall, bool]:
    """For APIs where max_tokens may be more than the context has room for, which is then what there is; whether that was so."""
    room, most = context.max_model_len - len(call.prompt.token_ids), call.params.max_tokens
    if most is None or not max(1, call.params.min_tokens) <= room < most:
        return call, False
    return replace(call, params=replace(call.params, max_tokens=room)), True


def chat_generation(context: Context, caller: Caller, call_id: str, body: ChatCompletionRequest, call: ChatCall) -> Generation:
    """Raises InvalidRequestError or ContextLengthError."""
    with chat_names(body):
        # A message that is continued goes on in the middle of its text.
        continues = bool(body.continue_final_message)
        return Generation(context, caller, call_id, body, [(call.prompt, call.params)], continues_prompt=continues, reading=call.reading)


class _Form:
    """The shape of the answer, whole or in chunks."""

    def __init__(self, context: Context, body: ChatCompletionRequest, call_id: str, call: ChatCall) -> None:
        self._id, self._model, self._created = call_id, context.model, int(time.time())
        self._labels = Labels(context.tokenizer, bool(body.return_tokens_as_token_ids))
        self._prompt = call.prompt
        self._token_ids = bool(body.return_token_ids)
        self._top, self._prompt_top = call.params.logprobs, call.params.prompt_logprobs
        self._message = MessageForm(legacy=body.functions is not None, reasoning=body.include_reasoning is not False)
        self.head = head(call_id, "chat.completion.chunk", self._created, context.model)

    def choices(self, piece: Piece) -> list[bytes]:
        delta, chunks = piece.delta, []
        if piece.first:
            start = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null' % piece.index
            if self._token_ids:
                start += b',"prompt_token_ids":' + json_bytes(self._prompt.token_ids)
            chunks.append(start + b"}")
        if delta.message is not None:
            return chunks + self._message_chunks(piece, delta.message)
        if delta.text or delta.finish_reason or self._token_ids or (self._top is not None and delta.token_ids):
            content = b'{"content":' + text_json(delta.text) + b"}" if delta.text or not delta.finish_reason else b"{}"
            chunks.append(
                b'{"index":%d,"delta":%b,"logprobs":%b,%b}'
                % (piece.index, content, self._logprobs_json(delta), reason_json(piece, self._token_ids))
            )
        return chunks

    def frame(self) -> tuple[bytes, bytes] | None:
        if self._token_ids or self._top is not None:
            return None
        return b'{"index":0,"delta":{"content":', b'},"logprobs":null,"finish_reason":null}'

    def _message_chunks(self, piece: Piece, message: MessageDelta) -> list[bytes]:
        """What is read as more than text: each part of it in a chunk of its own, and the end too."""
        delta, deltas = piece.delta, self._message.deltas(message)
        if delta.finish_reason is not None:
            delta.finish_reason = self._message.reason(delta.finish_reason)
            deltas.append(b"{}")
        if not deltas and (self._token_ids or (self._top is not None and delta.token_ids)):
            deltas.append(b'{"content":""}')
        ends = [b'"finish_reason":null'] * (len(deltas) - 1) + [reason_json(piece, self._token_ids)]
        logprobs = [self._logprobs_json(delta) if deltas else b"null"] + [b"null"] * (len(deltas) - 1)
        return [b'{"index":%d,"delta":%b,"logprobs":%b,%b}' % (piece.index, *parts) for parts in zip(deltas, logprobs, ends, strict=False)]

    def _logprobs_json(self, delta: Delta) -> bytes:
        return json_bytes(self._logprobs(delta.token_ids, delta.logprobs)) if delta.logprobs else b"null"

    def _logprobs(self, token_ids: list[int], positions: list[Any]) -> dict[str, Any]:
        return chat_logprobs(self._labels, token_ids, positions, self._top or 0)

    async def whole(self, generation: Generation) -> bytes:
        choices = await generation.run()
        return await written(generation.num_logprobs(), lambda: self._whole(generation, choices))

    def _whole(self, generation: Generation, choices: list[Choice]) -> dict[str, Any]:
        made: dict[str, Any] = {
            "id": self._id, "object": "chat.completion", "created": self._created, "model": self._model,
            "system_fingerprint": None,
            "choices": [self._choice(choice, generation.message(choice)) for choice in choices],
            "usage": usage_object(generation.usage), **generation.timings.describe(generation.usage),
        }  # fmt: skip
        if self._token_ids:
            made["prompt_token_ids"] = self._prompt.token_ids
        if self._prompt_top is not None:
            made["prompt_logprobs"] = prompt_logprobs(self._prompt.token_ids, generation.prompt_logprobs(0), self._prompt_top)
        return made

    def _choice(self, choice: Choice, message: Message | None) -> dict[str, Any]:
        content: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if message is not None:
            content, choice.finish_reason = self._message.whole(message), self._message.reason(choice.finish_reason)
        made: dict[str, Any] = {
            "index": choice.index,
            "message": content,
            "logprobs": None if choice.logprobs is None else self._logprobs(choice.token_ids, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._token_ids:
            made["token_ids"] = choice.token_ids
        return made
