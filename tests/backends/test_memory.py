"""Memory that may be used: the machine's, or its control group's."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.backends import memory
from quire.backends.cpu.decoder import Decoder
from quire.models.weights import load_model, resolve_model


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_limit_it_is_the_machines(group: Path) -> None:
    whole = memory.available_bytes()
    assert whole is not None
    assert whole > 0
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert memory.available_bytes() == pytest.approx(whole, rel=0.5)


def test_cached_files_of_a_group_are_not_in_the_way(group: Path) -> None:
    (group / "memory.max").write_text(f"{64 << 20}\n")
    (group / "memory.current").write_text(f"{60 << 20}\n")
    (group / "memory.stat").write_text(f"anon {10 << 20}\nfile {50 << 20}\nactive_file {30 << 20}\ninactive_file {20 << 20}\n")
    assert memory.available_bytes() == 54 << 20
    (group / "memory.stat").write_text(f"anon {60 << 20}\nactive_file 0\ninactive_file 0\n")
    assert memory.available_bytes() == 4 << 20


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_token_takes_what_the_spec_says(kv_dtype: str) -> None:
    """Scales included: a pool sized by the formula is exactly the arrays that are made."""
    model = load_model(resolve_model("embedded"))
    sizes = {"num_blocks": 5, "block_size": 8, "max_tokens": 1, "max_rows": 1, "max_model_len": 16}
    decoder = Decoder(model.spec, model.tensors, kv_dtype=kv_dtype, **sizes)
    held = sum(pool.nbytes for layer in decoder.layers for pool in layer.pools())
    assert held == 5 * 8 * model.spec.kv_bytes_per_token(kv_dtype)
