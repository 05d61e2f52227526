"""Memory that may be used: the machine's, or its control group's."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.backends import memory
from quire.backends.cpu.decoder import Decoder
from quire.models.weights import load_model, resolve_model

MACHINE = 8 << 30
V1 = "4:memory:/box/job\n1:cpu,cpuacct:/other\n0::/\n"
UNLIMITED = "9223372036854771712\n"
"""As version 1 says it."""


def v2(group: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon {used - cached}\nfile {cached}\nactive_file {cached // 4}\ninactive_file {cached - cached // 4}\n"
    return {f"{group}memory.max": f"{limit}\n", f"{group}memory.current": f"{used}\n", f"{group}memory.stat": stat}


def v1(group: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"active_file 0\ninactive_file 0\ntotal_active_file {cached // 4}\ntotal_inactive_file {cached - cached // 4}\n"
    return {f"{group}memory.limit_in_bytes": limit, f"{group}memory.usage_in_bytes": f"{used}\n", f"{group}memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("0::/\n", v2("", "max", 5), MACHINE),
        ("0::/\n", v2("", str(64 << 20), 60 << 20), 4 << 20),
        ("0::/\n", v2("", str(64 << 20), 65 << 20), 0),
        ("0::/\n", v2("", str(64 << 30), 0), MACHINE),
        # Cached files of a group are not in the way.
        ("0::/\n", v2("", str(64 << 20), 60 << 20, 50 << 20), 54 << 20),
        # The process's own group, as systemd makes one for a service, and those above it.
        ("0::/system.slice/quire.service\n", v2("system.slice/quire.service/", str(1 << 30), 1 << 20), (1 << 30) - (1 << 20)),
        ("0::/box/job\n", v2("box/job/", "max", 9) | v2("box/", str(1 << 30), 1 << 29), 1 << 29),
        ("0::/box/job\n", v2("box/job/", str(1 << 20), 9) | v2("box/", str(1 << 30), 1 << 29), (1 << 20) - 9),
        ("0::/box/job\n", v2("other/", str(1 << 20), 9), MACHINE),
        # Paths of a host that a container does not see.
        ("0::/host/docker-1234\n", v2("", str(1 << 30), 9), (1 << 30) - 9),
        ("0::/../../other\n", v2("", str(1 << 30), 9), (1 << 30) - 9),
        # Version 1, and version 2 beside it.
        (V1, v1("memory/", UNLIMITED, 1 << 30), MACHINE),
        (V1, v1("memory/", str(1 << 30), 1 << 29, 1 << 28), (1 << 30) - (1 << 28)),
        (V1, v1("memory/", UNLIMITED, 1 << 30) | v1("memory/box/job/", str(1 << 30), 9), (1 << 30) - 9),
        (V1, v1("cpu,cpuacct/", str(1 << 30), 9), MACHINE),
        (V1, v2("unified/", str(1 << 30), 9), (1 << 30) - 9),
        # Nonsense is no limit.
        ("nothing here\n0:\n", v2("", str(1 << 30), 9), MACHINE),
        ("0::/\n", v2("", "much", 9), MACHINE),
        ("0::/\n", {"memory.max": f"{1 << 30}\n"}, MACHINE),
    ],
)
def test_limits_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {MACHINE >> 10} kB\n", "proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.available_bytes() == expected


def test_this_machine_says_what_is_free() -> None:
    assert (memory.available_bytes() or 0) > 0


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.available_bytes() is None


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_token_takes_what_the_spec_says(kv_dtype: str) -> None:
    """Scales included: a pool sized by the formula is exactly the arrays that are made."""
    model = load_model(resolve_model("embedded"))
    sizes = {"num_blocks": 5, "block_size": 8, "max_tokens": 1, "max_rows": 1, "max_model_len": 16}
    decoder = Decoder(model.spec, model.tensors, kv_dtype=kv_dtype, **sizes)
    held = sum(pool.nbytes for layer in decoder.layers for pool in layer.pools())
    assert held == 5 * 8 * model.spec.kv_bytes_per_token(kv_dtype)
