"""EngineTotals: the engine's counters, summed over all engines that there were, so that none ever goes back."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from quire.core.plan import StepExtent
from quire.core.stats import EngineStats


class EngineTotals:
    """What an engine did after it was last heard of, and before it died, is not counted: at most about a second's work."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None
        """The last that was heard of the engine; None where there is none."""
        self.last: EngineStats | None = None
        """The same, but kept while the engine is away: the size of its pool does not change."""
        self._send_s = 0.0
        self._before: Counter[str] = Counter()

    def heard(self, stats: EngineStats, send_s: float) -> None:
        self.stats = self.last = stats
        self._send_s = send_s

    def died(self) -> None:
        """The engine will say nothing more; another one starts from zero."""
        self._before = self.counters()
        self.stats, self._send_s = None, 0.0

    def counters(self) -> Counter[str]:
        """Name → total."""
        total = Counter(self._before)
        if (stats := self.stats) is not None:
            counters = stats.kv.counters
            total.update({
                "tokens_sampled": stats.tokens_sampled,
                "tokens_drafted": stats.tokens_drafted,
                "tokens_accepted": stats.tokens_accepted,
                "positions_discarded": stats.positions_discarded,
                "tokens_recomputed": counters.tokens_recomputed,
                "blocks_copied": counters.blocks_copied,
                "blocks_swapped_out": counters.blocks_swapped_out,
                "blocks_swapped_in": counters.blocks_swapped_in,
                **{f"preempted_{cause}": count for cause, count in counters.preempted.items()},
                **{f"extent_{f.name}": getattr(stats.extent, f.name) for f in fields(stats.extent)},
            })  # fmt: skip
            seconds = {f"seconds_{f.name}": getattr(stats.times, f.name) for f in fields(stats.times)}
            for name, value in (seconds | {"seconds_send": self._send_s}).items():
                total[name] += value
        return total

    def extent(self) -> StepExtent:
        """What all steps asked of the device."""
        counters = self.counters()
        return StepExtent(**{f.name: counters[f"extent_{f.name}"] for f in fields(StepExtent)})
