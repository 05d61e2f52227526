"""``truncate_prompt_tokens``: the one way in which a prompt is cut, and only where its client asks for it."""

from __future__ import annotations

from typing import Protocol

from quire.errors import InvalidRequestError
from quire.sampling_params import integer
from quire.server.calls.fields import shown
from quire.server.calls.prompts import Prompt


class Wishes(Protocol):
    """The fields of a request."""

    truncate_prompt_tokens: int | None
    truncation_side: object


def truncated(prompts: list[Prompt], body: Wishes, max_model_len: int, output: int) -> list[Prompt]:
    """``prompts``, the long ones cut as ``body`` wishes. output: tokens that -1 leaves room for. Raises InvalidRequestError."""
    side, keep = body.truncation_side, body.truncate_prompt_tokens
    if side not in (None, "left", "right"):
        raise InvalidRequestError(f'truncation_side must be "left" or "right", got {shown(side)}', param="truncation_side")
    if keep is None:
        return prompts
    integer("truncate_prompt_tokens", keep, -1, max_model_len, ": -1 keeps what the context leaves beside max_tokens")
    if keep == 0:
        raise InvalidRequestError("truncate_prompt_tokens must be -1, or at least 1, got 0", param="truncate_prompt_tokens")
    if keep == -1:
        keep = max_model_len - output
    if keep < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens -1 keeps what max_tokens leaves of the context, but {max_model_len:,} - {output:,} is nothing: "
            "lower max_tokens",
            param="truncate_prompt_tokens",
        )
    return [_cut(prompt, keep, side == "right") for prompt in prompts]


def _cut(prompt: Prompt, keep: int, from_the_end: bool) -> Prompt:
    ids = prompt.token_ids
    if len(ids) <= keep:
        return prompt
    return Prompt(ids[:keep] if from_the_end else ids[-keep:])
