"""What the memory and the engine count. Metrics, benchmark and banner all read these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class KVStats:
    """The KV pool at one moment. Positions are token positions; a block holds ``block_size`` of them."""

    num_blocks: int
    block_size: int
    free_blocks: int
    positions_used: int
    """Positions whose KV was computed and belongs to a running sequence."""

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


@dataclass(slots=True, frozen=True)
class EngineStats:
    """The engine at one moment; counters run from its start."""

    running: int
    waiting: int
    steps: int
    tokens_computed: int
    """Positions computed, recomputed ones included."""
    tokens_sampled: int
    preemptions: int
    tokens_recomputed: int
    """Positions whose KV was thrown away by preemptions."""
    kv: KVStats
