"""OutputAssembler: a sequence's tokens → what its client sees. Text, stop strings, log-probabilities, why it ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quire.outputs import Choice, Logprob, SequenceOutput, TokenLogprobs
from quire.sampling_params import SamplingParams
from quire.text.detokenizer import Detokenizer
from quire.text.stop import StopChecker
from quire.text.tokenizer import Tokenizer
from quire.text.tools import MessageDelta, ToolParser


@dataclass(slots=True)
class Delta:
    """What one step adds to what a client has seen of a sequence."""

    text: str = ""
    """May be empty: a part of a character, or what may become a stop string, is held back."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    """For each of ``token_ids``: token id → Logprob, the chosen token first. None unless asked for."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    message: MessageDelta | None = None
    """What ``text`` adds to the message, where it is read as more than text."""


class OutputAssembler:
    """One for each sequence. Feed it every SequenceOutput in order.

    A stop string that is found ends the sequence here (``finished``); the engine knows nothing of text, so the caller then
    aborts the request there. Without a tokenizer there is no text, and stop strings can't be found.

    prompt_token_ids: give them where the output continues the prompt's text (completions), so that a leading space is
    kept (see Detokenizer); leave them out where the output is a text of its own (a chat message).

    shown: special tokens whose text is wanted in any case.

    parser: reads the text as a message. Where it wants no more, the sequence ends with the token that completed the message, as with
    a stop string.
    """

    __slots__ = (
        "_detokenizer",
        "_finish_reason",
        "_logprobs",
        "_params",
        "_parser",
        "_stop",
        "_stop_reason",
        "_texts",
        "_tokenizer",
        "_total_logprob",
        "finished",
        "token_ids",
    )

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Iterable[int] = (),
        shown: frozenset[int] = frozenset(),
        parser: ToolParser | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, params.skip_special_tokens, prompt_token_ids, shown)
        self._stop = StopChecker(params.stop_strings, params.include_stop_str_in_output) if params.stop_strings else None
        self._parser = parser
        self._texts: list[str] = []
        self.token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._total_logprob = 0.0
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self.finished = False

    def feed(self, output: SequenceOutput) -> Delta:
        """What the client gets for this step. Anything after the end is ignored."""
        message = None if self._parser is None else MessageDelta()
        if self.finished:
            return Delta(logprobs=None if self._logprobs is None else [], message=message)
        texts, count = [], 0
        for count, token in enumerate(output.token_ids, start=1):
            ends = output.finish_reason == "stop" and output.end_token and count == len(output.token_ids)
            self.token_ids.append(token)
            # The end-of-text or stop token that ends a sequence has no text, unless stops are asked for in the output.
            if self._detokenizer is not None and (not ends or self._params.include_stop_str_in_output):
                texts.append(self._check(self._detokenizer.push(token)))
                if message is not None:
                    self._read(message, texts[-1])
                if self.finished:
                    break
        if output.finish_reason is not None and not self.finished:
            texts.append(self._end(output.finish_reason, output.stop_reason))
            if message is not None:
                self._read(message, texts[-1])
        if self.finished and message is not None:
            assert self._parser is not None
            message.add(self._parser.finish())
        delta = Delta("".join(texts), output.token_ids[:count], None, self._finish_reason, self._stop_reason, message)
        if output.logprobs is not None:
            self._total_logprob += sum(entry.token[0] for entry in output.logprobs[:count])
        if self._logprobs is not None:
            pairs = zip(delta.token_ids, output.logprobs or (), strict=False)
            delta.logprobs = [spelt_out(self._tokenizer, token, entry) for token, entry in pairs]
            self._logprobs += delta.logprobs
        if delta.text:
            self._texts.append(delta.text)
        return delta

    @property
    def only_text(self) -> Detokenizer | None:
        """What makes the text, where ``feed`` does nothing with a token that may not as well be done without it, but for ``choice``."""
        return self._detokenizer if self._stop is None and self._logprobs is None and self._parser is None else None

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens, where the engine reports them; minus infinity for a sample that failed."""
        if self._finish_reason == "error" or not self.token_ids:
            return -math.inf
        return self._total_logprob / len(self.token_ids)

    def choice(self, index: int) -> Choice:
        """Everything so far."""
        return Choice(index, "".join(self._texts), self.token_ids, self._logprobs, self._finish_reason, self._stop_reason)

    def _read(self, message: MessageDelta, text: str) -> None:
        """Add to ``message`` what ``text`` does, and end here where nothing more is wanted."""
        assert self._parser is not None
        message.add(self._parser.push(text))
        if self._parser.done and not self.finished:
            self._finish("stop", None)

    def _check(self, text: str) -> str:
        if self._stop is None:
            return text
        # As for end-of-text tokens, the first min_tokens tokens can't complete a stop string.
        text = self._stop.push(text, allowed=len(self.token_ids) > self._params.min_tokens)
        if self._stop.matched is not None:
            self._finish("stop", self._stop.matched)
        return text

    def _end(self, finish_reason: str, stop_reason: int | str | None) -> str:
        rest = self._check(self._detokenizer.finish()) if self._detokenizer is not None else ""
        if not self.finished:  # the rest may complete a stop string that holds U+FFFD
            self._finish(finish_reason, stop_reason)
            rest += self._stop.flush() if self._stop is not None else ""
        return rest

    def _finish(self, finish_reason: str, stop_reason: int | str | None) -> None:
        self._finish_reason, self._stop_reason, self.finished = finish_reason, stop_reason, True


def spelt_out(tokenizer: Tokenizer | None, token: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
    """Token id → Logprob of one position: ``token``, which is there, then the most likely ones."""

    def text(token_id: int) -> str:
        return "" if tokenizer is None else tokenizer.token_text(token_id)

    value, rank = logprobs.token
    made = {token: Logprob(value, rank, text(token))}
    for rank, (top, value) in enumerate(logprobs.top, start=1):
        if top not in made:
            made[top] = Logprob(value, rank, text(top))
    return made


def prompt_positions(
    tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], scores: Sequence[TokenLogprobs]
) -> list[dict[int, Logprob] | None]:
    """``spelt_out`` for each token of a prompt; None for the first, which nothing predicts."""
    return [None, *(spelt_out(tokenizer, token, entry) for token, entry in zip(prompt_token_ids[1:], scores, strict=True))]


def best_choices(samples: Sequence[OutputAssembler], n: int, first_index: int = 0) -> list[Choice]:
    """The ``n`` samples with the highest mean log-probability, best first, numbered from ``first_index``; where there are no more
    than ``n``, all of them as they come."""
    if len(samples) > n:
        samples = sorted(samples, key=lambda sample: -sample.mean_logprob)[:n]  # stable: the lower index among equals
    return [sample.choice(index) for index, sample in enumerate(samples, start=first_index)]
