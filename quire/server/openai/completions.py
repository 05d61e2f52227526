"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from quire.outputs import Choice
from quire.sampling_params import SamplingParams
from quire.server.calls.fields import parse
from quire.server.calls.generation import Generation, Piece
from quire.server.calls.logprobs import CompletionLogprobs, Labels, Position, joined, prompt_logprobs
from quire.server.calls.prompts import Prompt, completion_prompts
from quire.server.calls.sampling import completion_params, fit_default
from quire.server.calls.schemas import CompletionRequest
from quire.server.calls.truncation import truncated
from quire.server.context import Context, caller_of, context_of
from quire.server.http.ids import call_id
from quire.server.http.limits import read_json
from quire.server.openai.chunks import head, json_bytes, reason_json, respond, text_json, usage_object, written


async def completions(request: Request) -> Response:
    context = context_of(request)
    body = parse(CompletionRequest, await read_json(request, context.config.max_body_bytes))
    context.check_model(body.model)
    call = call_id(request, "cmpl", body.request_id)
    fitted = await prepared(context, body)
    generation = Generation(context, caller_of(request), call.own, body, fitted, continues_prompt=True)
    return await respond(request, generation, _Form(context, body, generation, call.shown), body)


async def prepared(context: Context, body: CompletionRequest) -> list[tuple[Prompt, SamplingParams]]:
    """The prompts of a request, each with its parameters. Raises InvalidRequestError or ContextLengthError."""
    params = completion_params(body, context.sampling_defaults)
    width = params.num_beams if params.use_beam_search else params.num_sequences
    prompts = await completion_prompts(context, body.prompt, width, body.add_special_tokens is not False)
    prompts = truncated(prompts, body, context.max_model_len, params.max_tokens or 0)
    return [(prompt, fit_default(params, body, len(prompt.token_ids), context.client.limits)) for prompt in prompts]


class _Form:
    """The shape of the answer, whole or in chunks."""

    def __init__(self, context: Context, body: CompletionRequest, generation: Generation, call_id: str) -> None:
        self._id, self._model, self._created = call_id, context.model, int(time.time())
        self._generation = generation
        self._n, self._prompts = generation.n, generation.prompts
        self._token_ids = bool(body.return_token_ids)
        skip = body.skip_special_tokens is not False
        self._echo = [_text(context, prompt, skip) for prompt in generation.prompts] if body.echo else None
        self._prompt_logprobs = body.prompt_logprobs
        self._logprobs: list[CompletionLogprobs] | None = None
        if (count := body.logprobs) is not None:
            labels = Labels(context.tokenizer, bool(body.return_tokens_as_token_ids))
            self._logprobs = [CompletionLogprobs(labels, skip, count) for _ in range(len(generation.prompts) * generation.n)]
        self.head = head(call_id, "text_completion", self._created, context.model)

    def choices(self, piece: Piece) -> list[bytes]:
        delta, text = piece.delta, piece.delta.text
        if piece.first and self._echo is not None:
            text = self._echo[piece.index // self._n] + text
        if not (text or delta.finish_reason or self._token_ids or (self._logprobs and delta.token_ids)):
            return []
        logprobs = b"null"
        if self._logprobs is not None and delta.logprobs is not None:
            logprobs = json_bytes(self._take(piece.index, piece.first, delta.token_ids, delta.logprobs))
        end = reason_json(piece, self._token_ids)
        if piece.first and self._token_ids:
            end += b',"prompt_token_ids":' + json_bytes(self._prompts[piece.index // self._n].token_ids)
        return [b'{"index":%d,"text":%b,"logprobs":%b,%b}' % (piece.index, text_json(text), logprobs, end)]

    def frame(self) -> tuple[bytes, bytes] | None:
        if self._token_ids or self._logprobs is not None:
            return None
        return b'{"index":0,"text":', b',"logprobs":null,"finish_reason":null}'

    async def whole(self, generation: Generation) -> bytes:
        choices = await generation.run()
        return await written(generation.num_logprobs(), lambda: {
            "id": self._id, "object": "text_completion", "created": self._created, "model": self._model,
            "system_fingerprint": None,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_object(generation.usage), **generation.timings.describe(generation.usage),
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
            made["logprobs"] = self._take(choice.index, True, choice.token_ids, choice.logprobs)
        if self._prompt_logprobs is not None:
            ids, positions = self._prompts[number].token_ids, self._generation.prompt_logprobs(number)
            made["prompt_logprobs"] = prompt_logprobs(ids, positions, self._prompt_logprobs)
        if self._token_ids:
            made |= {"token_ids": choice.token_ids, "prompt_token_ids": self._prompts[number].token_ids}
        return made

    def _take(self, index: int, first: bool, token_ids: list[int], positions: list[Position]) -> dict[str, Any]:
        """``logprobs`` for the next tokens of a choice, and before the first ones for what is echoed."""
        assert self._logprobs is not None
        logprobs, number = self._logprobs[index], index // self._n
        if not first or self._echo is None:
            return logprobs.take(token_ids, positions)
        echoed = logprobs.echo(self._prompts[number], self._generation.prompt_logprobs(number))
        return joined(echoed, logprobs.take(token_ids, positions))


def _text(context: Context, prompt: Prompt, skip_special_tokens: bool) -> str:
    return context.tokenizer.decode(prompt.token_ids, skip_special_tokens) if prompt.text is None else prompt.text
