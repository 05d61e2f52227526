"""What a request must satisfy before it enters the engine, and when a waiting sequence may start.

May the head of the queue start, when nobody knows how long the running sequences will get? A sequence takes one more position
a step until it ends; then all of its blocks come back. Admitting too many means that the pool runs dry and a victim is
preempted, and what it had computed is computed again; admitting too few leaves memory empty. Three answers:

    Watermark    what is needed now, and a share of the pool stays free
    NoEvict      the peak if every sequence runs to its limit: exact where nothing is shared and prompts take one step
    PastFuture   the peak expected from the lengths seen so far, and a margin for chance (past_future.py)

A policy counts blocks to come; that a candidate's blocks are free now is for admitting.py to check. In a step:

    policy.survey(footprints of the running sequences, free blocks)
    while the queue's head fits and policy.admits(its footprint): start it

and ``policy.ended(...)`` whenever a sequence ends.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Protocol

from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.sequence import Sequence
from quire.errors import ContextLengthError, InvalidRequestError
from quire.sampling_params import SamplingParams


def empty_prompt() -> InvalidRequestError:
    """For a prompt without tokens, and for an empty text, also where the tokenizer would put a token before it."""
    return InvalidRequestError("the prompt is empty: it must hold at least one token", param="prompt")


@dataclass(slots=True, frozen=True)
class RequestLimits:
    """What every request of an engine is checked against, before any work is done for it."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    groups: KVGroups = ONE_GROUP

    @property
    def pool_tokens(self) -> int:
        """The longest sequence that the pool holds, or as many shorter ones as fill it if no layer has a window."""
        return self.groups.positions(self.num_blocks, self.block_size)

    def check(self, prompt_token_ids: list[int], params: SamplingParams, eos_token_ids: tuple[int, ...] = ()) -> None:
        """Raises InvalidRequestError or ContextLengthError with the numbers and the remedy."""
        prompt, context = len(prompt_token_ids), self.max_model_len
        if prompt == 0:
            raise empty_prompt()
        for token in prompt_token_ids:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"prompt token id {token} is out of range: the vocabulary has ids 0 to {self.vocab_size - 1}", param="prompt"
                )
        most = context if params.max_tokens == 0 else context - 1
        if prompt > most:
            raise ContextLengthError(
                f"the prompt has {prompt:,} tokens, but the context is {context:,}, output included: shorten the prompt to at most "
                f"{most:,} tokens, or serve with a longer --max-model-len if the model allows it",
                param="prompt", prompt=prompt, most=most,
            )  # fmt: skip
        room = context - prompt
        if params.min_tokens > room:
            raise ContextLengthError(
                f"prompt {prompt:,} + min_tokens {params.min_tokens:,} > context {context:,}: lower min_tokens to at most {room:,}",
                param="min_tokens",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise ContextLengthError(
                f"prompt {prompt:,} + max_tokens {params.max_tokens:,} > context {context:,}: lower max_tokens to at most {room:,}, "
                "or serve with a longer --max-model-len if the model allows it",
                param="max_tokens",
            )
        lists = {"stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias, "allowed_token_ids": params.allowed_token_ids}
        for name, ids in lists.items():
            for token in ids or ():
                if token >= self.vocab_size:
                    raise InvalidRequestError(
                        f"{name}: token id {token} is out of range: the vocabulary has ids 0 to {self.vocab_size - 1}", param=name
                    )
        allowed = params.allowed_token_ids
        if allowed and params.min_tokens and set(allowed) <= {*eos_token_ids, *(params.stop_token_ids or ())}:
            raise InvalidRequestError(
                f"allowed_token_ids holds nothing but tokens that end the output, and min_tokens {params.min_tokens:,} bans those: allow "
                "others, or leave out min_tokens",
                param="allowed_token_ids",
            )
        if params.use_beam_search:
            self._check_beams(prompt, params.num_beams, self.max_tokens(prompt_token_ids, params))

    def max_tokens(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """Tokens that a checked request may generate for each sequence."""
        room = self.max_model_len - len(prompt_token_ids)
        return room if params.max_tokens is None else params.max_tokens

    def _check_beams(self, prompt: int, width: int, max_tokens: int) -> None:
        """All beams must be able to run at the same time, with nothing shared but the prompt."""
        shared = self.groups.full * (prompt // self.block_size)
        need = shared + width * (self.groups.blocks(prompt + max_tokens, self.block_size) - shared)
        if width > self.max_num_seqs:
            raise InvalidRequestError(
                f"{width} beams > --max-num-seqs {self.max_num_seqs}: beams run together; lower beam_width, or serve with more sequences",
                param="beam_width",
            )
        if need > self.num_blocks:
            raise InvalidRequestError(
                f"{width} beams of up to {prompt + max_tokens:,} tokens may need {need:,} KV blocks of {self.block_size}, but the pool has "
                f"{self.num_blocks:,}: lower beam_width or max_tokens, or serve with more --kv-memory",
                param="beam_width",
            )


class Footprint(NamedTuple):
    """What a policy knows of a sequence. A tuple, since one is made for each running sequence at a survey."""

    held: int
    """Blocks that come back when it ends (those that nobody else owns), of all groups of layers."""
    generated: int
    positions: int
    """Tokens now, with those that are not computed yet."""
    remaining: int
    """Most tokens that it may still generate."""
    shared: int = 0
    """Logical blocks of its table that others own too: not counted again. Where all groups have a window, those as well that have left it
    when its positions are computed."""


def footprint(seq: Sequence, block_size: int, groups: KVGroups = ONE_GROUP) -> Footprint:
    """Of a running sequence. What it borrowed is not counted: others may hold it when it ends."""
    generated = len(seq.tokens) - seq.num_prompt
    others = shared = seq.num_borrowed
    if groups.windowed:
        others = max(others, seq.num_trimmed)
        shared = _shared(shared, seq, block_size, groups)
    if groups.full + groups.windowed == 1:
        return Footprint(len(seq.block_table) - others, generated, len(seq.tokens), seq.max_tokens - generated, shared)
    have = len(seq.block_table) // groups.width
    held = groups.full * (have - seq.num_borrowed) + groups.windowed * (have - others)
    return Footprint(held, generated, len(seq.tokens), seq.max_tokens - generated, shared)


def expected_footprint(seq: Sequence, shared: int, block_size: int, groups: KVGroups = ONE_GROUP) -> Footprint:
    """Of a waiting sequence that would begin with ``shared`` blocks which others own."""
    shared = _shared(shared, seq, block_size, groups)
    return Footprint(0, seq.num_generated, seq.num_tokens, seq.max_tokens - seq.num_generated, shared)


def _shared(shared: int, seq: Sequence, block_size: int, groups: KVGroups) -> int:
    """See Footprint. A prompt that is longer than all windows would else wait for memory that it never fills."""
    return shared if groups.full else max(shared, groups.first_visible(len(seq.tokens)) // block_size)


class Weights:
    """What positions weigh, where groups of layers that see everything stand beside others that have a window: policies count in positions
    of the former, and what the latter hold is so many positions more. 0 where there is one kind alone; where all groups have a window,
    a sequence counts as if it grew on and on."""

    def __init__(self, block_size: int, groups: KVGroups) -> None:
        self.unit = groups.full or groups.windowed
        """Blocks that ``block_size`` positions take."""
        mixed = groups.full > 0 and groups.windowed > 0
        self.ratio = groups.windowed / groups.full if mixed else 0.0
        """Positions that each position weighs beside itself, up to ``reach``."""
        self.reach = block_size * groups.most_windowed(block_size, 1) if mixed else 0

    def extra(self, positions: int) -> int:
        """What the windowed groups of a sequence of ``positions`` weigh."""
        return ceil(self.ratio * min(positions, self.reach))


class AdmissionPolicy(Protocol):
    """The decisions of one step: ``survey`` once, then ``admits`` for one candidate after another."""

    def survey(self, running: Iterable[Footprint], free: int) -> None:
        """Look at the pool: who runs, and how many blocks are free."""

    def admits(self, candidate: Footprint) -> bool:
        """Whether it may start beside the others. If so it counts as running from here on."""

    def room(self) -> int:
        """Blocks that nobody is expected to need soon: a prompt that does not fit may begin in them. May be negative."""

    def ended(self, generated: int, stopped: bool) -> None:
        """A sequence ended after ``generated`` tokens; ``stopped``: by its own will, not by a limit."""


class Watermark:
    """Admit what fits now, while a share of the pool stays free for the running ones to grow into."""

    def __init__(self, block_size: int, groups: KVGroups = ONE_GROUP, share: float = 0.01) -> None:
        self._block_size = block_size
        self._weights = Weights(block_size, groups)
        self._share = share
        self._left = 0
        self._reserve = 0
        self._keep = 0

    def survey(self, running: Iterable[Footprint], free: int) -> None:
        self._left = capacity = free
        empty = True
        for seq in running:
            self._left -= max(0, self._blocks(seq) - seq.held)  # what its prompt still lacks
            capacity += seq.held
            empty = False
        self._keep = int(capacity * self._share)
        self._reserve = 0 if empty else self._keep

    def admits(self, candidate: Footprint) -> bool:
        left = self._left + candidate.held - self._blocks(candidate)
        if left < self._reserve:
            return False
        self._left, self._reserve = left, self._keep
        return True

    def _blocks(self, seq: Footprint) -> int:
        """That it takes by itself for the positions which it has now."""
        positions = seq.positions + self._weights.extra(seq.positions)
        return self._weights.unit * (-(-positions // self._block_size) - seq.shared)

    def room(self) -> int:
        return self._left - self._reserve

    def ended(self, generated: int, stopped: bool) -> None:
        pass


class NoEvict:
    """Admit only what fits when every sequence runs to its limit. Never preempts where sequences share nothing and each prompt is
    computed in one step; sharing and chunks move the peak a little, and then a preemption can happen.

    All advance together, so use grows until a sequence ends, and the peak is just before one of the ends. With the
    sequences in order of remaining tokens r_1 >= r_2 >= ..., of p_j positions each (LightLLM's ``need_max_token_num``,
    arXiv 2507.10150 section 3, here exact in blocks of B):

        peak = max over i of  sum over j <= i of ceil((p_j + r_i) / B)

    ``ceil((p + t) / B)`` is p // B + t // B plus 0, 1 or 2, by p % B + t % B alone; a sorted list of the p % B gives the sum
    without a second loop. O(n log n) a decision.
    """

    def __init__(self, block_size: int, groups: KVGroups = ONE_GROUP) -> None:
        self._block_size = block_size
        self._weights = Weights(block_size, groups)
        self._capacity = 0
        self._running: list[tuple[int, int]] = []  # (-remaining, positions that count), sorted

    def survey(self, running: Iterable[Footprint], free: int) -> None:
        self._capacity = free
        self._running.clear()
        for seq in running:
            self._capacity += seq.held
            self._running.append(self._item(seq))
        self._running.sort()

    def admits(self, candidate: Footprint) -> bool:
        self._capacity += candidate.held
        item = self._item(candidate)
        insort(self._running, item)
        if self._weights.unit * self.peak() <= self._capacity:
            return True
        self._running.remove(item)
        self._capacity -= candidate.held
        return False

    def peak(self) -> int:
        """Blocks of the groups' unit that the surveyed and admitted sequences hold together at their worst moment."""
        size = self._block_size
        peak = whole = 0
        parts: list[int] = []
        for count, (minus_remaining, positions) in enumerate(self._running, 1):
            blocks, part = divmod(positions, size)
            whole += blocks
            insort(parts, part)
            blocks, part = divmod(-minus_remaining, size)
            begun = count if part else count - bisect_left(parts, 1)  # p % B + t % B > 0
            twice = count - bisect_right(parts, size - part)  # p % B + t % B > B
            peak = max(peak, whole + count * blocks + begun + twice)
        return peak

    def room(self) -> int:
        return self._capacity - self._weights.unit * self.peak()

    def ended(self, generated: int, stopped: bool) -> None:
        pass

    def _item(self, seq: Footprint) -> tuple[int, int]:
        most = self._weights.extra(seq.positions + seq.remaining)
        return -seq.remaining, seq.positions + most - seq.shared * self._block_size
