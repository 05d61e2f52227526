"""What happens to blocks and sequences, as a stream of plain values for whoever listens: metrics, routers, the dashboard.

Of content that takes a block for each of several groups of layers, the first group's block is spoken of.

Nothing is made while nobody listens. ``content`` numbers identify what a block holds: the same number is never given to
other content, and a content's parent is the content of the block before it (0: the start of a prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True, frozen=True)
class BlockStored:
    """A block's content can be found by others from now on. A partly filled block is stored again when it has grown."""

    block: int
    content: int
    parent: int
    tokens: tuple[int, ...]
    salt: bytes
    """Who may find it: requests with this salt. Empty: everybody."""


@dataclass(slots=True, frozen=True)
class BlockRemoved:
    """A block's content can't be found any more, though the block was not handed out: the cache was reset, or the same tokens
    are stored elsewhere."""

    block: int
    content: int


@dataclass(slots=True, frozen=True)
class BlockEvicted:
    """An idle block was handed out for something else; its content is gone."""

    block: int
    content: int
    """0: it was not the first group's."""


@dataclass(slots=True, frozen=True)
class BlockShared:
    """A sequence became one more owner of a block: by a prefix hit, or by a fork."""

    block: int
    owners: int


@dataclass(slots=True, frozen=True)
class BlockCopied:
    """A block was copied: on a write by one of several owners, or because only its first tokens match a new prompt."""

    source: int
    destination: int


PreemptionCause = Literal["memory", "order", "beams", "device"]
"""No free block was left; somebody who comes before it arrived; beams that waited for another beam held what that one needs;
the device had no memory left to compute a step."""


@dataclass(slots=True, frozen=True)
class Preempted:
    """A sequence gave its blocks back before its end."""

    request_id: str
    index: int
    positions: int
    """Computed positions that it held."""
    swapped: bool
    """They went to the swap pool; otherwise what is not found in the prefix cache is computed again."""
    cause: PreemptionCause
    reason: str
    """The cause in words, with the names of those involved."""

    def __str__(self) -> str:
        fate = "swapped out" if self.swapped else "to be computed again where the prefix cache loses them"
        return (
            f"request {self.request_id}, sequence {self.index}, was preempted: {self.positions:,} computed positions {fate}; {self.reason}"
        )


Event = BlockStored | BlockRemoved | BlockEvicted | BlockShared | BlockCopied | Preempted
Listener = Callable[[Event], None]


def chain(listeners: Sequence[Listener]) -> Listener | None:
    """One listener that tells all of ``listeners``, in order; None where there are none, so that no event is made."""
    if len(listeners) <= 1:
        return listeners[0] if listeners else None
    told = tuple(listeners)

    def tell(event: Event) -> None:
        for listener in told:
            listener(event)

    return tell
