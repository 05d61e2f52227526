"""From a request of /v1/responses to one of /v1/chat/completions.

Consecutive items of the assistant (reasoning, a message, function calls) are one message of it; a function call's output is a message
of the role ``tool``. The instructions and the system's (or developer's) messages that come first become one system message: many chat
templates know no second one.
"""

from __future__ import annotations

from typing import Any

from quire.errors import InvalidRequestError
from quire.server.calls.fields import parse, shown
from quire.server.calls.schemas import ChatCompletionRequest
from quire.server.calls.tools import unreadable
from quire.server.responses.schemas import SAME_NAME, ResponsesRequest
from quire.server.responses.tools import GivenTools

LOGPROBS = "message.output_text.logprobs"
TRUNCATIONS = (None, "auto", "disabled")


def chat_request(body: ResponsesRequest, tools: GivenTools) -> ChatCompletionRequest:
    """Raises InvalidRequestError, naming the item."""
    if body.truncation not in TRUNCATIONS:
        raise InvalidRequestError(f"truncation must be auto or disabled, got {shown(body.truncation)}", param="truncation")
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME_NAME}
    fields["messages"] = _messages(body)
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["logprobs"] = LOGPROBS in (body.include or ()) or bool(body.top_logprobs) or None
    if tools.functions:
        fields |= {"tools": tools.functions, "tool_choice": tools.choice}
    elif tools.choice not in (None, "none", "auto"):
        raise InvalidRequestError("tool_choice asks for a tool, and there is none: give tools of type function", param="tool_choice")
    fields["response_format"] = _response_format((body.text or {}).get("format"))
    fields["reasoning_effort"] = (body.reasoning or {}).get("effort")
    fields["chat_template_kwargs"] = body.chat_template_kwargs
    request = parse(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})
    request.cache_retention = body.cache_retention
    return request


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    made = _Messages()
    if body.instructions:
        made.message("instructions", "system", body.instructions)
    if isinstance(body.input, str):
        made.message("input", "user", body.input)
    elif isinstance(body.input, list):
        for i, item in enumerate(body.input):
            if not isinstance(item, dict):
                raise InvalidRequestError(f"input[{i}] must be an object, got {shown(item)}", param=f"input[{i}]")
            made.item(f"input[{i}]", item)
    else:
        raise InvalidRequestError(f"input must be a string or a list of items, got {shown(body.input)}", param="input")
    return made.messages


class _Messages:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._reasoning = ""
        """Of the assistant's message that comes next."""

    def item(self, at: str, item: dict[str, Any]) -> None:
        match kind := item.get("type", "message"):
            case "message":
                self.message(at, item.get("role"), item.get("content"))
            case "function_call":
                names = ("call_id", "name", "arguments")
                call_id, name, arguments = (_string(f"{at}.{key}", item.get(key)) for key in names)
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                self._assistant().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                content = _parts(f"{at}.output", _readable(item.get("output")))
                self.messages.append({"role": "tool", "tool_call_id": _string(f"{at}.call_id", item.get("call_id")), "content": content})
            case "reasoning":  # what other servers have encrypted, or summed up, nobody can give the model back
                content = item.get("content") or []
                if not isinstance(content, list):
                    raise InvalidRequestError(f"{at}.content must be a list of parts, got {shown(content)}", param=f"{at}.content")
                for part in content:
                    self._reasoning += _string(f"{at}.content", part.get("text") if isinstance(part, dict) else part)
            case "item_reference":
                raise InvalidRequestError(f"{at} refers to an item: this server keeps none, so send the item itself", param=at)
            case _:
                raise InvalidRequestError(
                    f"{at} is of type {shown(kind)}: this server knows message, function_call, function_call_output and reasoning", param=at
                )

    def message(self, at: str, role: object, content: object) -> None:
        parts = _parts(at if isinstance(content, str) else f"{at}.content", content)
        if role in ("system", "developer") and len(self.messages) == 1 and self.messages[0]["role"] in ("system", "developer"):
            self.messages[0] = {"role": "system", "content": [*self.messages[0]["content"], *parts]}
        elif role in ("system", "developer", "user"):
            self._reasoning = ""  # of an answer that was cut off in it
            self.messages.append({"role": role, "content": parts})
        elif role == "assistant":
            self._assistant()["content"] += parts
        else:
            raise InvalidRequestError(f"{at}.role must be system, developer, user or assistant, got {shown(role)}", param=f"{at}.role")

    def _assistant(self) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": []})
        turn = self.messages[-1]
        if self._reasoning:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + self._reasoning
            self._reasoning = ""
        return turn


def _parts(at: str, content: object) -> list[dict[str, Any]]:
    """Text parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise InvalidRequestError(f"{at} must be a string or a list of parts, got {shown(content)}", param=at)
    made = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise InvalidRequestError(f"{at}[{i}] is of type {shown(kind)}: this model reads text only", param=f"{at}[{i}]")
        text = part.get("refusal" if kind == "refusal" else "text")
        made.append({"type": "text", "text": _string(f"{at}[{i}].text", text)})
    return made


def _readable(output: object) -> object:
    """A function's output with a word in place of what can't be read."""
    if not isinstance(output, list):
        return output
    kinds = {"input_image": "image", "input_file": "document"}
    made = []
    for part in output:
        kind = part.get("type") if isinstance(part, dict) else None
        made.append({"type": "input_text", "text": unreadable(kinds[kind])} if isinstance(kind, str) and kind in kinds else part)
    return made


def _string(at: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{at} must be a string, got {shown(value)}", param=at)
    return value


def _response_format(format: object) -> dict[str, Any] | None:
    kind = format.get("type") if isinstance(format, dict) else None
    if format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": kind}
    if isinstance(format, dict) and kind == "json_schema" and isinstance(format.get("schema"), dict):
        given = {name: format[name] for name in ("name", "description", "strict", "schema") if format.get(name) is not None}
        return {"type": kind, "json_schema": {"name": "answer"} | given}
    raise InvalidRequestError(
        f"text.format must be of type text, json_object or json_schema (with a schema), got {shown(format)}", param="text.format"
    )
