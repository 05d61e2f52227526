"""What to change when something is the bottleneck, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from quire.core.admission import RequestLimits
from quire.core.snapshot import Snapshot

ROOM = 0.3
"""Share of the pool that is free when more sequences might as well run."""


def advice(snapshot: Snapshot, limits: RequestLimits, preemptions: int) -> Iterator[str]:
    """``preemptions``: those of the last minute."""
    kv, queue = snapshot.stats.kv, snapshot.stats.queue
    if count := queue.memory:
        yield (
            f"{_sequences(count)} for memory: {kv.used_blocks:,} of {kv.num_blocks:,} blocks are in use, and what runs is expected to need "
            f"the rest. Raise --kv-memory; or lower --max-model-len (now {limits.max_model_len:,}) or the clients' max_tokens; "
            "--kv-dtype int8 holds nearly twice as many tokens as float16."
        )
    if preemptions:
        what = "1 sequence" if preemptions == 1 else f"{preemptions:,} sequences"
        yield (
            f"{what} had to give memory back in the last minute, and will compute part of it again. Raise --kv-memory, lower "
            "--max-num-seqs, or serve with --admission no-evict, under which hardly anybody is preempted for want of memory."
        )
    if (count := queue.rows) and kv.free_blocks > ROOM * kv.num_blocks:
        yield (
            f"{_sequences(count)} though {kv.free_blocks:,} of {kv.num_blocks:,} blocks are free: --max-num-seqs {limits.max_num_seqs:,} "
            "run already. Raise it if tokens/s still grow with more of them."
        )


def _sequences(count: int) -> str:
    return "1 sequence waits" if count == 1 else f"{count:,} sequences wait"
