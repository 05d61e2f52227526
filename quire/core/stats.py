"""What the memory and the engine count. Metrics, benchmark, banner and dashboard all read these."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from quire.core.events import PreemptionCause
from quire.core.plan import StepExtent


@dataclass(slots=True)
class StepCounters:
    """Running totals since the start."""

    tokens_sampled: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0
    positions_discarded: int = 0


@dataclass(slots=True)
class StepTimes:
    """Seconds of the engine's clock that steps took, by what they did. Running totals since the start."""

    schedule: float = 0.0
    execute: float = 0.0
    """On the device, without sampling. Where steps overlap: what the engine waited for it."""
    sample: float = 0.0
    """From logits to tokens, where the backend tells it apart."""
    commit: float = 0.0


WaitsFor = Literal["memory", "rows", "prompt", "budget"]
"""See Queue."""


@dataclass(slots=True)
class Queue:
    """Sequences that wait to be started, by what for."""

    memory: int = 0
    rows: int = 0
    """As many run as may."""
    prompt: int = 0
    """Somebody else computes what they would compute next."""
    budget: int = 0
    """The positions of a step, or the prompts that are computed at the same time, are taken."""


@dataclass(slots=True)
class KVCounters:
    """Running totals since the start."""

    prompt_tokens: int = 0
    """Prompt positions of the requests admitted so far; each request's prompt counts once."""
    hit_tokens: int = 0
    """Those that were found in the prefix cache."""
    blocks_copied: int = 0
    """Copies on write, and copies of cached blocks that match in part."""
    blocks_swapped_out: int = 0
    blocks_swapped_in: int = 0
    preempted: dict[PreemptionCause, int] = field(default_factory=lambda: dict.fromkeys(get_args(PreemptionCause), 0))
    """Preemptions by their cause."""
    tokens_recomputed: int = 0
    """Positions computed again because a preemption took them, and the cache had not kept them."""

    @property
    def preemptions(self) -> int:
        return sum(self.preempted.values())

    def copy(self) -> KVCounters:
        return replace(self, preempted=dict(self.preempted))


@dataclass(slots=True, frozen=True)
class KVStats:
    """The KV pool at one moment. Positions are token positions; a block holds ``block_size`` of them, for one group of layers. Where there
    are several (groups.py), a position counts once for each that holds it."""

    num_blocks: int
    block_size: int
    free_blocks: int
    """Blocks without owner, those with cached content included."""
    positions_used: int
    """Positions whose KV was computed and belongs to a running sequence; shared ones count once."""
    cached_blocks: int = 0
    """Free blocks whose content can still be found."""
    shared_blocks: int = 0
    """Blocks with more than one owner."""
    saved_blocks: int = 0
    """Blocks that sharing saves: what all block tables hold, less the blocks that they hold it in."""
    largest_free_run: int = 0
    """The most free blocks with consecutive ids."""
    host_blocks: int = 0
    """Blocks of the swap pool."""
    host_blocks_used: int = 0
    groups: int = 1
    """Of layers."""
    counters: KVCounters = field(default_factory=KVCounters)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - self.free_blocks

    @property
    def positions_allocated(self) -> int:
        """Positions of all blocks that have an owner."""
        return self.used_blocks * self.block_size

    @property
    def empty_tail(self) -> int:
        """Allocated positions that hold nothing: the empty parts of last blocks."""
        return self.positions_allocated - self.positions_used

    @property
    def fragmentation(self) -> float:
        """Share of the free memory that a contiguous allocator could not hand out at once; 0 where nothing is free."""
        return 1 - self.largest_free_run / self.free_blocks if self.free_blocks else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the prefix cache."""
        return self.counters.hit_tokens / self.counters.prompt_tokens if self.counters.prompt_tokens else 0.0


@dataclass(slots=True, frozen=True)
class EngineStats:
    """The engine at one moment; counters run from its start."""

    running: int
    waiting: int
    steps: int
    tokens_computed: int
    """Positions computed, recomputed ones and wrong guesses included."""
    tokens_sampled: int
    kv: KVStats
    tokens_drafted: int = 0
    """Tokens that were guessed, and verified (speculation.py)."""
    tokens_accepted: int = 0
    """Those that were right."""
    positions_discarded: int = 0
    """Positions that were computed for sequences that had ended: it was known only when their next step was in flight."""
    queue: Queue = field(default_factory=Queue)
    extent: StepExtent = field(default_factory=StepExtent)
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def preemptions(self) -> int:
        return self.kv.counters.preemptions

    @property
    def tokens_recomputed(self) -> int:
        return self.kv.counters.tokens_recomputed
