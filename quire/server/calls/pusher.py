"""What a step has made of a stream goes to its client's socket where it arrives, and nobody is woken for it. There are two ways.

Outputs of all kinds are read and written as the stream's own generator would do it (Pusher). A token with nothing else to it, in a
stream that wants nothing but text, is most of what is ever sent; its text as JSON is made when the tokenizer first meets it, and what
stands around it when the stream begins (TokenPusher). The bytes are the same, and what one way refuses goes the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from quire.outputs import Usage
from quire.server.calls.generation import Generation, Piece
from quire.server.http.sse import Push
from quire.text.detokenizer import Detokenizer


class PieceWriter(Protocol):
    """What is wanted here of a Writer (answers.py)."""

    def write(self, pieces: list[Piece]) -> bytes: ...


class Pusher:
    """Pushes outputs of one stream, whose response has begun."""

    def __init__(self, generation: Generation, writer: PieceWriter, push: Push) -> None:
        self._generation, self._writer, self._push = generation, writer, push
        self.pushed = False
        """Something was sent since somebody has set this to False."""
        self.failure: Exception | None = None
        """Nothing is pushed any more; the stream's generator is to raise this."""

    def push(self) -> bool:
        """See Stream.listener."""
        if self.failure is not None or not self._push.ready:
            return False
        try:
            if made := self._writer.write(self._generation.take()):
                self._push.write(made)
        except Exception as e:
            self.failure = e
        self.pushed = True
        return self.failure is None and not self._generation.finished


class TokenPusher:
    """Pushes single tokens, past Generation and OutputAssembler, who learn nothing of them but the detokenizer's state, which they do
    not change, and the usage.

    texts, detokenizer: of the stream's only sequence. frame: see Writer.
    """

    __slots__ = ("_after", "_before", "_detokenizer", "_push", "_pusher", "_texts", "_usage")

    def __init__(
        self, pusher: Pusher, push: Push, usage: Usage, texts: Mapping[int, bytes | None], detokenizer: Detokenizer,
        frame: tuple[bytes, bytes],
    ) -> None:  # fmt: skip
        self._pusher, self._push, self._usage = pusher, push, usage
        self._texts, self._detokenizer = texts, detokenizer
        self._before, self._after = frame

    def push(self, token_id: int) -> bool:
        """See Stream.express."""
        try:
            text = self._texts[token_id]
            if text is None or not self._detokenizer.between or not self._push.write(self._before + text + self._after):
                return False
        except Exception as e:
            self._pusher.failure = e
            return False
        self._usage.completion_tokens += 1
        self._pusher.pushed = True
        return True
