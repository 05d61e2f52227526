"""``--cache-dir``: packed, quantized weights in a file that the next start maps, and that processes share.

    magic    8 bytes
    length   8 bytes, little endian: of the header
    crc      4 bytes: of the header
    header   JSON: what it was made from and how ("origin"), and for each linear its shape, place and CRC-32
    data     each linear's packed bytes, at a multiple of 64 bytes

One file for each model folder, kind of quantization and panel width. It is written beside its place and renamed, so that a
reader sees the old one or the new one, and two processes that write at once do the same thing twice. It is used where it is
mapped, read-only. On opening, everything is checked: the origin (the checkpoint's content, see content_digest), sizes, and the
CRC of every byte, which costs about what reading the file costs, and brings it into memory for the first step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from quire.backends.cpu import _native as native
from quire.backends.progress import Progress
from quire.errors import ConfigError
from quire.models.quantization import Quantization
from quire.models.weights import content_digest, weight_files

PACKING: Final = 2
"""Counts what native.pack_linear and pack_blocks make of the same weights, and models.weights.packed of the same tensors: raise it
with every change of scales, rounding or layout."""
MAGIC: Final = b"QUIREPK\n"
_ALIGN: Final = 64
_PIECE: Final = 4 << 20
_ABANDONED_S: Final = 3600.0
_MAX_HEADER: Final = 64 << 20

Origin = dict[str, Any]
log = logging.getLogger("quire.cache")


@dataclass(slots=True, frozen=True)
class Entry:
    """One linear in the file."""

    n: int
    k: int
    dtype: str
    group_size: int
    offsets: bool
    gated: bool
    offset: int
    """From the start of the data."""
    nbytes: int
    crc: int


class Unusable(Exception):
    """Why a file can't be used; to be followed by what is done about it."""


class PackedCache:
    """The packed linears of one model: taken from the file where it holds them, else collected and written at the end."""

    def __init__(self, folder: Path, cache_dir: str, quantization: Quantization, reading: str = "") -> None:
        """folder: the model's. reading: see Model. Raises ConfigError where the cache would have to be written and can't be, and
        ModelLoadError."""
        directory = Path(cache_dir).expanduser()
        files = weight_files(folder)
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        name = f"{folder.resolve().name}-{place}"
        kind = f"{quantization.dtype}-g{quantization.group_size}-p{native.panel()}"
        self.path = directory / f"{name}.{kind}.packed"
        self._linears: dict[str, native.PackedLinear] = {}
        self._temporary: Path | None = None
        self._mapped: mmap.mmap | None = None
        self._entries: dict[str, Entry] = {}
        self._start = 0
        if not self.path.exists():
            self._temporary = _temporary(self.path)  # before the work: a folder that can't be written should not cost a load
        total = sum(file.stat().st_size for file in files)
        with Progress("reading the checkpoint's content", total) as progress:
            digest = content_digest(files, directory / f"{name}.content.json", progress.add, native.num_threads())
        self._origin: Origin = {"packing": PACKING, "content": digest, "reading": reading, **_kind(quantization), "panel": native.panel()}
        if self._temporary is None:
            try:
                self._mapped, self._entries, self._start = _open(self.path, self._origin)
            except Unusable as e:
                log.warning("%s %s: it is made again", self.path, e)
                self._temporary = _temporary(self.path)

    @property
    def found(self) -> bool:
        """Whether all weights so far are in the file."""
        return self._temporary is None

    def take(self, name: str, n: int, k: int, quantization: Quantization, gated: bool) -> native.PackedLinear | None:
        """The linear ``name`` in place, or None where it has to be packed (and is then added)."""
        entry = self._entries.get(name)
        if self._mapped is None or entry is None:
            return None
        wanted = (n, k, *_kind(quantization).values(), gated)
        if (entry.n, entry.k, entry.dtype, entry.group_size, entry.offsets, entry.gated) != wanted:
            return None
        packed = self._linears[name] = _load(self._mapped, self._start, entry)
        return packed

    def add(self, name: str, packed: native.PackedLinear) -> None:
        """A linear that was packed."""
        if self._temporary is None:  # config.json tells other linears of the same tensors than it did
            log.warning("%s has no %s of %d x %d: it is made again", self.path, name, packed.n, packed.k)
            self._temporary = _temporary(self.path)
        self._linears[name] = packed

    def finish(self) -> None:
        """Write the file if it has to be. A disk that is full costs a warning: the weights are in memory."""
        if self._temporary is None:
            return
        try:
            with self._temporary.open("wb") as file:
                _write(file, self._origin, self._linears)
            os.replace(self._temporary, self.path)
        except OSError as e:
            log.warning("can't write %s: %s; the next start will pack the weights again", self.path, e.strerror or e)

    def close(self) -> None:
        """Leave nothing behind but the file; linears that were taken stay good."""
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                self._temporary.unlink()
        self._temporary, self._linears = None, {}


def _kind(quantization: Quantization) -> dict[str, Any]:
    """Which linears have which kind under ``stored`` follows from the checkpoint's content, and how it is read."""
    return {"dtype": quantization.dtype, "group_size": quantization.group_size, "offsets": quantization.offsets}


def _temporary(path: Path) -> Path:
    """A fresh file beside ``path``. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{path.name}.*"):  # of processes that were killed while they wrote
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > _ABANDONED_S:
                    old.unlink()
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.fchmod(handle, 0o644)  # as private as the checkpoint that it is made from; mkstemp's would be the owner's alone
    except OSError as e:
        raise ConfigError(
            f"--cache-dir {path.parent} can't be written: {e.strerror}; choose a folder that this user may write, or leave it out",
            param="cache_dir",
        ) from None
    os.close(handle)
    return Path(name)


def _write(file: BinaryIO, origin: Origin, linears: Mapping[str, native.PackedLinear]) -> None:
    entries: dict[str, Any] = {}
    size, views = 0, {name: packed.data.data for name, packed in linears.items()}
    crcs = dict(zip(views, _crcs(list(views.values())), strict=True))
    for name, packed in linears.items():
        shape = (packed.n, packed.k, packed.dtype, packed.group_size, packed.offsets, packed.gated)
        entry = Entry(*shape, size, len(views[name]), crcs[name])
        entries[name] = asdict(entry)
        size += -(-entry.nbytes // _ALIGN) * _ALIGN
    header = json.dumps({"origin": origin, "linears": entries}).encode()
    file.write(MAGIC + len(header).to_bytes(8, "little") + zlib.crc32(header).to_bytes(4, "little") + header)
    file.write(bytes(-file.tell() % _ALIGN))
    for view in views.values():
        file.write(view)
        file.write(bytes(-len(view) % _ALIGN))


def _open(path: Path, origin: Origin) -> tuple[mmap.mmap, dict[str, Entry], int]:
    """(mapping, entries, start of the data), all of it checked. Raises Unusable."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise Unusable(f"can't be read ({e})") from None
    try:
        found, entries = header["origin"], {name: Entry(**values) for name, values in header["linears"].items()}
        whole = start + sum(-(-e.nbytes // _ALIGN) * _ALIGN for e in entries.values())
        places = [slice(start + e.offset, start + e.offset + e.nbytes) for e in entries.values()]
        packing, content = found["packing"], found["content"]
    except (KeyError, TypeError, AttributeError):  # of a version whose header has other fields
        raise Unusable("was made by another version of Quire") from None
    if packing != origin["packing"]:
        raise Unusable("was made by another version of Quire")
    if content != origin["content"]:
        raise Unusable("is stale (the checkpoint has changed since)")
    if found != origin:
        raise Unusable("was made with other options")
    if size != whole:
        raise Unusable(f"is cut short ({size:,} of {whole:,} bytes)" if size < whole else f"has {size - whole:,} bytes too many")
    with memoryview(mapped) as view:
        views = [view[place] for place in places]
        for (name, entry), crc in zip(entries.items(), _crcs(views), strict=True):
            if crc != entry.crc:
                raise Unusable(f"is damaged (the bytes of {name} are not those that were written)")
        for each in views:
            each.release()
    return mapped, entries, start


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """(header, start of the data). Raises Unusable."""
    first = file.read(20)
    if first[:8] != MAGIC[: len(first[:8])]:
        raise Unusable("is not a file of packed weights")
    length, crc = int.from_bytes(first[8:16], "little"), int.from_bytes(first[16:], "little")
    if len(first) < 20 or 20 + length > size:
        raise Unusable(f"is cut short ({size:,} bytes)")
    text = file.read(min(length, _MAX_HEADER))
    if zlib.crc32(text) != crc:
        raise Unusable("is damaged (its header is not the one that was written)")
    header: dict[str, Any] = json.loads(text)
    return header, 20 + length + -(20 + length) % _ALIGN


def _crcs(views: list[memoryview]) -> Iterator[int]:
    """CRC-32 of each view, computed by all threads: of its pieces' CRCs, where it has several."""
    pieces = [(i, at) for i, view in enumerate(views) for at in range(0, len(view), _PIECE)]
    parts: list[bytes] = [b""] * len(views)
    with Progress("reading the cached weights", sum(map(len, views))) as progress, ThreadPoolExecutor(native.num_threads()) as pool:
        sums = pool.map(lambda piece: zlib.crc32(views[piece[0]][piece[1] : piece[1] + _PIECE]), pieces)
        for (i, at), crc in zip(pieces, sums, strict=True):
            parts[i] += crc.to_bytes(4, "little")
            progress.add(min(_PIECE, len(views[i]) - at))
    return (zlib.crc32(part) for part in parts)


def _load(mapped: mmap.mmap, start: int, entry: Entry) -> native.PackedLinear:
    data = np.frombuffer(mapped, np.uint8, entry.nbytes, start + entry.offset)
    return native.load_packed(data, entry.n, entry.k, entry.dtype, entry.group_size, entry.gated, entry.offsets)
