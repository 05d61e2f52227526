"""From Ollama's form of a request to that of /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.calls.fields import parse, shown
from quire.server.calls.schemas import ChatCompletionRequest
from quire.server.context import Context
from quire.server.ollama.schemas import IGNORED_OPTIONS, REFUSED_OPTIONS, OllamaChatRequest, OllamaGenerateRequest, Options
from quire.server.openai.chat import thinks

_OTHER_NAME = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}


def chat_request(context: Context, body: OllamaChatRequest | OllamaGenerateRequest) -> ChatCompletionRequest:
    """Raises InvalidRequestError, naming the field. A last message of the assistant is continued, and so is a ``raw`` prompt."""
    messages = _turns(body.messages or []) if isinstance(body, OllamaChatRequest) else _prompt(body)
    fields = _sampling(body.options or {}) | _form(body.format) | _thinking(context, body.think)
    fields |= {"messages": messages, "logprobs": body.logprobs, "top_logprobs": body.top_logprobs, "stream": body.stream is not False}
    last = messages[-1] if messages else {}
    fields["continue_final_message"] = last.get("role") == "assistant" and not last.get("tool_calls")
    if isinstance(body, OllamaChatRequest) and body.tools:
        fields["tools"] = body.tools
    return parse(ChatCompletionRequest, {name: value for name, value in fields.items() if value is not None})


def is_raw(context: Context, body: OllamaChatRequest | OllamaGenerateRequest) -> bool:
    """Whether the prompt goes to the model as it is. A model without a chat template takes no other."""
    return isinstance(body, OllamaGenerateRequest) and (bool(body.raw) or not (context.tokenizer.has_chat_template or body.system))


def _prompt(body: OllamaGenerateRequest) -> list[dict[str, Any]]:
    if body.raw:
        if body.system:
            raise InvalidRequestError("a raw prompt has no system message: put its text into the prompt, or leave out raw", param="system")
        return [{"role": "assistant", "content": body.prompt}]
    system = [{"role": "system", "content": body.system}] if body.system else []
    return [*system, {"role": "user", "content": body.prompt or ""}]


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    whole = {name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in options.items()}
    values = parse(Options, whole, IGNORED_OPTIONS, REFUSED_OPTIONS).model_dump(exclude_none=True)
    if values.get("num_predict", 1) < 1:
        del values["num_predict"]
    if values.get("seed", 0) < 0:
        del values["seed"]
    return {_OTHER_NAME.get(name, name): value for name, value in values.items()}


def _form(format: object) -> dict[str, Any]:
    if format in (None, ""):
        return {}
    if format == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(format, dict):
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": format, "strict": True}}}
    raise InvalidRequestError(f'format must be "json" or a JSON schema, got {shown(format)}', param="format")


def _thinking(context: Context, think: object) -> dict[str, Any]:
    if think is None:
        return {}
    if think not in (True, False, "low", "medium", "high"):
        raise InvalidRequestError(f"think must be true, false, low, medium or high, got {shown(think)}", param="think")
    if think and not context.reasoning:
        raise InvalidRequestError(f"{context.model!r} does not support thinking: leave out think", param="think")
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return {"chat_template_kwargs": thinks(bool(think))}


def _turns(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls have no ids there: a tool's result is that of the first call of its name that has none yet."""
    made: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    for i, message in enumerate(given):
        at = f"messages[{i}]"
        if message.get("images"):
            raise InvalidRequestError(f"{at} has images: this model reads text only", param=f"{at}.images")
        role = message.get("role")
        turn: dict[str, Any] = {"role": role.lower() if isinstance(role, str) else role, "content": message.get("content") or ""}
        if (thinking := message.get("thinking")) is not None:
            turn["reasoning_content"] = thinking
        if calls := message.get("tool_calls"):
            turn["tool_calls"] = _calls(at, i, calls)
            open_calls += [(call["function"]["name"], call["id"]) for call in turn["tool_calls"]]
        if turn["role"] == "tool":
            turn["tool_call_id"] = _answered(open_calls, message.get("tool_name") or message.get("name"), message.get("tool_call_id"), i)
        made.append(turn)
    return made


def _calls(at: str, number: int, calls: object) -> list[dict[str, Any]]:
    made = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(f"{at}.tool_calls[{i}].function must be an object with a name", param=f"{at}.tool_calls")
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                f"{at}.tool_calls[{i}].function.arguments must be an object, got {shown(arguments)}", param=f"{at}.tool_calls"
            )
        call_id = call.get("id") if isinstance(call.get("id"), str) else f"call_{number}_{i}"
        text = json.dumps(arguments, ensure_ascii=False)
        made.append({"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": text}})
    return made


def _answered(open_calls: list[tuple[str, str]], name: object, call_id: object, number: int) -> str:
    for call in open_calls:
        if call_id == call[1] or (call_id is None and name in (None, call[0])):
            open_calls.remove(call)
            return call[1]
    return call_id if isinstance(call_id, str) else f"call_{number}"
