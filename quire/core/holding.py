"""Who waits for whom: a waiting sequence is passed over while somebody computes what it would compute next.

The prompt of its own request, whether there is a cache or not; or an equal prefix, which it will find in the cache.
"""

from __future__ import annotations

from quire.core.block_manager import BlockManager
from quire.core.content import Node
from quire.core.prefix_cache import Match
from quire.core.sequence import Group, Sequence, Status


def sibling(manager: BlockManager, seq: Sequence) -> tuple[Sequence | None, bool]:
    """A running sequence of the same request to share the prompt's blocks with; and whether one is computing the prompt."""
    siblings = seq.group.sequences
    if len(siblings) == 1 or seq.unscored:  # what it has to score, it computes itself
        return None, False
    wait = False
    for other in siblings:
        wait = wait or bool(other.unscored)  # the request's first output is that of the one that scores the prompt
        if other.status is Status.RUNNING:
            if manager.can_fork(other, seq.num_prompt):
                return other, False
            wait = wait or other.num_computed < other.num_prompt
    return None, wait


class KnownToWait:
    """Tells of waiting sequences whether they wait for a prompt that somebody else computes. For one look at the queue: of the samples of
    a request one is asked, and again when one has ``started``."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._groups: dict[Group, bool] = {}

    def __call__(self, seq: Sequence) -> bool:
        if is_held(seq):
            return True
        group = seq.group
        if len(group.sequences) == 1 or seq.unscored:
            return False
        waits = self._groups.get(group)
        if waits is None:
            waits = self._groups[group] = sibling(self._manager, seq)[1]
        return waits

    def started(self, seq: Sequence) -> None:
        self._groups.pop(seq.group, None)


class Computing:
    """The prompts that a step computes: the next block of each, and whose it is."""

    def __init__(self, manager: BlockManager, prompts: list[Sequence]) -> None:
        self._manager = manager
        self._next: dict[tuple[Node, bytes], Sequence] = {}
        for seq in prompts:
            self.add(seq)

    def add(self, seq: Sequence) -> None:
        if seq.node is not None:
            key = self._manager.cache.key(seq.tokens, seq.num_published * self._manager.block_size)
            self._next[seq.node, key] = seq

    def hold(self, seq: Sequence, match: Match) -> bool:
        """Whether somebody computes the block that ``seq`` would compute next; then ``seq`` waits for what they have in common."""
        if not self._next or match.node is None:
            return False
        size = self._manager.block_size
        common = match.whole_positions
        runner = self._next.get((match.node, self._manager.cache.key(seq.tokens, common)))
        longest = min(seq.num_tokens, runner.num_tokens if runner else 0, seq.findable)
        if runner is None or common >= longest:
            return False
        while common < longest and seq.tokens[common : common + size] == runner.tokens[common : common + size]:
            common = min(common + size, longest)
        seq.held = runner, common
        return True


def is_held(seq: Sequence) -> bool:
    """The runner that ``seq`` waits for has not computed what they have in common."""
    if seq.held is None:
        return False
    runner, common = seq.held
    return runner.status is Status.RUNNING and runner.num_computed < common
