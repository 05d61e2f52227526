"""Which fields of a request are known, which are ignored, which are refused; and from a JSON object to a schema.

Nothing is dropped silently that would change the result. A field that clients send and that changes nothing here is
ignored; one that would change the result and is not supported is refused, unless it has a value that asks for nothing;
one that nobody knows is most likely a typing error, and is refused too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from quire.errors import InvalidRequestError

IGNORED = frozenset((
    "user", "metadata", "store", "service_tier", "safety_identifier", "session_id",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",  # who shares what: cache_salt; what to keep: cache_retention
    "prediction", "guided_decoding_backend", "parallel_tool_calls", "include_reasoning", "return_prompt_text", "stream_interval",
    "spaces_between_special_tokens",  # only tokenizers written in Python put any there
))  # fmt: skip
"""Sent by clients; without influence on the tokens that come back."""

REFUSED: dict[str, tuple[Any, ...]] = {
    # OpenAI's own
    "tools": (), "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "moderation": (), "web_search_options": (),
    "verbosity": ("medium",), "suffix": ("",),
    # vLLM's
    "logprob_token_ids": (), "thinking_token_budget": (),
    "documents": ([],), "chat_template": (), "mm_processor_kwargs": (), "media_io_kwargs": (),
    "structural_tag": (), "echo": (False,),
    # SGLang's, which vllm-router adds to what it asks to be rendered
    "no_stop_trim": (False,), "return_hidden_states": (False,), "separate_reasoning": (True,), "stream_reasoning": (True,),
    "kv_transfer_params": (), "vllm_xargs": (), "repetition_detection": (), "prompt_embeds": (), "logits_processors": (),
}  # fmt: skip
"""Known to clients, not supported yet → values that ask for nothing, besides null."""

LIKENESS = 0.75
"""Of an unknown field to the known one that was meant."""
Schema = TypeVar("Schema", bound=BaseModel)

_EXPECTED = {
    "float_type": "a number", "int_type": "an integer", "bool_type": "true or false", "string_type": "a string",
    "list_type": "a list", "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
}  # fmt: skip


def parse(
    schema: type[Schema],
    body: dict[str, Any],
    ignored: frozenset[str] = IGNORED,
    refused: Mapping[str, tuple[Any, ...]] = REFUSED,
) -> Schema:
    """Check the names and the types of a request's fields. Raises InvalidRequestError with the field's name."""
    known = schema.model_fields
    for name, value in body.items():
        if name in known or name in ignored or value is None:
            continue
        if name in refused:
            if value not in refused[name]:
                raise InvalidRequestError(f"{name} is not supported by this server: leave it out", param=name)
            continue
        raise InvalidRequestError(f"unknown field {name[:80]!r}: {_hint(name, list(known))}", param=name[:80])
    try:
        return schema.model_validate({name: value for name, value in body.items() if name in known})
    except ValidationError as e:
        raise _readable(e) from None


def _hint(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    if close := get_close_matches(name[:80], known, n=1, cutoff=LIKENESS):
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(known)}"


def _readable(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:80]
    if first["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param=param)
    if expected := _EXPECTED.get(first["type"]):
        return InvalidRequestError(f"{param} must be {expected}, got {shown(first['input'])}", param=param)
    return InvalidRequestError(f"{param}: {first['msg']}, got {shown(first['input'])}", param=param)


def shown(value: object) -> str:
    """A value of a request, cut to a length that fits a sentence."""
    import json

    if isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"
