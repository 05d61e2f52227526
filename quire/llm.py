"""The offline API: ``LLM(model).generate(prompts, params)``. Names are vLLM's where the thing is the same."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TypedDict

from tqdm import tqdm

from quire.backends.base import Backend, open_backend
from quire.config import EMBEDDED_MODEL, EngineConfig
from quire.core.admission import empty_prompt
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.errors import EngineError, InvalidRequestError
from quire.outputs import Choice, RequestOutput, SequenceOutput, Usage
from quire.sampling_params import SamplingParams
from quire.text.output import OutputAssembler
from quire.text.tokenizer import Tokenizer

PROGRESS_AFTER_S = 1.0
"""A progress bar appears on work that takes longer than this."""


class TokensPrompt(TypedDict):
    """A prompt that is already tokenized."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


class LLM:
    """A model, its KV pool and an engine in this process.

    ``model`` is a folder in Hugging Face format, or ``"embedded"``. The other parameters are those of EngineConfig.
    Raises ModelLoadError, ConfigError or CapacityError.
    """

    def __init__(self, model: str | Path = EMBEDDED_MODEL, **options: Any) -> None:
        known = EngineConfig.__dataclass_fields__
        for name in options:
            if name not in known:
                raise TypeError(f"LLM() has no parameter {name!r}; it has: {', '.join(known)}")
        self._open(EngineConfig(model=str(model), **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: EngineConfig) -> None:
        self.config = config
        self.backend: Backend = open_backend(config)
        self.tokenizer = Tokenizer.load(self.backend.folder)
        self.engine = Engine(self.backend, config)
        self._requests = 0
        self._unread: dict[str, deque[SequenceOutput]] = {}
        """What the engine gave to each open stream, and its reader has not taken yet."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        ``sampling_params``: one for all, or one for each prompt; None: the model's own defaults. ``use_tqdm``: show progress
        on long work (vLLM's name).
        Everything is checked before anything runs. Raises InvalidRequestError. A sample that fails in the engine has
        finish_reason ``error`` and the message in stop_reason; the others go on.
        """
        todo = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]
        each = self._params(sampling_params, len(todo))
        requests = [self._request(prompt, p) for prompt, p in zip(todo, each, strict=True)]
        outputs = {
            request.request_id: RequestOutput(
                request.request_id,
                prompt if isinstance(prompt, str) else None,
                request.prompt_token_ids,
                [],
                Usage(len(request.prompt_token_ids)),
            )
            for prompt, request in zip(todo, requests, strict=True)
        }
        for request_id, choice in self._run(requests, use_tqdm):
            output = outputs[request_id]
            output.outputs.append(choice)
            output.usage.completion_tokens += len(choice.token_ids)
        for output in outputs.values():
            output.outputs.sort(key=lambda choice: choice.index)
        return list(outputs.values())

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (generation_config.json), over the defaults of SamplingParams."""
        defaults: dict[str, Any] = dict(self.backend.spec.sampling_defaults)
        return SamplingParams(**defaults)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt (``params.n`` is 1); yields text as it comes. Closing the iterator frees its blocks.

        Several streams may be open, and ``generate`` may be called meanwhile: they share the engine's steps.
        Raises InvalidRequestError at once, EngineError from the iterator.
        """
        request = self._request(prompt, params or self.get_default_sampling_params())
        if request.params.n != 1:
            raise InvalidRequestError(f"stream() gives one sample, got n={request.params.n}: use generate()", param="n")
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[str]:
        assembler = OutputAssembler(self.tokenizer, request.params, request.prompt_token_ids)
        unread = self._unread[request.request_id] = deque()
        try:
            self.engine.add(request)
            while not assembler.finished and (unread or self.engine.has_work):
                if not unread:
                    self._step()
                    continue
                output = unread.popleft()
                delta = assembler.feed(output)
                if delta.text:
                    yield delta.text
                if output.finish_reason == "error":
                    raise EngineError(str(output.stop_reason))
        finally:
            del self._unread[request.request_id]
            self.engine.abort(request.request_id)

    def _step(self) -> list[SequenceOutput]:
        """One step of the engine, whoever asks for it: what it adds to open streams waits there for their readers."""
        outputs = self.engine.step()
        for output in outputs:
            if output.request_id in self._unread:
                self._unread[output.request_id].append(output)
        return outputs

    def _run(self, requests: list[Request], use_tqdm: bool) -> Iterator[tuple[str, Choice]]:
        """Run all requests to their end; yields (request id, choice) as samples finish."""
        assemblers = {
            (r.request_id, i): OutputAssembler(self.tokenizer, r.params, r.prompt_token_ids) for r in requests for i in range(r.params.n)
        }
        # disable=None: no bar where stderr is no terminal.
        progress = tqdm(total=len(assemblers), desc="Generating", unit="sample", delay=PROGRESS_AFTER_S, disable=None if use_tqdm else True)
        tokens, start = 0, monotonic()
        try:
            for request in requests:
                self.engine.add(request)
            while assemblers:
                for output in self._step():
                    key = (output.request_id, output.index)
                    assembler = assemblers.get(key)
                    if assembler is None:  # of an open stream
                        continue
                    assembler.feed(output)
                    tokens += len(output.token_ids)
                    if assembler.finished:
                        del assemblers[key]
                        progress.update()
                        progress.set_postfix_str(f"{tokens / (monotonic() - start):.0f} tokens/s", refresh=False)
                        if output.finish_reason is None:
                            self.engine.abort(output.request_id, output.index)
                        yield output.request_id, assembler.choice(output.index)
        finally:
            progress.close()
            for request in requests:
                self.engine.abort(request.request_id)

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        if len(params) != count:
            raise InvalidRequestError(
                f"{count} prompts but {len(params)} SamplingParams: give one, or one for each prompt", param="sampling_params"
            )
        return list(params)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if prompt == "":
            raise empty_prompt()
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            given: Any = prompt["prompt_token_ids"]
            tokens = list(given) if isinstance(given, Sequence) else []
            if not isinstance(given, Sequence) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
                raise InvalidRequestError("prompt_token_ids must be a list of integers", param="prompt")
        else:
            raise InvalidRequestError(f"a prompt is a string or {{'prompt_token_ids': [...]}}, got {prompt!r:.60}", param="prompt")
        self.engine.limits.check(tokens, params)
        number = self._requests
        self._requests += 1
        seed = params.seed if params.seed is not None else _derived_seed(self.config.seed, number)
        return Request(str(number), tokens, params, seed % (1 << 64), self.backend.spec.eos_token_ids)


def _derived_seed(seed: int, number: int) -> int:
    """Seed of the ``number``-th request that brought none: the same script with the same ``LLM(seed=)`` repeats itself."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")
