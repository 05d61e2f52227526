"""What a step has made of a stream goes to its client's socket where it arrives, and nobody is woken for it. There are two ways.

Outputs of all kinds are read and written as the stream's own generator would do it. A token with nothing else to it, in a stream that
wants nothing but text, is most of what is ever sent: its text as JSON is made when the tokenizer first meets it, and what stands around
it when the stream begins (Express). The bytes are the same, and what goes one way may go the other.
"""

from __future__ import annotations

from typing import Protocol

from quire.server.calls.generation import Generation, Piece
from quire.server.engine._express import Express
from quire.server.engine.stream import Shortcut
from quire.server.http.sse import Push


class PieceWriter(Protocol):
    """What is wanted here of a Writer (answers.py)."""

    def write(self, pieces: list[Piece]) -> bytes: ...

    def frame(self) -> tuple[bytes, bytes] | None: ...


class Pusher:
    """Pushes what there is of one stream, whose response has begun, until ``failure``."""

    def __init__(self, generation: Generation, writer: PieceWriter, push: Push) -> None:
        self._generation, self._writer, self._push = generation, writer, push
        self._detokenizer = generation.only_text
        self.pushed = False
        """Something was sent since somebody has set this to False."""
        self.failure: Exception | None = None
        """Nothing is pushed any more; the stream's generator is to raise this."""
        generation.listen(self._push_outputs, self._shortcut())

    def resume(self) -> None:
        """Call this when the response has begun, and after each part of it that was sent otherwise."""
        self._push.resume()
        self._look()

    def _push_outputs(self) -> bool:
        """See Stream.listener."""
        if self.failure is not None or not self._push.ready:
            return False
        try:
            if made := self._writer.write(self._generation.take()):
                self._push.write(made)
                self.pushed = True
            self._look()
        except Exception as e:
            self.failure = e
        return self.failure is None and not self._generation.finished

    def _shortcut(self) -> Shortcut | None:
        """For the tokens of the stream's only sequence. Generation and OutputAssembler learn nothing of those but the usage, and the
        detokenizer is as it would be after them."""
        frame, sequence = self._writer.frame(), self._generation.emitted()
        if frame is None or sequence is None or self._detokenizer is None:
            return None
        request_id, emitted = sequence
        express = self._push.express = Express(emitted, self._generation.tokenizer.json_texts, *frame)
        return Shortcut(request_id, express, self._push.write_rest, self._count)

    def _look(self) -> None:
        if self._push.express is not None and self._detokenizer is not None:
            self._push.express.between = self._detokenizer.between

    def _count(self, tokens: int) -> None:
        self._generation.usage.completion_tokens += tokens
        self.pushed = True
