"""What every handler needs: the engine's client, the tokenizer, the limits, and the model's name."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from quire.config import ServerConfig
from quire.errors import ModelNotFoundError
from quire.server.client import EngineClient
from quire.server.keys import Caller, Keys
from quire.server.salts import Salts
from quire.text.tokenizer import Tokenizer


@dataclass(slots=True, frozen=True)
class Context:
    client: EngineClient
    tokenizer: Tokenizer
    config: ServerConfig
    model: str
    """Id of the served model."""
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float] = field(default_factory=dict)
    """The model's own, where a request says nothing."""
    created: int = field(default_factory=lambda: int(time.time()))
    salts: Salts = field(default_factory=Salts)
    embedding_size: int = 0
    """Numbers of a vector of /v1/embeddings."""
    keys: Keys | None = None
    """None: everybody may use the server."""

    @property
    def max_model_len(self) -> int:
        return self.client.limits.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError unless ``name`` is the served model, or is left out."""
        if name is not None and name != self.model:
            raise ModelNotFoundError(f"the model {name[:200]!r} does not exist here; this server has {self.model!r}", param="model")


def context_of(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


def caller_of(request: Request) -> Caller:
    caller = request.scope["caller"]
    assert isinstance(caller, Caller)
    return caller
