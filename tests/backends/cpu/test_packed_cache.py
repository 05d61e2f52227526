"""--cache-dir: what was packed is mapped again; what is stale, cut short or damaged is noticed and made again."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sample_models
from quire.backends.cpu import _native as native
from quire.backends.cpu.backend import CpuBackend
from quire.backends.cpu.packed_cache import PACKING
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork
from quire.errors import ConfigError
from quire.models.weights import content, content_digest
from quire.sampling_params import SamplingParams

CONFIG = {**sample_models.LLAMA, "intermediate_size": 192, "torch_dtype": "float32"}
FOUND, MADE = "map packed weights", "write the weight cache"


def write_model(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {name: (0.1 * rng.standard_normal(t.shape)).astype(np.float32) for name, t in sample_models.checkpoint(CONFIG).items()}
    return sample_models.write_model(folder, CONFIG, tensors)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "below"


@pytest.fixture(autouse=True)
def times_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED_S", 0.0)


def load(model: Path, cache: Path | None, quantize: str = "int8", group_size: int | None = None) -> tuple[np.ndarray, list[str]]:
    """Logits of a fixed prompt, and the phases of loading."""
    phases: list[str] = []
    config = EngineConfig(
        model=str(model),
        quantize=quantize,
        group_size=group_size,
        cache_dir=None if cache is None else str(cache),
        kv_memory="8MiB",
        max_model_len=64,
    )
    backend = CpuBackend.open(config, lambda name, seconds: phases.append(name))
    backend._rows.begin(RowStart(0, [5, 9, 300, 7], 4, SamplingParams(), 0, ()))
    return backend.decoder.forward(backend._rows.batch([RowWork(0, 0, 4, [3], True, 0)])).copy(), phases


def only(cache: Path) -> Path:
    (file,) = cache.glob("*.packed")
    return file


@pytest.mark.parametrize(("quantize", "group_size"), [("int8", None), ("int8", 32), ("int4", 32)])
def test_the_second_start_maps_what_the_first_packed(model: Path, cache: Path, quantize: str, group_size: int | None) -> None:
    reference, _ = load(model, None, quantize, group_size)
    for phase in (MADE, FOUND, FOUND):
        logits, phases = load(model, cache, quantize, group_size)
        assert phase in phases
        assert np.array_equal(logits, reference)
    assert len(list(cache.iterdir())) == 2, "the weights, and what is remembered of the checkpoint"
    assert stat.S_IMODE(only(cache).stat().st_mode) == 0o644


def test_each_kind_has_its_file(model: Path, cache: Path) -> None:
    for kind in (("int8", None), ("int8", 32), ("int4", 32)):
        assert MADE in load(model, cache, *kind)[1]
    for kind in (("int8", None), ("int8", 32), ("int4", 32)):
        assert FOUND in load(model, cache, *kind)[1]


def test_other_content_is_stale(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(model, cache)
    times = (model / "model.safetensors").stat()
    write_model(model, seed=1)
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync and cp -p do
    reference, _ = load(model, None)
    logits, phases = load(model, cache)
    assert MADE in phases
    assert np.array_equal(logits, reference)
    assert f"{only(cache)} is stale (the checkpoint has changed since): it is made again" in caplog.text
    assert FOUND in load(model, cache)[1]


def test_the_same_content_under_other_times_is_not(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(model, cache)
    copy = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(copy)
    assert FOUND in load(model, cache)[1]
    assert not caplog.records


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_in_the_header(file: Path) -> None:
    os.truncate(file, 100)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(64))


def flip(at: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[at] ^= 4
        file.write_bytes(data)

    return damage


def rewrite(file: Path, old: bytes, new: bytes) -> None:
    """Replace text of the header by text of the same length."""
    data = file.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = data[20 : 20 + length].replace(old, new)
    assert len(header) == length
    assert header != data[20 : 20 + length]
    file.write_bytes(data[:16] + zlib.crc32(header).to_bytes(4, "little") + header + data[20 + length :])


def other_version(file: Path) -> None:
    rewrite(file, f'"packing": {PACKING}'.encode(), b'"packing": 0')


def other_fields(file: Path) -> None:
    rewrite(file, b'"offset"', b'"places"')


def other_types(file: Path) -> None:
    rewrite(file, b'"offset": 0', b'"offset":""')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "is cut short"),
        (cut_in_the_header, "is cut short (100 bytes)"),
        (empty, "is cut short (0 bytes)"),
        (lengthen, "has 64 bytes too many"),
        (flip(3), "is not a file of packed weights"),
        (flip(9), "is "),  # the header's length: cut short, or damaged
        (flip(40), "is damaged (its header is not the one that was written)"),
        (flip(-70_000), "is damaged (the bytes of "),
        (other_version, "was made by another version of Quire"),
        (other_fields, "was made by another version of Quire"),
        (other_types, "was made by another version of Quire"),
    ],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_a_file_that_is_not_as_it_was_written(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], says: str
) -> None:
    reference, _ = load(model, cache)
    damage(only(cache))
    logits, phases = load(model, cache)
    assert MADE in phases
    assert np.array_equal(logits, reference)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{only(cache)} {says}")
    assert record.getMessage().endswith(": it is made again")
    caplog.clear()
    assert FOUND in load(model, cache)[1]
    assert not caplog.records


def test_any_damaged_byte_is_noticed(model: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the header, and of the data but for the padding between linears, of which nobody reads."""
    load(model, cache)
    whole = only(cache).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 12):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        only(cache).write_bytes(damaged)
        assert MADE in load(model, cache)[1], at


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--cache-dir .*file/below can't be written: Not a directory; choose a folder"):
        load(model, tmp_path / "file" / "below")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() == 0:
        return  # root may write anywhere
    with pytest.raises(ConfigError, match="can't be written: Permission denied"):
        load(model, closed)


def test_a_folder_that_can_only_be_read_serves_what_it_has(model: Path, cache: Path) -> None:
    load(model, cache)
    for file in cache.glob("*.json"):
        file.unlink()
    cache.chmod(0o500)
    try:
        assert FOUND in load(model, cache)[1]
    finally:
        cache.chmod(0o700)


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        (b'"layers.2.o"', b'"layers.9.o"', "layers.2.o of 96 x 96"),
        (b'"gated": true', b'"gated":false', "layers.0.gate+layers.0.up of 192 x 96"),
    ],
    ids=["name", "gated"],
)
def test_another_config_of_the_same_tensors(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture, old: bytes, new: bytes, missing: str
) -> None:
    """Which linears there are follows from config.json, and the digest is of the tensors: here the file has others."""
    load(model, cache)
    rewrite(only(cache), old, new)
    reference, _ = load(model, None)
    logits, phases = load(model, cache)
    assert MADE in phases
    assert np.array_equal(logits, reference)
    assert f"{only(cache)} has no {missing}: it is made again" in caplog.text
    assert FOUND in load(model, cache)[1]


def test_a_full_disk_costs_a_warning(model: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quire.backends.cpu.packed_cache.os.replace", full)
    reference, _ = load(model, None)
    logits, _ = load(model, cache)
    assert np.array_equal(logits, reference)
    assert "No space left on device; the next start will pack the weights again" in caplog.text
    assert not [file for file in cache.iterdir() if "packed" in file.name], "nothing half written is left"


def test_what_a_killed_process_left_goes_after_a_while(model: Path, cache: Path) -> None:
    load(model, cache)
    name = f".{only(cache).name}.abc"
    (cache / name).write_bytes(b"half")
    only(cache).unlink()
    load(model, cache)
    assert (cache / name).exists(), "somebody may be writing it"
    os.utime(cache / name, (0, time.time() - 7200))
    only(cache).unlink()
    load(model, cache)
    assert not (cache / name).exists()


def test_processes_that_start_at_the_same_time(model: Path, cache: Path) -> None:
    code = (
        "import sys; from quire.backends.base import open_backend; from quire.config import EngineConfig;"
        "b = open_backend(EngineConfig(model=sys.argv[1], quantize='int4', cache_dir=sys.argv[2], kv_memory='8MiB', max_model_len=64));"
        "print(b.weight_bytes())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(model), str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert len({out for out, _ in results}) == 1
    assert [error for _, error in results if error] == []
    assert FOUND in load(model, cache, "int4")[1]
    assert not list(cache.glob(".*"))


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first, second, memory = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "memory.json"
    data = np.random.default_rng(0).bytes(9 << 20)
    first.write_bytes(data)
    second.write_bytes(data[:100])
    heard: list[int] = []
    digest = content_digest([first, second], memory, heard.append)
    assert sum(heard) == len(data) + 100
    assert content_digest([first, second], memory, heard.append) == digest
    assert sum(heard) == len(data) + 100, "nothing was read again"
    memory.write_text("no JSON")
    assert content_digest([first, second], memory) == digest
    changed = bytearray(data)
    changed[5 << 20] ^= 1
    first.write_bytes(changed)
    assert content_digest([first, second], memory) != digest


def test_what_packing_makes_has_a_version() -> None:
    """A difference here means that cached files of before are no longer what packing makes: raise PACKING, then these sums."""
    if native.panel() != 64:
        pytest.skip("the sums are of panels of 64 outputs")
    weight = np.random.default_rng(0).standard_normal((100, 256)).astype(np.float32)
    kinds = [("int8", 0), ("int8", 64), ("int4", 32)]
    sums = [zlib.crc32(native.pack_linear(weight, *kind).data.data) for kind in kinds]
    gated = [zlib.crc32(native.pack_linear([weight[:50], weight[50:]], *kind, gated=True).data.data) for kind in kinds]
    assert (PACKING, sums, gated) == (2, [353610844, 630810486, 3125935430], [92523059, 3162331054, 1133248420])
    stored = np.random.default_rng(0).integers(0, 120, (100, 720), np.uint8)  # scales that are numbers
    sums = [zlib.crc32(native.pack_blocks(stored, name).data.data) for name in ("Q4_0", "Q4_1", "Q4_K")]
    assert (PACKING, sums) == (2, [660495699, 2149965377, 3721383287])
