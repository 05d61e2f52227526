"""Experts in MXFP4 (OCP Microscaling specification, MX 1.0), as gpt-oss has them: floats of 4 bits (E2M1), 32 of which share a power of two
(E8M0, a byte less 127).

    NAME_blocks [experts, out, in / 32, 16], uint8: the even inputs in the low halves of bytes; NAME_scales [experts, out, in / 32], uint8

What is not packed is one tensor too, but [experts, in, out]: that is what the families say of NAME.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from quire.errors import ModelLoadError
from quire.models.weights.safetensors import TensorInfo, view

U8 = npt.NDArray[np.uint8]

GROUP: Final = 32
_VALUES: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS: Final = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=1)
"""What the two numbers of a byte are."""
_POWERS: Final = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
_CHUNK: Final = 1 << 18
"""Numbers that become floats at a time."""


@dataclass(slots=True, frozen=True)
class Mxfp4Tensor:
    """The linears of all experts of a layer."""

    name: str
    numbers: TensorInfo
    scales: TensorInfo

    def open(self, maps: Mapping[Path, mmap.mmap]) -> Mxfp4Weight:
        return Mxfp4Weight(view(maps[self.numbers.file], self.numbers), view(maps[self.scales.file], self.scales))


class Mxfp4Weight:
    """Of an open checkpoint. numbers [out, in / 32, 16] of one expert, or of all along another axis; scales the same without the last."""

    kind = "mxfp4"
    """As in TransformerSpec.stored."""

    def __init__(self, numbers: U8, scales: U8) -> None:
        self._numbers, self._scales = numbers, scales

    def expert(self, index: int) -> Mxfp4Weight:
        return Mxfp4Weight(self._numbers[index], self._scales[index])

    def floats(self, rows: slice) -> npt.NDArray[np.float16]:
        """[rows, in] of one expert. Powers beyond float16 become 0 or infinite."""
        numbers, scales = self._numbers[rows], self._scales[rows]
        made = np.empty((len(numbers), numbers.shape[1] * GROUP), np.float16)
        step = max(1, _CHUNK // made.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(made), step):
                some = slice(start, start + step)
                grouped = _PAIRS[numbers[some]].reshape(*scales[some].shape, GROUP)
                made[some] = (grouped * _POWERS[scales[some]][..., None]).reshape(made[some].shape)
        return made

    def blocks(self, rows: slice) -> U8:
        """The same as ``native.pack_blocks`` takes them."""
        numbers, halves = self._numbers[rows], np.float32(0.5) * _POWERS[self._scales[rows]]
        return np.concatenate([halves[..., None].view(np.uint8), numbers], axis=-1).reshape(len(numbers), -1)


def find_mxfp4(infos: dict[str, TensorInfo]) -> dict[str, Mxfp4Tensor]:
    """Name → its tensors, which are taken out of ``infos``; there one of floats stands for them. Raises ModelLoadError for parts that are
    missing or do not fit together."""
    found = {}
    for blocks in [name for name in infos if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        numbers = infos.pop(blocks)
        scales = infos.pop(f"{name}_scales", None)
        if scales is None:
            raise ModelLoadError(f"{numbers.file}: {blocks} is there, but no {name}_scales")
        shape = numbers.shape
        if numbers.dtype != "U8" or len(shape) != 4 or shape[3] != GROUP // 2 or not numbers.nbytes:
            raise ModelLoadError(f"{numbers.file}: {blocks} is {numbers.dtype} {list(shape)}, not U8 [experts, out, in / 32, 16]")
        if scales.dtype != "U8" or scales.shape != shape[:3]:
            raise ModelLoadError(f"{scales.file}: {name}_scales is {scales.dtype} {list(scales.shape)}, not U8 {list(shape[:3])}")
        found[name] = Mxfp4Tensor(name, numbers, scales)
        experts, out, groups = shape[:3]
        infos[name] = TensorInfo(numbers.file, "BF16", (experts, groups * GROUP, out), 0, 4 * numbers.nbytes)
    return found
