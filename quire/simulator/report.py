"""What a run was like: latencies, tokens per second, how full the memory was, and how many requests were served well enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from quire.core.engine import Engine
from quire.errors import ConfigError
from quire.simulator.drive import Run, Served

Latency = Literal["ttft", "tpot", "itl", "e2el", "queue"]
LATENCIES: Mapping[Latency, str] = {
    "ttft": "time to the first token",
    "tpot": "time per output token behind the first, mean of a request",
    "itl": "time between two tokens",
    "e2el": "time to the last token",
    "queue": "time before anything is computed",
}
"""Names are those of vLLM's benchmark."""
_LIMITED: tuple[Latency, ...] = ("ttft", "tpot", "e2el")
SHARES = (50, 90, 95, 99)
"""Percentiles that are reported."""
GROWS = 0.9
"""``Report.kept_up`` below it is more than chance."""


@dataclass(slots=True, frozen=True)
class Goodput:
    """A request is served well where each of these latencies, in seconds, is kept."""

    limits: tuple[tuple[Latency, float], ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Goodput:
        """Of ``ttft:500``, ``tpot:50``, ``e2el:20000``: milliseconds, as vLLM's benchmark has it. Raises ConfigError."""
        limits: dict[Latency, float] = {}
        for text in texts:
            name, _, number = text.partition(":")
            try:
                seconds = float(number) / 1000
            except ValueError:
                seconds = -1.0
            asked = next((each for each in _LIMITED if each == name), None)
            if asked is None or not 0 < seconds < 1e9:
                raise ConfigError(
                    f"--goodput {text!r:.40}: write a latency and milliseconds above 0, such as ttft:500, tpot:50 or e2el:20000"
                )
            limits[asked] = seconds
        return cls(tuple(limits.items()))

    def kept(self, served: Served) -> bool:
        return served.refused is None and all(latency(name, served) <= most for name, most in self.limits)


def latency(name: Latency, served: Served) -> float:
    """Of one request that was answered, in seconds (``itl`` is no request's)."""
    if name == "queue":
        return served.queued
    if name == "ttft":
        return served.first - served.sent
    if name == "tpot":
        return (served.last - served.first) / max(1, served.output_tokens - 1)
    return served.last - served.sent


@dataclass(slots=True)
class Report:
    """``asdict`` of it is what ``--json`` writes. Seconds, tokens."""

    requests: int
    completed: int
    refused: dict[str, int]
    """By why: ``queue`` (429, --max-waiting), ``length`` (400, longer than the context)."""
    seconds: float
    """From the first request's arrival to the last token."""
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output tokens."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts, found in the prefix cache."""
    output_tokens: int
    latencies: dict[str, dict[str, float]]
    """``ttft``, ``tpot``, ``itl``, ``e2el``, ``queue`` → ``mean``, ``p50``, ``p90``, ``p95``, ``p99``."""
    kept_up: float | None
    """Requests that ended in the second half of the time in which requests came, for each that came; below 1 by more than chance the
    queue grows. None where they did not come over some time."""
    goodput: float | None
    """Share of all requests that were served as --goodput asks; None where it asks nothing."""
    goodput_per_s: float | None
    goodput_late: float | None
    """The same share of the quarter that came last."""
    steps: int
    busy: float
    """Share of the time in which a step ran."""
    mean_rows: float
    """Sequences in a step, on average over time."""
    most_rows: int
    most_waiting: int
    kv_blocks: int
    kv_mean: float
    """Share of the pool's blocks that had an owner, on average over time."""
    kv_most: float
    preemptions: int
    tokens_recomputed: int
    timeline: list[tuple[float, int, int, int]]
    """(second, sequences that run, that wait, blocks with an owner)."""


def report(run: Run, engine: Engine, goodput: Goodput) -> Report:
    served = [each for each in run.served if each.refused is None]
    refused: dict[str, int] = {}
    for each in run.served:
        if each.refused is not None:
            refused[each.refused] = refused.get(each.refused, 0) + 1
    prompt, output = sum(each.prompt_tokens for each in served), sum(each.output_tokens for each in served)
    seconds = max((each.last for each in served), default=0.0) - min((each.sent for each in run.served), default=0.0)
    rate = 1 / seconds if seconds else 0.0
    good = _share(goodput, run.served) * len(run.served) if goodput.limits else None
    values: dict[str, Any] = {name: [latency(name, each) for each in served] for name in LATENCIES if name != "itl"}
    values["tpot"] = [latency("tpot", each) for each in served if each.output_tokens > 1]
    values["itl"] = run.gaps
    counters, pool = engine.scheduler.manager.counters, engine.backend.num_blocks
    return Report(
        requests=len(run.served),
        completed=len(served),
        refused=refused,
        seconds=seconds,
        requests_per_s=len(served) * rate,
        output_tokens_per_s=output * rate,
        total_tokens_per_s=(prompt + output) * rate,
        prompt_tokens=prompt,
        cached_tokens=sum(each.cached_tokens for each in served),
        output_tokens=output,
        latencies={name: _spread(values[name]) for name in LATENCIES},
        kept_up=_kept_up(run),
        goodput=None if good is None else _share(goodput, run.served),
        goodput_per_s=None if good is None else good * rate,
        goodput_late=None if good is None else _share(goodput, run.served[-(len(run.served) // 4 or 1) :]),
        steps=run.steps,
        busy=min(1.0, run.stepping * rate),
        mean_rows=run.rows,
        most_rows=run.most_rows,
        most_waiting=run.most_waiting,
        kv_blocks=pool,
        kv_mean=run.blocks / pool,
        kv_most=run.most_blocks / pool,
        preemptions=counters.preemptions,
        tokens_recomputed=counters.tokens_recomputed,
        timeline=run.timeline,
    )


def _share(goodput: Goodput, served: Sequence[Served]) -> float:
    return sum(map(goodput.kept, served)) / max(1, len(served))


def _kept_up(run: Run) -> float | None:
    sent = sorted(each.sent for each in run.served)
    if len(sent) < 2 or sent[-1] <= sent[len(sent) // 2]:
        return None
    middle, end = sent[len(sent) // 2], sent[-1]
    ended = sum(each.refused is None and middle < each.last <= end for each in run.served)
    return ended / sum(middle < each <= end for each in sent)


def _spread(values: Any) -> dict[str, float]:
    if not len(values):
        return {"mean": 0.0, **{f"p{share}": 0.0 for share in SHARES}}
    numbers = np.asarray(values, np.float64)
    return {"mean": float(numbers.mean()), **{f"p{share}": float(np.percentile(numbers, share)) for share in SHARES}}


def describe(r: Report, goodput: Goodput) -> str:
    """For the terminal."""
    cached = f", {r.cached_tokens / r.prompt_tokens:.1%} of the prompts found in the cache" if r.cached_tokens else ""
    lines = [
        f"requests     {r.completed:,} of {r.requests:,} in {r.seconds:,.1f} s, {r.requests_per_s:.2f} a second; "
        f"{r.prompt_tokens:,} prompt and {r.output_tokens:,} output tokens{cached}",
        f"output       {r.output_tokens_per_s:,.1f} tokens/s; with prompts {r.total_tokens_per_s:,.1f}",
    ]
    if r.refused:
        why = {"queue": "the queue was full, --max-waiting", "length": "longer than the context, --max-model-len"}
        lines.append("refused      " + "; ".join(f"{count:,} ({why[name]})" for name, count in r.refused.items()))
    if r.kept_up is not None and r.kept_up < GROWS:
        lines.append(
            f"overload     while requests came, {r.kept_up:.0%} as many ended: the queue grows, and waits get longer with more requests"
        )
    lines.append(f"{'ms':<13}{'mean':>10}" + "".join(f"{f'p{share}':>10}" for share in SHARES))
    for name, meaning in LATENCIES.items():
        at = r.latencies[name]
        lines.append(f"{name:<13}" + "".join(f"{1000 * at[key]:>10,.1f}" for key in at) + f"   {meaning}")
    if r.goodput is not None and r.goodput_per_s is not None:
        asked = ", ".join(f"{name} {1000 * most:g} ms" for name, most in goodput.limits)
        lines.append(f"goodput      {r.goodput:.1%} of the requests keep {asked}; {r.goodput_per_s:.2f} a second")
    lines += [
        f"steps        {r.steps:,}, {r.busy:.1%} of the time; {r.mean_rows:.1f} sequences in one on average, {r.most_rows:,} at most; "
        f"{r.most_waiting:,} waited at most",
        f"KV pool      {r.kv_mean:.1%} of {r.kv_blocks:,} blocks in use on average, {r.kv_most:.1%} at most; "
        f"{r.preemptions:,} preemptions, {r.tokens_recomputed:,} positions computed again",
    ]
    return "\n".join(lines)


def in_short(r: Report) -> str:
    """In a line."""
    at = r.latencies
    first, each = (", ".join(f"{1000 * at[name][key]:,.0f}" for key in ("p50", "p99")) for name in ("ttft", "tpot"))
    good = "" if r.goodput is None else f", goodput {r.goodput:.1%}"
    return f"{r.output_tokens_per_s:,.1f} output tokens/s, ttft p50, p99 {first} ms, tpot {each} ms, {r.preemptions:,} preemptions{good}"


def compare(simulated: Report, measured: Report) -> str:
    """What was foretold, beside what was measured."""
    rows = [("output tokens/s", simulated.output_tokens_per_s, measured.output_tokens_per_s)]
    rows += [
        (f"{name} {key}, ms", 1000 * simulated.latencies[name][key], 1000 * measured.latencies[name][key])
        for name in LATENCIES
        for key in ("mean", "p50", "p99")
    ]
    rows += [
        ("sequences in a step", simulated.mean_rows, measured.mean_rows),
        ("KV pool in use, %", 100 * simulated.kv_mean, 100 * measured.kv_mean),
        ("steps", simulated.steps, measured.steps),
        ("preemptions", simulated.preemptions, measured.preemptions),
    ]
    lines = [f"{'':<22}{'simulated':>12}{'measured':>12}{'ratio':>8}"]
    for what, foretold, seen in rows:
        lines.append(f"{what:<22}{foretold:>12,.1f}{seen:>12,.1f}" + (f"{foretold / seen:>8.2f}" if seen else f"{'':>8}"))
    return "\n".join(lines)
