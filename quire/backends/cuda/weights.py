"""Weights on the device: streamed tensor by tensor out of the mapped files, fused where linears share an input, quantized if asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.backends.cuda.cache import DTYPES
from quire.backends.cuda.quantize import quantize_weight
from quire.backends.progress import Progress
from quire.models.spec import Activation

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(slots=True)
class Linear:
    """out = x · Wᵀ + b"""

    weight: Tensor
    """[out, in]"""
    bias: Tensor | None
    scales: Tensor | None
    """[out] float32 where the weight is int8 or fp8."""
    ops: Any
    """Whose ``linear`` and ``gated_linear`` are taken."""
    same: bool
    """Whether a row's result must not depend on the other rows."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in] → [T, out], in ``out`` where that is given"""
        product: Tensor = self.ops.linear(x, self.weight, self.bias, self.scales, self.same, out)
        return product

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, of gate beside up [T, out] → [T, out / 2]"""
        product: Tensor = self.ops.gated_linear(x, self.weight, self.bias, self.scales, self.same, activation)
        return product

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.bias, self.scales) if tensor is not None)


@dataclass(slots=True)
class FeedForward:
    """down(act(up(x)))"""

    up: Linear
    """Gate beside up where gated."""
    down: Linear
    gated: bool
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]"""
        if self.gated:
            return self.down(self.up.gated(x, self.activation))
        return self.down(self.up.ops.activate(self.up(x), self.activation, False))

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes


@dataclass(slots=True)
class Choice:
    """How scores choose experts, and weigh them: what ``route`` of the operations takes."""

    taken: int
    sum_to_one: bool
    sigmoid: bool
    correction: Tensor | None
    """[experts] float32"""
    scale: float


@dataclass(slots=True)
class Experts:
    """As many feed-forwards as the router has outputs, of which each row takes a few, and how they are weighed."""

    router: Linear
    choice: Choice
    up: Tensor
    """[experts, 2 * inner, hidden], gate beside up; or [experts, inner, hidden] where there is no gate."""
    up_bias: Tensor | None
    """[experts, 2 * inner], or [experts, inner]."""
    up_scales: Tensor | None
    """[experts, 2 * inner] float32 where weights are int8 or fp8, or [experts, inner]."""
    down: Tensor
    """[experts, hidden, inner]"""
    down_bias: Tensor | None
    """[experts, hidden]"""
    down_scales: Tensor | None
    """[experts, hidden]"""
    activation: Activation
    shared: FeedForward | None
    """What every row takes beside them."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]"""
        ops, choice = self.router.ops, self.choice
        scores = self.router(x.to(self.router.weight.dtype))
        chosen, weights = ops.route(scores, choice.taken, choice.sum_to_one, choice.sigmoid, choice.correction, choice.scale)
        summed: Tensor = ops.experts(
            x, self.up, self.up_bias, self.up_scales, self.down, self.down_bias, self.down_scales, chosen, weights, self.activation,
            self.router.same,
        )  # fmt: skip
        return summed if self.shared is None else summed.add_(self.shared(x))

    @property
    def nbytes(self) -> int:
        """Of all experts, without the router and what is beside them."""
        tensors = self.up, self.up_bias, self.up_scales, self.down, self.down_bias, self.down_scales
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Loader:
    """Makes device tensors of a model's host tensors. What it has copied is given back to the system through ``release``."""

    def __init__(
        self, tensors: Tensors, device: torch.device, dtype: str, quantize: Literal["int8", "fp8"] | None,
        ops: Any, progress: Progress, release: Callable[[], None], same: bool = False,
    ) -> None:  # fmt: skip
        """dtype: of the weights that are not quantized, and of the activations. ops, same: see Linear."""
        self._tensors, self._device, self._dtype = tensors, device, DTYPES[dtype]
        self._quantize, self._ops, self._same = quantize, ops, same
        self._progress, self._release = progress, release

    def has(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, wide: bool = False) -> Tensor:
        """One tensor, in the dtype of the activations, or in float32 (wide)."""
        array = self._tensors[name]
        there = torch.empty(array.shape, dtype=torch.float32 if wide else self._dtype, device=self._device)
        self._copy(name, array, there)
        return there

    def linear(self, *names: str, share: Tensor | None = None, exact: bool = False, wide: bool = False) -> Linear:
        """The linears ``names`` side by side, which share an input. share: a tensor that is the weight already (a tied lm_head). exact:
        it is not quantized (a router). wide: it is in float32, and so must be what it multiplies."""
        weight, scales = self._weight(*names, wide=wide) if share is None else share, None
        if self._quantize is not None and not exact:
            weight, scales = quantize_weight(weight, self._quantize)
        return Linear(weight, self._bias(*names, wide=wide), scales, self._ops, self._same)

    def stacked(self, each: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The linears of one shape, some of them side by side in ``each``: weights [len(each), out, in]; biases [len(each), out] where
        all have them, None where none has; and where they are quantized scales [len(each), out]. One at a time: there is no room for all
        weights in two widths."""
        found = [bias for names in each if (bias := self._bias(*names)) is not None]
        bias = torch.stack(found) if found else None
        shapes = [self._tensors[f"{name}.weight"].shape for name in each[0]]
        shape = (len(each), sum(out for out, _ in shapes), shapes[0][1])
        if self._quantize is None:
            stack = torch.empty(shape, dtype=self._dtype, device=self._device)
            for names, there in zip(each, stack, strict=True):
                self._weight(*names, into=there)
            return stack, bias, None
        stack = torch.empty(shape, dtype=DTYPES[self._quantize], device=self._device)
        scales = torch.empty(shape[:2], dtype=torch.float32, device=self._device)
        for i, names in enumerate(each):
            stack[i], scales[i] = quantize_weight(self._weight(*names), self._quantize)
        return stack, bias, scales

    def _weight(self, *names: str, into: Tensor | None = None, wide: bool = False) -> Tensor:
        """Of the linears ``names`` side by side, in the dtype of the activations, or in float32 (wide)."""
        arrays = [self._tensors[f"{name}.weight"] for name in names]
        sizes, dtype = [len(array) for array in arrays], torch.float32 if wide else self._dtype
        weight = torch.empty((sum(sizes), arrays[0].shape[1]), dtype=dtype, device=self._device) if into is None else into
        for name, array, part in zip(names, arrays, weight.split(sizes), strict=True):
            self._copy(f"{name}.weight", array, part)
        return weight

    def _bias(self, *names: str, wide: bool = False) -> Tensor | None:
        """Of the linears ``names`` side by side, 0 of those that have none; None where none has. wide: in float32."""
        if not any(self.has(f"{name}.bias") for name in names):
            return None
        sizes = [len(self._tensors[f"{name}.weight"]) for name in names]
        bias = torch.zeros(sum(sizes), dtype=torch.float32 if wide else self._dtype, device=self._device)
        for name, part in zip(names, bias.split(sizes), strict=True):
            if self.has(f"{name}.bias"):
                self._copy(f"{name}.bias", self._tensors[f"{name}.bias"], part)
        return bias

    def _copy(self, name: str, array: npt.NDArray[Any], there: Tensor) -> None:
        there.copy_(host_tensor(array))
        self._progress.add(array.nbytes)
        self._release()


def host_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A view of a host array that is only read; bfloat16 comes as ml_dtypes has it, or as its bits."""
    if array.dtype.name in ("bfloat16", "uint16"):
        return _view(array.view(np.uint16)).view(torch.bfloat16)
    return _view(array)


def _view(array: npt.NDArray[Any]) -> Tensor:
    # PyTorch has no tensors that may only be read, and warns; these are not written.
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
