"""The answer of /v1/responses: a response of output items, whole or as events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from quire.errors import QuireError
from quire.sampling_params import SamplingParams
from quire.server.calls.generation import Generation, Piece, new_id
from quire.server.calls.logprobs import Labels, chat_logprobs
from quire.server.calls.turn import Block, Step, Turn
from quire.server.context import Context
from quire.server.http.sse import PING
from quire.server.openai.chunks import json_bytes, text_json, written
from quire.server.responses.schemas import ResponsesRequest
from quire.server.responses.tools import GivenTools

_PREFIX = {"text": "msg", "reasoning": "rs", "call": "fc"}
_DELTA = {"text": "response.output_text", "reasoning": "response.reasoning_text", "call": "response.function_call_arguments"}


class Reply:
    """Writes what a generation says."""

    ping = PING

    def __init__(
        self, context: Context, body: ResponsesRequest, tools: GivenTools, params: SamplingParams, response_id: str, generation: Generation
    ) -> None:  # fmt: skip
        self._labels, self._top = Labels(context.tokenizer, False), params.logprobs
        self._generation, self._turn, self._tools = generation, Turn(), tools
        self._fields = _fields(context, body, tools, params, response_id)
        self._sequence_number = -1
        self._ids: list[str] = []
        """Of the items."""
        self._head = b""
        """Of the events with what is added to the open item, up to their number."""
        self._logprobs: dict[int, list[Any]] = {}
        """Block → its tokens' log-probabilities."""
        self._unsent: list[Any] = []
        """Those of tokens whose text is held back."""

    def start(self) -> bytes:
        return b"".join(self._event(f"response.{kind}", response=self._response("in_progress")) for kind in ("created", "in_progress"))

    def write(self, pieces: list[Piece]) -> bytes:
        made = []
        for piece in pieces:
            for step, block, text in self._steps(piece):
                if step == "add":
                    made.append(self._added(block, text))
                elif step == "open":
                    made += self._opened(block)
                else:
                    made += self._closed(block)
        return b"".join(made)

    def frame(self) -> None:
        """Blocks are opened and closed, and have to know their text."""

    def end(self) -> bytes:
        status = self._status
        return self._event(f"response.{status}", response=self._response(status))

    def failed(self, error: QuireError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        return self._event("response.failed", response=response)

    async def whole(self, generation: Generation) -> bytes:
        while not generation.finished:
            for piece in await generation.next():
                for step, block, _ in self._steps(piece):
                    if step == "add":
                        self._claim(block)
        return await written(generation.num_logprobs(), lambda: self._response(self._status))

    def _steps(self, piece: Piece) -> Iterator[Step]:
        if self._top is not None and piece.delta.logprobs:
            self._unsent += chat_logprobs(self._labels, piece.delta.token_ids, piece.delta.logprobs, self._top)["content"]
        for step in self._turn.take(piece):
            if step[0] == "open":
                self._ids.append(new_id(_PREFIX[step[1].kind], "_"))
            yield step
        if self._turn.blocks and self._turn.blocks[-1].kind != "text":
            self._unsent = []  # of a reasoning, or a call

    def _claim(self, block: Block) -> list[Any]:
        """The log-probabilities that belong to what is added to a block."""
        if block.kind != "text" or not self._unsent:
            return []
        new, self._unsent = self._unsent, []
        self._logprobs.setdefault(block.index, []).extend(new)
        return new

    def _opened(self, block: Block) -> list[bytes]:
        where = {"item_id": self._ids[block.index], "output_index": block.index}
        made = [self._event("response.output_item.added", output_index=block.index, item=self._item(block, "in_progress", empty=True))]
        if block.kind != "call":
            where["content_index"] = 0
            made.append(self._event("response.content_part.added", **where, part=self._part(block, empty=True)))
        kind = f"{_DELTA[block.kind]}.delta"
        self._head = b"event: %b\ndata: %b" % (kind.encode(), json_bytes({"type": kind, **where})[:-1])
        return made

    def _added(self, block: Block, text: str) -> bytes:
        self._sequence_number += 1
        logprobs = b"" if block.kind != "text" else b',"logprobs":%b' % (json_bytes(self._claim(block)) if self._unsent else b"[]")
        return b'%b%b,"sequence_number":%d,"delta":%b}\n\n' % (self._head, logprobs, self._sequence_number, text_json(text))

    def _closed(self, block: Block) -> list[bytes]:
        where: dict[str, Any] = {"item_id": self._ids[block.index], "output_index": block.index}
        kind, item = f"{_DELTA[block.kind]}.done", self._item(block, self._item_status(block))
        if block.kind == "call":
            made = [self._event(kind, **where, name=block.name, arguments=block.text)]
        else:
            where["content_index"] = 0
            done = where | {"text": block.text} | ({"logprobs": self._logprobs.get(block.index, [])} if block.kind == "text" else {})
            made = [self._event(kind, **done), self._event("response.content_part.done", **where, part=self._part(block))]
        return [*made, self._event("response.output_item.done", output_index=block.index, item=item)]

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence_number += 1
        data = {"type": kind, **fields, "sequence_number": self._sequence_number}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), json_bytes(data))

    @property
    def _status(self) -> str:
        return "incomplete" if self._turn.finish_reason == "length" else "completed"

    def _item_status(self, block: Block) -> str:
        """Only the last one can be cut off."""
        return self._status if block is self._turn.blocks[-1] else "completed"

    def _item(self, block: Block, status: str, empty: bool = False) -> dict[str, Any]:
        start = {"id": self._ids[block.index], "status": status}
        if block.kind == "call":
            call = {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": "" if empty else block.text}
            namespace = self._tools.namespaces.get(block.name)
            return start | call | ({} if namespace is None else {"namespace": namespace})
        content = [] if empty else [self._part(block)]
        if block.kind == "reasoning":
            return start | {"type": "reasoning", "summary": [], "content": content}
        return start | {"type": "message", "role": "assistant", "content": content}

    def _part(self, block: Block, empty: bool = False) -> dict[str, Any]:
        text = "" if empty else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs.get(block.index, [])}

    def _response(self, status: str) -> dict[str, Any]:
        ended = status in ("completed", "incomplete")
        made = self._fields | {"status": status}
        if ended:
            made["output"] = [self._item(block, self._item_status(block)) for block in self._turn.blocks]
            made["usage"] = self._usage()
            made |= self._generation.timings.describe(self._generation.usage)
        if status == "completed":
            made["completed_at"] = int(time.time())
        if status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        return made

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        }


def _fields(context: Context, body: ResponsesRequest, tools: GivenTools, params: SamplingParams, response_id: str) -> dict[str, Any]:
    """What is known of a response before anything was generated."""
    reasoning, text = body.reasoning or {}, body.text or {}
    return {
        "id": response_id, "object": "response", "created_at": int(time.time()), "completed_at": None, "status": "in_progress",
        "background": False, "error": None, "incomplete_details": None, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "max_tool_calls": None, "metadata": body.metadata or {}, "model": context.model,
        "output": [], "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None}, "service_tier": "default", "store": False,
        "temperature": params.temperature, "text": text | {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto", "tools": tools.told, "top_logprobs": body.top_logprobs or 0, "top_p": params.top_p,
        "truncation": "disabled", "usage": None, "user": None,
    }  # fmt: skip
