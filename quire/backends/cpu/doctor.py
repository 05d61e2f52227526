"""Measures what this machine can do at most, and says what keeps it from doing more: ``quire doctor``.

Takes a few seconds. Every figure is the best of many short tries: other processes, and other guests of the same host, only
ever take away.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.backends.cpu import _native as native
from quire.backends.cpu.machine import Machine, examine, last_level_cache, use_threads, why_threads

KINDS = ("float32", "bfloat16", "int8")
"""Of arithmetic, in the order of Peak."""


@dataclass(slots=True, frozen=True)
class Peak:
    """Arithmetic in registers with one instruction set, in 10^9 operations/s (two for a multiply-add)."""

    isa: str
    float32_one_thread: float
    float32: float
    bfloat16_one_thread: float
    bfloat16: float
    """Of products with weights in bfloat16: those of float32 where the instruction set has no others."""
    int8_one_thread: float
    int8: float


@dataclass(slots=True, frozen=True)
class Bandwidth:
    threads: int
    gb_per_s: float


@dataclass(slots=True, frozen=True)
class Regions:
    """Median microseconds of a parallel region without work, with all threads."""

    empty: float
    together: float
    """Until every thread has taken part, while all are awake: right after another region."""
    asleep: float
    """Likewise, after a pause long enough for them to go to sleep."""


@dataclass(slots=True, frozen=True)
class Report:
    """``asdict`` of it is what ``--json`` writes."""

    machine: Machine
    threads: int
    """The peaks and the regions are measured with so many."""
    bandwidth: list[Bandwidth]
    bandwidth_buffer: int
    """Bytes that are read again and again; far more than caches hold."""
    peaks: list[Peak]
    regions_us: Regions
    notes: list[str]


def measure(threads: int | None = None) -> Report:
    """Measure with 1 to ``threads`` threads (None: all cores that this process may use). Raises ConfigError.

    The number of threads stays set; the instruction set in use is what it was.
    """
    machine = examine()
    count = use_threads(threads)
    isas = machine.isas
    size = buffer_bytes(machine)
    bandwidth: list[Bandwidth] = []
    single: dict[str, list[float]] = {}
    for n in thread_counts(count):
        native.set_num_threads(n)
        bandwidth.append(Bandwidth(n, native.measure_read_bandwidth(size, 0.4)))
        if n == 1:
            single = {isa: _peaks(isa) for isa in isas}
    full = {isa: _peaks(isa) for isa in isas} if count > 1 else single
    regions = Regions(*(1e6 * native.measure_region(*kind) for kind in ((False, False), (True, False), (True, True))))
    peaks = [Peak(isa, *(figure for pair in zip(single[isa], full[isa], strict=True) for figure in pair)) for isa in isas]
    return Report(machine, count, bandwidth, size, peaks, regions, notes(machine, count, bandwidth, peaks, regions))


def buffer_bytes(machine: Machine) -> int:
    """512 MiB, or 8 times the last cache where that is more; less where memory is scarce."""
    size = max(512 << 20, 8 * last_level_cache())
    if machine.memory_available is not None:
        size = min(size, machine.memory_available // 4)
    return max(size, 1 << 20) >> 12 << 12


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})


def _peaks(isa: str) -> list[float]:
    """Of each KIND, with the threads in use; of two tries some way apart, since a neighbour may fill a whole one."""
    before = native.isa()
    native.set_isa(isa)
    try:
        return [max(native.measure_peak(kind) for _ in range(2)) for kind in KINDS]
    finally:
        native.set_isa(before)


def notes(machine: Machine, threads: int, bandwidth: list[Bandwidth], peaks: list[Peak], regions: Regions) -> list[str]:
    """What a user could change, or should know before comparing figures."""
    found = []
    if machine.default_threads < machine.cpus_online:
        found.append(f"{machine.default_threads} of {machine.cpus_online} CPUs are used: {why_threads()}")
    if threads < machine.default_threads:
        found.append(f"measured with {threads} of the {machine.default_threads} threads that a model would run on: --threads says so")
    if machine.load is not None and machine.load > 0.5:
        found.append(
            f"other processes were busy: the load average of the last minute was {machine.load:.1f} before the measurement; "
            "figures may be too low"
        )
    if machine.isa_stated and machine.isa != machine.isas[0]:
        found.append(f"QUIRE_ISA={machine.isa} is not what this machine would take: without it, {machine.isas[0]} would be used")
    one, all_ = bandwidth[0], bandwidth[-1]
    if all_.threads > 1 and all_.gb_per_s < 1.15 * one.gb_per_s:
        found.append(
            f"{all_.threads} threads read memory no faster than one ({all_.gb_per_s:.1f} and {one.gb_per_s:.1f} GB/s): one core fills the "
            "memory bus, or another process, or another guest of the same host, keeps it busy"
        )
    used = next((peak for peak in peaks if peak.isa == machine.isa), None)
    if used is not None and threads > 1 and used.float32 < 0.75 * threads * used.float32_one_thread:
        found.append(
            f"{threads} threads compute {used.float32 / used.float32_one_thread:.1f} times as fast as one: some CPUs share a core "
            "(hyper-threading), are slower than others, or are kept busy by another process"
        )
    if machine.huge_pages == "never":
        found.append(
            "transparent huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled makes reading weights faster"
        )
    if regions.asleep > 200:
        found.append(f"waking the threads takes {regions.asleep:.0f} µs: other processes, or a busy host, keep the cores")
    return found


def describe(report: Report) -> str:
    """The report for the terminal."""
    m = report.machine
    quota = "no CPU quota" if m.cpu_quota is None else f"a CPU quota of {m.cpu_quota:g}"
    caches = ", ".join(f"{c.name} {_size(c.bytes)}" + (f" for {c.cpus} CPUs" if c.cpus > 1 else "") for c in m.caches)
    memory = f"{_size(m.memory_total)}, {_size(m.memory_available)} available"
    lines = [
        ("cpu", m.cpu),
        ("cores", f"{m.cpus_online} online, {m.cpus_affinity} for this process, {quota}"),
        (
            "threads",
            f"{m.default_threads} ({why_threads()})" + ("" if report.threads == m.default_threads else f"; measured: {report.threads}"),
        ),
        ("caches", caches or "unknown"),
        ("memory", memory),
        ("huge pages", m.huge_pages or "unknown"),
        ("kernels", f"{m.isa} ({'QUIRE_ISA' if m.isa_stated else 'the best'} of {', '.join(m.isas)})"),
        ("load", "unknown" if m.load is None else f"{m.load:.2f} in the last minute, before measuring"),
    ]
    text = [f"{name:<12}{value}" for name, value in lines]
    text += ["", f"reading memory, GB/s (of {_size(report.bandwidth_buffer)})"]
    text += [f"  {b.threads:>3} {'thread ' if b.threads == 1 else 'threads'}{b.gb_per_s:>10.1f}" for b in report.bandwidth]
    of_all = report.threads > 1
    text += ["", "arithmetic, 10^9 operations/s of 1 thread" + (f", and of {report.threads}" if of_all else "")]
    text.append(" " * 22 + "".join(f"{kind:>{20 if of_all else 10}}" for kind in KINDS))
    for p in report.peaks:
        pairs = ((p.float32_one_thread, p.float32), (p.bfloat16_one_thread, p.bfloat16), (p.int8_one_thread, p.int8))
        figures = [figure for pair in pairs for figure in (pair if of_all else pair[:1])]
        text.append(f"  {p.isa:<12}{'in use' if p.isa == m.isa else '':<8}" + "".join(f"{figure:>10,.0f}" for figure in figures))
    r = report.regions_us
    text += [
        "",
        f"parallel region, µs: {r.empty:.2f} empty, {r.together:.2f} until all threads have taken part, {r.asleep:.2f} after sleeping",
    ]
    if report.notes:
        text += ["", "notes", *(f"  - {note}" for note in report.notes)]
    return "\n".join(text)


def _size(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}".replace(".0 ", " ")
    return f"{size >> 10} KiB"
