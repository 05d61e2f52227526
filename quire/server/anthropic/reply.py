"""The answer of /v1/messages: a message of content blocks, whole or as events."""

from __future__ import annotations

from typing import Any

from quire.errors import QuireError
from quire.server.calls.generation import Generation, Piece
from quire.server.calls.turn import Block, Turn, arguments_of
from quire.server.http.errors import anthropic_error_bytes
from quire.server.openai.chunks import json_bytes, text_json

_DELTA = {
    "text": b'{"type":"text_delta","text":%b}',
    "reasoning": b'{"type":"thinking_delta","thinking":%b}',
    "call": b'{"type":"input_json_delta","partial_json":%b}',
}
UNSIGNED = "unsigned"
"""Stands for the signature of a thinking block, which clients send back and nobody here reads; some take a block without one for cut."""


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_bytes({"type": kind, **fields}))


class Reply:
    """Writes what a generation says. ``message_start`` is sent with the first tokens: only then it is known what was cached."""

    ping = event("ping")

    def __init__(self, message_id: str, model: str, generation: Generation, *, capped: bool) -> None:
        """capped: the context has room for fewer tokens than were asked for."""
        self._id, self._model, self._capped = message_id, model, capped
        self._generation, self._turn = generation, Turn()

    def start(self) -> bytes:
        return b""

    def write(self, pieces: list[Piece]) -> bytes:
        made = []
        for piece in pieces:
            if piece.first:
                made.append(event("message_start", message=self._message([], None, None)))
            for step, block, text in self._turn.take(piece):
                if step == "add":
                    delta = _DELTA[block.kind] % text_json(text)
                    made.append(
                        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":%b}\n\n' % (block.index, delta)
                    )
                elif step == "open":
                    made.append(
                        event("content_block_start", index=block.index, content_block=_content(Block(block.kind, 0, block.id, block.name)))
                    )
                else:
                    if block.kind == "reasoning":
                        signature = {"type": "signature_delta", "signature": UNSIGNED}
                        made.append(event("content_block_delta", index=block.index, delta=signature))
                    made.append(event("content_block_stop", index=block.index))
        return b"".join(made)

    def frame(self) -> None:
        """Blocks are opened and closed, and have to know their text."""

    def end(self) -> bytes:
        stop_reason, stop_sequence = self._stop()
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return event("message_delta", delta=delta, usage=self._usage(), **self._timings()) + event("message_stop")

    def failed(self, error: QuireError) -> bytes:
        return b"event: error\ndata: " + anthropic_error_bytes(error) + b"\n\n"

    async def whole(self, generation: Generation) -> bytes:
        await self._turn.read(generation)
        content = [_content(block, whole=True) for block in self._turn.blocks]
        return json_bytes(self._message(content, *self._stop()) | self._timings())

    def _message(self, content: list[dict[str, Any]], stop_reason: str | None, stop_sequence: str | None) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": self._usage(),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts what was cached apart from the rest."""
        usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        }

    def _timings(self) -> dict[str, Any]:
        return self._generation.timings.describe(self._generation.usage)

    def _stop(self) -> tuple[str, str | None]:
        """stop_reason, and the stop sequence where it is one."""
        turn = self._turn
        if turn.finish_reason == "length":
            return ("model_context_window_exceeded" if self._capped else "max_tokens"), None
        if isinstance(turn.stop_reason, str):
            return "stop_sequence", turn.stop_reason
        return ("tool_use" if turn.finish_reason == "tool_calls" else "end_turn"), None


def _content(block: Block, whole: bool = False) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": UNSIGNED if whole else ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments_of(block.text) if whole else {}}
