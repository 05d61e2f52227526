"""Times the kernels and says which fraction of the machine's limit each reaches: ``quire bench kernels``.

The limit of a call is the longer of two times: moving its bytes at the measured read bandwidth, doing its operations at the
measured peak of the instruction set in use. Both are measured in the same run with the same threads. Weights and KV come from
memory: calls go through so many copies that none is left in a cache. What a step has just written (activations, logits) comes
from a cache here as well, and is compared with the bandwidth of reading that many bytes over and over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median
from time import perf_counter

from quire.backends.cpu import _native as native
from quire.backends.cpu.doctor import KINDS, buffer_bytes
from quire.backends.cpu.kernel_cases import DTYPES, FOUR_BITS, GROUP_SIZE, KERNELS, MODELS, Call, Case, Selection, cases
from quire.backends.cpu.machine import examine, use_threads
from quire.errors import ConfigError

ROUND_S = 0.003
"""A round is as many calls as take so long."""
CASE_S = 0.3
"""After so long a case gets no more rounds, but for the first two."""
BANDWIDTH_S = 2
"""After so long the read bandwidth is measured again: neighbours on the same host change it from one second to the next."""
TOO_SHORT_S = 20e-6
"""Below, the time is mostly that of the call from Python, and says little about the kernel."""
NAMED = ("linear", "attention", "sampling")
"""Kernels whose cases begin with a kind (qkv, decode, greedy): the summary has a line for each, and width."""
SLOWEST = 24


@dataclass(slots=True, frozen=True)
class Limits:
    """What the machine does at most, with the threads of the run."""

    isa: str
    threads: int
    memory_gb_per_s: float
    cache_gb_per_s: dict[int, float]
    """Bytes read again and again → GB/s, ascending."""
    float32_g_per_s: float
    """10^9 operations/s."""
    bfloat16_g_per_s: float
    int8_g_per_s: float

    def bound(self, case: Case) -> tuple[float, str]:
        """(least seconds of a call, what binds: memory, cache, float32, bfloat16 or int8)."""
        bandwidth, where = self.memory_gb_per_s, "memory"
        if case.cached and case.bytes <= max(self.cache_gb_per_s):
            bandwidth, where = next(rate for size, rate in self.cache_gb_per_s.items() if size >= case.bytes), "cache"
        peaks = {"float32": self.float32_g_per_s, "bfloat16": self.bfloat16_g_per_s, "int8": self.int8_g_per_s}
        return max((case.bytes / bandwidth / 1e9, where), (case.operations / peaks[case.arithmetic] / 1e9, case.arithmetic))


@dataclass(slots=True, frozen=True)
class Result:
    kernel: str
    name: str
    model: str
    dtype: str
    rows: int
    seconds: float
    """Of a call, in the fastest round: the limits are the best that was seen, too."""
    seconds_median: float
    gb_per_s: float
    g_operations_per_s: float
    bound: str
    """What binds: memory, cache, float32, bfloat16 or int8."""
    fraction: float
    """Least possible time of a call, of the time that it took."""


@dataclass(slots=True, frozen=True)
class Run:
    """``asdict`` of it is what ``--json`` writes."""

    limits: Limits
    memory_gb_per_s: list[float]
    """Read bandwidth, measured again and again during the run: each case is compared with the last."""
    results: list[Result]
    skipped: list[str]


def select(
    models: str | None = None, dtypes: str | None = None, kernels: str | None = None, rows: str | None = None, group_size: int | None = None
) -> Selection:
    """From lists with commas; None: all, or what is usual. Raises ConfigError."""
    if group_size is not None and group_size not in (0, 32, 64, 128):
        raise ConfigError(f"--group-size {group_size} is not supported; choose from: 0 (one scale an output, int8 only), 32, 64, 128")
    if group_size == 0 and dtypes is not None and any(name in dtypes.split(",") for name in FOUR_BITS):
        raise ConfigError("--group-size 0 is for int8: int4 weights need groups of 32, 64 or 128")
    return Selection(
        models=_names("--model", models, tuple(MODELS)),
        dtypes=_names("--dtype", dtypes, [name for name in DTYPES if group_size != 0 or name not in FOUR_BITS]),
        kernels=_names("--kernel", kernels, KERNELS),
        rows=_numbers(rows),
        group_size=GROUP_SIZE if group_size is None else group_size,
    )


def _names(flag: str, text: str | None, known: Sequence[str]) -> Sequence[str]:
    if text is None:
        return known
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} {name!r:.40} is unknown; choose from: {', '.join(known)}")
    return names


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= 4096 for number in numbers):
        raise ConfigError(f"--rows must be numbers from 1 to 4096 with commas between them, such as 1,8,32, got {text!r:.60}")
    return numbers


def measure_limits(threads: int) -> Limits:
    caches = {1 << shift: native.measure_read_bandwidth(1 << shift, 0.03) for shift in range(16, 28, 2)}
    memory = native.measure_read_bandwidth(buffer_bytes(examine()), 0.4)
    return Limits(native.isa(), threads, memory, caches, *(native.measure_peak(kind) for kind in KINDS))


def run(
    selection: Selection,
    rounds: int,
    threads: int | None = None,
    started: Callable[[Limits], None] = lambda limits: None,
    report: Callable[[Result], None] = lambda result: None,
) -> Run:
    """Measure the limits, then all selected cases; ``started`` and ``report`` hear of each as it comes. Raises ConfigError."""
    first = limits = measure_limits(use_threads(threads))
    started(limits)
    results: list[Result] = []
    skipped: list[str] = []
    bandwidths, measured = [limits.memory_gb_per_s], perf_counter()
    for case in cases(selection, skipped.append):
        if perf_counter() - measured > BANDWIDTH_S:
            bandwidths.append(native.measure_read_bandwidth(buffer_bytes(examine()), 0.05))
            limits, measured = replace(limits, memory_gb_per_s=bandwidths[-1]), perf_counter()
        results.append(measure(case, rounds, limits))
        report(results[-1])
    return Run(first, bandwidths, results, skipped)


def measure(case: Case, rounds: int, limits: Limits) -> Result:
    times = _time(case.calls, rounds)
    best = min(times)
    least, bound = limits.bound(case)
    return Result(
        case.kernel, case.name, case.model, case.dtype, case.rows, best, median(times),
        case.bytes / best / 1e9, case.operations / best / 1e9, bound, least / best,
    )  # fmt: skip


def _time(calls: list[Call], rounds: int) -> list[float]:
    """Seconds of a call in each round, after each call once, or as many as CASE_S has room for: what has just been made is slow to read
    the first time, under a hypervisor up to five times as slow, and what a call writes has no memory before."""
    begin = perf_counter()
    for call in calls:
        call()
        if perf_counter() - begin > CASE_S:
            break
    turn = cycle(calls)
    times: list[float] = []
    begin = perf_counter()
    while len(times) < min(rounds, 2) or (len(times) < rounds and perf_counter() - begin < CASE_S):
        times.append(_round(turn))
    return times


def _round(turn: Iterator[Call]) -> float:
    """Seconds of a call. The clock ends a round, and no guess of how long a call takes: one that was held up would leave too few."""
    count = 0
    start = now = perf_counter()
    while now - start < ROUND_S:
        next(turn)()
        count += 1
        now = perf_counter()
    return (now - start) / count


def describe_limits(limits: Limits) -> str:
    caches = ", ".join(f"{rate:.0f} at {size >> 10:,} KiB" for size, rate in limits.cache_gb_per_s.items())
    threads = f"{limits.threads} thread{'s' if limits.threads > 1 else ''}"
    return (
        f"{limits.isa}, {threads}; read bandwidth {limits.memory_gb_per_s:.1f} GB/s; float32 {limits.float32_g_per_s:,.0f}, "
        f"bfloat16 {limits.bfloat16_g_per_s:,.0f}, int8 {limits.int8_g_per_s:,.0f} x 10^9 operations/s\nreading from caches, GB/s: {caches}"
    )


HEADER = f"{'kernel':<11}{'model':<13}{'':<22}{'type':<13}{'rows':>5}{'time':>13}{'GB/s':>8}{'Gop/s':>9}  of the limit"


def describe(r: Result) -> str:
    """A line of the table."""
    operations = f"{r.g_operations_per_s:,.1f}" if r.g_operations_per_s else "-"
    return (
        f"{r.kernel:<11}{r.model:<13}{r.name:<22}{r.dtype:<13}{r.rows:>5}{1e6 * r.seconds:>10,.1f} µs{r.gb_per_s:>8.1f}{operations:>9}"
        f"{r.fraction:>7.0%} {r.bound}"
    )


def summarize(done: Run) -> str:
    """What was left out, and the slowest fractions: what to look at next."""
    text = [f"left out: {line}" for line in done.skipped]
    low, high = min(done.memory_gb_per_s), max(done.memory_gb_per_s)
    if high > 1.15 * low:
        text.append(f"the read bandwidth went from {low:.1f} to {high:.1f} GB/s during the run: fractions of memory are uncertain")
    slowest: dict[tuple[str, str, str], Result] = {}
    for r in sorted(done.results, key=lambda r: r.fraction):
        if r.seconds >= TOO_SHORT_S:
            slowest.setdefault((r.kernel, r.name.split()[0] if r.kernel in NAMED else "", r.dtype), r)
    if slowest:
        text += ["slowest of each kind, of calls that take 20 µs or more:", HEADER, *map(describe, list(slowest.values())[:SLOWEST])]
    return "\n".join(text)
