"""Linears of a checkpoint that are quantized and packed: several tensors each, found in its headers, and made floats or blocks.

Numbers are unsigned, of 4 or 8 bits, or small floats (see families/packing.py); a weight is (number - zero) * scale. In little-endian
words of 32 bits the first number is the lowest.

    awq             qweight [in, out / 8], eight outputs in a word, in the order 0 2 4 6 1 3 5 7; qzeros [groups, out / 8], likewise;
                    scales [groups, out]
    gptq            qweight [in * bits / 32, out], consecutive inputs in a word; qzeros [groups, out * bits / 32], outputs in a word;
                    scales [groups, out]; g_idx [in], the group of each input, optional
    pack-quantized  weight_packed [out, in * bits / 32], inputs in a word; weight_scale [out, groups]; weight_zero_point
                    [out * bits / 32, groups], outputs in a word, optional; weight_g_idx [in], optional; weight_shape [2]
    int-quantized   weight [out, in], signed bytes; weight_scale [out, 1]
    float-quantized weight [out, in], e4m3 (float8_e4m3fn); weight_scale [out, 1], or one number for all, or for blocks as below
    fp8             weight [out, in], likewise; weight_scale_inv [out / rows, in / group], rounded up, of blocks, which it multiplies
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quire.errors import ModelLoadError
from quire.models.families.packing import Packing
from quire.models.weights.safetensors import TensorInfo, view

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_OF_ACTIVATIONS: Final = ("input_scale", "input_zero_point", "activation_scale", "output_scale")
"""Quire finds scales of activations for each row by itself, so these say nothing to it."""
_PARTS: Final[dict[str, tuple[str, ...]]] = {
    "awq": ("qweight", "scales", "qzeros"),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    "int-quantized": ("weight", "weight_scale", "weight_zero_point", *_OF_ACTIVATIONS),
    "float-quantized": ("weight", "weight_scale", *_OF_ACTIVATIONS),
    "fp8": ("weight", "weight_scale_inv", *_OF_ACTIVATIONS),
}
"""The numbers, the scales, and what else there may be."""
_FP8: Final = ("float-quantized", "fp8")
_E4M3: Final = np.array(
    [(-1) ** (b >> 7) * (2.0 ** ((b >> 3 & 15) - 7) * (1 + (b & 7) / 8) if b >> 3 & 15 else 2.0**-6 * (b & 7) / 8) for b in range(256)],
    np.float32,
)
"""What a byte of float8_e4m3fn (OCP OFP8) is: 4 bits of exponent, 3 of fraction, no infinities."""
_E4M3[[0x7F, 0xFF]] = np.nan
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_CHUNK: Final = 1 << 18
"""Numbers that become floats at a time."""


@dataclass(slots=True, frozen=True)
class PackedTensor:
    """One linear."""

    name: str
    packing: Packing
    parts: Mapping[str, TensorInfo]
    shape: tuple[int, int]
    """[out, in]"""

    def open(self, maps: Mapping[Path, mmap.mmap]) -> PackedWeight:
        """Its scales and zeros read. Raises ModelLoadError."""
        return PackedWeight(self, maps)


def find_packed(packing: Packing, infos: dict[str, TensorInfo]) -> dict[str, PackedTensor]:
    """Name of each packed linear's weight → its parts, which are taken out of ``infos``; there the weight stands for them.

    Raises ModelLoadError for parts that are missing or do not fit together.
    """
    numbers, scales, *others = _PARTS[packing.method]
    if packing.method == "float-quantized":  # one scale for all has two names
        for name in [name for name in infos if name.endswith(".weight_scale_inv")]:
            infos[name.removesuffix("_inv")] = infos.pop(name)
    found = {}
    for name in [name for name in infos if name.endswith(f".{scales}")]:
        module = name.removesuffix(f".{scales}")
        parts = {part: infos.pop(f"{module}.{part}") for part in (numbers, scales, *others) if f"{module}.{part}" in infos}
        if numbers not in parts:
            raise ModelLoadError(f"{parts[scales].file}: {name} is there, but no {module}.{numbers}")
        weight = f"{module}.weight"
        found[weight] = PackedTensor(weight, packing, parts, _shape(module, packing, parts))
        out, inputs = found[weight].shape
        dtype = "BF16" if parts[scales].dtype == "BF16" else "F16"
        infos[weight] = TensorInfo(parts[numbers].file, dtype, (out, inputs), 0, 2 * out * inputs)
    return found


def _shape(module: str, packing: Packing, parts: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """[out, in], where all parts have the shapes and dtypes that go with it."""
    numbers = _PARTS[packing.method][0]
    each = 32 // packing.bits
    first, second = parts[numbers].shape if len(parts[numbers].shape) == 2 else (0, 0)
    integers, floats = ("I32",), ("F32", "F16", "BF16")
    if packing.method == "awq":
        out, inputs = second * each, first
    elif packing.method == "gptq":
        out, inputs = second, first * each
    else:
        out, inputs = first, second * (each if packing.method == "pack-quantized" else 1)
    packed, bytes_ = parts[numbers].shape, packing.method in _FP8
    if not out * inputs or (not bytes_ and (inputs % 2 or (packing.group_size and inputs % packing.group_size))):
        what = f"numbers in groups of {packing.group_size}" if packing.group_size else "numbers"
        raise ModelLoadError(f"{parts[numbers].file}: {module}.{numbers} has the shape {list(packed)}, which is not that of {what}")
    groups = -(-inputs // packing.group_size) if packing.group_size else 1
    rows = -(-out // packing.rows) if packing.rows else 1
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "qweight": (packed, integers), "weight_packed": (packed, integers), "weight": (packed, ("F8_E4M3",) if bytes_ else ("I8",)),
        "scales": ((groups, out), floats), "weight_scale": ((rows, groups) if packing.rows else (1,), floats),
        "weight_scale_inv": ((rows, groups), floats),
        "qzeros": ((groups, -(-out // each)), integers), "weight_zero_point": ((-(-out // each), groups), integers),
        "g_idx": ((inputs,), ("I32", "I64")), "weight_g_idx": ((inputs,), ("I32", "I64")), "weight_shape": ((2,), ("I32", "I64")),
    }  # fmt: skip
    if packing.method == "int-quantized":
        wanted["weight_zero_point"] = (parts.get("weight_zero_point", parts["weight_scale"]).shape, ("I8",))
    for part, info in parts.items():
        if part in _OF_ACTIVATIONS:
            continue
        shape, dtypes = wanted[part]
        if info.shape == () and shape == (1,):  # one number for all
            shape = ()
        if info.shape != shape or info.dtype not in dtypes:
            raise ModelLoadError(
                f"{info.file}: {module}.{part} is {info.dtype} {list(info.shape)}, and a linear with {inputs} inputs, {out} outputs and "
                f"{groups} groups has {' or '.join(dtypes)} {list(shape)}"
            )
    if packing.offsets and not {"qzeros", "weight_zero_point"} & parts.keys():
        raise ModelLoadError(f"{parts[numbers].file}: {module} has no zeros, and its quantization is not symmetric")
    return out, inputs


class PackedWeight:
    """One linear of an open checkpoint."""

    def __init__(self, tensor: PackedTensor, maps: Mapping[Path, mmap.mmap]) -> None:
        self._tensor, self._maps = tensor, maps
        packing, parts, (out, inputs) = tensor.packing, tensor.parts, tensor.shape
        _, scales, *_ = _PARTS[packing.method]
        table = self._part(scales)
        if parts[scales].dtype == "BF16":  # also where nothing is installed that knows it
            table = (table.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        table = table.astype(np.float32).reshape(parts[scales].shape or (1,))
        if packing.rows != 1:
            table = (
                np.broadcast_to(table.reshape(1, 1), (out, 1)) if not packing.rows else table.repeat(min(packing.rows, out), axis=0)[:out]
            )
        self._scales: F32 = np.ascontiguousarray(table.T if scales == "scales" else table)
        self._zeros = self._read_zeros(out)
        self._groups: npt.NDArray[np.int64] | None = None
        """Of each input, where they are not in order."""
        if packing.group_size and inputs % packing.group_size:  # blocks may end before they are full
            self._groups = np.arange(inputs) // packing.group_size
        index = next((self._part(part) for part in ("g_idx", "weight_g_idx") if part in parts), None)
        in_order = index is None or bool((index == np.arange(inputs) // (packing.group_size or inputs)).all())
        if index is not None and not in_order:
            if index.min() < 0 or index.max() >= self._scales.shape[1]:
                raise ModelLoadError(
                    f"{tensor.name}: g_idx names groups from {index.min()} to {index.max()}, and there are {self._scales.shape[1]}"
                )
            self._groups = index.astype(np.int64)
        centred = bool((self._zeros == 1 << (packing.bits - 1)).all())
        self.kind = packing.kind(inputs, not centred, in_order)
        """As in TransformerSpec.stored."""

    def floats(self, rows: slice) -> npt.NDArray[np.float16]:
        """[rows, in], of rows that follow one another."""
        first, last = rows.start, rows.stop
        made = np.empty((last - first, self._tensor.shape[1]), np.float16)
        step = max(1, _CHUNK // made.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(first, last, step):
                some = slice(start, min(start + step, last))
                made[start - first : some.stop - first] = self._floats(some)
        return made

    def blocks(self, rows: slice) -> U8:
        """Rows as ``native.pack_blocks`` takes them, of the type ``kind``, which is not int8: a group's scale, its offset, then its
        numbers, the even ones in the low halves of bytes."""
        group, count = self.kind.partition(":")[2], rows.stop - rows.start
        halves = self._bytes(rows).reshape(count, -1, int(group.split("+")[0]) // 2)
        repeated = halves.shape[1] // self._scales.shape[1]  # the kernels' groups may be smaller
        scales, zeros = (each[rows].repeat(repeated, axis=1) for each in (self._scales, self._zeros))
        with np.errstate(invalid="ignore"):
            columns = (scales, (8 - zeros) * scales) if group.endswith("offsets") else (scales,)
        return np.concatenate([np.stack(columns, axis=-1).view(np.uint8), halves], axis=-1).reshape(count, -1)

    def _floats(self, rows: slice) -> F32:
        bytes_ = self._bytes(rows)
        numbers = _E4M3[bytes_] if self._tensor.packing.method in _FP8 else _unpack(bytes_, self._tensor.packing.bits)
        if self._groups is not None:
            return (numbers - self._zeros[rows][:, self._groups]) * self._scales[rows][:, self._groups]
        grouped = numbers.reshape(len(numbers), self._scales.shape[1], -1)
        made: F32 = (grouped - self._zeros[rows][..., None]) * self._scales[rows][..., None]
        return made.reshape(numbers.shape)

    def _part(self, part: str) -> npt.NDArray[Any]:
        info = self._tensor.parts[part]
        return view(self._maps[info.file], info)

    def _bytes(self, rows: slice) -> U8:
        """[rows, in * bits / 8], the first number lowest."""
        method = self._tensor.packing.method
        if method == "int-quantized":
            return self._part("weight")[rows].view(np.uint8) ^ np.uint8(128)
        if method in _FP8:
            return self._part("weight")[rows]
        if method == "pack-quantized":
            return np.ascontiguousarray(self._part("weight_packed")[rows]).view(np.uint8)
        words = self._part("qweight")
        if method == "gptq":
            return np.ascontiguousarray(words[:, rows].T).view(np.uint8)
        whole = slice(rows.start // 8, -(-rows.stop // 8))
        each = np.ascontiguousarray(words[:, whole].T).view(np.uint8).reshape(whole.stop - whole.start, len(words), 4)
        made = np.empty((8 * len(each), len(words) // 2), np.uint8)
        for i in range(4):
            even, odd = each[:, 0::2, i], each[:, 1::2, i]
            made[_AWQ_ORDER[2 * i] :: 8] = (even & 15) | odd << 4
            made[_AWQ_ORDER[2 * i + 1] :: 8] = even >> 4 | (odd & 240)
        return made[rows.start - 8 * whole.start : rows.stop - 8 * whole.start]

    def _read_zeros(self, out: int) -> F32:
        """[out, groups]"""
        packing, parts = self._tensor.packing, self._tensor.parts
        middle = np.broadcast_to(np.float32(0 if packing.method in _FP8 else 1 << (packing.bits - 1)), self._scales.shape)
        if packing.method == "int-quantized" and "weight_zero_point" in parts and self._part("weight_zero_point").any():
            raise ModelLoadError(f"{self._tensor.name}: zeros of weights in 'int-quantized' are not supported")
        if not packing.offsets:
            return middle
        if packing.method == "awq":
            numbers = _unpack(np.ascontiguousarray(self._part("qzeros")).view(np.uint8), 4).reshape(-1, out // 8, 8)
            return numbers[:, :, np.argsort(_AWQ_ORDER)].reshape(-1, out).T.astype(np.float32)
        if packing.method == "gptq":
            zeros = _unpack(np.ascontiguousarray(self._part("qzeros")).view(np.uint8), packing.bits)[:, :out].T
            return ((zeros.astype(np.int64) + packing.zero_shift) & ((1 << packing.bits) - 1)).astype(np.float32)
        assert "weight_zero_point" in parts
        zeros = _unpack(np.ascontiguousarray(self._part("weight_zero_point").T).view(np.uint8), packing.bits)[:, :out].T
        return zeros.astype(np.float32)


def _unpack(each: U8, bits: int) -> U8:
    """[rows, bytes] → [rows, numbers]"""
    return each if bits == 8 else np.stack([each & 15, each >> 4], axis=-1).reshape(len(each), -1)
