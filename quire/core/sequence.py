"""Request and Sequence: what a client asked, and one stream of tokens of it, counted in tokens.

A sequence knows ``num_tokens`` tokens (prompt and generated) and has computed the KV of the first ``num_computed`` of
them. A step computes some of the difference. There is no prefill and no decode: a prompt, a chunk of it, the one new
token, the recompute after a preemption are all the same case.

    tokens        [ prompt ........................ | generated ....... ]
    num_computed  [ KV in blocks ......... ]
    the next step                           [ count ]  the last position's logits give a token once all are computed

Where a fork or a prefix hit brings the KV of every known token, the last position is computed again, without writing: its
logits are still wanted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from quire.core.beam import BeamSearch
from quire.core.content import Node
from quire.core.plan import Pooling
from quire.errors import InvalidRequestError
from quire.outputs import TokenLogprobs
from quire.sampling_params import SamplingParams, integer, number

if TYPE_CHECKING:
    from quire.core.constraint import Constraint
    from quire.core.speculation import Drafter

EVERYTHING = 1 << 62
MAX_RETENTION_S = 86400
MAX_PRIORITY = (1 << 31) - 1
MAX_CACHE_SALT = 128


@dataclass(slots=True, frozen=True)
class Retention:
    """A wish that what a request computes stays in the prefix cache. It decays, and pins nothing."""

    priority: int
    """1 to 100: the content is passed over up to log2(priority) + 1 times when its turn to go comes and there is other content."""
    seconds: float
    """Above 0, at most 86,400. Afterwards it is content like any other."""

    def __post_init__(self) -> None:
        integer("retention.priority", self.priority, 1, 100)
        if number("retention.seconds", self.seconds, 0, MAX_RETENTION_S) == 0:
            raise InvalidRequestError("retention.seconds must be above 0, got 0", param="retention.seconds")


@dataclass(slots=True, frozen=True)
class Request:
    """What a client asked. Ends in exactly one final output for each of its ``params.n`` samples."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """0 <= seed < 2**64; drawn by the caller where ``params.seed`` is None, and kept for the request's life."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end-of-text tokens."""
    priority: int = 0
    """Lower runs earlier, preempts higher where it waits, and is preempted later."""
    salt: bytes = b""
    """Only requests with the same salt share cached prefixes."""
    retention: Retention | None = None
    pooling: Pooling | None = None
    """The prompt's hidden states are wanted, as one vector. ``params.max_tokens`` is 0 then, and ``params.n`` 1."""

    def __post_init__(self) -> None:
        integer("priority", self.priority, -MAX_PRIORITY - 1, MAX_PRIORITY)

    def scored(self) -> range:
        """Positions of the prompt that are scored; see RowWork.score. Those before them may come from the cache."""
        count = len(self.prompt_token_ids)
        if self.pooling is not None:
            return range(count - 1 if self.pooling == "last" else 0, count)
        return range(count - 1) if self.params.prompt_logprobs is not None else range(0)


def salt_bytes(cache_salt: str | None) -> bytes:
    """A user's ``cache_salt`` as a request has it; empty for None. Raises InvalidRequestError."""
    if cache_salt is None:
        return b""
    if not isinstance(cache_salt, str) or not 0 < len(cache_salt) <= MAX_CACHE_SALT:
        got = f"{len(cache_salt):,} characters" if isinstance(cache_salt, str) else f"{cache_salt!r:.60}"
        raise InvalidRequestError(f"cache_salt must be a text of 1 to {MAX_CACHE_SALT} characters, got {got}", param="cache_salt")
    return cache_salt.encode("utf-8", "surrogatepass")


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Group:
    """The live sequences of one request: they share its prompt's blocks."""

    request: Request
    added: float = 0.0
    """When it was queued, by the engine's clock."""
    sequences: list[Sequence] = field(default_factory=list)
    search: BeamSearch | None = None
    """Set where the sequences are beams; ``sequences`` are in the search's order then."""
    cached_tokens: int | None = None
    """Positions of the prompt that its first sequence found in the cache; None before it was admitted."""
    queued_s: float = 0.0
    """Seconds until then."""
    preemptions: int = 0
    """Of its sequences, so far."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One stream of tokens. Only the scheduler changes it; only the block manager changes what is below the line."""

    group: Group
    request: Request
    index: int
    tokens: list[int]
    num_prompt: int
    seed: int
    max_tokens: int
    """Tokens to generate at most: the request's limit or what the context leaves."""
    params: SamplingParams
    """As the backend gets them."""
    order: tuple[int, int, int] = (0, 0, 0)
    """(priority, arrival, index): who comes first, in the queue and in a step; who comes last is preempted first."""
    row: int = -1
    """Row in the backend's tables while RUNNING, else -1."""
    status: Status = Status.WAITING
    started: bool = False
    """The backend knows the row."""
    unsent: list[int] = field(default_factory=list)
    """Newest tokens that the backend does not know: those that a beam search chose, or that a constraint forces."""
    candidates: list[tuple[int, float]] | None = None
    """Of a beam: its most likely next tokens, until all beams have theirs."""
    held: tuple[Sequence, int] | None = None
    """While waiting: who computes the tokens that it would compute next, and how many positions they have in common."""
    lack: int | None = None
    """While waiting: positions that it would have to compute, when it was last looked at; None before."""
    in_flight: int = 0
    """Tokens that launched steps bring at most, and nobody has read yet. A beam's candidates, and the end of a prompt of which nothing
    is generated, count as one."""
    first_output: bool = True
    """Nothing was put out yet."""
    num_lost: int = 0
    """Computed positions that the last preemption took."""
    unscored: range = range(0)
    """Positions of the prompt whose scores are still to come. It computes them itself."""
    scores: list[TokenLogprobs] | None = None
    """Those of the prompt so far, until they are put out; None where none are wanted."""
    vector: list[float] | None = None
    constraint: Constraint | None = None
    """Which tokens may come next; None: any."""
    drafter: Drafter | None = None
    """Guesses its next tokens; None before it was asked to."""
    # ---- the block manager's
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    """Logical block → physical block ids, one for each group of layers. Holds every position below num_computed, but for those before the
    sliding window of windowed groups, where it has -1."""
    num_sent: int = 0
    """Logical blocks that the backend knows."""
    num_trimmed: int = 0
    """Logical blocks of which windowed groups gave theirs back, from the first on."""
    num_borrowed: int = 0
    """Logical blocks that came from the cache or a fork, and may have other owners."""
    shared_tail: bool = False
    """The last block may have other owners: look before writing."""
    node: Node | None = None
    """Content of the last published whole block; None while it holds no blocks, or publishes none."""
    num_published: int = 0
    """Whole logical blocks that were published."""
    publish_at: int = 1 << 62
    """num_computed at which the next block is to be published."""
    host_blocks: list[int] | None = None
    """Where its blocks are in the swap pool, while it is swapped out."""
    num_swapped: int = 0
    """Computed positions that they hold."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def waits(self) -> bool:
        """Its next step can't be planned before what is in flight is read: by that its next mask or its beams are decided, or how much
        of a draft is right."""
        return self.in_flight > 0 and (self.constraint is not None or self.group.search is not None or self.in_flight > 1)

    @property
    def ends(self) -> bool:
        """What is in flight is the last of it, whatever it is."""
        return self.in_flight > 0 and len(self.tokens) - self.num_prompt + self.in_flight >= self.max_tokens

    @property
    def findable(self) -> int:
        """Positions that it may take from the cache or from others."""
        return self.unscored.start if self.unscored else EVERYTHING

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that min_tokens bans: end-of-text (also where it is ignored as an end) and stop tokens."""
        return (*self.request.eos_token_ids, *(self.request.params.stop_token_ids or ()))

    @property
    def num_banned(self) -> int:
        """Candidates of a beam that min_tokens may take away, though the search does not end with them."""
        params = self.request.params
        return len(self.request.eos_token_ids) if params.ignore_eos and params.min_tokens else 0

    def end_reason(self) -> tuple[str, int | None] | None:
        """(finish_reason, stop_reason) if the newest token ends the sequence, else None."""
        params, token = self.request.params, self.tokens[-1]
        generated = len(self.tokens) - self.num_prompt
        if generated >= params.min_tokens:
            if params.stop_token_ids and token in params.stop_token_ids:
                return "stop", token
            if token in self.request.eos_token_ids and not params.ignore_eos:
                return "stop", None
        if generated >= self.max_tokens:
            return "length", None
        return None


def derive_seed(seed: int, index: int) -> int:
    """Seed of the request's index-th sequence: the request's own for the first, then spread by an odd constant (Weyl)."""
    return (seed + index * 0x9E3779B97F4A7C15) % (1 << 64)


def request_seed(seed: int, number: int) -> int:
    """Seed of the ``number``-th request that brought none of its own: the same work with the same ``seed`` repeats itself."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little")
