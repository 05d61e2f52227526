"""Picture: what watchers are sent. The first one whole, those after it as what has changed.

The whole one carries states and times of all blocks, and all block tables; a change carries those blocks that are different, and the
ends of block tables from the first difference on. Everything else is small, and sent each time.
"""

from __future__ import annotations

from array import array
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any

from quire.core.snapshot import SequenceView, Snapshot

CHUNK = 512
"""Blocks that are compared at once."""
BYTES_OF_TIME = 8


@dataclass(slots=True)
class Picture:
    number: int
    """One more than that of the picture before."""
    generation: int
    """Engines before this one."""
    facts: dict[str, Any]
    """All that is no block and no sequence."""
    snapshot: Snapshot | None = None
    """None where the engine has none to give."""
    tables: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.snapshot is not None:
            self.tables = {_key(view): view.blocks for view in self.snapshot.sequences}


def whole(picture: Picture) -> dict[str, Any]:
    made = {"whole": True, "number": picture.number, **picture.facts}
    if (snapshot := picture.snapshot) is not None:
        made["blocks"] = {"states": b64encode(snapshot.states).decode(), "since": b64encode(snapshot.since).decode()}
        made["sequences"] = [_sequence(view, 0) for view in snapshot.sequences]
    return made


def change(before: Picture, after: Picture) -> dict[str, Any] | None:
    """What makes ``after`` out of ``before``; None where only the whole of it does."""
    old, new = before.snapshot, after.snapshot
    if after.number != before.number + 1 or after.generation != before.generation or (old is None) != (new is None):
        return None
    made = {"whole": False, "number": after.number, **after.facts}
    if old is not None and new is not None:
        if len(new.states) < len(old.states):
            return None
        ids = changed_blocks(old, new)
        since = array("d", new.since)
        made["blocks"] = {"ids": ids, "states": [new.states[i] for i in ids], "since": [since[i] for i in ids]}
        made["sequences"] = [_sequence(view, _common(before.tables.get(_key(view), []), view.blocks)) for view in new.sequences]
    return made


def changed_blocks(old: Snapshot, new: Snapshot) -> list[int]:
    """Ids of blocks whose state, or the time of it, is another."""
    changed: list[int] = []
    before, after = array("d", old.since), array("d", new.since)
    for start in range(0, len(new.states), CHUNK):
        end = min(start + CHUNK, len(new.states))
        times = slice(start * BYTES_OF_TIME, end * BYTES_OF_TIME)
        if old.states[start:end] == new.states[start:end] and old.since[times] == new.since[times]:
            continue
        known = min(end, len(old.states))
        changed += [i for i in range(start, known) if old.states[i] != new.states[i] or before[i] != after[i]]
        changed += range(max(start, known), end)
    return changed


def _common(old: list[int], new: list[int]) -> int:
    """Entries at the beginning that are the same. Tables grow at their end, so mostly all of the old one."""
    if new[: len(old)] == old:
        return len(old)
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))


def _key(view: SequenceView) -> tuple[str, int, int]:
    return view.request_id, view.index, view.row


def _sequence(view: SequenceView, known: int) -> dict[str, Any]:
    return {
        "id": view.request_id, "index": view.index, "row": view.row, "prompt": view.num_prompt, "tokens": view.num_tokens,
        "computed": view.num_computed, "most": view.most_tokens, "cached": view.cached_tokens, "preempted": view.preempted,
        "waits_for": view.waits_for, "known": known, "blocks": view.blocks[known:],
    }  # fmt: skip
