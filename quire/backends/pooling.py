"""The vector of a prompt: the last hidden state, or the mean of all, whatever steps the prompt was cut into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.backends.parameters import NOT_FINITE
from quire.core.plan import RowStart, StepResult


@dataclass(slots=True)
class Pooled:
    """Of one prompt: what its positions so far add up to."""

    sum: npt.NDArray[np.float64]
    num_prompt: int
    count: int = 0

    def add(self, row: int, hidden: npt.NDArray[np.float32], end: int, result: StepResult) -> None:
        """The states of the next scored positions, up to position ``end``. Into ``result`` the row's vector, where they are all."""
        for state in hidden:  # one after the other: the sum must not depend on how the prompt was cut into steps
            self.sum += state
        self.count += len(hidden)
        if end < self.num_prompt:
            return
        vector = (self.sum / self.count).astype(np.float32)
        if not np.isfinite(vector).all():
            result.errors[row] = NOT_FINITE
        result.vectors[row] = vector.tolist()


class Pooling:
    def __init__(self, size: int) -> None:
        """size: of a hidden state."""
        self._size = size
        self._rows: dict[int, Pooled] = {}

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        self._rows.pop(start.row, None)
        if start.pooling is not None:
            self._rows[start.row] = Pooled(np.zeros(self._size), start.num_prompt)

    def of(self, row: int) -> Pooled | None:
        """What the row's scored positions are added to; None where they make no vector."""
        return self._rows.get(row)
