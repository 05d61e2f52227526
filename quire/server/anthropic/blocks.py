"""Content blocks, checked."""

from __future__ import annotations

from typing import Any

from quire.errors import InvalidRequestError
from quire.server.calls.fields import shown


def blocks_of(at: str, content: object) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and all(isinstance(block, dict) for block in content):
        return content
    raise InvalidRequestError(f"{at} must be a string or a list of blocks, got {shown(content)}", param=at)


def texts_of(at: str, content: object) -> list[dict[str, Any]]:
    return [text_of(f"{at}[{i}]", block) for i, block in enumerate(blocks_of(at, content))]


def text_of(at: str, block: dict[str, Any], known: str = "text") -> dict[str, Any]:
    """known: types of blocks that may stand here."""
    if block.get("type") != "text":
        raise InvalidRequestError(
            f"{at} is of type {shown(block.get('type'))}: this model reads text only, so blocks here may be of type {known}", param=at
        )
    return {"type": "text", "text": string_in(at, block, "text")}


def string_in(at: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{at}.{name} must be a string, got {shown(value)}", param=f"{at}.{name}")
    return value
