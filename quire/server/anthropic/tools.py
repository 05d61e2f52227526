"""Tools of /v1/messages, as /v1/chat/completions has them.

A tool may be kept out of the prompt until the conversation speaks of it (``defer_loading``), come later, and go again. What the model is
told of such a tool stands where the conversation speaks of it, so that everything before it stays the prompt that it was.
"""

from __future__ import annotations

import json
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.anthropic.blocks import string_in
from quire.server.calls.fields import shown
from quire.server.calls.tools import Availability


class GivenTools:
    """The tools of a request. ``tell`` and ``changed`` are called in the order of the conversation."""

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        """Raises InvalidRequestError, naming the tool."""
        self.functions = [_function(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
        """In the form of the chat API."""
        self._later = {
            function["function"]["name"] for function, tool in zip(self.functions, tools, strict=True) if tool.get("defer_loading")
        }
        self._gone = set(self._later)

    @property
    def availability(self) -> Availability:
        return Availability(frozenset(self._later), frozenset(self._gone))

    def tell(self, at: str, name: str) -> str:
        """What the model is told of a tool that it may call from here on."""
        function = next((tool["function"] for tool in self.functions if tool["function"]["name"] == name), None)
        if function is None:
            raise InvalidRequestError(f"{at} names the tool {name[:64]!r}, which is not among the tools", param=at)
        self._gone.discard(name)
        return f"<function>{json.dumps(function, ensure_ascii=False)}</function>"

    def changed(self, at: str, block: dict[str, Any]) -> dict[str, Any] | None:
        """The text of a system message's block by which a tool comes or goes; None for other blocks."""
        kind = block.get("type")
        if kind not in ("tool_addition", "tool_removal"):
            return None
        tool = block.get("tool")
        if not isinstance(tool, dict) or tool.get("type") not in (
            "tool_reference",
            *(["tool_definition"] if kind == "tool_addition" else []),
        ):
            raise InvalidRequestError(f"{at}.tool must refer to a tool, got {shown(tool)}", param=f"{at}.tool")
        if tool["type"] == "tool_definition":
            definition = tool.get("definition")
            if not isinstance(definition, dict):
                raise InvalidRequestError(f"{at}.tool.definition must be an object, got {shown(definition)}", param=f"{at}.tool")
            name = self._add(f"{at}.tool.definition", definition)
        else:
            name = string_in(f"{at}.tool", tool, "name")
        told = self.tell(f"{at}.tool", name)
        if kind == "tool_removal":
            self._gone.add(name)
            told = f"The tool {name} is no longer available."
        return {"type": "text", "text": told}

    def _add(self, at: str, definition: dict[str, Any]) -> str:
        """The name of a tool that the conversation brings."""
        function = _function(at, definition)
        name: str = function["function"]["name"]
        self.functions = [tool for tool in self.functions if tool["function"]["name"] != name] + [function]
        self._later.add(name)
        return name


def _function(at: str, tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequestError(
            f"{at} is of type {shown(tool['type'])}, which only Anthropic's models know: leave it out, or describe it with an input_schema",
            param=at,
        )
    function = {"name": string_in(at, tool, "name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
    function |= {"strict": tool.get("strict")}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """Fields of the chat API."""
    match kind := choice.get("type"):
        case "auto" | "none":
            made: object = kind
        case "any":
            made = "required"
        case "tool":
            made = {"type": "function", "function": {"name": string_in("tool_choice", choice, "name")}}
        case _:
            raise InvalidRequestError(f"tool_choice.type must be auto, any, tool or none, got {shown(kind)}", param="tool_choice")
    return {"tool_choice": made, "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None}
