"""What an assistant says in its turn, block by block: /v1/messages has them as content blocks, /v1/responses as output
items, /api/chat as lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from quire.server.calls.generation import Generation, Piece
from quire.text.tools import MessageDelta, Prose

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    kind: Kind
    index: int
    """In the turn."""
    id: str = ""
    """Of a call."""
    name: str = ""
    """Of the tool that is called."""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text, or a call's arguments as JSON."""
        return "".join(self.parts)


Step = tuple[Literal["open", "add", "close"], Block, str]
"""What happens to a block; the text that is added."""


class Turn:
    """The blocks of one choice. At most one is open, the last."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._open: Block | None = None
        self._call = -1
        """Which call is open."""

    async def read(self, generation: Generation) -> None:
        """Everything at once."""
        while not generation.finished:
            for piece in await generation.next():
                for _ in self.take(piece):
                    pass

    def take(self, piece: Piece) -> Iterator[Step]:
        """What a piece changes."""
        delta = piece.delta
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.message is not None:
            yield from self._change(delta.message)
        elif delta.text:
            yield from self._add("text", delta.text)
        if delta.finish_reason is not None:
            if not self.blocks:  # clients look at the first one without asking
                yield from self._begin("text")
            yield from self._close()

    def _change(self, delta: MessageDelta) -> Iterator[Step]:
        for part in delta.parts:
            if isinstance(part, Prose):
                yield from self._add("reasoning" if part.reasoning else "text", part.text)
                continue
            if part.index != self._call:
                self._call = part.index
                yield from self._begin("call", part.id or "", part.name or "")
            if part.arguments:
                yield from self._add("call", part.arguments)

    def _add(self, kind: Kind, text: str) -> Iterator[Step]:
        block = self._open
        if block is None or block.kind != kind:
            yield from self._begin(kind)
            block = self._open
            assert block is not None
        block.parts.append(text)
        yield "add", block, text

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Step]:
        yield from self._close()
        block = self._open = Block(kind, len(self.blocks), call_id, name)
        self.blocks.append(block)
        yield "open", block, ""

    def _close(self) -> Iterator[Step]:
        if (block := self._open) is not None:
            self._open = None
            yield "close", block, ""


def arguments_of(text: str) -> dict[str, Any]:
    """Of a call, as an object. Where the end of the output has cut it off: what is there, which is what Anthropic's client makes of a
    stream too."""
    from pydantic_core import from_json

    try:
        value = from_json(text or "{}", allow_partial=True, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is infinite all the same
    except ValueError:
        return {"INVALID_JSON": text}  # as Anthropic advises to hand such arguments back: a tool that is called with nothing might run
    return value if isinstance(value, dict) else {"INVALID_JSON": text}
