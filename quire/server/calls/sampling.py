"""From a request's fields to SamplingParams and a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from quire.core.admission import RequestLimits
from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.server.calls.fields import shown
from quire.server.calls.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from quire.server.calls.structured import structured_of

DEFAULT_MAX_TOKENS = 16
"""Of /v1/completions, as in OpenAI's API."""

_SAME_NAME = (
    "n", "best_of", "use_beam_search", "beam_width", "length_penalty", "early_stopping", "temperature", "top_p", "top_k",
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "min_tokens",
    "stop_token_ids", "ignore_eos", "allowed_token_ids", "bad_words", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


def completion_params(body: CompletionRequest, defaults: Mapping[str, float]) -> SamplingParams:
    """``defaults``: the model's own, where the request says nothing. Raises InvalidRequestError."""
    max_tokens, prompt_logprobs = body.max_tokens, body.prompt_logprobs
    if body.echo and body.logprobs is not None:  # of what is echoed, too
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    if max_tokens is None:  # the context may hold fewer; see ``fit_default``
        max_tokens = max(DEFAULT_MAX_TOKENS, body.min_tokens or 0)
    if max_tokens < 1 and not (max_tokens == 0 and body.echo):
        raise InvalidRequestError(
            f"max_tokens must be at least 1, got {max_tokens}: without output, ask for the prompt with echo and 0", param="max_tokens"
        )
    return _params(body, defaults, max_tokens, body.logprobs, prompt_logprobs)


def chat_params(body: ChatCompletionRequest, defaults: Mapping[str, float]) -> SamplingParams:
    """``defaults``: the model's own, where the request says nothing. Raises InvalidRequestError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError(f"top_logprobs {body.top_logprobs} needs logprobs to be true", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    with chat_names(body):
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequestError(f"max_tokens must be at least 1, got {max_tokens}", param="max_tokens")
        return _params(body, defaults, max_tokens, (body.top_logprobs or 0) if body.logprobs else None, body.prompt_logprobs)


def chat_names(body: ChatCompletionRequest) -> AbstractContextManager[None]:
    """Errors about a chat's parameters name them as the chat API does."""
    max_tokens = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return names({"max_tokens": max_tokens, "logprobs": "top_logprobs", "prompt": "messages"})


@contextmanager
def names(theirs: Mapping[str, str]) -> Iterator[None]:
    """Errors about parameters name them as the API at hand does. theirs: our name → its name; or, from a dot on, the end or the middle of
    a name."""
    try:
        yield
    except InvalidRequestError as e:
        name = theirs.get(e.param or "", e.param)
        for part in theirs:
            if part.startswith(".") and name is not None:
                name = name.replace(part, theirs[part])
        message = e.message if e.param in (None, "prompt") else e.message.replace(e.param or "", name or "")
        raise e.said(message, name) from None


def _params(
    body: GenerationRequest, defaults: Mapping[str, float], max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError("prompt_logprobs are not there with stream: leave one of them out", param="prompt_logprobs")
    beams = _wants_beams(body)
    values: dict[str, Any] = {} if beams else dict(defaults)  # a beam search ranks the model's own probabilities
    values |= {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    values |= {"stop": _stop(body.stop), "logit_bias": _bias(body.logit_bias), "structured": structured_of(body)}
    params = SamplingParams(**values, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    if body.stream and params.num_outputs > params.n:
        raise InvalidRequestError(
            f"best_of {params.best_of} > n {params.n} can't be streamed, since the best samples are known only at the end: leave out "
            "stream, or best_of",
            param="best_of",
        )
    return params


def _wants_beams(body: GenerationRequest) -> bool:
    """Raises InvalidRequestError where fields contradict each other."""
    if body.use_beam_search or (body.use_beam_search is None and body.beam_width is not None):
        return True
    for name, nothing in (("beam_width", ()), ("length_penalty", (1,)), ("early_stopping", (False,))):
        value = getattr(body, name)
        if value is not None and value not in nothing:
            raise InvalidRequestError(f"{name} needs use_beam_search to be true, got {name} {shown(value)}", param=name)
    return False


def _stop(value: object) -> list[str]:
    if value is None:
        return []
    values: list[object] = value if isinstance(value, list) else [value]
    stops = [item for item in values if isinstance(item, str)]
    if len(stops) < len(values):
        raise InvalidRequestError(f"stop must be a string or a list of strings, got {shown(value)}", param="stop")
    return stops


def _bias(value: dict[str, float] | None) -> dict[int, float] | None:
    if value is None:
        return None
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def fit_default(params: SamplingParams, body: CompletionRequest, prompt_tokens: int, limits: RequestLimits) -> SamplingParams:
    """A default of max_tokens gives way where the context has less room; a number that the client chose never does."""
    room = limits.max_model_len - prompt_tokens
    if body.max_tokens is not None or params.max_tokens is None or not max(1, params.min_tokens) <= room < params.max_tokens:
        return params
    return replace(params, max_tokens=room)


def draw_seed(params: SamplingParams) -> int:
    """0 <= seed < 2**64: the request's own, or a random one."""
    if params.seed is not None:
        return params.seed % (1 << 64)
    return int.from_bytes(os.urandom(8), "little")
