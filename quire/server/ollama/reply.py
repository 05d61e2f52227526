"""The answer of /api/chat and /api/generate: JSON objects, a line each, or a single one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from quire.errors import QuireError
from quire.server.calls.generation import Generation, Piece
from quire.server.calls.logprobs import Labels, chat_logprobs
from quire.server.calls.turn import Block, Turn, arguments_of
from quire.server.context import Context
from quire.server.http.errors import ollama_error_bytes
from quire.server.openai.chunks import json_bytes, written

MEDIA_TYPE = "application/x-ndjson"


def timestamp(seconds: float | None = None) -> str:
    """A time (default: now) as Ollama writes it, by RFC 3339."""
    when = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return when.isoformat().replace("+00:00", "Z")


class Form:
    """chat: the text stands in a message; else in ``response``."""

    def __init__(self, model: str, chat: bool) -> None:
        self._head = {"model": model, "created_at": timestamp()}
        self._chat = chat

    def line(self, text: str = "", **more: Any) -> dict[str, Any]:
        """more: members of the message beside its text, where there is one."""
        said = {"message": {"role": "assistant", "content": text} | more} if self._chat else {"response": text} | more
        return self._head | said | {"done": False}

    def frame(self) -> tuple[bytes, bytes]:
        before, _, after = json_bytes(self.line()).rpartition(b'""')
        return before, after + b"\n"

    def loaded(self, unload: bool) -> dict[str, Any]:
        """For a request that has nothing to answer: with Ollama it loads the model, or drops it."""
        return self.line() | {"done": True, "done_reason": "unload" if unload else "load"}


class Reply:
    """Writes what a generation says. A call is told when all of it is there."""

    ping = b""
    """Lines have no room for what says nothing."""

    def __init__(self, context: Context, form: Form, generation: Generation, top_logprobs: int | None) -> None:
        self._form, self._generation, self._turn = form, generation, Turn()
        self._labels, self._top = Labels(context.tokenizer, False), top_logprobs
        self._calls = 0
        """That were told in a stream."""

    def start(self) -> bytes:
        return b""

    def write(self, pieces: list[Piece]) -> bytes:
        return b"".join([json_bytes(line) + b"\n" for piece in pieces for line in self._lines(piece)])

    def _lines(self, piece: Piece) -> list[dict[str, Any]]:
        lines = []
        for step, block, text in self._turn.take(piece):
            if step == "add" and block.kind == "text":
                lines.append(self._form.line(text))
            elif step == "add" and block.kind == "reasoning":
                lines.append(self._form.line(thinking=text))
            elif step == "close" and block.kind == "call":
                lines.append(self._form.line(tool_calls=[_call(block, self._calls)]))
                self._calls += 1
        if piece.delta.logprobs:
            lines = lines or [self._form.line()]
            lines[0]["logprobs"] = self._logprobs(piece.delta.token_ids, piece.delta.logprobs)
        return lines

    def frame(self) -> tuple[bytes, bytes] | None:
        return None if self._top is not None else self._form.frame()

    def end(self) -> bytes:
        return json_bytes(self._form.line() | self._done()) + b"\n"

    def failed(self, error: QuireError) -> bytes:
        return ollama_error_bytes(error) + b"\n"

    async def whole(self, generation: Generation) -> bytes:
        positions: list[dict[str, Any]] = []
        while not generation.finished:
            for piece in await generation.next():
                for _ in self._turn.take(piece):
                    pass
                if piece.delta.logprobs:
                    positions += self._logprobs(piece.delta.token_ids, piece.delta.logprobs)
        parts: dict[str, list[str]] = {"text": [], "reasoning": []}
        for block in self._turn.blocks:
            parts.setdefault(block.kind, []).append(block.text)
        calls = [_call(block, i) for i, block in enumerate(block for block in self._turn.blocks if block.kind == "call")]
        more: dict[str, Any] = {"thinking": "".join(parts["reasoning"])} if parts["reasoning"] else {}
        if calls:
            more["tool_calls"] = calls
        made = self._form.line("".join(parts["text"]), **more) | self._done()
        if self._top is not None:
            made["logprobs"] = positions
        return await written(generation.num_logprobs(), lambda: made)

    def _logprobs(self, token_ids: list[int], positions: list[Any]) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = chat_logprobs(self._labels, token_ids, positions, self._top or 0)["content"]
        return entries

    def _done(self) -> dict[str, Any]:
        """Durations are in nanoseconds; clients divide by them."""
        usage, timings = self._generation.usage, self._generation.timings
        queued, prompt, predicted = timings.parts()
        if timings.first_tokens >= usage.completion_tokens:  # all came at once: by the numbers of tokens
            both, share = prompt + predicted, usage.completion_tokens / max(1, usage.total_tokens)
            prompt, predicted = both * (1 - share), both * share
        queued, prompt, predicted = (max(1, round(1e9 * seconds)) for seconds in (queued, prompt, predicted))
        return {
            "done": True, "done_reason": "length" if self._turn.finish_reason == "length" else "stop",
            "total_duration": queued + prompt + predicted, "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens, "prompt_eval_duration": prompt,
            "eval_count": usage.completion_tokens, "eval_duration": predicted,
        }  # fmt: skip


def _call(block: Block, index: int) -> dict[str, Any]:
    """index: among the calls of an answer; clients put together what has the same one."""
    return {"id": block.id, "function": {"index": index, "name": block.name, "arguments": arguments_of(block.text)}}
