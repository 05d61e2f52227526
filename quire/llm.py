"""The offline API: ``LLM(model).generate(prompts, params)``. Names are vLLM's where the thing is the same."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, TypedDict

from tqdm import tqdm

from quire.backends.base import Backend, open_backend
from quire.config import EMBEDDED_MODEL, EngineConfig
from quire.core.admission import empty_prompt
from quire.core.engine import Engine
from quire.core.plan import Pooling
from quire.core.sequence import Request, Retention, request_seed, salt_bytes
from quire.errors import EngineError, InvalidRequestError, QueueFullError
from quire.grammar.constraints import Constraints
from quire.logs import ThrottledLog
from quire.models.spec import ModelCost
from quire.outputs import Embedding, EmbeddingOutput, RequestOutput, SequenceOutput, TokenLogprobs, Usage, unit_vector
from quire.sampling_params import SamplingParams
from quire.text.chat import Message
from quire.text.output import OutputAssembler, best_choices, prompt_positions
from quire.text.tokenizer import Tokenizer
from quire.text.tools import ToolParser, parser_for
from quire.text.tools.formats import FORMATS, begun, detect

PROGRESS_AFTER_S = 1.0
"""A progress bar appears on work that takes longer than this."""


class TextPrompt(TypedDict):
    """The same as the text alone."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt that is already tokenized."""

    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt
Conversation = Sequence[Message]


class LLM:
    """A model, its KV pool and an engine in this process.

    ``model`` is a folder in Hugging Face format, a GGUF file, a name on the Hugging Face Hub, or ``"embedded"``. The other parameters are
    those of EngineConfig.
    Raises ModelLoadError, ConfigError or CapacityError.

    Several threads may use it; their calls of ``generate`` take turns, since one has all of the machine already.
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
        spec = self.backend.spec
        tokenizer = self.tokenizer  # what holds on to this object would keep the model's memory until the next collection of garbage
        self._constraints = Constraints(lambda: tokenizer, spec.vocab_size, spec.eos_token_ids)
        self.engine = self._new_engine()
        self._requests = 0
        self._lock = threading.RLock()
        """Held by who runs the engine; and it may collect a stream that was dropped meanwhile."""
        self._unread: dict[str, deque[SequenceOutput]] = {}
        """What the engine gave to each open stream, and its reader has not taken yet."""

    def _new_engine(self) -> Engine:
        engine = Engine(self.backend, self.config, monotonic, constraints=self._constraints)
        engine.on_preemption(ThrottledLog(logging.getLogger("quire.engine")).warning)
        return engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        cache_salt: str | None = None,
        retention: Retention | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        ``sampling_params``: one for all, or one for each prompt; None: the model's own defaults. ``use_tqdm``: show progress
        on long work (vLLM's name). ``priority``: one for all, or one for each prompt; lower runs earlier. ``cache_salt``: cached
        prefixes are shared only with calls that have the same. ``retention``: a wish that the prompts stay in the prefix cache.
        Everything is checked before anything runs. Raises InvalidRequestError. A sample that fails in the engine has
        finish_reason ``error`` and the message in stop_reason; the others go on.
        """
        todo = _prompts(prompts)
        each = self._params(sampling_params, len(todo))
        salt = salt_bytes(cache_salt)
        if not isinstance(retention, Retention | None):
            raise InvalidRequestError(f"retention must be a Retention or None, got {retention!r:.60}", param="retention")
        requests = [
            replace(self._request(prompt, p), priority=rank, salt=salt, retention=retention)
            for prompt, p, rank in zip(todo, each, _priorities(priority, len(todo)), strict=True)
        ]
        for structured in dict.fromkeys(request.params.structured for request in requests):
            if structured is not None:
                self._constraints.prepare(structured)
        with self._lock:
            runs = self._run(requests, use_tqdm)
        return [
            RequestOutput(
                request.request_id,
                _text(prompt),
                request.prompt_token_ids,
                best_choices(run.samples, request.params.n),
                Usage(len(request.prompt_token_ids), sum(len(sample.token_ids) for sample in run.samples), run.cached_tokens),
                prompt_logprobs=None if run.scores is None else prompt_positions(self.tokenizer, request.prompt_token_ids, run.scores),
            )
            for prompt, request, run in zip(todo, requests, runs, strict=True)
        ]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, in the model's own format; what it writes comes as it is, tool calls too, and with
        ``skip_special_tokens=False`` the markers of what is what.

        ``tools``: the functions that the model is told of, as the API has them. ``continue_final_message``: go on with the last
        message (with ``add_generation_prompt=False``). ``options``: those of ``generate``. Raises InvalidRequestError, also where
        the model has no chat template.
        """
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise InvalidRequestError(
                f"chat_template_kwargs must be a mapping or None, got {chat_template_kwargs!r:.60}", param="chat_template_kwargs"
            )
        several = isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], list | tuple)
        conversations: Sequence[Any] = messages if several else [messages]
        variables = {**({} if tools is None else {"tools": tools}), **(chat_template_kwargs or {})}
        prompts: list[Prompt] = [
            self._chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=variables,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, **options)

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "last", use_tqdm: bool = True) -> list[EmbeddingOutput]:
        """A vector of length 1 of each prompt: what the last layer says of its last token, or of all of them (``mean``).

        Each has ``TransformerSpec.embedding_size`` numbers, float32. Raises InvalidRequestError; EngineError where one fails.
        """
        if pooling not in ("mean", "last"):
            raise InvalidRequestError(f"pooling must be mean or last, got {pooling!r:.60}", param="pooling")
        nothing = SamplingParams(max_tokens=0)
        requests = [replace(self._request(prompt, nothing), pooling=pooling) for prompt in _prompts(prompts)]
        with self._lock:
            runs = self._run(requests, use_tqdm)
        outputs = []
        for request, run in zip(requests, runs, strict=True):
            if run.vector is None:
                raise EngineError(f"the request could not be finished: {run.samples[0].choice(0).stop_reason}")
            outputs.append(EmbeddingOutput(request.request_id, request.prompt_token_ids, Embedding(unit_vector(run.vector))))
        return outputs

    def cost(self) -> ModelCost:
        """What the steps of this model ask of this machine, in the widths that it is served in."""
        backend = self.backend
        kv_dtype = self.config.kv_width(backend.spec.dtype)
        return ModelCost(backend.spec, backend.weight_bytes(), backend.head_bytes(), kv_dtype, backend.expert_bytes())

    def reset_prefix_cache(self) -> None:
        """Forget what was computed so far: no later request finds it."""
        with self._lock:
            self.engine.reset_prefix_cache()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (generation_config.json), over the defaults of SamplingParams."""
        defaults: dict[str, Any] = dict(self.backend.spec.sampling_defaults)
        return SamplingParams(**defaults)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt (``params.n`` is 1); yields text as it comes. Closing the iterator frees its blocks.

        Several streams may be open, and ``generate`` may be called meanwhile: they share the engine's steps.
        Raises InvalidRequestError at once, EngineError from the iterator.
        """
        return self._stream(self._request(prompt, self._for_stream(params)))

    def stream_chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Iterator[str]:
        """``stream`` the next message of a conversation, in the model's own format. Raises InvalidRequestError where it has none.

        Where that has channels (harmony), the text is what is in them, a blank line between two, unless special tokens are asked for.
        """
        return self._stream(self._request(self._chat_prompt(messages), self._for_stream(params)), continues_prompt=False)

    def _chat_prompt(self, messages: Conversation, **how: Any) -> TokensPrompt:
        # Templates spell out the special tokens themselves.
        return {"prompt_token_ids": self.tokenizer.encode(self.tokenizer.render_chat(messages, **how), add_special_tokens=False)}

    def _for_stream(self, params: SamplingParams | None) -> SamplingParams:
        params = self._params(params, 1)[0]
        for name, count in (("n", params.n), ("best_of", params.num_outputs)):
            if count != 1:
                raise InvalidRequestError(f"a stream gives one sample, got {name}={count}: use generate()", param=name)
        if params.structured is not None:
            self._constraints.prepare(params.structured)
        return params

    def _stream(self, request: Request, continues_prompt: bool = True) -> Iterator[str]:
        prompt = request.prompt_token_ids
        shown, parser = (frozenset[int](), None) if continues_prompt else self._channels(prompt, request.params)
        assembler = OutputAssembler(self.tokenizer, request.params, prompt if continues_prompt else (), shown, parser)
        unread: deque[SequenceOutput] = deque()
        with self._lock:
            self._unread[request.request_id] = unread
        try:
            with self._lock:
                while not self._add(request):
                    self._step()
            while not assembler.finished:
                with self._lock:
                    if not unread:
                        if not self.engine.has_work:
                            break
                        self._step()
                        continue
                    output = unread.popleft()
                delta = assembler.feed(output)
                if text := delta.text if delta.message is None else delta.message.text:
                    yield text
                if output.finish_reason == "error":
                    raise EngineError(str(output.stop_reason))
        finally:
            with self._lock:
                del self._unread[request.request_id]
                self.engine.abort(request.request_id)

    def _channels(self, prompt: list[int], params: SamplingParams) -> tuple[frozenset[int], ToolParser | None]:
        """What reads an answer that is in channels, and the markers that it has to see; None: the answer is its text."""
        name = detect(self.tokenizer.chat_template)
        if name is None or not FORMATS[name].start or not params.skip_special_tokens or params.structured is not None:
            return frozenset(), None
        ids = {marker: self.tokenizer.token_id(marker) for marker in FORMATS[name].markers}
        hidden = {marker: i for marker, i in ids.items() if i is not None and i in self.tokenizer.special_ids}
        before = begun(name, self.tokenizer.decode(prompt, skip_special_tokens=False))
        return frozenset(hidden.values()), parser_for(name, before=before, hidden=hidden)

    def _add(self, request: Request) -> bool:
        """Queue ``request``, unless ``max_waiting`` sequences wait already."""
        try:
            self.engine.add(request)
        except QueueFullError:
            return False
        return True

    def _step(self) -> list[SequenceOutput]:
        """One step of the engine, whoever asks for it: what it adds to open streams waits there for their readers. Where it is interrupted
        (Ctrl-C), or fails, what was in flight is lost, and what comes after that begins anew."""
        try:
            outputs = self.engine.step()
        except BaseException:
            self.engine = self._new_engine()
            for request_id, unread in self._unread.items():
                unread.append(SequenceOutput(request_id, 0, [], None, "error", "a step of the engine was interrupted"))
            raise
        for output in outputs:
            if output.request_id in self._unread:
                self._unread[output.request_id].append(output)
        return outputs

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[_Run]:
        """Run all requests to their end."""
        runs = [
            _Run([OutputAssembler(self.tokenizer, r.params, r.prompt_token_ids) for _ in range(r.params.num_outputs)]) for r in requests
        ]
        by_id = {request.request_id: run for request, run in zip(requests, runs, strict=True)}
        left = sum(len(run.samples) for run in runs)
        # disable=None: no bar where stderr is no terminal.
        progress = tqdm(total=left, desc="Generating", unit="sample", delay=PROGRESS_AFTER_S, disable=None if use_tqdm else True)
        tokens, start = 0, monotonic()
        queue = deque(sorted(requests, key=lambda request: request.priority))
        try:
            while left:
                while queue and self._add(queue[0]):
                    queue.popleft()
                for output in self._step():
                    run = by_id.get(output.request_id)
                    if run is None:  # of an open stream
                        continue
                    if output.cached_tokens is not None:
                        run.cached_tokens = output.cached_tokens
                    if output.prompt_logprobs is not None:
                        run.scores = output.prompt_logprobs
                    if output.vector is not None:
                        run.vector = output.vector
                    sample = run.samples[output.index]
                    if sample.finished:
                        continue
                    sample.feed(output)
                    tokens += len(output.token_ids)
                    if sample.finished:
                        left -= 1
                        progress.update()
                        progress.set_postfix_str(f"{tokens / (monotonic() - start):.0f} tokens/s", refresh=False)
                        if output.finish_reason is None:
                            self.engine.abort(output.request_id, output.index)
        finally:
            progress.close()
            for request in requests:
                self.engine.abort(request.request_id)
        return runs

    def _params(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
            raise InvalidRequestError("sampling_params must be a SamplingParams, or a list of them", param="sampling_params")
        if len(params) != count:
            raise InvalidRequestError(
                f"{count} prompts but {len(params)} SamplingParams: give one, or one for each prompt", param="sampling_params"
            )
        return list(params)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if (text := _text(prompt)) is not None:
            if not text:
                raise empty_prompt()
            tokens = self.tokenizer.encode(text)
        elif isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            given: Any = prompt["prompt_token_ids"]  # type: ignore[typeddict-item]
            tokens = list(given) if isinstance(given, Sequence) else []
            if not isinstance(given, Sequence) or not all(isinstance(t, int) and not isinstance(t, bool) for t in tokens):
                raise InvalidRequestError("prompt_token_ids must be a list of integers", param="prompt")
        else:
            raise InvalidRequestError(f"a prompt is a string or {{'prompt_token_ids': [...]}}, got {_shown(prompt)}", param="prompt")
        self.engine.limits.check(tokens, params, self.backend.spec.eos_token_ids)
        with self._lock:
            number = self._requests
            self._requests += 1
        seed = params.seed if params.seed is not None else request_seed(self.config.seed, number)
        return Request(str(number), tokens, params, seed % (1 << 64), self.backend.spec.eos_token_ids)


@dataclass(slots=True)
class _Run:
    """A request on its way."""

    samples: list[OutputAssembler]
    cached_tokens: int = 0
    scores: list[TokenLogprobs] | None = None
    """Of the prompt."""
    vector: list[float] | None = None


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    return list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str) else [prompts]


def _text(prompt: Prompt) -> str | None:
    """None where it is no text."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) and "prompt_token_ids" not in prompt else prompt
    return text if isinstance(text, str) else None


def _shown(prompt: object) -> str:
    return f"{' '.join(repr(prompt).split()):.60}"


def _priorities(priority: int | Sequence[int] | None, count: int) -> list[int]:
    if not isinstance(priority, Sequence) or isinstance(priority, str):
        return [0 if priority is None else priority] * count
    if len(priority) != count:
        raise InvalidRequestError(f"{count} prompts but {len(priority)} priorities: give one, or one for each prompt", param="priority")
    return list(priority)
