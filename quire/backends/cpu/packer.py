"""Linears from tensors: packed in their own width, quantized or as they are stored, or found packed in a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.packed_cache import PackedCache
from quire.backends.progress import Progress
from quire.models.quantization import FOUR_BITS, INT8, Quantization
from quire.models.weights import Blocks, no_blocks

Tensors = Mapping[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]
"""Of the weights of linears, by name, in the order in which they are packed."""


class Packer:
    """Packs the linears of a model, one after the other."""

    def __init__(
        self,
        weight_dtype: str | None = None,
        quantization: Quantization | None = None,
        cache: PackedCache | None = None,
        progress: Progress | None = None,
        release: Callable[[], None] | None = None,
        blocks: Blocks = no_blocks,
    ) -> None:
        """weight_dtype: width of what is not quantized; None keeps each tensor's. cache: of quantized weights. release: is called
        when weights have been packed, and lets go of the memory that reading them took. blocks: of weights that stay in 4 bits."""
        self._weight_dtype, self._quantization, self._cache, self._progress = weight_dtype, quantization, cache, progress
        self._release, self._blocks = release, blocks

    def matrix(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A weight as the kernels take it, in the width asked for."""
        if self._weight_dtype is not None and tensor.dtype.name != self._weight_dtype:
            if self._weight_dtype == "bfloat16":
                import ml_dtypes  # noqa: F401  numpy knows the name once this is imported; only here, as others need none of it
            tensor = tensor.astype(self._weight_dtype)
        return _bits(tensor)

    def linear(self, tensors: Tensors, shapes: Shapes, *, gated: bool = False) -> list[native.PackedLinear]:
        """The weights that ``shapes`` names, side by side, or gate and up: one linear, or several, each with the outputs of some, where
        they are not all stored in the same way."""
        if self._quantization is None:
            return [self.floats(tensors, shapes, gated=gated)]
        kinds = {name: self._kind(name, self._quantization) for name in shapes}
        if gated and len(set(kinds.values())) > 1:
            kinds = dict.fromkeys(shapes, (INT8, ""))
        return [
            self._quantized(tensors, {name: shapes[name] for name in names}, *kind, gated)
            for kind, names in groupby(shapes, kinds.__getitem__)
        ]

    def floats(self, tensors: Tensors, shapes: Shapes, *, gated: bool = False, wide: bool = False) -> native.PackedLinear:
        """One linear that is not quantized, whatever others are. wide: in float32."""
        weights = [self.matrix(weight) for weight in _alike([tensors[f"{name}.weight"] for name in shapes], wide)]
        packed = native.pack_linear(weights, gated=gated)
        self._done(shapes)
        return packed

    def experts(self, tensors: Tensors, experts: Sequence[Shapes], *, gated: bool = False) -> tuple[native.PackedLinear, ...]:
        """One linear of each expert (gate and up where gated), all of one kind: int8 where they are not stored in the same way."""
        if self._quantization is None:
            packed = tuple(self.floats(tensors, shapes, gated=gated) for shapes in experts)
            if len({each.dtype for each in packed}) > 1:
                packed = tuple(self.floats(tensors, shapes, gated=gated, wide=True) for shapes in experts)
            return packed
        kinds = {self._kind(name, self._quantization) for shapes in experts for name in shapes}
        kind = kinds.pop() if len(kinds) == 1 else (INT8, "")
        return tuple(self._quantized(tensors, shapes, *kind, gated) for shapes in experts)

    def _kind(self, name: str, quantization: Quantization) -> tuple[Quantization, str]:
        """And the type of the blocks that are packed as they are; empty where numbers are made of floats."""
        kind = quantization.kind(name)
        kept = self._blocks(f"{name}.weight") if quantization.linears and kind.dtype in FOUR_BITS else None
        return kind, kept[0] if kept else ""

    def _quantized(self, tensors: Tensors, shapes: Shapes, kind: Quantization, stored: str, gated: bool) -> native.PackedLinear:
        name, rows, k = "+".join(shapes), [n for n, _ in shapes.values()], next(iter(shapes.values()))[1]
        packed = self._cache.take(name, rows[0] if gated else sum(rows), k, kind, gated) if self._cache is not None else None
        if packed is None:
            if stored:
                kept = [found[1]() for each in shapes if (found := self._blocks(f"{each}.weight")) is not None]
                packed = native.pack_blocks(kept, stored, gated)
            else:
                weights = _alike([tensors[f"{each}.weight"] for each in shapes])
                packed = native.pack_linear([_bits(weight) for weight in weights], kind.dtype, kind.group_size, gated)
            if self._cache is not None:
                self._cache.add(name, packed)
        self._done(shapes)
        return packed

    def _done(self, shapes: Shapes) -> None:
        """With weights of these shapes."""
        if self._progress is not None:
            self._progress.add(sum(map(prod, shapes.values())))
        if self._release is not None:
            self._release()


def _alike(weights: list[npt.NDArray[Any]], wide: bool = False) -> list[npt.NDArray[Any]]:
    """In one width: the widest holds those of a checkpoint of mixed widths. wide: in that one always."""
    mixed = wide or len({weight.dtype for weight in weights}) > 1
    return [np.asarray(weight, np.float32) for weight in weights] if mixed else weights


def _bits(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A bfloat16 as its bits."""
    return tensor.view(np.uint16) if tensor.dtype.name == "bfloat16" else tensor
