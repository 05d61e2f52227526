"""View: what a watcher knows, from the pictures that it was sent. feed.js does the same in the browser."""

from __future__ import annotations

from array import array
from base64 import b64decode
from typing import Any

from quire.core.block_pool import EMPTY, OWNED

FREE, CACHED, OWN, SHARED = "free", "cached", "owned", "shared"


class View:
    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        """As sent: engine, server, kv, rates, ..."""
        self.states = bytearray()
        """Of all blocks that were ever handed out."""
        self.since = array("d")
        self.owners: dict[int, int] = {}
        """Block → block tables that hold it."""
        self.sequences: list[dict[str, Any]] = []
        """As sent, with whole block tables."""

    def apply(self, picture: dict[str, Any]) -> None:
        if "kv" not in picture:  # no engine to look at: what was seen last stays
            self.facts = self.facts | picture
            return
        self.facts = picture
        blocks = picture["blocks"]
        if picture["whole"]:
            self.states = bytearray(b64decode(blocks["states"]))
            self.since = array("d", b64decode(blocks["since"]))
            self.sequences = []
        else:
            for i, state, since in zip(blocks["ids"], blocks["states"], blocks["since"], strict=True):
                if i == len(self.states):  # new ones come in their order
                    self.states.append(state)
                    self.since.append(since)
                else:
                    self.states[i], self.since[i] = state, since
        before = {_key(sequence): sequence["blocks"] for sequence in self.sequences}
        self.sequences = [
            sequence | {"blocks": before.get(_key(sequence), [])[: sequence["known"]] + sequence["blocks"]}
            for sequence in picture["sequences"]
        ]
        self.owners = {}
        for sequence in self.sequences:
            for block in sequence["blocks"]:
                if block >= 0:
                    self.owners[block] = self.owners.get(block, 0) + 1

    def kind(self, block: int) -> str:
        if block >= len(self.states) or self.states[block] == EMPTY:
            return FREE
        if self.states[block] != OWNED:
            return CACHED
        return SHARED if self.owners.get(block, 0) > 1 else OWN


def _key(sequence: dict[str, Any]) -> tuple[str, int, int]:
    return sequence["id"], sequence["index"], sequence["row"]
