"""Sampler: logits → tokens under each row's parameters. The arithmetic is in the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.parameters import COUNTS, OFF, REPEATS, USES, Lists, Parameters, entry, failure
from quire.backends.rows import Rows
from quire.core.plan import RowStart, StepResult
from quire.outputs import TokenLogprobs


class Reported:
    """Room for the log-probabilities that the kernels report: of row i the ``count[i]`` most likely tokens', or nothing if negative."""

    def __init__(self, count: npt.NDArray[np.int32]) -> None:
        shape = len(count), max(0, int(count.max(initial=0)))
        self.count = count
        self._logprob, self._rank = np.zeros(len(count), np.float32), np.zeros(len(count), np.int32)
        self._top_ids, self._top_logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)

    def arrays(self) -> dict[str, Any]:
        """As the kernels take them."""
        return {
            "num_logprobs": self.count, "logprob": self._logprob, "rank": self._rank,
            "top_ids": self._top_ids, "top_logprobs": self._top_logprobs,
        }  # fmt: skip

    def entry(self, i: int) -> TokenLogprobs:
        n = self.count[i]
        return entry(self._logprob[i], self._rank[i], self._top_ids[i, :n], self._top_logprobs[i, :n])


class Sampler:
    """The call of the kernel, for rows of a step."""

    def __init__(self, rows: Rows, vocab_size: int) -> None:
        self._rows = rows
        self._parameters = Parameters(rows, vocab_size)

    @property
    def beams(self) -> npt.NDArray[np.bool_]:
        """[rows] which rows report candidates, and get their token from the next plan."""
        return self._parameters.beams

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        self._parameters.begin(start)

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        result: StepResult,
        masks: Sequence[bytes | None] = (),
    ) -> None:
        """Into ``result`` one token for each of ``rows``, after its first ``lengths`` tokens; logits [len(rows), vocab] float32. A row
        may be there several times, with different lengths. masks: see RowWork; None for a row without."""
        count = len(rows)
        tokens, status = np.zeros(count, np.int32), np.zeros(count, np.int32)
        parameters = self._parameters
        options: dict[str, Any] = {
            "temperature": parameters.floats["temperature"][rows],
            "seed": parameters.seed[rows],
            "position": lengths,
        }
        if masks:
            options["mask_index"], options["allowed_mask"] = parameters.mask_words(masks)
        uses = parameters.used(rows)
        if uses:
            self._add_parameters(options, uses, rows)
            self._add_histories(options, uses, rows, lengths)
            self._add_bias_and_bans(options, uses, rows, lengths)
        if uses & USES["logprobs"]:
            reported = Reported(parameters.num_logprobs[rows])
            options |= reported.arrays()
        native.sample(logits, tokens, status, **options)
        result.tokens, result.logprobs = tokens.tolist(), [None] * count
        if status.any():
            for failed in np.flatnonzero(status).tolist():
                result.tokens[failed] = -1
                result.errors[int(rows[failed])] = failure(int(status[failed]), bool(masks) and masks[failed] is not None)
        if uses & USES["logprobs"]:
            for i in np.flatnonzero((reported.count >= 0) & (status == 0)):
                result.logprobs[i] = reported.entry(int(i))

    def _add_parameters(self, options: dict[str, Any], uses: int, rows: npt.NDArray[np.int32]) -> None:
        for name in OFF:
            if uses & USES[name]:
                options[name] = self._parameters.floats[name][rows]
        if uses & USES["top_k"]:
            options["top_k"] = self._parameters.top_k[rows]

    def _add_histories(self, options: dict[str, Any], uses: int, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> None:
        """Prompt and output tokens of the rows with penalties."""
        if not uses & (REPEATS | COUNTS):
            return
        nothing = np.zeros(0, np.int32)
        prompts, outputs = Lists(), Lists()
        for row, length in zip(rows, lengths, strict=True):
            repeated, counted = self._parameters.uses[row] & REPEATS, self._parameters.uses[row] & COUNTS
            tokens, prompt = self._rows.tokens[row], self._rows.num_prompt[row]
            prompts.add(tokens[:prompt] if repeated else nothing)
            outputs.add(tokens[prompt:length] if repeated or counted else nothing)
        options.update(prompts.arrays("prompt"))
        options.update(outputs.arrays("output"))

    def _add_bias_and_bans(self, options: dict[str, Any], uses: int, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> None:
        if uses & USES["logit_bias"]:
            biased, options["bias_values"] = self._parameters.biases(rows)
            options.update(biased.arrays("bias"))
        if uses & USES["min_tokens"] and (banned := self._parameters.bans(rows, lengths)).start[-1]:
            options.update(banned.arrays("banned"))
