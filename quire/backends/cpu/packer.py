"""Linears from tensors: packed in their own width or quantized, or found packed in a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.packed_cache import PackedCache
from quire.backends.progress import Progress
from quire.models.quantization import Quantization

Tensors = Mapping[str, npt.NDArray[Any]]


class Packer:
    """Packs the linears of a model, one after the other."""

    def __init__(
        self,
        weight_dtype: str | None = None,
        quantization: Quantization | None = None,
        cache: PackedCache | None = None,
        progress: Progress | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        """weight_dtype: width of what is not quantized; None keeps each tensor's. cache: of quantized weights. release: is called
        when weights have been packed, and lets go of the memory that reading them took."""
        self._weight_dtype, self._quantization, self._cache, self._progress = weight_dtype, quantization, cache, progress
        self._release = release

    def matrix(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A weight as the kernels take it, in the width asked for."""
        if self._weight_dtype is not None and tensor.dtype.name != self._weight_dtype:
            if self._weight_dtype == "bfloat16":
                import ml_dtypes  # noqa: F401  numpy knows the name once this is imported; only here, as others need none of it
            tensor = tensor.astype(self._weight_dtype)
        return _bits(tensor)

    def linear(self, tensors: Tensors, names: Sequence[str], *, head: bool = False, gated: bool = False) -> native.PackedLinear:
        """The weights of ``names``, side by side, or gate and up. head: lm_head, which is quantized in its own way."""
        weights = [tensors[f"{name}.weight"] for name in names]
        if len({weight.dtype for weight in weights}) > 1:  # a checkpoint of mixed widths: the widest holds them all
            weights = [np.asarray(weight, np.float32) for weight in weights]
        if self._quantization is not None:
            packed = self._quantized("+".join(names), weights, self._quantization.head if head else self._quantization, gated)
        else:
            packed = native.pack_linear([self.matrix(weight) for weight in weights], gated=gated)
        if self._progress is not None:
            self._progress.add(sum(weight.nbytes for weight in weights))
        if self._release is not None:
            self._release()
        return packed

    def _quantized(self, name: str, weights: list[npt.NDArray[Any]], kind: Quantization, gated: bool) -> native.PackedLinear:
        n, k = len(weights[0]) if gated else sum(map(len, weights)), weights[0].shape[1]
        if self._cache is not None and (found := self._cache.take(name, n, k, kind, gated)) is not None:
            return found
        packed = native.pack_linear([_bits(weight) for weight in weights], kind.dtype, kind.group_size, gated)
        if self._cache is not None:
            self._cache.add(name, packed)
        return packed


def _bits(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A bfloat16 as its bits."""
    return tensor.view(np.uint16) if tensor.dtype.name == "bfloat16" else tensor
