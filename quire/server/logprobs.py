"""Log-probabilities in the two forms of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from quire.outputs import Logprob
from quire.text.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON can't say."""

Position = dict[int, Logprob]


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, FLOOR)


def _label(tokenizer: Tokenizer, token_id: int, logprob: Logprob) -> str:
    """The token's text; the bytes of one that holds a part of a character, which would all look the same as text."""
    if "\ufffd" not in logprob.decoded_token:
        return logprob.decoded_token
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """``logprobs`` of one choice of /v1/completions, piece by piece: text offsets count from the start of the output."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, token_ids: Sequence[int], positions: Sequence[Position]) -> dict[str, Any]:
        """The object for the next tokens."""
        tokens, values, tops, offsets = [], [], [], []
        for token_id, position in zip(token_ids, positions, strict=True):
            label = _label(self._tokenizer, token_id, position[token_id])
            top: dict[str, float] = {}
            for other, logprob in position.items():  # the chosen token comes first and wins where two look the same
                top.setdefault(_label(self._tokenizer, other, logprob), _value(logprob))
            tokens.append(label)
            values.append(_value(position[token_id]))
            tops.append(top)
            offsets.append(self._offset)
            if token_id not in self._skipped:
                self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], positions: Sequence[Position], top_count: int) -> dict[str, Any]:
    """``logprobs`` of a choice of /v1/chat/completions; ``top_count`` most likely tokens for each position."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {"token": _label(tokenizer, token_id, logprob), "logprob": _value(logprob), "bytes": list(tokenizer.token_bytes(token_id))}

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        # The chosen token is one more than asked for, unless it is among the most likely.
        top = [entry(other, logprob) for other, logprob in ranked[:top_count]]
        content.append(entry(token_id, position[token_id]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}
