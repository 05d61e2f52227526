"""How long a call took, and where: in the names of llama.cpp's server (``timings``) and of vLLM's (``metrics``)."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Any

from quire.outputs import SequenceOutput, Usage


@dataclass(slots=True)
class Timings:
    """Of one call, as its front sees it. Seconds of a monotonic clock."""

    submitted: float = 0.0
    first: float | None = None
    """When its first tokens came."""
    last: float = 0.0
    queued_s: float = 0.0
    """How long it waited before anything of it was computed; the engine knows."""
    first_tokens: int = 0
    """How many tokens came first; they belong to the time of the prompt."""

    def note(self, outputs: list[SequenceOutput]) -> None:
        self.last = monotonic()
        if self.first is None and outputs:
            self.first = self.last
            self.first_tokens = sum(len(output.token_ids) for output in outputs)
            self.queued_s = min(self.last - self.submitted, next((o.queued_s for o in outputs if o.queued_s is not None), 0.0))

    def parts(self) -> tuple[float, float, float]:
        """Seconds in the queue, with the prompt, and with what came after the first tokens."""
        first = self.last if self.first is None else self.first
        return self.queued_s, first - self.submitted - self.queued_s, self.last - first

    def describe(self, usage: Usage) -> dict[str, dict[str, Any]]:
        """Both objects, in milliseconds, as members of an answer. Rates are 0 where there is nothing to measure."""
        queued, prompt, predicted = self.parts()
        computed = usage.prompt_tokens - usage.cached_tokens
        later = usage.completion_tokens - self.first_tokens
        each = predicted / later if later > 0 else 0.0
        return {
            "timings": {
                "queue_ms": _ms(queued),
                "cache_n": usage.cached_tokens,
                "prompt_n": computed,
                "prompt_ms": _ms(prompt),
                "prompt_per_token_ms": _ms(prompt / computed if computed else 0.0),
                "prompt_per_second": _rate(computed, prompt),
                "predicted_n": usage.completion_tokens,
                "predicted_ms": _ms(predicted),
                "predicted_per_token_ms": _ms(each),
                "predicted_per_second": _rate(later, predicted),
            },
            "metrics": {
                "time_to_first_token_ms": _ms(queued + prompt),
                "generation_time_ms": _ms(predicted),
                "queue_time_ms": _ms(queued),
                "mean_itl_ms": _ms(each),
                "tokens_per_second": _rate(later, predicted),
            },
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 and count > 0 else 0.0
