"""Log-probabilities in the two forms of OpenAI's API, and those of prompts in vLLM's."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from quire.outputs import Logprob
from quire.server.calls.prompts import Prompt
from quire.text.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON can't say."""

Position = dict[int, Logprob]


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, FLOOR)


class Labels:
    """What tokens are called. as_ids: by their ids, which are never ambiguous (``return_tokens_as_token_ids``)."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def __call__(self, token_id: int) -> str:
        """The token's text; the bytes of one that holds a part of a character, which would all look the same as text."""
        if self._as_ids:
            return f"token_id:{token_id}"
        text = self.tokenizer.token_text(token_id)
        if "\ufffd" not in text:
            return text
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """``logprobs`` of one choice of /v1/completions, piece by piece: text offsets count from the start of the choice's text."""

    def __init__(self, labels: Labels, skip_special_tokens: bool, top_count: int) -> None:
        self._labels, self._tokenizer = labels, labels.tokenizer
        self._skipped = labels.tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._top_count = top_count
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def echo(self, prompt: Prompt, positions: Sequence[Position | None]) -> dict[str, Any]:
        """The object for a prompt that is put before the output. The first token has no log-probability."""
        ids, tokenizer = prompt.token_ids, self._tokenizer
        texts = [0 if i in self._skipped else len(self._utf8.decode(tokenizer.token_bytes(i))) for i in ids]
        before = 0
        if prompt.text is not None:  # as it was sent: without what the tokenizer puts before every text, with all that it spells out
            before = len(added) if ids[: len(added := tokenizer.encode(""))] == added else 0
            texts = [0] * before + [len(self._utf8.decode(tokenizer.token_bytes(i))) for i in ids[before:]]
        first = next((i for i, size in enumerate(texts) if size), None)
        if first is not None:  # a text begins without the space that its first token may stand for
            texts[first] = len(tokenizer.decode(ids[first : first + 1], skip_special_tokens=False))
        offsets = []
        for size in texts:
            offsets.append(self._offset)
            self._offset += size
        return self._object(ids, positions, offsets)

    def take(self, token_ids: Sequence[int], positions: Sequence[Position]) -> dict[str, Any]:
        """The object for the next tokens of the output."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            if token_id not in self._skipped:
                self._offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return self._object(token_ids, positions, offsets)

    def _object(self, token_ids: Sequence[int], positions: Sequence[Position | None], offsets: list[int]) -> dict[str, Any]:
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:
                values.append(None)
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for other, logprob in position.items():  # the token that is there comes first and wins where two look the same
                if other == token_id or logprob.rank <= self._top_count:
                    top.setdefault(self._labels(other), _value(logprob))
            values.append(_value(position[token_id]))
            tops.append(top)
        return {"tokens": [self._labels(i) for i in token_ids], "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One object of /v1/completions for the tokens of both."""
    return {name: first[name] + second[name] for name in first}


def chat_logprobs(labels: Labels, token_ids: Sequence[int], positions: Sequence[Position], top_count: int) -> dict[str, Any]:
    """``logprobs`` of a choice of /v1/chat/completions; ``top_count`` most likely tokens for each position."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {"token": labels(token_id), "logprob": _value(logprob), "bytes": list(labels.tokenizer.token_bytes(token_id))}

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        # The chosen token is one more than asked for, unless it is among the most likely.
        top = [entry(other, logprob) for other, logprob in ranked[:top_count]]
        content.append(entry(token_id, position[token_id]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def prompt_logprobs(token_ids: Sequence[int], positions: Sequence[Position | None], top_count: int) -> list[dict[str, Any] | None]:
    """``prompt_logprobs`` of both APIs: for each token of the prompt, its own and the ``top_count`` most likely ones, by id."""
    made: list[dict[str, Any] | None] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        if position is None:
            made.append(None)
            continue
        listed = {other: logprob for other, logprob in position.items() if other == token_id or logprob.rank <= top_count}
        made.append({
            str(other): {"logprob": _value(logprob), "rank": logprob.rank, "decoded_token": logprob.decoded_token}
            for other, logprob in listed.items()
        })  # fmt: skip
    return made
