"""POST /v1/completions."""

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
from quire.server.generation import Generation, Piece, new_id
from quire.server.limits import read_json
from quire.server.logprobs import CompletionLogprobs
from quire.server.prompts import Prompt, completion_prompts
from quire.server.sampling import completion_params, fit_default
from quire.server.schemas import CompletionRequest


async def completions(request: Request) -> Response:
    context = context_of(request)
    body = parse(CompletionRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    params = completion_params(body, context.sampling_defaults)
    width = params.num_beams if params.use_beam_search else params.num_sequences
    prompts = await completion_prompts(context, body.prompt, width, body.add_special_tokens is not False)
    limits = context.client.limits
    call_id = new_id("cmpl")
    fitted = [(prompt, fit_default(params, body, len(prompt.token_ids), limits)) for prompt in prompts]
    generation = Generation(context, caller_of(request), call_id, body, fitted, continues_prompt=True)
    form = _Form(context, body, params, call_id, prompts)
    return await respond(request, generation, form, body)


class _Form:
    """The shape of the answer, whole or in chunks."""

    def __init__(self, context: Context, body: CompletionRequest, params: SamplingParams, call_id: str, prompts: list[Prompt]) -> None:
        self._id, self._model, self._created = call_id, context.model, int(time.time())
        self._n, self._prompts = params.n, prompts
        self._token_ids = bool(body.return_token_ids)
        self._echo = [_text(context, prompt, params) for prompt in prompts] if body.echo else None
        self._logprobs: list[CompletionLogprobs] | None = None
        if params.logprobs is not None:
            self._logprobs = [CompletionLogprobs(context.tokenizer, params.skip_special_tokens) for _ in range(len(prompts) * params.n)]
        self.head = head(call_id, "text_completion", self._created, context.model)

    def choices(self, piece: Piece) -> list[bytes]:
        delta, text = piece.delta, piece.delta.text
        if piece.first and self._echo is not None:
            text = self._echo[piece.index // self._n] + text
        if not (text or delta.finish_reason or self._token_ids or (self._logprobs and delta.token_ids)):
            return []
        logprobs = b"null"
        if self._logprobs is not None and delta.logprobs is not None:
            logprobs = json_bytes(self._logprobs[piece.index].take(delta.token_ids, delta.logprobs))
        end = reason_json(piece, self._token_ids)
        if piece.first and self._token_ids:
            end += b',"prompt_token_ids":' + json_bytes(self._prompts[piece.index // self._n].token_ids)
        return [b'{"index":%d,"text":%b,"logprobs":%b,%b}' % (piece.index, text_json(text), logprobs, end)]

    async def whole(self, generation: Generation) -> bytes:
        choices = await generation.run()
        return json_bytes({
            "id": self._id, "object": "text_completion", "created": self._created, "model": self._model,
            "system_fingerprint": None,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(generation.usage),
        })  # fmt: skip

    def _choice(self, choice: Choice) -> dict[str, Any]:
        number = choice.index // self._n
        made: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text if self._echo is None else self._echo[number] + choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._logprobs is not None and choice.logprobs is not None:
            made["logprobs"] = self._logprobs[choice.index].take(choice.token_ids, choice.logprobs)
        if self._token_ids:
            made |= {"token_ids": choice.token_ids, "prompt_token_ids": self._prompts[number].token_ids}
        return made


def _text(context: Context, prompt: Prompt, params: SamplingParams) -> str:
    return context.tokenizer.decode(prompt.token_ids, params.skip_special_tokens) if prompt.text is None else prompt.text
