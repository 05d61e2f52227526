"""A model's vocabulary as llguidance sees it: the bytes of every token, which tokens are special, and how a text is cut into tokens.

It is made from the same rules that turn tokens into text (quire.text), so that what a grammar allows is what a client gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from quire.grammar.masks import Masks

if TYPE_CHECKING:
    from llguidance import LLTokenizer

ANCHORS = ("\n", "\u20ac")
"""Put before a text to get at its tokens in the middle of another text; any that no token has together with what follows does."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; quire.text.Tokenizer is one."""

    special_ids: frozenset[int]

    @property
    def added_tokens(self) -> Mapping[int, str]: ...
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary:
    """``size`` tokens (those of the model, which may be more or fewer than the tokenizer's) and the ids that end a text."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]) -> None:
        """Some hundred milliseconds for a large vocabulary."""
        from llguidance import LLTokenizer

        self.tokenizer = tokenizer
        self.size = size
        self.eos_ids = tuple(token for token in eos_token_ids if token < size)
        self.masks = Masks(size, self.eos_ids)
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)]
        special = {token for token in tokenizer.special_ids if token < size} | set(self.eos_ids)
        special |= {token for token, text in tokenizer.added_tokens.items() if token < size and _is_markup(text)}
        ends = list(self.eos_ids)
        if not ends:  # a model that knows no end gets one that it can't say
            ends = [size]
            special.add(size)
            self.tokens.append(b"<|end of text|>")
        self.special_ids = frozenset(special)
        self._ids: dict[bytes, int] | None = None
        self.ll: LLTokenizer = LLTokenizer(_Wrapper(self, ends[0]), eos_token=ends)  # type: ignore[arg-type]
        """Safe to share between threads."""

    def cut(self, text: str) -> list[int]:
        """``text`` in tokens as they are in the middle of a text: no space is put before it, unlike ``Tokenizer.encode``."""
        wanted = text.encode()
        ids = self.tokenizer.encode(text, False)
        if self._joined(ids) == wanted:
            return ids
        for anchor in ANCHORS:
            ids = self.tokenizer.encode(anchor + text, False)
            for i in range(len(ids), -1, -1):
                if self._joined(ids[i:]) == wanted:
                    return ids[i:]
        return self._greedy(wanted)

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """``word`` in tokens at the start of a text, in the middle of one, and after a space, as far as they differ."""
        word = word.lstrip() or word
        ways = (self.tokenizer.encode(word, False), self.cut(word), self.tokenizer.encode(" " + word, False))
        return list(dict.fromkeys(tuple(ids) for ids in ways if ids and all(token < self.size for token in ids)))

    def _joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[token] if token < self.size else b"?" for token in ids)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token first, up to where no token goes on."""
        if self._ids is None:
            self._ids = {piece: token for token, piece in enumerate(self.tokens) if piece and token not in self.special_ids}
        longest = max(map(len, self._ids), default=0)
        ids, at = [], 0
        while at < len(data):
            length = next((n for n in range(min(longest, len(data) - at), 0, -1) if data[at : at + n] in self._ids), 0)
            if not length:
                break
            ids.append(self._ids[data[at : at + length]])
            at += length
        return ids


class _Wrapper:
    """The object that LLTokenizer is made from, by its attributes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> list[int]:
        return self._vocabulary.cut(text)


def _is_markup(text: str) -> bool:
    """Added tokens such as <tool_call> or [ARGS] stand for themselves alone, also where the tokenizer does not call them special."""
    return len(text) > 2 and (text[0], text[-1]) in (("<", ">"), ("[", "]"))
