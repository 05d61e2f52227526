"""Sampler: logits → tokens on the device, under each row's parameters. What no row of a step uses is not computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.backends.cuda.sampling_tensors import SamplingTensors
from quire.backends.cuda.staging import to_device
from quire.backends.cuda.tables import FIRST_FLOAT, PROMPT, SEED, TOP_K, Tables
from quire.backends.parameters import COUNTS, FLOATS, REPEATS, USES, Parameters, entry, failure
from quire.core.plan import StepResult

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_TRUNCATES = USES["top_p"] | USES["min_p"] | USES["top_k"]


@dataclass(slots=True)
class Sampled:
    """A step's samples on the device, and what of them the host knows already."""

    found: Tensor
    """[2, at least N] int32: tokens; the status of the operation ``sample``."""
    rows: I32
    """[N]"""
    masked: list[bool]
    num_logprobs: I32 | None = None
    """[N] most likely tokens that are reported, -1: not even its own; None: of no row."""
    reported: tuple[Tensor, ...] = ()
    """logprob, rank, top ids, top logprobs"""


class Sampler:
    def __init__(self, tables: Tables, parameters: Parameters, ops: Any, share: Callable[[Tensor], None] | None = None) -> None:
        """share: where several devices have the model, gives all of them what the first one has drawn."""
        self._tables, self._parameters, self._ops, self._share = tables, parameters, ops, share

    def tensors(self, rows: Tensor, lengths: Tensor, truncates: bool) -> SamplingTensors:
        """For ``plain``, of N rows after their first ``lengths`` tokens; some of them ``truncates``, or none."""
        parameters = self._tables.parameters.index_select(0, rows)
        floats = parameters[:, FIRST_FLOAT:].t().contiguous().view(torch.float32)
        named = dict(zip(FLOATS, floats, strict=True))
        seed = parameters[:, SEED : SEED + 2].contiguous().view(torch.int64).view(-1)
        return SamplingTensors(
            temperature=named["temperature"], top_k=parameters[:, TOP_K].contiguous(), top_p=named["top_p"], min_p=named["min_p"],
            seed=seed, position=lengths, truncates=truncates,
        )  # fmt: skip

    def plain(self, logits: Tensor, rows: Tensor, tensors: SamplingTensors) -> Tensor:
        """[2, N] int32: tokens, and the status of the operation ``sample``, of N rows, by temperature and, where some row truncates,
        top_k, top_p and min_p alone. The tokens are put into the table. Reads nothing of the host, so a CUDA graph may hold it."""
        found: Tensor = self._ops.sample(logits, tensors)
        if self._share is not None:
            self._share(found)
        self._ops.put_tokens(self._tables.tokens, rows, tensors.position, found[0])
        return found

    def is_plain(self, rows: I32, masks: Sequence[bytes | None]) -> bool:
        """Whether ``plain`` is all that ``rows`` need."""
        return not masks and not self._parameters.used(rows) & ~_TRUNCATES

    def truncates(self, rows: I32) -> bool:
        """Whether some of ``rows`` has top_k, top_p or min_p."""
        return bool(self._parameters.used(rows) & _TRUNCATES)

    def sample(
        self, logits: Tensor, there: tuple[Tensor, Tensor], rows: I32, lengths: I64, masks: Sequence[bytes | None]
    ) -> Sampled:  # fmt: skip
        """One token for each of ``rows`` after its first ``lengths`` tokens; ``there``: both on the device. A row may be there several
        times. masks: see RowWork."""
        uses = self._parameters.used(rows)
        changed = logits
        if masks or uses & ~_TRUNCATES & ~USES["logprobs"]:
            changed = self._changed(logits.to(torch.float32, copy=True), there, uses, rows, lengths, masks)
        found = self.plain(changed, there[0], self.tensors(*there, bool(uses & _TRUNCATES)))
        sampled = Sampled(found, rows, [mask is not None for mask in masks] or [False] * len(rows))
        if uses & USES["logprobs"]:
            sampled.num_logprobs = self._parameters.num_logprobs[rows]
            sampled.reported = self._ops.report(logits, found[0], max(0, int(sampled.num_logprobs.max())))
        return sampled

    def _changed(
        self, logits: Tensor, there: tuple[Tensor, Tensor], uses: int, rows: I32, lengths: I64, masks: Sequence[bytes | None]
    ) -> Tensor:
        """In the CPU sampler's order: masks, bans, biases, penalties."""
        ops, parameters = self._ops, self._parameters

        def on_device(array: npt.NDArray[Any]) -> Tensor:
            return to_device(array, logits.device)

        if masks:
            index, words = parameters.mask_words(masks)
            ops.restrict(logits, on_device(words.view(np.int32)), on_device(index))
        if uses & USES["min_tokens"] and (banned := parameters.bans(rows, lengths)).start[-1]:
            ops.ban(logits, *map(on_device, banned.arrays("b").values()))
        if uses & USES["logit_bias"]:
            biased, values = parameters.biases(rows)
            ops.bias(logits, *map(on_device, biased.arrays("b").values()), on_device(values))
        if uses & (REPEATS | COUNTS):
            rows_there, lengths_there = there
            own = self._tables.parameters.index_select(0, rows_there)
            named = dict(zip(FLOATS, own[:, FIRST_FLOAT:].t().contiguous().view(torch.float32), strict=True))
            ops.penalize(
                logits, self._tables.tokens, rows_there, own[:, PROMPT].contiguous(), lengths_there, named["repetition_penalty"],
                named["frequency_penalty"], named["presence_penalty"],
            )  # fmt: skip
        return logits


def read(sampled: Sampled, arrays: Sequence[npt.NDArray[Any]], result: StepResult) -> None:
    """Into ``result`` what has come to the host: ``arrays`` of what is found and what is reported."""
    found, *reported = arrays
    tokens, status = found[:, : len(sampled.rows)]
    result.tokens, result.logprobs = tokens.tolist(), [None] * len(tokens)
    for i in np.flatnonzero(status).tolist():
        result.tokens[i] = -1
        result.errors[int(sampled.rows[i])] = failure(int(status[i]), sampled.masked[i])
    if sampled.num_logprobs is not None:
        logprob, rank, top_ids, top_logprobs = reported
        for i in np.flatnonzero((sampled.num_logprobs >= 0) & (status == 0)).tolist():
            n = int(sampled.num_logprobs[i])
            result.logprobs[i] = entry(logprob[i], rank[i], top_ids[i, :n], top_logprobs[i, :n])
