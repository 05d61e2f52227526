"""What every handler needs: the engine's client, the tokenizer, the limits, and the model's name."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

from quire.config import ServerConfig
from quire.errors import ModelNotFoundError
from quire.models.spec import ModelCost
from quire.server.calls.compiler import Compiler
from quire.server.calls.salts import Salts
from quire.server.engine.client import EngineClient
from quire.server.http.keys import Caller, Keys
from quire.server.metrics.kv_publisher import KVPublisher
from quire.text.tokenizer import Tokenizer
from quire.text.tools.formats import END_THINK, FORMATS, detect, takes_one_call

if TYPE_CHECKING:
    from quire.server.batches.runner import Runner


@dataclass(slots=True, frozen=True)
class ModelFacts:
    """What the served model is, for those who list models."""

    family: str = ""
    """Of its architecture, as in ``model_type``."""
    num_parameters: int = 0
    parameter_size: str = ""
    """The same, as people say it."""
    weights: str = ""
    """What linears are in: float32, int8, ..."""
    file_format: str = ""
    """What the model was loaded from: safetensors or gguf."""
    weight_bytes: int = 0
    vram_bytes: int = 0
    """Of them, those in a GPU's memory."""


@dataclass(slots=True, frozen=True)
class Context:
    client: EngineClient
    tokenizer: Tokenizer
    config: ServerConfig
    model: str
    """Id of the served model: the first of its names."""
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    """The model's own, where a request says nothing."""
    created: int = field(default_factory=lambda: int(time.time()))
    salts: Salts = field(default_factory=Salts)
    embedding_size: int = 0
    """Numbers of a vector of /v1/embeddings."""
    facts: ModelFacts = field(default_factory=ModelFacts)
    aliases: tuple[str, ...] = ()
    """Other names of the served model."""
    keys: Keys | None = None
    """None: everybody may use the server."""
    cost: ModelCost | None = None
    """What steps ask of the engine's device; None where that is not known."""
    machine_limits: tuple[float, float] | None = None
    """Bytes that it reads per second, operations per second, as measured; None where that was not asked for."""
    publisher: KVPublisher | None = None
    """Of KV events."""
    compiler: Compiler | None = None
    """Tries forms of structured output; None: the engine alone does."""
    batches: Runner | None = None
    """None: the server keeps none."""
    tool_format: str | None = field(init=False)
    """In which the model writes calls of tools; None: in none that is known."""
    frame: str | None = field(init=False)
    """The format, where it has answers and reasoning in messages too: all that the model writes is read so."""
    parallel_calls: bool = field(init=False)
    """The model's chat template takes messages with several calls."""
    reasoning: bool = field(init=False)
    """The model's answers may begin with its reasoning, and it is told from them."""

    def __post_init__(self) -> None:
        template, tools, reasoning = self.tokenizer.chat_template, self.config.tool_parser, self.config.reasoning_parser
        found = detect(template) if tools in ("auto", "none") else tools
        frame = found if found is not None and FORMATS[found].start else None
        object.__setattr__(self, "tool_format", None if tools == "none" else found)
        object.__setattr__(self, "frame", frame)
        object.__setattr__(self, "parallel_calls", not takes_one_call(template))
        known = frame is not None or END_THINK in template
        object.__setattr__(self, "reasoning", known if reasoning == "auto" else reasoning == "think")

    @property
    def max_model_len(self) -> int:
        return self.client.limits.max_model_len

    @property
    def names(self) -> tuple[str, ...]:
        """By which requests may ask for the served model."""
        return (self.model, *self.aliases)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless ``name`` is one of the served model, or is left out."""
        if name is not None and name not in self.names:
            known = " or ".join(map(repr, self.names))
            raise ModelNotFoundError(
                f"the model {name[:200]!r} does not exist here; this server has {known} (more names: --served-model-name NAME,NAME)",
                param="model",
            )


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


def caller_of(request: Request) -> Caller:
    caller = request.scope["caller"]
    assert isinstance(caller, Caller)
    return caller
