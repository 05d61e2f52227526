"""Events of streams, held against the types of the official clients. Those let pass what does not fit; here it is an error."""

from __future__ import annotations

from typing import Any, get_args

from anthropic.types import RawMessageStreamEvent
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel


def _by_type(union: Any) -> dict[str, type[BaseModel]]:
    members = get_args(get_args(union)[0])  # Annotated[Union[...], ...]
    return {get_args(member.model_fields["type"].annotation)[0]: member for member in members}


_ANTHROPIC, _OPENAI = _by_type(RawMessageStreamEvent), _by_type(ResponseStreamEvent)


def check_messages(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of /v1/messages, without pings."""
    found = [event for event in found if event["type"] != "ping"]
    for event in found:
        _ANTHROPIC[event["type"]].model_validate(event)
    return found


def check_responses(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of /v1/responses, numbered without a gap."""
    for number, event in enumerate(found):
        _OPENAI[event["type"]].model_validate(event)
        assert event["sequence_number"] == number
    return found
