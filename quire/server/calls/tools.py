"""The functions that a request offers to the model, and which of them may, or must, be called."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.calls.fields import shown
from quire.server.calls.schemas import ChatCompletionRequest

MAX_TOOLS = 128
"""As in OpenAI's API."""
MAX_TOOLS_CHARS = 256 << 10
"""Of all tools of a request together, as JSON text."""
MAX_TOOLS_DEPTH = 64
"""Levels of lists and objects in a tool."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(slots=True, frozen=True)
class Availability:
    """Of functions of which the model is not told in the prompt's list of them, but perhaps by a message."""

    later: frozenset[str] = frozenset()
    """Their names."""
    gone: frozenset[str] = frozenset()
    """Those that may not be called, since no message speaks of them yet, or one has taken them away; others may be among them."""


@dataclass(slots=True, frozen=True)
class Tools:
    given: list[dict[str, Any]]
    """As chat templates expect them: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""
    listed: list[dict[str, Any]]
    """Those that the template is given."""
    names: tuple[str, ...]
    """Functions that may be called."""
    must: bool
    """One of them is called in any case."""
    parallel: bool
    """Several calls may be made at once."""

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """Those that may be called."""
        return [tool["function"] for tool in self.given if tool["function"]["name"] in self.names]


ALWAYS = Availability()
"""The template is given all of them."""


def read_tools(body: ChatCompletionRequest, availability: Availability = ALWAYS) -> Tools | None:
    """None where there are none to call. Raises InvalidRequestError."""
    field, given, choice = "tools", body.tools, body.tool_choice
    choice_field = "tool_choice"
    if body.functions is not None or body.function_call is not None:
        if given is not None or choice is not None:
            raise InvalidRequestError(
                "functions and function_call are older names of tools and tool_choice: use one pair", param="functions"
            )
        field, choice_field = "functions", "function_call"
        given = None if body.functions is None else [{"type": "function", "function": function} for function in body.functions]
        choice = body.function_call
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
    if given is None:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                f"{choice_field} {shown(choice)} needs {field}: name the functions, or leave it out", param=choice_field
            )
        return None
    tools = check_tools(given, field)
    names = tuple(name for tool in tools if (name := tool["function"]["name"]) not in availability.gone)
    if not names:
        if choice in (None, "none", "auto"):
            return None
        raise InvalidRequestError(f"{choice_field} asks for a tool, and no message has spoken of one yet", param=choice_field)
    listed = [tool for tool in tools if tool["function"]["name"] not in availability.later]
    if not listed:  # a template that is given no function does not tell the model how to call one
        listed = [tool for tool in tools if tool["function"]["name"] in names]
    parallel = body.parallel_tool_calls is not False and field == "tools"  # the older form has room for one call
    if choice == "none":
        return None
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        names, choice = _allowed(choice, names)
    if choice in (None, "auto", "required"):
        return Tools(tools, listed, names, choice == "required", parallel)
    return Tools(tools, listed, (_chosen(choice, names, choice_field),), True, False)


def _chosen(choice: object, names: Sequence[str], field: str) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequestError(
            f'{field} must be "auto", "none", "required" or {{"type": "function", "function": {{"name": ...}}}}, got {shown(choice)}',
            param=field,
        )
    if name not in names:
        raise InvalidRequestError(
            f"{field} names the function {name[:64]!r}, which is not among the tools: {', '.join(names)[:200]}", param=field
        )
    return name


def _allowed(choice: dict[str, Any], names: Sequence[str]) -> tuple[tuple[str, ...], object]:
    """Of OpenAI's ``allowed_tools``: the functions, and ``auto`` or ``required``."""
    allowed = choice.get("allowed_tools")
    mode, tools = (allowed.get("mode"), allowed.get("tools")) if isinstance(allowed, dict) else (None, None)
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise InvalidRequestError(
            f"tool_choice.allowed_tools must have a mode, auto or required, and a list of tools, got {shown(allowed)}", param="tool_choice"
        )
    return tuple(_chosen(tool, names, "tool_choice") for tool in tools), mode


def check_tools(tools: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """Tools as chat templates expect them. Raises InvalidRequestError."""
    if not tools:
        raise InvalidRequestError(f"{field} is empty: name at least one function, or leave it out", param=field)
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"{field} has {len(tools):,} entries; at most {MAX_TOOLS} are allowed", param=field)
    names = [_name(tool, f"{field}[{i}]") for i, tool in enumerate(tools)]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidRequestError(f"{field}[{i}] has the name {name!r}, as another one before it", param=field)
    try:
        size = len(json.dumps(tools, allow_nan=False))
    except ValueError:
        raise InvalidRequestError(f"{field} holds a number that is not finite", param=field) from None
    if size > MAX_TOOLS_CHARS:
        raise InvalidRequestError(f"{field} has {size:,} characters of JSON; at most {MAX_TOOLS_CHARS:,} are allowed", param=field)
    if (depth := _depth(tools)) > MAX_TOOLS_DEPTH:
        raise InvalidRequestError(f"{field} is nested {depth} levels deep; at most {MAX_TOOLS_DEPTH} are allowed", param=field)
    return [_for_templates(tool) for tool in tools]


def _name(tool: dict[str, Any], at: str) -> str:
    """The checked name of a tool's function."""
    if tool.get("type", "function") != "function":
        raise InvalidRequestError(f'{at} has the type {shown(tool["type"])}; this server has tools of the type "function"', param=at)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequestError(f"{at}.function must be an object with a name, got {shown(function)}", param=f"{at}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{at}.function.name must be 1 to 128 letters, digits, dots, dashes or underscores, got {shown(name)}",
            param=f"{at}.function.name",
        )
    for key, kind, said in (("description", str, "a string"), ("parameters", dict, "an object"), ("strict", bool, "true or false")):
        value = function.get(key)
        if value is not None and not isinstance(value, kind):
            raise InvalidRequestError(f"{at}.function.{key} must be {said}, got {shown(value)}", param=f"{at}.function.{key}")
    parameters = function.get("parameters") or {}
    if parameters.get("type", "object") != "object":
        raise InvalidRequestError(
            f"{at}.function.parameters must be the JSON schema of an object, got the type {shown(parameters['type'])}",
            param=f"{at}.function.parameters",
        )
    return name


def _for_templates(tool: dict[str, Any]) -> dict[str, Any]:
    """With what templates look at, and without nulls, which they would spell out."""
    function = {key: value for key, value in tool["function"].items() if value is not None}
    function.setdefault("description", "")
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _depth(value: object) -> int:
    """Levels of lists and objects."""
    depth, level = 0, [value]
    while level := [inner for v in level if isinstance(v, dict | list) for inner in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
    return depth


def history(messages: list[dict[str, Any]], *, short_ids: bool) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: ``function_call`` and the role ``function`` become ``tool_calls`` and the role ``tool``.

    short_ids: ids of calls become 9 letters and digits, on which Mistral's templates insist, where they come from elsewhere.
    """
    if not any(message.get(key) for message in messages for key in ("tool_calls", "function_call", "tool_call_id", "name")):
        return messages
    made, last = [], ""
    for i, message in enumerate(messages):
        message = dict(message)
        if call := message.pop("function_call", None):
            last = f"call_{i}"
            message["tool_calls"] = [{"id": last, "type": "function", "function": call}]
        if message.get("role") == "function":
            message |= {"role": "tool", "tool_call_id": last}
        if short_ids:
            if isinstance(call_id := message.get("tool_call_id"), str):
                message["tool_call_id"] = _short(call_id)
            if isinstance(calls := message.get("tool_calls"), list):
                message["tool_calls"] = [_with_short_id(call) for call in calls]
        made.append(message)
    return made


def unreadable(kind: str) -> str:
    """What stands for an image or a document in a tool's result. The model has asked for it, and can do something else; whoever sends
    the conversation can't."""
    return f"[{kind}: this model reads text only]"


def _with_short_id(call: object) -> object:
    return call | {"id": _short(call["id"])} if isinstance(call, dict) and isinstance(call.get("id"), str) else call


def _short(call_id: str) -> str:
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()[:9]
