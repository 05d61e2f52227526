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
from quire.server.anthropic.schemas import SAME_NAME, CountTokensRequest, MessagesRequest
from quire.server.calls.fields import parse, shown
from quire.server.calls.schemas import ChatCompletionRequest

BILLING_LINE = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n?")
"""What Claude Code puts first into the system prompt, different in each request: it is for Anthropic's accounting and no part of the
prompt, and would keep everything after it from being found in the prefix cache."""


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """Raises InvalidRequestError, naming the block."""
    messages: list[dict[str, Any]] = []
    if system := _system(body.system):
        messages.append({"role": "system", "content": system})
    for i, message in enumerate(body.messages):
        _add(messages, f"messages[{i}]", message)
    fields: dict[str, Any] = {"messages": messages, "continue_final_message": _continues(messages)}
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in SAME_NAME}
        fields["stop"] = body.stop_sequences
    if body.tools:
        fields["tools"] = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
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
    for block in [] if system is None else _texts("system", system):
        text = block["text"]
        if first and (line := BILLING_LINE.match(text)) is not None:
            text = text[line.end() :]
            if not text.strip():
                continue
        first = False
        blocks.append({"type": "text", "text": text})
    return blocks


def _add(messages: list[dict[str, Any]], at: str, message: Mapping[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if role == "user":
        for i, block in enumerate(_blocks(f"{at}.content", content)):
            where = f"{at}.content[{i}]"
            if block.get("type") == "tool_result":
                messages.append(_tool_result(where, block))
            else:
                _turn(messages, "user")["content"].append(_text(where, block, "text and tool_result"))
    elif role == "assistant":
        turn = _turn(messages, "assistant")
        for i, block in enumerate(_blocks(f"{at}.content", content)):
            _add_to_assistant(turn, f"{at}.content[{i}]", block)
    elif role == "system":
        _turn(messages, "system")["content"] += _texts(f"{at}.content", content)
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
            turn["reasoning_content"] = turn.get("reasoning_content", "") + _string(at, block, "thinking")
        case "redacted_thinking":  # encrypted, by another server
            pass
        case "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise InvalidRequestError(f"{at}.input must be an object, got {shown(arguments)}", param=f"{at}.input")
            function = {"name": _string(at, block, "name"), "arguments": json.dumps(arguments, ensure_ascii=False)}
            turn.setdefault("tool_calls", []).append({"id": _string(at, block, "id"), "type": "function", "function": function})
        case _:
            turn["content"].append(_text(at, block, "text, thinking and tool_use"))


def _tool_result(at: str, block: dict[str, Any]) -> dict[str, Any]:
    content = block.get("content")
    text = "\n".join(part["text"] for part in _texts(f"{at}.content", "" if content is None else content))
    if block.get("is_error"):  # templates have no other place for it
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": _string(at, block, "tool_use_id"), "content": text}


def _blocks(at: str, content: object) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and all(isinstance(block, dict) for block in content):
        return content
    raise InvalidRequestError(f"{at} must be a string or a list of blocks, got {shown(content)}", param=at)


def _texts(at: str, content: object) -> list[dict[str, Any]]:
    return [_text(f"{at}[{i}]", block) for i, block in enumerate(_blocks(at, content))]


def _text(at: str, block: dict[str, Any], known: str = "text") -> dict[str, Any]:
    """known: types of blocks that may stand here."""
    if block.get("type") != "text":
        raise InvalidRequestError(
            f"{at} is of type {shown(block.get('type'))}: this model reads text only, so blocks here may be of type {known}", param=at
        )
    return {"type": "text", "text": _string(at, block, "text")}


def _string(at: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{at}.{name} must be a string, got {shown(value)}", param=f"{at}.{name}")
    return value


def _continues(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is one that the assistant has begun."""
    if not messages or messages[-1]["role"] != "assistant":
        return False
    if messages[-1].get("tool_calls"):
        raise InvalidRequestError("the last message uses tools: add a user's message with their tool_result blocks", param="messages")
    return True


def _tool(at: str, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequestError(
            f"{at} is of type {shown(tool['type'])}, which only Anthropic's models know: leave it out, or describe it with an input_schema",
            param=at,
        )
    function = {"name": _string(at, tool, "name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    function |= {"strict": tool.get("strict")}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    match kind := choice.get("type"):
        case "auto" | "none":
            made: object = kind
        case "any":
            made = "required"
        case "tool":
            made = {"type": "function", "function": {"name": _string("tool_choice", choice, "name")}}
        case _:
            raise InvalidRequestError(f"tool_choice.type must be auto, any, tool or none, got {shown(kind)}", param="tool_choice")
    return {"tool_choice": made, "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None}


def _response_format(format: object) -> dict[str, Any]:
    if not isinstance(format, dict) or format.get("type") != "json_schema" or not isinstance(format.get("schema"), dict):
        raise InvalidRequestError("output_config.format must be of type json_schema, with a schema", param="output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format["schema"], "strict": True}}


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    """The variable by which the templates of models that may think, or not, are told (Qwen3 and others)."""
    if thinking is None:
        return {}
    kind = thinking.get("type")
    if kind not in ("enabled", "adaptive", "between_tools", "disabled"):
        raise InvalidRequestError(f"thinking.type must be enabled, adaptive or disabled, got {shown(kind)}", param="thinking")
    return {"enable_thinking": kind != "disabled"}
