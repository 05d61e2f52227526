"""Messages with calls and reasoning, as /v1/chat/completions has them: whole, or delta by delta."""

from __future__ import annotations

from typing import Any

from quire.server.openai.chunks import json_bytes, text_json
from quire.text.tools import CallDelta, Message, MessageDelta


class MessageForm:
    """legacy: a call stands in ``function_call``, as it did before there were tools. reasoning: show it.

    Reasoning is sent under both names that clients look for: ``reasoning`` and ``reasoning_content``.
    """

    def __init__(self, *, legacy: bool, reasoning: bool) -> None:
        self._legacy, self._reasoning = legacy, reasoning

    def reason(self, finish_reason: str | None) -> str | None:
        """Why a choice ended, in the words of this form."""
        return "function_call" if self._legacy and finish_reason == "tool_calls" else finish_reason

    def deltas(self, delta: MessageDelta) -> list[bytes]:
        """JSON objects, each for a chunk of its own."""
        made = []
        if delta.reasoning and self._reasoning:
            text = text_json(delta.reasoning)
            made.append(b'{"reasoning":' + text + b',"reasoning_content":' + text + b"}")
        if delta.text:
            made.append(b'{"content":' + text_json(delta.text) + b"}")
        for call in delta.calls:
            made += self._call(call)
        return made

    def _call(self, call: CallDelta) -> list[bytes]:
        """A call begins in a chunk without arguments, which then come in chunks of their own."""
        made = []
        if call.name is not None:
            head: dict[str, Any] = {"name": call.name, "arguments": ""}
            made.append({"function_call": head} if self._legacy else _entry(call.index, {"id": call.id, "type": "function"}, head))
        if call.arguments:
            more: dict[str, Any] = {"arguments": call.arguments}
            made.append({"function_call": more} if self._legacy else _entry(call.index, {}, more))
        return [json_bytes(delta) for delta in made]

    def whole(self, message: Message) -> dict[str, Any]:
        made: dict[str, Any] = {"role": "assistant", "content": message.text or None, "refusal": None}
        if not message.calls:
            made["content"] = message.text
        elif self._legacy:
            made["function_call"] = {"name": message.calls[0].name, "arguments": message.calls[0].arguments}
        else:
            made["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in message.calls
            ]
        if message.reasoning and self._reasoning:
            made["reasoning"] = made["reasoning_content"] = message.reasoning
        return made


def _entry(index: int, head: dict[str, str | None], function: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **head, "function": function}]}
