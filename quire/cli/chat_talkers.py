"""Who answers in ``quire chat``: a model in this process, or that of a server."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from quire.cli.remote import Remote, RemoteError
from quire.config import EngineConfig, model_name
from quire.errors import ConfigError
from quire.outputs import Usage

if TYPE_CHECKING:
    from quire.llm import LLM

Messages = Sequence[dict[str, Any]]


class Talker(Protocol):
    name: str
    taken: Usage
    """What the last answer took."""

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        """The next message, as it comes. Raises QuireError."""
        ...

    def stop(self) -> None:
        """Called from a signal's handler: no more is wanted of the answer."""
        ...


class Local:
    """The model of a folder. Raises ConfigError where it has no chat template, before it is loaded."""

    def __init__(self, config: EngineConfig, settings: dict[str, Any]) -> None:
        from quire.models.weights import resolve_model
        from quire.sampling_params import SamplingParams
        from quire.text.tokenizer import Tokenizer

        SamplingParams(**settings)  # a typing error should not cost a load
        folder = resolve_model(config.model)
        self.name = model_name(folder, config.model)
        config = replace(config, model=str(folder))
        if not Tokenizer.load(folder).has_chat_template:
            raise ConfigError(
                f"{self.name} has no chat template, so it does not know what a conversation looks like: complete text with "
                "quire run, or add a chat_template.jinja to the model folder"
            )
        from quire.llm import LLM

        self.taken = Usage()
        self._llm: LLM = LLM.from_config(config)
        values = {"max_tokens": None, **dict(self._llm.backend.spec.sampling_defaults), **settings}
        self._params = SamplingParams(**values)

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        before = self._llm.engine.stats()
        pieces = self._llm.stream_chat(messages, self._params)
        try:
            yield from pieces
        finally:
            after = self._llm.engine.stats()
            counted, start = after.kv.counters, before.kv.counters
            self.taken = Usage(
                counted.prompt_tokens - start.prompt_tokens,
                after.tokens_sampled - before.tokens_sampled,
                counted.hit_tokens - start.hit_tokens,
            )

    def stop(self) -> None:
        """The loop over the answer ends after the next piece; a step can't be interrupted."""


class Served:
    """The model of a server, whose name is asked for."""

    def __init__(self, url: str, api_key: str | None, settings: dict[str, Any]) -> None:
        self._remote, self._settings = Remote(url, api_key), settings
        try:
            self._model = str(self._remote.get("/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RemoteError(f"{self._remote.url} names no model at /v1/models") from None
        self.name, self.taken = f"{self._model} at {self._remote.url}", Usage()

    def answer(self, messages: Messages) -> Generator[str, None, None]:
        self.taken = Usage()
        body = {"model": self._model, "messages": list(messages), "stream": True, **self._settings}
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}  # a stopped answer is counted too
        for event in self._remote.stream("/v1/chat/completions", body):
            if usage := event.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                self.taken = Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if text := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
                    yield text

    def stop(self) -> None:
        self._remote.hang_up()
