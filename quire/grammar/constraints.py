"""Constraints: makes the constraint of each sequence, and remembers the forms that it has compiled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from quire.grammar.constraint import Constraint
from quire.grammar.program import compile_structured
from quire.grammar.vocabulary import Tokenizer, Vocabulary
from quire.sampling_params import SamplingParams
from quire.structured import Structured

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_PROGRAMS = 64


class Constraints:
    """For a model whose tokenizer ``load`` gives; it is called when it is needed first.

    ``prepare`` may be called on another thread than ``open``: what takes time is done there then.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._load = load
        self._vocab_size, self._eos_token_ids = vocab_size, tuple(eos_token_ids)
        self._vocabulary: Vocabulary | None = None
        self._programs: OrderedDict[Structured, LLMatcher] = OrderedDict()
        """At the start of the form; used as a pattern, and never advanced."""
        self._lock = Lock()

    def prepare(self, structured: Structured | None) -> None:
        """Load and compile what ``open`` will need. Raises InvalidRequestError."""
        self._loaded()
        if structured is not None:
            self._program(structured)

    def _program(self, structured: Structured) -> LLMatcher:
        with self._lock:
            if (program := self._programs.get(structured)) is not None:
                self._programs.move_to_end(structured)
                return program
        program = compile_structured(structured, self._loaded())
        with self._lock:
            self._programs[structured] = program
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        return program

    def open(self, params: SamplingParams, made: Sequence[int]) -> Constraint:
        """For a sequence that has generated ``made``. Raises InvalidRequestError, or EngineError where they are not allowed."""
        vocabulary = self._loaded()
        matcher = None
        if params.structured is not None:
            matcher = self._program(params.structured).deep_copy()
        allowed = None if params.allowed_token_ids is None else vocabulary.masks.of(params.allowed_token_ids)
        words = [ids for word in params.bad_words or () for ids in vocabulary.spellings(word)]
        return Constraint(vocabulary.masks, matcher, allowed, words, made, ignore_eos=params.ignore_eos)

    def _loaded(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._load(), self._vocab_size, self._eos_token_ids)
            return self._vocabulary
