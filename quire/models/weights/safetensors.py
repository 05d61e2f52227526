"""Safetensors files: the header, checked against the file, and arrays that are views of the mapped file.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes, little endian, the header's length; the header, JSON
from name to ``{"dtype", "shape", "data_offsets": [begin, end]}``; then the tensors, which cover the rest without holes.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from quire.errors import ModelLoadError

# Every dtype of the format, so that sizes can be checked; only some become arrays.
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
SUPPORTED: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INTEGERS: Final = {"U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64", "F8_E4M3": "uint8"}
"""Of the parts that quantized weights are stored in; small floats as their bits."""
_MAX_HEADER: Final = 100_000_000  # the limit of the reference implementation
_LFS: Final = b"version https://git-lfs"


@dataclass(slots=True, frozen=True)
class TensorInfo:
    """One tensor of a file, as its header describes it."""

    file: Path
    dtype: str
    """As the format writes it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the start of the file."""
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor name → info, without reading a tensor. Raises ModelLoadError for a file that is not whole and well formed."""
    try:
        with file.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(0)
            first = f.read(8)
            if size < 8:
                _refuse(file, f"has {size} bytes; even an empty safetensors file has 8")
            length = int.from_bytes(first, "little")
            if _LFS.startswith(first):
                _refuse(file, "is a Git LFS pointer and not the tensors: fetch them with 'git lfs pull'")
            if length > _MAX_HEADER:
                _refuse(file, f"is not a safetensors file: its first 8 bytes give a header of {length} bytes")
            if 8 + length > size:
                _refuse(file, f"is cut short: its header ends at byte {8 + length}, the file at byte {size}; download it again")
            text = f.read(length)
    except OSError as e:
        _refuse(file, f"can't be read: {e.strerror or e}")
    header = _parse(file, text)
    infos = {name: _info(file, name, entry, 8 + length) for name, entry in header.items()}
    _check_coverage(file, infos, 8 + length, size)
    return infos


def map_file(file: Path) -> mmap.mmap:
    """The file, mapped read-only. Pages are read when they are touched, and can be dropped again by the system."""
    try:
        with file.open("rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        _refuse(file, f"can't be mapped: {e}")


def view(mapped: mmap.mmap, info: TensorInfo) -> npt.NDArray[Any]:
    """A read-only array, [shape] in the stored dtype, over the mapped file; a copy only where the file misaligns it.

    The mapping stays open as long as any view is alive.
    """
    dtype = array_dtype(info.dtype)
    array = np.frombuffer(mapped, dtype, count=prod(info.shape), offset=info.offset).reshape(info.shape)
    return array if array.flags.aligned else array.copy()


def array_dtype(dtype: str) -> np.dtype[Any]:
    """numpy dtype of a SUPPORTED dtype, or of integers; ``ml_dtypes.bfloat16`` for BF16, or uint16 (its bits) where ml_dtypes is not
    installed: the CUDA backend does without."""
    if dtype == "BF16":
        try:
            import ml_dtypes  # where it is used, as the other formats need no second extension module
        except ModuleNotFoundError:
            return np.dtype("<u2")
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype((SUPPORTED | _INTEGERS)[dtype]).newbyteorder("<")


def _refuse(file: Path, problem: str) -> NoReturn:
    raise ModelLoadError(f"{file} {problem}")


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in table if names.count(name) > 1)
            raise ValueError(f"{twice!r} is there twice")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # both JSON and UTF-8 errors are ValueErrors
        _refuse(file, f"has a malformed header: {e}")
    if not isinstance(header, dict):
        _refuse(file, "has a malformed header: not a JSON object")
    header.pop("__metadata__", None)
    return dict(header)


def _info(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """Check one entry of the header; ``data`` is the file offset that its offsets count from."""
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _refuse(file, f"has a malformed header: tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > 32 or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, f"has a malformed header: tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in _BITS:
        _refuse(file, f"has a malformed header: tensor {name!r} has the unknown dtype {dtype!r}")
    nbytes, bits = offsets[1] - offsets[0], prod(shape) * _BITS[dtype]
    if bits != nbytes * 8:
        _refuse(file, f"has a malformed header: tensor {name!r}, {dtype} {shape}, needs {bits // 8} bytes but has {nbytes}")
    return TensorInfo(file, dtype, tuple(shape), data + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_coverage(file: Path, infos: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Tensors must follow one another without holes or overlaps, up to the end of the file."""
    at = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            _refuse(file, f"has a malformed header: tensor {name!r} starts at byte {info.offset} of the file instead of {at}")
        at += info.nbytes
    if at > size:
        _refuse(file, f"is cut short: its header describes {at} bytes, the file has {size}; download it again")
    if at < size:
        _refuse(file, f"has {size} bytes, but its header describes only {at}; download it again")
