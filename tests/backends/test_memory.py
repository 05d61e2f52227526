"""Memory that may be used, the machine's or its control group's; and how layers share blocks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.backends import memory
from quire.backends.cpu.decoder import Decoder
from quire.config import EngineConfig
from quire.core.groups import KVGroups
from quire.errors import CapacityError
from quire.models.spec import TransformerSpec
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
    held = sum(pool.nbytes for kv in decoder.kv for pool in kv.pools())
    assert held == 5 * 8 * model.spec.kv_bytes_per_token(kv_dtype)


def spec_of(full: int, windowed: int, window: int, context: int = 131_072) -> TransformerSpec:
    windows = (0,) * full + (window,) * windowed
    return TransformerSpec("Some", 50, 64, full + windowed, 4, 2, 16, 128, context, dtype="bfloat16", windows=windows)


@pytest.mark.parametrize(
    ("layers", "window", "groups", "slots"),
    [
        ((12, 12), 128, KVGroups(1, 1, 128), 12),  # gpt-oss-20b
        ((18, 18), 128, KVGroups(1, 1, 128), 18),  # gpt-oss-120b
        ((4, 22), 512, KVGroups(2, 11, 512), 2),  # Gemma 3 1B
        ((5, 29), 1024, KVGroups(1, 6, 1024), 5),  # 4B: a block of the last windowed group has one layer less than there is room for
        ((8, 40), 1024, KVGroups(1, 5, 1024), 8),  # 12B
        ((10, 52), 1024, KVGroups(2, 11, 1024), 5),  # 27B
        ((27, 1), 4096, KVGroups(), 28),  # one window among many layers is not worth a table
        ((28, 0), 4096, KVGroups(), 28),
        ((0, 32), 4096, KVGroups(0, 1, 4096), 32),  # Mistral 7B v0.1
    ],
)
def test_layers_are_put_into_groups(layers: tuple[int, int], window: int, groups: KVGroups, slots: int) -> None:
    layout = memory.kv_layout(spec_of(*layers, window), 32_768, 16)
    assert (layout.groups, layout.slots) == (groups, slots)


@given(layers=st.lists(st.booleans(), min_size=1, max_size=70), window=st.integers(1, 5000), context=st.integers(1, 40_000))
def test_every_layer_has_a_place_of_its_own(layers: list[bool], window: int, context: int) -> None:
    windows = tuple(window if windowed else 0 for windowed in layers)
    spec = replace(spec_of(len(layers), 0, 0), windows=windows)
    layout = memory.kv_layout(spec, context, 16)
    groups = layout.groups
    assert len(layout.places) == len(set(layout.places)) == len(layers)
    assert groups.width <= memory.MOST_GROUPS
    assert all(0 <= slot < layout.slots for _, slot in layout.places)
    assert {group for group, _ in layout.places} == set(range(groups.width)), "no group without a layer"
    if groups.window:
        assert all((group >= groups.full) == windowed for (group, _), windowed in zip(layout.places, layers, strict=True))
    one_group = len(layers) * -(-context // 16)
    assert layout.slots * groups.blocks(context, 16) <= one_group, "it never takes more for the longest sequences"


def test_what_windows_save_is_said() -> None:
    """Gemma 3 4B's layers: 32,768 tokens took 2,048 blocks of 34 layers; now it is blocks of 5."""
    spec, config = spec_of(5, 29, 1024), EngineConfig(kv_memory="1GiB", max_num_batched_tokens=512)
    room = memory.Room(1 << 34, 0, 0)
    per_block = 16 * 5 * spec.layer_kv_bytes("float16")
    assert memory.kv_memory(config, spec, 32_768, room).num_blocks == (1 << 30) // per_block
    need = 2048 + 6 * (64 + 1 + 32)
    with pytest.raises(CapacityError, match=rf"at least {-(-need * per_block >> 20)}MiB") as error:
        memory.kv_memory(replace(config, kv_memory="20MiB"), spec, 32_768, room)
    fits = re.search(r"--max-model-len to at most ([0-9,]+)", str(error.value))
    assert fits is not None
    most = int(fits[1].replace(",", ""))
    assert memory.kv_memory(replace(config, kv_memory="20MiB"), spec, most, room).num_blocks == (20 << 20) // per_block
    with pytest.raises(CapacityError):
        memory.kv_memory(replace(config, kv_memory="20MiB"), spec, most + 16, room)
