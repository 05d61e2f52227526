"""The fields of Anthropic's requests."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from quire.server.calls.schemas import CacheRetention

_BLOCKS = {"type": "array", "items": {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}}
_CONTENT = {"anyOf": [{"type": "string"}, _BLOCKS]}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": _CONTENT},
}
_TOOL = {
    "type": "object",
    "required": ["name", "input_schema"],
    "properties": {"name": {"type": "string"}, "description": {"type": "string"}, "input_schema": {"type": "object"}},
}

IGNORED = frozenset((
    "metadata", "service_tier", "inference_geo", "speed", "diagnostics", "user_profile_id", "workspace_id",
    "betas", "anthropic_beta", "anthropic_version",  # in the body where a client is made for a cloud's endpoint
    "cache_control", "context_management",  # everything is cached, and nothing is taken out of a conversation
))  # fmt: skip
"""Sent by clients; without influence on the tokens that come back."""

REFUSED: dict[str, tuple[Any, ...]] = {"container": (), "mcp_servers": ([],), "safeguards": ([],), "thread": ()}
"""Known to clients, not supported → values that ask for nothing, besides null.

Safeguards judge the calls of tools, on the server: whoever asks for them has to know that nobody does. Claude Code asks its user then.
The official client's runner of tools asks for a thread on the server first, and sends whole conversations where it is refused.
"""


class CountTokensRequest(BaseModel):
    """A conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = Field(None, description="id from /v1/models; may be left out, since one model is served")
    messages: list[Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]]
    system: Annotated[Any, WithJsonSchema(_CONTENT)] = Field(None, description="a text, or a list of text blocks")
    tools: list[Annotated[dict[str, Any], WithJsonSchema(_TOOL)]] | None = None
    tool_choice: dict[str, Any] | None = Field(None, description="type auto, any, tool (with name) or none")
    thinking: dict[str, Any] | None = Field(None, description="type enabled, adaptive or disabled: enable_thinking of the chat template")
    output_config: dict[str, Any] | None = Field(None, description="format: a JSON schema that the answer follows; effort is ignored")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more variables for the model's chat template")


class MessagesRequest(CountTokensRequest):
    """A conversation, and how it goes on. What Anthropic's API does not have is named as in /v1/chat/completions."""

    max_tokens: int = Field(description="most tokens of the answer; the context may have room for fewer, and stop_reason says so then")
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, description="0 is greedy")
    top_p: float | None = Field(None, description="in (0, 1]")
    top_k: int | None = Field(None, description="0 or -1 keeps every token")
    min_p: float | None = None
    repetition_penalty: float | None = Field(None, description="1 is off")
    seed: int | None = Field(None, description="the same request with the same seed gives the same output")
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(None, description="lower runs earlier; default 0")
    cache_salt: str | None = Field(None, description="cached prefixes are shared only among requests with the same salt")
    cache_retention: CacheRetention | None = Field(None, description="a wish that the prompt stays in the prefix cache")


SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "min_tokens", "stop_token_ids",
    "ignore_eos", "priority", "cache_salt", "stream",
)  # fmt: skip
"""Fields that mean what they mean in /v1/chat/completions."""
