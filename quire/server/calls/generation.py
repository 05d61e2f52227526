"""Generation: the requests behind one HTTP call, from tokens to text.

Text is made here and not in the engine: detokenizing, stop strings and log-probabilities are this process's work.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from time import monotonic
from types import TracebackType

from quire import sampling_params
from quire.config import MAX_TIMEOUT_S
from quire.core.sequence import Request, Retention
from quire.errors import EngineError, InvalidRequestError
from quire.outputs import Choice, Logprob, SequenceOutput, TokenLogprobs, Usage
from quire.sampling_params import SamplingParams
from quire.server.calls.prompts import Prompt
from quire.server.calls.reading import Reading, reason_of
from quire.server.calls.sampling import draw_seed
from quire.server.calls.schemas import GenerationRequest
from quire.server.calls.timings import Timings
from quire.server.context import Context
from quire.server.engine.stream import Shortcut, Stream
from quire.server.http.errors import DeadlineError
from quire.server.http.keys import Caller
from quire.structured import Structured
from quire.text.detokenizer import Detokenizer
from quire.text.output import Delta, OutputAssembler, best_choices, prompt_positions
from quire.text.tools import Message, ToolParser

_ids = Random(os.urandom(32))


def new_id(prefix: str, separator: str = "-") -> str:
    """An id that no other has, of any server. Not a secret: a call to the system for each costs more than all else about it."""
    return f"{prefix}{separator}{_ids.getrandbits(96):024x}"


@dataclass(slots=True)
class Piece:
    """What a call's client gets next of one of its choices."""

    index: int
    """Of the choice: prompt's number times n, plus the sample's number. (Where samples are chosen from, nothing is streamed.)"""
    first: bool
    """Nothing was sent of this choice before."""
    delta: Delta


class Generation:
    """Once submitted, use it as a context manager: leaving it, for whatever reason, ends what has not ended, and frees its blocks."""

    def __init__(
        self,
        context: Context,
        caller: Caller,
        call_id: str,
        body: GenerationRequest,
        prompts: Sequence[tuple[Prompt, SamplingParams]],
        *,
        continues_prompt: bool,
        reading: Reading | None = None,
    ) -> None:
        """Checks every prompt against the engine's limits. Raises InvalidRequestError or ContextLengthError.

        continues_prompt: the output goes on with the prompt's text (completions), and is not a text of its own (chat).
        reading: how the text is read; None: it is just text.
        """
        self.prompts = [prompt for prompt, _ in prompts]
        self.n = prompts[0][1].n
        self._width = prompts[0][1].num_outputs
        """Samples of a prompt; the best ``n`` of them become choices."""
        self._client, self._caller, self.tokenizer = context.client, caller, context.tokenizer
        self._compiler = context.compiler
        self._stream: Stream | None = None
        self._timeout = _timeout(body, 0 if caller.background else context.config.request_timeout)  # nobody waits for what waits
        self._timer: asyncio.TimerHandle | None = None
        salt, retention = context.salts.derive(body.cache_salt, caller.tenant), _retention(body)
        self._requests: list[Request] = []
        self._first_sample: dict[str, int] = {}
        self._assemblers: list[OutputAssembler] = []
        self._parsers: list[ToolParser | None] = []
        for number, (prompt, params) in enumerate(prompts):
            context.client.limits.check(prompt.token_ids, params, context.eos_token_ids)
            request = Request(
                f"{call_id}-{number}", prompt.token_ids, params, draw_seed(params), context.eos_token_ids,
                priority=caller.priority(body.priority or 0), salt=salt, retention=retention,
            )  # fmt: skip
            self._requests.append(request)
            self._first_sample[request.request_id] = number * self._width
            seen = prompt.token_ids if continues_prompt else ()
            shown = reading.shown if reading is not None else frozenset[int]()
            for index in range(len(self._assemblers), len(self._assemblers) + self._width):
                parser = None if reading is None else reading.parser(f"{call_id}/{index}")
                self._parsers.append(parser)
                self._assemblers.append(OutputAssembler(context.tokenizer, params, seen, shown, parser))
        self._reading, self._key = reading, call_id
        self._thoughts = [] if reading is None else [reading.thought(context.tokenizer) for _ in self._assemblers]
        self._started = [False] * len(self._assemblers)
        self._closed = False
        self._uncounted = set(self._first_sample)
        """Requests of which it is not known how much was cached."""
        self._scores: dict[int, list[TokenLogprobs]] = {}
        """Of the prompts whose log-probabilities were asked for, by their numbers: there before any piece of their choices."""
        self.timings = Timings()
        self.usage = Usage(prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts))

    async def submit(self) -> None:
        """Queue the requests, once it is known that their forms compile. Raises UnavailableError, QueueFullError, RateLimitError, or
        InvalidRequestError where they don't."""
        self._caller.enter()
        self.timings.submitted = monotonic()
        try:
            await self._compile()
            self._stream = self._client.submit(self._requests, background=self._caller.background)
        except BaseException:  # the client may hang up meanwhile
            self._caller.leave(0)
            raise
        if self._timeout is not None:
            left = self._timeout - (monotonic() - self.timings.submitted)
            self._timer = asyncio.get_running_loop().call_later(max(0.0, left), self._too_late)

    @property
    def to_compile(self) -> set[Structured]:
        """Forms that are tried before the requests are queued."""
        forms = {request.params.structured for request in self._requests}
        return set() if self._compiler is None else {form for form in forms if form is not None}

    async def _compile(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                for structured in self.to_compile:
                    assert self._compiler is not None
                    await self._compiler.check(structured)
        except TimeoutError:
            raise self._late() from None

    def _too_late(self) -> None:
        """Also where the client is not reading: what is fetched later is what had arrived, and then the error."""
        assert self._stream is not None
        self._stream.fail(self._late())

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"the request did not end within {self._timeout:g} seconds, its timeout or this server's --request-timeout: ask for fewer "
            "tokens, or for more time",
            param="timeout",
        )

    def close(self) -> None:
        """May be called twice."""
        if self._stream is not None and not self._closed:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._stream.close()
            self._caller.leave(self.usage.total_tokens)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        assert self._stream is not None
        return self._stream.finished

    def choices(self) -> list[Choice]:
        """The best of everything, in the order of the prompts."""
        choices = []
        for number in range(len(self.prompts)):
            samples = self._assemblers[number * self._width : (number + 1) * self._width]
            choices += best_choices(samples, self.n, number * self.n)
        return choices

    async def next(self, timeout: float | None = None) -> list[Piece]:
        """What the engine has made since the last call; empty after ``timeout`` seconds without anything.

        Raises EngineError where the work of one sequence failed, UnavailableError where the engine or server stopped, DeadlineError.
        """
        assert self._stream is not None
        return self._read(await self._stream.fetch(timeout))

    def take(self) -> list[Piece]:
        """As ``next``, of what is there by now."""
        assert self._stream is not None
        return self._read(self._stream.take())

    def listen(self, listener: Callable[[], bool], shortcut: Shortcut | None = None) -> None:
        """See Stream. After ``submit``."""
        assert self._stream is not None
        self._stream.listener, self._stream.shortcut = listener, shortcut

    def emitted(self) -> tuple[str, list[int]] | None:
        """The only request, and the tokens of its only sequence, a list that goes on growing; None where there are others, or it ended."""
        request_id = self._requests[0].request_id
        emitted = self._client.emitted(request_id) if len(self._assemblers) == 1 else None
        return None if emitted is None else (request_id, emitted)

    @property
    def only_text(self) -> Detokenizer | None:
        """Of the only sequence, where nothing is wanted of it but its text, as it comes; else None."""
        return self._assemblers[0].only_text if len(self._assemblers) == 1 else None

    def _read(self, outputs: list[SequenceOutput]) -> list[Piece]:
        assert self._stream is not None
        pieces = []
        outputs = _merged(outputs)
        self.timings.note(outputs)
        for output in outputs:
            if output.finish_reason == "error":
                raise EngineError(f"the request could not be finished: {output.stop_reason}")
            if output.cached_tokens is not None and output.request_id in self._uncounted:
                self._uncounted.discard(output.request_id)
                self.usage.cached_tokens += output.cached_tokens
            index = self._first_sample[output.request_id] + output.index
            if output.prompt_logprobs is not None:
                self._scores[index // self._width] = output.prompt_logprobs
            assembler = self._assemblers[index]
            delta = assembler.feed(output)
            self.usage.completion_tokens += len(delta.token_ids)
            if self._thoughts:
                self.usage.reasoning_tokens += self._thoughts[index].take(delta.token_ids)
            parser = self._parsers[index]
            if parser is not None and delta.finish_reason is not None:
                delta.finish_reason = reason_of(delta.finish_reason, delta.stop_reason, parser)
            if assembler.finished and output.finish_reason is None:  # by its text, which the engine knows nothing of
                self._stream.end(output.request_id, output.index)
            pieces.append(Piece(index, not self._started[index], delta))
            self._started[index] = True
        return pieces

    def prompt_logprobs(self, number: int) -> list[dict[int, Logprob] | None]:
        """Of one of the prompts, where they were asked for."""
        return prompt_positions(self.tokenizer, self.prompts[number].token_ids, self._scores[number])

    def num_logprobs(self) -> int:
        """How many an answer has, or would have, that tells all of them."""
        params = [request.params for request in self._requests]
        prompts = sum(len(self._requests[i].prompt_token_ids) * (1 + (params[i].prompt_logprobs or 0)) for i in self._scores)
        return prompts + sum(0 if p.logprobs is None else self.usage.completion_tokens * (1 + p.logprobs) for p in params[:1])

    def message(self, choice: Choice) -> Message | None:
        """What a finished choice says; None where its text is just text."""
        return None if self._reading is None else self._reading.message(choice, f"{self._key}/{choice.index}")

    async def run(self) -> list[Choice]:
        """Everything at once."""
        while not self.finished:
            await self.next()
        return self.choices()


def _timeout(body: GenerationRequest, most: int) -> float | None:
    """Seconds that the request may take, at most ``most`` where that is not 0; None: any time. Raises InvalidRequestError."""
    if body.timeout is None:
        return most or None
    wish = sampling_params.number("timeout", body.timeout, 0.001, MAX_TIMEOUT_S, " seconds")
    return min(wish, most or wish)


def _retention(body: GenerationRequest) -> Retention | None:
    wish = body.cache_retention
    if wish is None:
        return None
    try:
        return Retention(wish.priority, wish.seconds)
    except InvalidRequestError as e:  # "retention.seconds must be ..."
        raise InvalidRequestError(f"cache_{e.message}", param=f"cache_{e.param}") from None


def _merged(outputs: list[SequenceOutput]) -> list[SequenceOutput]:
    """One output for each sequence: a reader that was slow gets what it missed in one piece."""
    if len(outputs) == 1:
        return outputs
    merged: dict[tuple[str, int], SequenceOutput] = {}
    for output in outputs:
        before = merged.setdefault((output.request_id, output.index), output)
        if before is not output:
            before.token_ids += output.token_ids
            if output.logprobs is not None:
                before.logprobs = (before.logprobs or []) + output.logprobs
            before.finish_reason, before.stop_reason, before.end_token = output.finish_reason, output.stop_reason, output.end_token
    return list(merged.values())
