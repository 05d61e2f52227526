"""Steps that come again without Python between their kernels, as CUDA graphs do it on a GPU.

A decode step, with guessed tokens or without, calls the same kernels on the same buffers as every other one of as many sequences and
positions. So the calls of a step are recorded once for each of these pairs of numbers, and run again over what the arrays hold
by then: at batch 1 of a small quantized model that is a tenth of the step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.rows import Batch

F32 = npt.NDArray[np.float32]
_MOST = 32
"""Recordings that are kept, those used last: the number of running sequences moves in small steps, and few have guesses beside them."""


@dataclass(slots=True)
class _Recorded:
    calls: native.Recording
    batch: Batch
    """Whose arrays the calls read."""
    logits: F32


class Replay:
    """``forward``, which must call kernels alone, on memory that stays where it is and on the arrays of its batch."""

    def __init__(self, forward: Callable[[Batch], F32]) -> None:
        self._forward = forward
        self._recorded: OrderedDict[tuple[int, int], _Recorded] = OrderedDict()

    def __call__(self, batch: Batch) -> F32:
        """forward(batch). A batch that is not ``whole`` runs as it is."""
        if not batch.whole:
            return self._forward(batch)
        key = len(batch.rows), len(batch.ids)
        recorded = self._recorded.get(key)
        if recorded is None or recorded.batch.block_tables is not batch.block_tables:
            return self._record(key, batch)
        self._recorded.move_to_end(key)
        for mine, new in zip(recorded.batch.contents(), batch.contents(), strict=True):
            np.copyto(mine, new)
        recorded.calls.run()
        return recorded.logits

    def _record(self, key: tuple[int, int], batch: Batch) -> F32:
        mine = batch.copy()
        calls = native.Recording()
        with calls:
            logits = self._forward(mine)
        self._recorded[key] = _Recorded(calls, mine, logits)
        if len(self._recorded) > _MOST:
            self._recorded.popitem(last=False)
        return logits
