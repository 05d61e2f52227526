"""The fields of Ollama's requests."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from quire.server.calls.schemas import Stop, Tool

_FORMAT = {"anyOf": [{"enum": ["", "json"]}, {"type": "object"}, {"type": "null"}]}
_THINK = {"anyOf": [{"type": "boolean"}, {"enum": ["low", "medium", "high"]}, {"type": "null"}]}
_INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_CALL = {
    "type": "object",
    "properties": {"function": {"type": "object", "properties": {"name": {"type": "string"}, "arguments": {"type": "object"}}}},
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool"]},
        "content": {"type": "string"},
        "thinking": {"type": "string"},
        "tool_calls": {"type": "array", "items": _CALL},
        "tool_name": {"type": "string"},
    },
}

IGNORED = frozenset(("keep_alive", "name", "verbose", "insecure", "truncate", "shift"))
"""Sent by clients; without influence on what comes back: the model stays loaded, and no conversation is cut."""
REFUSED: dict[str, tuple[Any, ...]] = {
    "images": ([],), "suffix": ("",), "template": ("",), "context": ([],), "width": (0,), "height": (0,), "steps": (0,),
    "_debug_render_only": (False,),
}  # fmt: skip
"""Known to clients, not supported → values that ask for nothing, besides null."""
IGNORED_OPTIONS = frozenset((
    "num_ctx",  # the context is what the server was started with; a prompt that is too long for it is refused, and not cut
    "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock",
    "embedding_only", "num_gqa", "rope_frequency_base", "rope_frequency_scale",
    "num_keep", "mirostat_tau", "mirostat_eta", "penalize_newline",
    "repeat_last_n",  # repeat_penalty looks at all of the text
))  # fmt: skip
REFUSED_OPTIONS: dict[str, tuple[Any, ...]] = {"tfs_z": (1,), "typical_p": (1,), "mirostat": (0,)}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = Field(None, description="name from /api/tags; may be left out, since one model is served")


class Options(BaseModel):
    """Ollama's names of sampling parameters."""

    model_config = ConfigDict(strict=True, extra="ignore")

    num_predict: int | None = Field(None, description="most tokens of the answer; below 1: what the context leaves")
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop = None


class _Run(_Body):
    """What /api/chat and /api/generate have in common."""

    stream: bool | None = Field(None, description="default: true")
    format: Annotated[Any, WithJsonSchema(_FORMAT)] = Field(None, description="json, or a JSON schema")
    think: Annotated[Any, WithJsonSchema(_THINK)] = Field(None, description="whether the model thinks before it answers, or how much")
    options: dict[str, Any] | None = Field(None, description="sampling parameters; see Options")
    logprobs: bool | None = None
    top_logprobs: int | None = None


class OllamaChatRequest(_Run):
    messages: list[Annotated[dict[str, Any], WithJsonSchema(_MESSAGE)]] | None = None
    tools: list[Tool] | None = None


class OllamaGenerateRequest(_Run):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = Field(None, description="the prompt as it is, without the model's chat template")


class OllamaEmbedRequest(_Body):
    input: Annotated[Any, WithJsonSchema(_INPUT)]
    truncate: bool | None = Field(None, description="false: refuse an input that is longer than the context (default: cut its end)")
    dimensions: int | None = None
    options: dict[str, Any] | None = None


class OllamaEmbeddingsRequest(_Body):
    prompt: str
    options: dict[str, Any] | None = None


class OllamaShowRequest(_Body):
    """Its older name for ``model`` is ``name``."""
