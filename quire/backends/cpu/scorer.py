"""Scorer: what the hidden states of a prompt say of it. Log-probabilities of its own tokens, or one vector for all of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.decoder import MAX_SCORED_ROWS, Decoder
from quire.backends.cpu.sampler import Reported
from quire.backends.parameters import FAILURES
from quire.backends.pooling import Pooling
from quire.backends.rows import Rows
from quire.core.plan import RowStart, StepResult

F32 = npt.NDArray[np.float32]


class Scorer:
    def __init__(self, rows: Rows, decoder: Decoder) -> None:
        self._rows = rows
        self._decoder = decoder
        self._num_top = np.zeros(len(rows.starts), np.int32)
        self._pooling = Pooling(decoder.spec.embedding_size)

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        self._num_top[start.row] = min(start.params.prompt_logprobs or 0, self._decoder.spec.vocab_size)
        self._pooling.begin(start)

    def score(self, hidden: F32, rows: list[tuple[int, range, int]], result: StepResult) -> None:
        """Into ``result`` what comes of ``rows``: (row, positions, where ``hidden`` has the first of them)."""
        places, asked = [], []
        for row, positions, at in rows:
            if pooled := self._pooling.of(row):
                pooled.add(row, hidden[at : at + len(positions)], positions.stop, result)
            else:
                places.append(np.arange(at, at + len(positions)))
                asked.append((row, positions))
        if asked:
            self._report(hidden, np.concatenate(places), asked, result)

    def _report(self, hidden: F32, places: npt.NDArray[np.int64], asked: list[tuple[int, range]], result: StepResult) -> None:
        targets = np.concatenate([self._rows.tokens[row, p.start + 1 : p.stop + 1] for row, p in asked]).astype(np.int32)
        owners = np.repeat([row for row, _ in asked], [len(p) for _, p in asked])
        for row, _ in asked:
            result.scores[row] = []
        for begin in range(0, len(places), MAX_SCORED_ROWS):
            part = slice(begin, begin + MAX_SCORED_ROWS)
            status = np.zeros(len(places[part]), np.int32)
            reported = Reported(self._num_top[owners[part]])
            native.score(self._decoder.logits(hidden[places[part]]), targets[part], status, **reported.arrays())
            for i, row in enumerate(owners[part].tolist()):
                if status[i]:
                    result.errors[row] = FAILURES[1]
                result.scores[row].append(reported.entry(i))
