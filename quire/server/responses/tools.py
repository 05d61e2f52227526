"""Tools of /v1/responses, as /v1/chat/completions has them."""

from __future__ import annotations

import re
from typing import Any

from quire.errors import InvalidRequestError
from quire.server.calls.fields import shown

_HOSTED = re.compile(r"(web_search|file_search|code_interpreter|image_generation|mcp|tool_search)(_|$)")
"""Run by OpenAI's own servers. A model that is not told of them answers without them; clients such as Codex send them unasked."""


class GivenTools:
    """The functions that the model is told of."""

    def __init__(self, tools: list[dict[str, Any]], choice: object) -> None:
        """Raises InvalidRequestError, naming the tool."""
        self.namespaces: dict[str, str] = {}
        """Function → the namespace that it was given in."""
        self.told: list[dict[str, Any]] = []
        """Of the tools that were given, those that the model is told of."""
        self.functions: list[dict[str, Any]] = []
        """In the form of the chat API."""
        for i, tool in enumerate(tools):
            self._add(f"tools[{i}]", tool)
        self.choice = self._choose(choice)

    def _add(self, at: str, tool: dict[str, Any]) -> None:
        kind = tool.get("type")
        if kind == "function":
            self.functions.append(_function(at, tool))
        elif kind == "namespace":
            name, members = tool.get("name"), tool.get("tools")
            if not isinstance(name, str) or not isinstance(members, list):
                raise InvalidRequestError(f"{at} is a namespace, and needs a name and tools", param=at)
            for j, member in enumerate(members):
                if not _is_function(member):
                    raise InvalidRequestError(f"{at}.tools[{j}] must be of type function, got {shown(member)}", param=at)
                self.functions.append(_function(f"{at}.tools[{j}]", member))
                self.namespaces[member["name"]] = name
        elif isinstance(kind, str) and _HOSTED.match(kind):
            return
        else:
            raise InvalidRequestError(f"{at} is of type {shown(kind)}: this server knows tools of type function", param=at)
        self.told.append(tool)

    def _choose(self, choice: object) -> object:
        """``tool_choice`` of the chat API."""
        if choice is None or choice in ("none", "auto", "required"):
            return choice
        kind = choice.get("type") if isinstance(choice, dict) else None
        if isinstance(choice, dict) and kind == "function":
            return {"type": "function", "function": {"name": choice.get("name")}}
        if isinstance(choice, dict) and kind == "allowed_tools" and isinstance(choice.get("tools"), list):
            allowed = [{"type": "function", "function": {"name": tool.get("name")}} for tool in choice["tools"] if _is_function(tool)]
            return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": allowed}}
        raise InvalidRequestError(
            f"tool_choice must be none, auto, required, a function or allowed_tools, got {shown(choice)}", param="tool_choice"
        )


def _is_function(tool: object) -> bool:
    return isinstance(tool, dict) and tool.get("type") == "function"


def _function(at: str, tool: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise InvalidRequestError(f"{at}.name must be a string, got {shown(tool.get('name'))}", param=f"{at}.name")
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}
