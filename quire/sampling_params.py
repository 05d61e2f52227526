"""SamplingParams: how the tokens of one request are chosen. Validated here and nowhere else.

Names and defaults are vLLM's, so that scripts move over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quire.errors import InvalidRequestError
from quire.structured import Structured

MAX_N = 128
MAX_BEAMS = 32
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 1024
MAX_TOKENS = 1 << 30
MAX_SEED = (1 << 64) - 1


def _shown(value: object) -> str:
    """``value`` in a message."""
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python spells out no integer of more digits
        return "a number of more than 4,300 digits"


def number(name: str, value: object, low: float, high: float, hint: str = "") -> float:
    """``value`` as a float within [low, high]; refuses booleans, strings, NaN and infinities."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{name} must be a number, got {value!r:.60}", param=name)
    # A comparison of an int with a float is exact in Python, so a huge int can't overflow here.
    if not (low <= value <= high):  # NaN fails this too
        bounds = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise InvalidRequestError(f"{name} must be {bounds}, got {_shown(value)}{hint}", param=name)
    return float(value)


def integer(name: str, value: object, low: int, high: int, hint: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, got {value!r:.60}", param=name)
    if not (low <= value <= high):
        raise InvalidRequestError(f"{name} must be from {low} to {high}, got {_shown(value)}{hint}", param=name)
    return value


def _list(name: str, values: object, limit: int) -> Sequence[object]:
    """``values`` as a list of at most ``limit`` entries; None is empty."""
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InvalidRequestError(f"{name} must be a list, got {values!r:.60}", param=name)
    if len(values) > limit:
        raise InvalidRequestError(f"{name} has {len(values)} entries; at most {limit} are allowed", param=name)
    return values


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    The order in which they act on a row of logits: structured, allowed_token_ids, bad_words and min_tokens (which ban tokens),
    logit_bias, repetition/frequency/presence penalties, temperature, min_p, top_k, top_p, then one draw keyed by (seed, position).

    Raises InvalidRequestError, naming the parameter, the value and what is allowed.
    """

    n: int = 1
    """Number of samples for the prompt."""
    best_of: int | None = None
    """Generate this many samples, and return the ``n`` of them with the highest mean log-probability; None: ``n``."""
    use_beam_search: bool = False
    """Search for the most likely outputs instead of sampling; the results are those of transformers' beam search."""
    beam_width: int | None = None
    """Number of beams; None: ``best_of``, or ``n``. A number switches use_beam_search on."""
    length_penalty: float = 1.0
    """Beams are ranked by the sum of their log-probabilities / length ** length_penalty: above 0 prefers longer outputs."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search stops, once it has as many outputs as beams: True at once, False when no better one is likely,
    "never" when no better one is possible."""
    temperature: float = 1.0
    """0 is greedy: the most likely token, the lowest id among equals."""
    top_p: float = 1.0
    """The smallest set of most likely tokens whose probability reaches top_p is kept; in (0, 1]."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Tokens less likely than min_p times the most likely one are dropped."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    """Token id → value added to its logit, -100 to 100."""
    seed: int | None = None
    """None: the engine gives the request one at admission."""
    max_tokens: int | None = 16
    """Most tokens to generate for each sample; None: as many as the context holds. 0 computes the prompt, and generates nothing."""
    min_tokens: int = 0
    """End-of-text and stop tokens can't be chosen before this many tokens."""
    stop: tuple[str, ...] | list[str] | str | None = ()
    """Strings that end the output when they appear in it; they may span tokens."""
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    ignore_eos: bool = False
    structured: Structured | None = None
    """The form that the output must have: JSON, a regular expression, a choice, a grammar. It ends when it is complete, whatever
    min_tokens and ignore_eos say; before that end-of-text is possible where the form may end."""
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    """Only these tokens may be generated. End-of-text has to be among them, or the output ends with max_tokens."""
    bad_words: tuple[str, ...] | list[str] | None = ()
    """Words that are not completed in the output: the last token of a word is banned where those before it stand. Each as the
    tokenizer spells it at the start of a text and after a space; spelt with other tokens it is not noticed."""
    logprobs: int | None = None
    """Number of most likely tokens to report for each position besides the chosen one; None reports nothing."""
    prompt_logprobs: int | None = None
    """Number of most likely tokens to report for each position of the prompt besides its own token; None reports nothing."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stop_strings: tuple[str, ...] = field(init=False, default=(), repr=False)
    """``stop``, normalised to a tuple."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        integer("n", self.n, 1, MAX_N)
        self._beams(put)
        put("temperature", number("temperature", self.temperature, 0.0, 100.0, ": 0 is greedy, 1 leaves the model's own distribution"))
        put("top_p", number("top_p", self.top_p, 0.0, 1.0, ": 1 keeps every token"))
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be above 0, got 0: use temperature=0 for greedy decoding", param="top_p")
        integer("top_k", self.top_k, -1, MAX_TOKENS, ": 0 or -1 keeps every token")
        put("min_p", number("min_p", self.min_p, 0.0, 1.0))
        put("presence_penalty", number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, ": 1 is off"))
        if self.seed is not None:
            integer("seed", self.seed, -(1 << 63), MAX_SEED)
        if self.max_tokens is not None:
            integer("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens {self.min_tokens} > max_tokens {self.max_tokens}: lower min_tokens or raise max_tokens", param="min_tokens"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "use_beam_search"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"{name} must be true or false, got {getattr(self, name)!r:.60}", param=name)
        put("stop_token_ids", self._token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        if self.allowed_token_ids is not None:
            allowed = self._token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            put("allowed_token_ids", tuple(dict.fromkeys(allowed)))
            if not self.allowed_token_ids:
                raise InvalidRequestError("allowed_token_ids is empty: name at least one token, or leave it out", param="allowed_token_ids")
        put("bad_words", self._texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS))
        if self.structured is not None and not isinstance(self.structured, Structured):
            raise InvalidRequestError(f"structured must be a Structured, got {self.structured!r:.60}", param="structured")
        put("logit_bias", self._bias())
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        put("stop_strings", self._texts("stop", stops, MAX_STOP_STRINGS, MAX_STOP_CHARS))
        put("stop", self.stop_strings)

    @property
    def num_beams(self) -> int:
        """Width of the beam search."""
        return self.beam_width or self.best_of or self.n

    @property
    def num_sequences(self) -> int:
        """Samples to generate, of which ``n`` are returned."""
        return self.best_of or self.n

    @property
    def num_outputs(self) -> int:
        """Sequences that the engine reports on, by index from 0: the beams to return, or the samples to choose from."""
        return self.n if self.use_beam_search else self.num_sequences

    @property
    def constrained(self) -> bool:
        """Which tokens may come next depends on those before them, or is not all of the vocabulary."""
        return self.structured is not None or self.allowed_token_ids is not None or bool(self.bad_words)

    def _beams(self, put: Callable[[str, object], None]) -> None:
        if self.best_of is not None:
            integer("best_of", self.best_of, 1, MAX_N)
            if self.best_of < self.n:
                raise InvalidRequestError(f"best_of {self.best_of} < n {self.n}: raise best_of, or lower n", param="best_of")
        if self.beam_width is not None:
            integer("beam_width", self.beam_width, 1, MAX_BEAMS)
            put("use_beam_search", True)
        put("length_penalty", number("length_penalty", self.length_penalty, -10.0, 10.0, ": 0 ranks beams by their sum"))
        if self.early_stopping not in (True, False, "never") or isinstance(self.early_stopping, int | float) != isinstance(
            self.early_stopping, bool
        ):
            raise InvalidRequestError(
                f'early_stopping must be true, false or "never", got {self.early_stopping!r:.60}', param="early_stopping"
            )
        if self.use_beam_search is not True:
            return
        integer("beam_width", self.num_beams, 1, MAX_BEAMS)
        if self.num_beams < self.n:
            raise InvalidRequestError(f"beam_width {self.num_beams} < n {self.n}: raise beam_width, or lower n", param="beam_width")
        if isinstance(self.logprobs, int) and self.logprobs > 0:
            raise InvalidRequestError(
                f"logprobs={_shown(self.logprobs)} is not there for beam search, which reports the chosen tokens' only: use logprobs=0",
                param="logprobs",
            )
        if self.prompt_logprobs is not None:
            raise InvalidRequestError(
                "log-probabilities of the prompt (prompt_logprobs, or echo with logprobs) are not there for beam search",
                param="prompt_logprobs",
            )
        if self.max_tokens == 0:
            raise InvalidRequestError("max_tokens 0 leaves a beam search nothing to search: raise it", param="max_tokens")
        # Temperatures 0 and 1 both leave the model's own distribution, which is what is searched.
        plain: dict[str, tuple[Any, ...]] = {"temperature": (0, 1), "top_p": (1,), "top_k": (0, -1), "repetition_penalty": (1,)}
        plain |= {"min_p": (0,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": (None,), "stop": ((), [], None)}
        plain |= {"allowed_token_ids": (None,), "bad_words": ((), [], None)}
        if isinstance(self.structured, Structured):
            raise self.structured.error("a beam search can't follow a form: leave one of them out")
        for name, allowed in plain.items():
            if getattr(self, name) not in allowed and not (name == "logit_bias" and not self.logit_bias):
                raise InvalidRequestError(
                    f"{name}={getattr(self, name)!r:.60} has no effect on beam search, which ranks the model's "
                    "own probabilities: leave it out",
                    param=name,
                )

    @staticmethod
    def _token_ids(name: str, values: object, limit: int) -> tuple[int, ...]:
        return tuple(integer(name, i, 0, (1 << 31) - 1) for i in _list(name, values, limit))

    def _bias(self) -> dict[int, float] | None:
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r:.60}", param="logit_bias")
        _list("logit_bias", list(self.logit_bias), MAX_LOGIT_BIAS)
        bias = {
            integer("logit_bias", token, 0, (1 << 31) - 1): number("logit_bias", value, -100.0, 100.0)
            for token, value in self.logit_bias.items()
        }
        return bias or None

    @staticmethod
    def _texts(name: str, values: object, limit: int, max_chars: int) -> tuple[str, ...]:
        texts = _list(name, values, limit)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(f"{name} must hold non-empty strings, got {text!r:.60}", param=name)
            if len(text) > max_chars:
                raise InvalidRequestError(f"{name} has a string of {len(text)} characters; at most {max_chars} are allowed", param=name)
        return tuple(text for text in texts if isinstance(text, str))
