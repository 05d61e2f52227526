"""How much memory this process may use: the machine's, or its control group's where that is less."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Bytes that can still be taken without swapping, or None where the system does not say (no /proc)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    try:  # a container's limit (cgroup v2); "max" where there is none
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # Cached files count as used, the model's own among them, but go when memory is needed.
        used -= int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return available
    return min(available, max(0, limit - used))
