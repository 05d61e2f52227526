"""Incremental detokenizing: one token in, the text that it completes out.

A token's bytes do not depend on its neighbours (see ``pieces``), so the text of a sequence is its bytes read as UTF-8.
What is held back is therefore at most the first three bytes of a character, and the cost of a token is constant.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from quire.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, piece by piece. The pieces joined are ``tokenizer.decode`` of all tokens.

    prompt: the tokens before the first one pushed. They give no text, but tell whether the pushed ones begin a text: with
    a sentencepiece vocabulary, the first word of a text loses its leading space, and a continuation must keep it.

    shown: special tokens whose text is wanted, although special tokens are skipped.

    Ids that the tokenizer does not know (a model may have more embedding rows than tokens) have no text.
    """

    __slots__ = ("_skipped", "_started", "_strip_left", "_tokenizer", "_utf8", "between")

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Iterable[int] = (), shown: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - shown if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.rules.errors)
        self._started = False
        self.between = False
        """Between two characters: a token that is text by itself (Tokenizer.json_texts) gives that text and changes nothing here."""
        self._strip_left = tokenizer.rules.strip_count
        for token_id in prompt:
            self.push(token_id)
            if self._started and not self._strip_left:
                break
        self._utf8.reset()
        self.between = False

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if not self._started:
            self._started = True
            piece = self._tokenizer.head_piece(token_id)
        text = self._utf8.decode(piece)
        if self._strip_left:
            text = self._strip(text)
        self.between = not self._strip_left and not self._utf8.getstate()[0]
        return text

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was never completed."""
        text = self._utf8.decode(b"", True)
        return self._strip(text) if self._strip_left else text

    def _strip(self, text: str) -> str:
        while text and self._strip_left:
            if not text.startswith(self._tokenizer.rules.strip):
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text
