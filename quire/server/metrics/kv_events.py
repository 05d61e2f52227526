"""What the prefix cache holds, told to routers in the form of vLLM's KV events, so that a prompt goes where it is warm.

Three events: blocks were stored (with their tokens, under the block before them), blocks were removed, everything is gone. Only whole
blocks are told of; and only content without a salt, which is everybody's: a router knows no salt, and would send others in vain to
what they may not find, and the tokens of a tenant are nobody else's business.
"""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import msgspec

from quire.core.events import BlockEvicted, BlockRemoved, BlockStored, Event

Format = Literal["map", "array"]
"""Of an event: a map with a type (vLLM since 2026), or its fields in order after the type's name (before)."""

MEDIUM = "GPU"
"""What routers call the memory that the model reads directly, whatever it is made of."""
NUMBER_BITS = 40

encode = msgspec.msgpack.Encoder().encode


class EventLog:
    """Listens to an engine, and writes down what routers want to know. ``take`` what has come together since it was last called.

    A content's number tells it apart from all others of its engine; with bits drawn at the start in front of it, also from those of
    engines before and beside it, since routers keep events of many engines in one table.
    """

    def __init__(self, block_size: int, form: str) -> None:
        self._block_size, self._form = block_size, form
        self._first = int.from_bytes(os.urandom(4), "little") % (1 << (62 - NUMBER_BITS)) << NUMBER_BITS
        self._known: set[int] = set()
        self._events: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, BlockStored):
            if not event.salt and len(event.tokens) == self._block_size:
                self._stored(event)
        elif isinstance(event, BlockRemoved | BlockEvicted) and event.content in self._known:
            self._known.discard(event.content)
            self._removed(self._first | event.content)

    def take(self) -> bytes | None:
        """The payload of one message: what has happened, or None where nothing has."""
        if not self._events:
            return None
        events, self._events = self._events, []
        return payload(events, self._form)

    def _stored(self, event: BlockStored) -> None:
        self._known.add(event.content)
        name, parent = self._first | event.content, self._first | event.parent if event.parent else None
        if self._events and (last := self._events[-1])["type"] == "BlockStored" and last["block_hashes"][-1] == parent:
            last["block_hashes"].append(name)
            last["token_ids"] += event.tokens
            return
        self._events.append({
            "type": "BlockStored", "block_hashes": [name], "parent_block_hash": parent, "token_ids": list(event.tokens),
            "block_size": self._block_size, "lora_id": None, "medium": MEDIUM, "lora_name": None,
        })  # fmt: skip

    def _removed(self, name: int) -> None:
        if self._events and (last := self._events[-1])["type"] == "BlockRemoved":
            last["block_hashes"].append(name)
            return
        self._events.append({"type": "BlockRemoved", "block_hashes": [name], "medium": MEDIUM})


def payload(events: list[dict[str, Any]], form: str) -> bytes:
    """A message's third frame: [seconds since 1970, events, rank]."""
    return encode([time.time(), events if form == "map" else [list(event.values()) for event in events], 0])


def cleared(form: str) -> bytes:
    """The payload that says that everything is gone."""
    return payload([{"type": "AllBlocksCleared"}], form)
