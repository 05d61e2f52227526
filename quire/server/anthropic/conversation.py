"""From Anthropic's form of a conversation to that of /v1/chat/completions.

A user's tool results become messages of their own, of the role ``tool``; tool uses become ``tool_calls``; consecutive messages of one
role become one, as they do with Anthropic. A last message of the assistant is continued.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.anthropic.blocks import blocks_of, string_in, text_of, texts_of
from quire.server.anthropic.schemas import SAME_NAME, CountTokensRequest, MessagesRequest
from quire.server.anthropic.tools import GivenTools, tool_choice
from quire.server.calls.fields import parse, shown
from quire.server.calls.schemas import ChatCompletionRequest
from quire.server.calls.tools import unreadable
from quire.server.openai.chat import thinks

BILLING_LINE = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n?")
"""What Claude Code puts first into the system prompt, different in each request: it is for Anthropic's accounting and no part of the
prompt, and would keep everything after it from being found in the prefix cache."""

UNREADABLE = ("image", "document")


def chat_request(body: CountTokensRequest, tools: GivenTools) -> ChatCompletionRequest:
    """Raises InvalidRequestError, naming the block. tools: are told what the messages say of them."""
    messages: list[dict[str, Any]] = []
    if system := _system(body.system):
        messages.append({"role": "system", "content": system})
    for i, message in enumerate(body.messages):
        _add(messages, f"messages[{i}]", message, tools)
    fields: dict[str, Any] = {"messages": messages, "continue_final_message": _continues(messages)}
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in SAME_NAME}
        fields["stop"] = body.stop_sequences
    if tools.functions:
        fields["tools"] = tools.functions
    if body.tool_choice is not None:
        fields |= tool_choice(body.tool_choice)
    if (format := (body.output_config or {}).get("format")) is not None:
        fields["response_format"] = _response_format(format)
    fields["chat_template_kwargs"] = _thinking(body.thinking) | (body.chat_template_kwargs or {}) or None
    request = parse(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})
    if isinstance(body, MessagesRequest):
        request.cache_retention = body.cache_retention
    return request


def _system(system: object) -> list[dict[str, Any]]:
    """Its blocks; of those that come first, without the line that is Claude Code's for Anthropic's accounting."""
    blocks, first = [], True
    for block in [] if system is None else texts_of("system", system):
        text = block["text"]
        if first and (line := BILLING_LINE.match(text)) is not None:
            text = text[line.end() :]
            if not text.strip():
                continue
        first = False
        blocks.append({"type": "text", "text": text})
    return blocks


def _add(messages: list[dict[str, Any]], at: str, message: Mapping[str, Any], tools: GivenTools) -> None:
    role, content = message.get("role"), message.get("content")
    if role == "user":
        blocks = blocks_of(f"{at}.content", content)
        answers = any(block.get("type") == "tool_result" for block in blocks)
        for i, block in enumerate(blocks):
            where, kind = f"{at}.content[{i}]", block.get("type")
            if kind == "tool_result":
                messages.append(_tool_result(where, block, tools))
            elif answers and kind in UNREADABLE:  # some tools' results have them beside the text
                _turn(messages, "user")["content"].append({"type": "text", "text": unreadable(kind)})
            else:
                _turn(messages, "user")["content"].append(text_of(where, block, "text and tool_result"))
    elif role == "assistant":
        turn = _turn(messages, "assistant")
        for i, block in enumerate(blocks_of(f"{at}.content", content)):
            _add_to_assistant(turn, f"{at}.content[{i}]", block)
    elif role == "system":
        turn = _turn(messages, "system")
        for i, block in enumerate(blocks_of(f"{at}.content", content)):
            where = f"{at}.content[{i}]"
            change = tools.changed(where, block)
            turn["content"].append(text_of(where, block, "text, tool_addition and tool_removal") if change is None else change)
    else:
        raise InvalidRequestError(f"{at}.role must be user, assistant or system, got {shown(role)}", param=f"{at}.role")


def _turn(messages: list[dict[str, Any]], role: str) -> dict[str, Any]:
    """The last message, if it is of that role, else a new one."""
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role, "content": []})
    return messages[-1]


def _add_to_assistant(turn: dict[str, Any], at: str, block: dict[str, Any]) -> None:
    match block.get("type"):
        case "thinking":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + string_in(at, block, "thinking")
        case "redacted_thinking":  # encrypted, by another server
            pass
        case "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise InvalidRequestError(f"{at}.input must be an object, got {shown(arguments)}", param=f"{at}.input")
            function = {"name": string_in(at, block, "name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
            turn.setdefault("tool_calls", []).append({"id": string_in(at, block, "id"), "type": "function", "function": function})
        case _:
            turn["content"].append(text_of(at, block, "text, thinking and tool_use"))


def _tool_result(at: str, block: dict[str, Any], tools: GivenTools) -> dict[str, Any]:
    content, parts = block.get("content"), []
    for i, part in enumerate(blocks_of(f"{at}.content", "" if content is None else content)):
        where, kind = f"{at}.content[{i}]", part.get("type")
        if kind == "tool_reference":
            parts.append(tools.tell(where, string_in(where, part, "tool_name")))
        elif kind in UNREADABLE:
            parts.append(unreadable(kind))
        else:
            parts.append(text_of(where, part, "text and tool_reference")["text"])
    text = "\n".join(parts)
    if block.get("is_error"):  # templates have no other place for it
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": string_in(at, block, "tool_use_id"), "content": text}


def _continues(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is one that the assistant has begun."""
    if not messages or messages[-1]["role"] != "assistant":
        return False
    if messages[-1].get("tool_calls"):
        raise InvalidRequestError("the last message uses tools: add a user's message with their tool_result blocks", param="messages")
    return True


def _response_format(format: object) -> dict[str, Any]:
    if not isinstance(format, dict) or format.get("type") != "json_schema" or not isinstance(format.get("schema"), dict):
        raise InvalidRequestError("output_config.format must be of type json_schema, with a schema", param="output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format["schema"], "strict": True}}


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    if thinking is None:
        return {}
    kind = thinking.get("type")
    if kind not in ("enabled", "adaptive", "between_tools", "disabled"):
        raise InvalidRequestError(f"thinking.type must be enabled, adaptive or disabled, got {shown(kind)}", param="thinking")
    return thinks(kind != "disabled")
