"""Scorer: what the hidden states of a prompt say of it. Log-probabilities of its own tokens, or one vector for all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from quire.backends.cuda.decoder import Decoder
from quire.backends.cuda.staging import to_device
from quire.backends.parameters import FAILURES, entry
from quire.backends.pooling import Pooled, Pooling
from quire.backends.rows import Rows
from quire.core.plan import RowStart, StepResult

MAX_SCORED_ROWS = 64
"""Positions of prompts whose logits are there at the same time: a prompt of thousands by a large vocabulary would take gigabytes."""


@dataclass(slots=True)
class Scores:
    """Of some rows: tensors on their way to the host, and what is then to be done with them."""

    tensors: list[Tensor]
    read: Callable[[list[npt.NDArray[Any]], StepResult], None]


class Scorer:
    def __init__(self, rows: Rows, decoder: Decoder, ops: Any) -> None:
        self._rows, self._decoder, self._ops = rows, decoder, ops
        self._num_top = np.zeros(len(rows.starts), np.int32)
        self._pooling = Pooling(decoder.spec.embedding_size)

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        self._num_top[start.row] = min(start.params.prompt_logprobs or 0, self._decoder.spec.vocab_size)
        self._pooling.begin(start)

    def score(self, hidden: Tensor, rows: list[tuple[int, range, int]]) -> list[Scores]:
        """What comes of ``rows``: (row, positions, where ``hidden`` has the first of them)."""
        found = []
        for row, positions, at in rows:
            states = hidden[at : at + len(positions)]
            pooled = self._pooling.of(row)
            found.append(self._pooled(pooled, row, positions, states) if pooled else self._reported(row, positions, states))
        return found

    def _pooled(self, pooled: Pooled, row: int, positions: range, states: Tensor) -> Scores:
        """pooled: the row's now, which may be another sequence's when the states are read."""

        def read(arrays: list[npt.NDArray[Any]], result: StepResult) -> None:
            pooled.add(row, arrays[0], positions.stop, result)

        return Scores([states.float()], read)

    def _reported(self, row: int, positions: range, states: Tensor) -> Scores:
        targets = to_device(self._rows.tokens[row, positions.start + 1 : positions.stop + 1], states.device)
        width = int(self._num_top[row])
        tensors: list[Tensor] = []
        for begin in range(0, len(states), MAX_SCORED_ROWS):
            part = slice(begin, begin + MAX_SCORED_ROWS)
            tensors += self._ops.report(self._decoder.logits(states[part]), targets[part], width)

        def read(arrays: list[npt.NDArray[Any]], result: StepResult) -> None:
            logprob, rank, top_ids, top_logprobs = (np.concatenate(arrays[i::4]) for i in range(4))
            if (rank < 0).any():
                result.errors[row] = FAILURES[1]
            result.scores[row] = [entry(logprob[i], rank[i], top_ids[i], top_logprobs[i]) for i in range(len(logprob))]

        return Scores(tensors, read)
