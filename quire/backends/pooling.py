"""The vector of a prompt: the last hidden state, or the mean of all, whatever steps the prompt was cut into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.backends.parameters import NOT_FINITE
from quire.core.plan import RowStart, StepResult


@dataclass(slots=True)
class _Pooled:
    """Of a row: what its positions so far add up to."""

    sum: npt.NDArray[np.float64]
    num_prompt: int
    count: int = 0


class Pooling:
    def __init__(self, size: int) -> None:
        """size: of a hidden state."""
        self._size = size
        self._rows: dict[int, _Pooled] = {}

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        self._rows.pop(start.row, None)
        if start.pooling is not None:
            self._rows[start.row] = _Pooled(np.zeros(self._size), start.num_prompt)

    def has(self, row: int) -> bool:
        """Whether the row's scored positions make a vector."""
        return row in self._rows

    def add(self, row: int, hidden: npt.NDArray[np.float32], end: int, result: StepResult) -> None:
        """The states of the row's next scored positions, up to position ``end``. Into ``result`` the vector, where they are all."""
        pooled = self._rows[row]
        for state in hidden:  # one after the other: the sum must not depend on how the prompt was cut into steps
            pooled.sum += state
        pooled.count += len(hidden)
        if end < pooled.num_prompt:
            return
        vector = (pooled.sum / pooled.count).astype(np.float32)
        if not np.isfinite(vector).all():
            result.errors[row] = NOT_FINITE
        result.vectors[row] = vector.tolist()
