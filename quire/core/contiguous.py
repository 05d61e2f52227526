"""Contiguous memory, what paging replaces: a sequence gets one run of consecutive units, reserved before it starts.

``Buddy`` and ``FirstFit`` hand out runs of a pool of ``size`` units (any number; a unit is a token position, or whatever
the caller counts). ``reservation`` says how long a run a sequence asks for. ``ContiguousManager`` puts them behind the
interface of BlockManager, on the same scheduler, so that what paging is worth can be measured: the baselines of the
PagedAttention paper (arXiv 2309.06180, §6.1) are Buddy with each of the reservations.

A reservation shows as internal fragmentation (held and never used), the holes between runs as external (free and too
short to be of use).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import replace

from quire.core.admission import Footprint
from quire.core.block_manager import BlockManager
from quire.core.block_pool import BlockPool
from quire.core.groups import ONE_GROUP
from quire.core.needs import Needs
from quire.core.prefix_cache import Match, PrefixCache
from quire.core.sequence import Sequence
from quire.core.stats import KVStats
from quire.errors import ConfigError

RESERVATIONS = ("max", "pow2", "oracle")


def reservation(policy: str, prompt: int, output: int, max_len: int) -> int:
    """Positions reserved for a sequence of ``prompt + output`` tokens, which is at most ``max_len``. ConfigError for another policy.

    ``max``: the longest sequence that the server allows. ``pow2``: the output rounded up to a power of two, as if its length
    were known within a factor of two. ``oracle``: the true length, as if it were known.
    """
    match policy:
        case "max":
            return max_len
        case "pow2":
            return min(max_len, prompt + _power_of_two(output))
        case "oracle":
            return prompt + output
    raise ConfigError(f"there is no reservation policy {policy!r}; choose from: {', '.join(RESERVATIONS)}")


class ContiguousAllocator(ABC):
    """A pool of ``size`` units, and the runs of it that have an owner. A run is named by its first unit."""

    __slots__ = ("_runs", "free_units", "size")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a pool has at least 1 unit, got {size}")
        self.size = size
        self.free_units = size
        """Units without owner, in one run or in many."""
        self._runs: dict[int, int] = {}  # first unit → units

    def allocate(self, n: int) -> int | None:
        """A run of ``n`` units (at least 1) or more, or None (and nothing changed) where no free run is long enough."""
        if n < 1:
            raise ValueError(f"a run has at least 1 unit, got {n}")
        taken = self._take(n)
        if taken is None:
            return None
        start, units = taken
        self._runs[start] = units
        self.free_units -= units
        return start

    def free(self, start: int) -> None:
        """Give back the run that begins at ``start``. KeyError where none does."""
        units = self._runs.pop(start)
        self.free_units += units
        self._give(start, units)

    def granted(self, start: int) -> int:
        """Units that the run at ``start`` really holds: at least as many as were asked for."""
        return self._runs[start]

    @property
    @abstractmethod
    def largest_free_run(self) -> int:
        """The most units that ``allocate`` could hand out now; 0 where the pool is full."""

    @abstractmethod
    def _take(self, n: int) -> tuple[int, int] | None:
        """Remove a run of at least ``n`` units from the free ones: (start, units)."""

    @abstractmethod
    def _give(self, start: int, units: int) -> None:
        """Add a run to the free ones, joined with its free neighbours."""

    @abstractmethod
    def _holes(self) -> list[tuple[int, int]]:
        """Free runs: (start, units)."""

    def check(self) -> None:
        """Raises AssertionError unless owned and free runs cover every unit exactly once, and nothing is left to join."""
        end = 0
        for start, units in sorted([*self._runs.items(), *self._holes()]):
            assert units > 0, f"the run at {start} has {units} units"
            assert start == end, f"a run ends at {end} and the next begins at {start}"
            end = start + units
        assert end == self.size, f"the runs end at {end}, the pool at {self.size}"
        free = sum(units for _, units in self._holes())
        assert free == self.free_units, f"{free} units are in free runs, {self.free_units} are counted"


class FirstFit(ContiguousAllocator):
    """Cuts exactly what is asked for from the free run with the lowest address that is long enough. O(free runs)."""

    __slots__ = ("_starts", "_units")

    def __init__(self, size: int) -> None:
        super().__init__(size)
        # Free runs by address; no two touch.
        self._starts = [0]
        self._units = [size]

    @property
    def largest_free_run(self) -> int:
        return max(self._units, default=0)

    def _take(self, n: int) -> tuple[int, int] | None:
        for i, units in enumerate(self._units):
            if units >= n:
                start = self._starts[i]
                if units == n:
                    del self._starts[i], self._units[i]
                else:
                    self._starts[i] += n
                    self._units[i] -= n
                return start, n
        return None

    def _give(self, start: int, units: int) -> None:
        i = bisect_left(self._starts, start)
        if i < len(self._starts) and start + units == self._starts[i]:  # joins the run after it
            units += self._units[i]
            del self._starts[i], self._units[i]
        if i > 0 and self._starts[i - 1] + self._units[i - 1] == start:  # joins the run before it
            self._units[i - 1] += units
        else:
            self._starts.insert(i, start)
            self._units.insert(i, units)

    def _holes(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._units, strict=True))

    def check(self) -> None:
        """As above; also: no two free runs touch."""
        super().check()
        ends = {start + units for start, units in self._holes()}
        assert not ends.intersection(self._starts), "two free runs touch"


class Buddy(ContiguousAllocator):
    """Binary buddies: every run is a power of two, aligned to its own length; a free run is halved until it fits, and joins
    its buddy (the other half) as soon as both are free. O(log size), but for moving list entries.

    A pool that is no power of two begins as descending powers of two, so that each is aligned: 13 = 8 + 4 + 1. A run is at
    most as long as the first of them, and the buddy of a whole one is never free: it begins with another order, or lies
    outside of the pool.

    Of the free runs that fit, the shortest is taken, and of these the one with the lowest address.
    """

    __slots__ = ("_free",)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        # _free[k]: starts of the free runs of 2**k units, in ascending order.
        self._free: list[list[int]] = [[] for _ in range(size.bit_length())]
        start = 0
        for order in reversed(range(size.bit_length())):
            if size >> order & 1:
                self._free[order].append(start)
                start += 1 << order

    @property
    def largest_free_run(self) -> int:
        return next((1 << order for order in reversed(range(len(self._free))) if self._free[order]), 0)

    def _take(self, n: int) -> tuple[int, int] | None:
        wanted = _power_of_two(n).bit_length() - 1
        order = next((order for order in range(wanted, len(self._free)) if self._free[order]), None)
        if order is None:
            return None
        start = self._free[order].pop(0)
        while order > wanted:  # keep the lower half, free the upper one
            order -= 1
            insort(self._free[order], start + (1 << order))
        return start, 1 << wanted

    def _give(self, start: int, units: int) -> None:
        order = units.bit_length() - 1
        while (i := self._buddy(start, order)) is not None:
            start = min(start, self._free[order].pop(i))
            order += 1
        insort(self._free[order], start)

    def _buddy(self, start: int, order: int) -> int | None:
        """Where in ``_free[order]`` the buddy of a run is; None where it is not free as a whole."""
        free, buddy = self._free[order], start ^ (1 << order)
        i = bisect_left(free, buddy)
        return i if i < len(free) and free[i] == buddy else None

    def _holes(self) -> list[tuple[int, int]]:
        return [(start, 1 << order) for order, starts in enumerate(self._free) for start in starts]

    def check(self) -> None:
        """As above; also: every run is a power of two and aligned, and no two buddies are both free."""
        super().check()
        for start, units in [*self._runs.items(), *self._holes()]:
            assert units & (units - 1) == 0, f"the run at {start} has {units} units"
            assert start % units == 0, f"the run of {units} at {start} is not aligned"
        for order, starts in enumerate(self._free):
            for start in starts:
                assert self._buddy(start, order) is None, f"the free run of {1 << order} at {start} has a free buddy"


class _Runs(BlockPool):
    """The accounts of a pool whose blocks go in runs: every block of a run has the run's owner."""

    __slots__ = ("allocator",)

    def __init__(self, allocator: ContiguousAllocator, cache: PrefixCache) -> None:
        super().__init__(allocator.size, cache)
        self.allocator = allocator

    def take_run(self, count: int) -> range | None:
        """A run of ``count`` blocks or more, or None (and nothing changed) where no free run is long enough."""
        start = self.allocator.allocate(count)
        if start is None:
            return None
        run = range(start, start + self.allocator.granted(start))
        self._set(run, 1)
        return run

    def give_run(self, run: range) -> None:
        self.allocator.free(run.start)
        self._set(run, 0)

    def _set(self, run: range, owners: int) -> None:
        self.ref_counts[run.start : run.stop] = [owners] * len(run)
        self.states[run.start : run.stop] = bytes([owners]) * len(run)
        self.num_owned = self.num_references = self.num_blocks - self.allocator.free_units

    def check(self) -> None:
        """Raises AssertionError unless the counts are those of the allocator's runs."""
        self.allocator.check()
        assert list(self.states) == self.ref_counts
        assert self.num_owned == self.num_references == sum(self.ref_counts) == self.num_blocks - self.allocator.free_units


class _RunNeeds(Needs):
    """What a sequence needs is one run, and it gets all of that when it starts. reserve: see ContiguousManager."""

    def __init__(self, pool: _Runs, block_size: int, reserve: Callable[[Sequence], int]) -> None:
        super().__init__(pool, block_size, ONE_GROUP, 1 << 30)
        self._pool, self._reserve = pool, reserve

    def start(self, seq: Sequence, match: Match) -> int:
        """Blocks of the run that ``seq`` asks for; more than the pool has where no free run is long enough."""
        need = -(-self._reserve(seq) // self._block_size)
        return need if need <= self._pool.allocator.largest_free_run else self._pool.num_blocks + 1

    def rest(self, seq: Sequence, num_positions: int | None = None) -> int:
        return 0


class ContiguousManager(BlockManager):
    """One run of blocks for each sequence, from its start to its end. Nothing is shared, cached or swapped, and no sequence is
    ever preempted: what it may need is there.

    reserve: positions that a sequence gets, at least those that it will compute. Beams can't be forked; samples of one
    request each compute the prompt.
    """

    def __init__(self, allocator: ContiguousAllocator, block_size: int, reserve: Callable[[Sequence], int]) -> None:
        super().__init__(allocator.size, block_size, caching=False)
        self.pool = self._pool = _Runs(allocator, self.cache)  # nothing is published, so the publisher needs none
        self.needs = _RunNeeds(self._pool, block_size, reserve)
        self._reserve = reserve
        self._runs: dict[Sequence, range] = {}

    # Queries.

    def can_fork(self, parent: Sequence, num_positions: int) -> bool:
        return False

    # Commands.

    def start(self, seq: Sequence, match: Match) -> None:
        run = self._pool.take_run(self.blocks_for(self._reserve(seq)))
        assert run is not None, "start() was called without looking at needs.start()"
        self._runs[seq] = run

    def grow(self, seq: Sequence, num_positions: int) -> bool:
        """The next blocks of the run come into ``seq``'s table; always True."""
        run, table = self._runs[seq], seq.block_table
        need = self.blocks_for(num_positions)
        assert need <= len(run), f"{num_positions} positions in a run of {len(run)} blocks of {self.block_size}"
        table.extend(run[len(table) : need])
        return True

    def fork(self, parent: Sequence, child: Sequence, num_positions: int) -> None:
        raise NotImplementedError("contiguous memory shares nothing: a beam can't be forked")

    def trim(self, seq: Sequence) -> None:
        """Blocks leave ``seq``'s table; the run keeps them."""
        keep = self.blocks_for(seq.num_computed)
        del seq.block_table[keep:]
        seq.num_sent = min(seq.num_sent, keep)

    def free(self, seq: Sequence) -> None:
        if (run := self._runs.pop(seq, None)) is not None:
            self._pool.give_run(run)
        seq.block_table.clear()  # the pool's counts are done
        super().free(seq)

    def swap_out(self, seq: Sequence) -> bool:
        return False

    # Accounts.

    def stats(self, running: Iterable[Sequence]) -> KVStats:
        """As above; what is reserved counts as allocated."""
        sequences = list(running)
        return replace(super().stats(sequences), positions_used=sum(seq.num_computed for seq in sequences))

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove the counts against the tables of all live sequences. Raises AssertionError."""
        self._pool.check()
        live = set(sequences)
        assert live >= self._runs.keys(), "a run belongs to a sequence that has ended"
        assert sum(map(len, self._runs.values())) == self._pool.num_owned, "a run has no owner, or two"
        for seq in live:
            run = self._runs.get(seq, range(0))
            assert seq.block_table == list(run[: len(seq.block_table)]), "a table differs from its run"
            assert len(seq.block_table) >= self.blocks_for(seq.num_computed)


class FirstCome:
    """Admission to contiguous memory: the next in line starts as soon as there is a run for it, and the manager knows that."""

    def survey(self, running: Iterable[Footprint], free: int) -> None:
        pass

    def admits(self, candidate: Footprint) -> bool:
        return True

    def room(self) -> int:
        return 0

    def ended(self, generated: int, stopped: bool) -> None:
        pass


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``; n >= 1."""
    return 1 << (n - 1).bit_length()
