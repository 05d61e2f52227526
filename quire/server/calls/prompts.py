"""Prompts: from the forms that clients send to token ids, with every bound checked before work is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from quire.core.admission import empty_prompt
from quire.errors import ContextLengthError, InvalidRequestError
from quire.server.calls.fields import shown
from quire.server.context import Context
from quire.server.http.limits import MAX_SEQUENCES, check_text_size, max_text_bytes

LONG_TEXT = 8192
"""Characters from which on a text is tokenized on another thread: the event loop must not wait for it."""

MESSAGE_SIZE = 32
"""A message takes as long as so many characters."""
RESERVED_VARIABLES = frozenset((
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "raise_exception", "strftime_now", "self", "loop",
))  # fmt: skip
"""Variables of a template that are the server's, and arguments of the functions by which other servers render it."""

T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None
    """None where the client sent token ids."""


async def completion_prompts(context: Context, prompt: object, width: int, add_special_tokens: bool) -> list[Prompt]:
    """The prompts of a /v1/completions request: a text, a list of texts, token ids, or a list of lists of token ids.

    ``width``: samples or beams of each. Raises InvalidRequestError or ContextLengthError.
    """
    items = _items(prompt)
    most = context.config.max_prompts_per_request
    if len(items) > most:
        raise InvalidRequestError(
            f"prompt holds {len(items):,} prompts; at most {most:,} are allowed: send several requests, or serve with a larger "
            "--max-prompts-per-request",
            param="prompt",
        )
    if len(items) * width > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{len(items):,} prompts with {width} samples or beams each are {len(items) * width:,} sequences; one request may have "
            f"{MAX_SEQUENCES:,}: send several",
            param="n",
        )
    texts = [item for item in items if isinstance(item, str)]
    for text in texts:
        if not text:
            raise empty_prompt()
        check_text_size(text, max_text_bytes(context.max_model_len), "prompt")
    encoded = iter(await in_thread(sum(map(len, texts)), lambda: context.tokenizer.encode_batch(texts, add_special_tokens)))
    return [Prompt(next(encoded), item) if isinstance(item, str) else Prompt(item) for item in items]


def _items(prompt: object) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list):
        if not prompt:
            raise empty_prompt()
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(item, list) for item in prompt):
            for item in prompt:
                if not _are_ids(item):
                    raise _not_a_prompt(item)
            return prompt
    raise _not_a_prompt(prompt)


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)  # a boolean is an int to isinstance


def _not_a_prompt(value: object) -> InvalidRequestError:
    culprit = value
    if isinstance(value, list):
        first = type(value[0])
        culprit = next((item for item in value if type(item) is not first or type(item) not in (str, int, list)), value)
    return InvalidRequestError(
        f"prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids, got {shown(culprit)}",
        param="prompt",
    )


async def chat_prompt(
    context: Context,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Any] | None,
    add_special_tokens: bool | None,
    max_bytes: int,
    tools: list[dict[str, Any]] | None = None,
) -> Prompt:
    """The conversation in the model's own format. Raises InvalidRequestError or ContextLengthError."""
    generation = not continue_final_message if add_generation_prompt is None else add_generation_prompt
    check_template_kwargs(context, template_kwargs)
    if len(messages) > context.max_model_len:
        raise ContextLengthError(
            f"{len(messages):,} messages can't fit into the context, which has {context.max_model_len:,} tokens: send fewer",
            param="messages",
        )
    tokenizer, plain = context.tokenizer, not context.config.special_tokens_in_messages
    size = MESSAGE_SIZE * len(messages) + _size([messages, template_kwargs])
    if tools is not None:
        template_kwargs = {**(template_kwargs or {}), "tools": tools}
        size += LONG_TEXT  # schemas are long
    if plain and size < LONG_TEXT and tokenizer.has_special_text([messages, template_kwargs]):
        size = LONG_TEXT  # takes long where it is the first

    def work() -> Prompt:
        text = tokenizer.render_chat(
            messages,
            add_generation_prompt=generation,
            continue_final_message=bool(continue_final_message),
            template_kwargs=template_kwargs,
            plain_messages=plain,
        )
        check_text_size(tokenizer.shown(text), max_bytes, "messages")
        # Templates spell out the special tokens themselves.
        text, ids = tokenizer.encode_chat(text, bool(add_special_tokens))
        return Prompt(ids, text)

    return await in_thread(size, work)


def check_template_kwargs(context: Context, variables: dict[str, Any] | None) -> None:
    """What a template is told by the server can't be told otherwise by a request. Raises InvalidRequestError."""
    for name in variables or ():
        if name in RESERVED_VARIABLES or name in context.tokenizer.special_tokens:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name}, which the server gives to the template itself: leave it out, or use the "
                "request's own field",
                param=f"chat_template_kwargs.{name}",
            )


def _size(value: object) -> int:
    """About the characters of a JSON value, or what takes as long; no further than LONG_TEXT."""
    size, left = 0, [value]
    while left and size < LONG_TEXT:
        each = left.pop()
        if not isinstance(each, str | list | dict):
            continue
        size += len(each)
        if size < LONG_TEXT and not isinstance(each, str):
            left += each.values() if isinstance(each, dict) else each
    return size


async def in_thread(size: int, work: Callable[[], T]) -> T:
    """Do ``work`` here where ``size`` characters are few, else on another thread."""
    return work() if size < LONG_TEXT else await asyncio.to_thread(work)
