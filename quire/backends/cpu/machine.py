"""What the system says about this machine, and how many threads this process may use on it. Nothing is measured here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from quire.backends.cpu import _native as native
from quire.backends.memory import available_bytes
from quire.errors import ConfigError

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(slots=True, frozen=True)
class Cache:
    name: str
    """L1d, L1i, L2, L3"""
    bytes: int
    cpus: int
    """That share it."""


@dataclass(slots=True, frozen=True)
class Machine:
    """Facts; what the system does not say is None, or empty."""

    cpu: str
    cpus_online: int
    cpus_affinity: int
    """CPUs that this process may run on."""
    cpu_quota: float | None
    """CPUs that the control group's quota is worth; None: no quota."""
    load: float | None
    """Load average of the last minute."""
    caches: list[Cache]
    memory_total: int | None
    memory_available: int | None
    huge_pages: str | None
    """Setting of transparent huge pages: always, madvise or never."""
    isas: list[str]
    """Instruction sets with kernels of their own that this CPU has, best first."""
    isa: str
    """The one in use."""
    isa_stated: bool
    """By QUIRE_ISA; else the best."""
    default_threads: int
    """What a model runs on where --threads says nothing."""


def examine() -> Machine:
    try:
        load = os.getloadavg()[0]
    except OSError:
        load = None
    return Machine(
        cpu=_field("/proc/cpuinfo", "model name") or os.uname().machine,
        cpus_online=os.cpu_count() or 1,
        cpus_affinity=_affinity(),
        cpu_quota=native.cpu_quota(),
        load=load,
        caches=_caches(),
        memory_total=int(total.split()[0]) * 1024 if (total := _field("/proc/meminfo", "MemTotal")) else None,
        memory_available=available_bytes(),
        huge_pages=text.partition("[")[2].partition("]")[0] if (text := _read(_HUGE_PAGES)) else None,
        isas=native.available_isas(),
        isa=native.isa(),
        isa_stated=bool(os.environ.get("QUIRE_ISA")),
        default_threads=native.default_num_threads(),
    )


def why_threads() -> str:
    """Where the default number of threads comes from."""
    online, affinity, quota = os.cpu_count() or 1, _affinity(), native.cpu_quota()
    if quota is not None and quota < affinity:
        return f"a CPU quota of {quota:g} of the control group, rounded up"
    if affinity < online:
        return f"the affinity mask allows {affinity} of {online} CPUs"
    return "all CPUs"


def use_threads(threads: int | None) -> int:
    """Make the kernels run on ``threads`` threads (None: all cores that this process may use), and return how many that is.

    Raises ConfigError where that is more than the cores: threads that take turns on a core only slow each other down.
    """
    most = native.default_num_threads()
    if threads is not None and threads > most:
        raise ConfigError(
            f"--threads {threads} is more than the {most} {'core' if most == 1 else 'cores'} that this process may use "
            f"({why_threads()}): lower it to at most {most}, or leave it out",
            param="threads",
        )
    native.set_num_threads(threads or most)
    return threads or most


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    return max((cache.bytes for cache in _caches()), default=32 << 20)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _caches() -> list[Cache]:
    found = []
    for folder in sorted(_CACHES.glob("index*")):
        kind, size = _read(folder / "type"), _read(folder / "size")
        if size.endswith("K") and size[:-1].isdigit():
            name = f"L{_read(folder / 'level')}{'' if kind == 'Unified' else kind[:1].lower()}"
            found.append(Cache(name, int(size[:-1]) << 10, _count(_read(folder / "shared_cpu_list"))))
    return found


def _count(cpus: str) -> int:
    """How many CPUs a list such as 0-3,8 names."""
    total = 0
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            total += int(last) - int(first) + 1 if last.isdigit() else 1
    return total


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _field(path: str, name: str) -> str:
    for line in _read(Path(path)).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
