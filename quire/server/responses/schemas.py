"""The fields of requests of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from quire.server.calls.schemas import CacheRetention, StreamOptions

_INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object", "properties": {"type": {"type": "string"}}}}]}
_TOOL = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}, "name": {"type": "string"}}}

IGNORED = frozenset((
    "user", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "max_tool_calls",
    "access_programs", "background_options", "client_metadata", "request_id",
))  # fmt: skip
"""Sent by clients; without influence on the tokens that come back."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (), "conversation": (), "prompt": (), "background": (False,), "context_management": ([],), "moderation": (),
    "image": (),
}  # fmt: skip
"""Known to clients, not supported → values that ask for nothing, besides null."""


class ResponsesRequest(BaseModel):
    """What OpenAI's API does not have is named as in /v1/chat/completions."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = Field(None, description="id from /v1/models; may be left out, since one model is served")
    input: Annotated[Any, WithJsonSchema(_INPUT)] = Field(description="a user's text, or a list of items")
    instructions: str | None = Field(None, description="a system message before everything else")
    max_output_tokens: int | None = Field(None, description="default: what the context leaves")
    tools: list[Annotated[dict[str, Any], WithJsonSchema(_TOOL)]] | None = Field(
        None, description="functions; tools that OpenAI's own servers run, such as web_search, are left out"
    )
    tool_choice: Any = Field(None, description="none, auto, required, a function, or allowed_tools")
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = Field(None, description="format: text, json_object or json_schema; verbosity is ignored")
    reasoning: dict[str, Any] | None = Field(None, description="effort: reasoning_effort of chats")
    include: list[str] | None = Field(None, description="message.output_text.logprobs; others are ignored")
    top_logprobs: int | None = None
    truncation: str | None = Field(None, description="auto or disabled; nothing is ever cut, a request that is too long is refused")
    metadata: dict[str, str] | None = Field(None, description="returned as it is")
    store: bool | None = Field(None, description="accepted and ignored: nothing is kept")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, description="0 is greedy")
    top_p: float | None = Field(None, description="in (0, 1]")
    top_k: int | None = Field(None, description="0 or -1 keeps every token")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = Field(None, description="1 is off")
    seed: int | None = Field(None, description="the same request with the same seed gives the same output")
    min_tokens: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more variables for the model's chat template")
    priority: int | None = Field(None, description="lower runs earlier; default 0")
    cache_salt: str | None = Field(None, description="cached prefixes are shared only among requests with the same salt")
    cache_retention: CacheRetention | None = Field(None, description="a wish that the prompt stays in the prefix cache")


SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "min_tokens", "stop",
    "stop_token_ids", "ignore_eos", "parallel_tool_calls", "top_logprobs", "priority", "cache_salt", "stream",
)  # fmt: skip
"""Fields that mean what they mean in /v1/chat/completions."""
