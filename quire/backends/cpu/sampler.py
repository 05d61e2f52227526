"""Sampler: logits → tokens under each row's parameters. The arithmetic is in the kernel; here are the rows' parameters.

What no row of a step uses (penalties, biases, bans, log-probabilities) is not handed over, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.rows import Rows
from quire.core.plan import RowStart, StepResult
from quire.outputs import TokenLogprobs

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_OFF = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
_USES = {name: 1 << i for i, name in enumerate((*_OFF, "top_k", "logit_bias", "min_tokens", "logprobs"))}
"""A bit for each parameter that costs something where a row has it."""
_REPEATS = _USES["repetition_penalty"]
_COUNTS = _USES["frequency_penalty"] | _USES["presence_penalty"]

FAILURES = {
    1: "the model's logits are not finite numbers: the weights may be damaged, or too large for their width",
    2: "no token may be chosen: before min_tokens every token is banned as a stop token; lower min_tokens, or name fewer stop_token_ids",
    3: "no token may be chosen: structured output, allowed_token_ids, bad_words and min_tokens (which bans stop tokens) leave none; "
    "lower min_tokens, or constrain the output less",
}
"""The kernel's status of a row → what its request is told; 3 where it is 2 under a mask."""


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
        top = zip(self._top_ids[i, :n].tolist(), self._top_logprobs[i, :n].tolist(), strict=True)
        return TokenLogprobs((float(self._logprob[i]), int(self._rank[i])), list(top))


@dataclass(slots=True)
class _Lists:
    """Lists of token ids of several rows, end to end: row i has ``ids[start[i]:start[i + 1]]``."""

    start: list[int] = field(default_factory=lambda: [0])
    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)

    def add(self, ids: npt.NDArray[np.int32]) -> None:
        self.ids.append(ids)
        self.start.append(self.start[-1] + len(ids))

    def arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        joined = np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32)
        return {f"{name}_start": np.array(self.start, np.int32), f"{name}_ids": joined}


class Sampler:
    """Parameters of every row, and the call of the kernel."""

    def __init__(self, rows: Rows, vocab_size: int) -> None:
        count = len(rows.starts)
        self._rows = rows
        self._vocab_size = vocab_size
        self._floats = {name: np.zeros(count, np.float32) for name in _FLOATS}
        self._top_k = np.zeros(count, np.int32)
        self._seed = np.zeros(count, np.uint64)
        self._num_logprobs = np.full(count, -1, np.int32)
        self._uses = np.zeros(count, np.int32)
        """[rows] bits of _USES."""
        self.beams = np.zeros(count, bool)
        """[rows] which rows report candidates, and get their token from the next plan."""

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        row, params = start.row, start.params
        for name, values in self._floats.items():
            values[row] = getattr(params, name)
        self._top_k[row] = max(0, params.top_k)
        self._seed[row] = start.seed
        self._num_logprobs[row] = -1 if params.logprobs is None else min(params.logprobs, self._vocab_size)
        self.beams[row] = start.num_candidates > 0
        if start.num_candidates:  # the search chooses; what is drawn here is not used
            self._floats["temperature"][row] = 0.0
            self._num_logprobs[row] = min(start.num_candidates, self._vocab_size)
        used = {name: self._floats[name][row] != off for name, off in _OFF.items()}
        used |= {
            "top_k": self._top_k[row] > 0,
            "logit_bias": bool(params.logit_bias),
            "min_tokens": params.min_tokens > 0,
            "logprobs": self._num_logprobs[row] >= 0,
        }
        self._uses[row] = sum(_USES[name] for name, is_used in used.items() if is_used)

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
        options: dict[str, Any] = {
            "temperature": self._floats["temperature"][rows],
            "seed": self._seed[rows],
            "position": lengths,
        }
        if masks:
            self._add_masks(options, masks)
        uses = int(np.bitwise_or.reduce(self._uses[rows]))
        if uses:
            self._add_parameters(options, uses, rows)
            self._add_histories(options, uses, rows, lengths)
            self._add_bias_and_bans(options, uses, rows, lengths)
        if uses & _USES["logprobs"]:
            reported = Reported(self._num_logprobs[rows])
            options |= reported.arrays()
        native.sample(logits, tokens, status, **options)
        result.tokens, result.logprobs = tokens.tolist(), [None] * count
        if status.any():
            for failed in np.flatnonzero(status).tolist():
                result.tokens[failed] = -1
                masked = bool(masks) and masks[failed] is not None
                result.errors[int(rows[failed])] = FAILURES[3 if status[failed] == 2 and masked else int(status[failed])]
        if uses & _USES["logprobs"]:
            for i in np.flatnonzero((reported.count >= 0) & (status == 0)):
                result.logprobs[i] = reported.entry(int(i))

    def _add_masks(self, options: dict[str, Any], masks: Sequence[bytes | None]) -> None:
        words = -(-self._vocab_size // 32)
        present = np.array([mask is not None for mask in masks])
        options["mask_index"] = np.where(present, np.cumsum(present) - 1, -1).astype(np.int32)
        joined = b"".join([mask[: 4 * words] for mask in masks if mask is not None])
        options["allowed_mask"] = np.frombuffer(joined, np.uint32).reshape(-1, words)

    def _add_parameters(self, options: dict[str, Any], uses: int, rows: npt.NDArray[np.int32]) -> None:
        for name in _OFF:
            if uses & _USES[name]:
                options[name] = self._floats[name][rows]
        if uses & _USES["top_k"]:
            options["top_k"] = self._top_k[rows]

    def _add_histories(self, options: dict[str, Any], uses: int, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> None:
        """Prompt and output tokens of the rows with penalties."""
        if not uses & (_REPEATS | _COUNTS):
            return
        nothing = np.zeros(0, np.int32)
        prompts, outputs = _Lists(), _Lists()
        for row, length in zip(rows, lengths, strict=True):
            repeated, counted = self._uses[row] & _REPEATS, self._uses[row] & _COUNTS
            tokens, prompt = self._rows.tokens[row], self._rows.num_prompt[row]
            prompts.add(tokens[:prompt] if repeated else nothing)
            outputs.add(tokens[prompt:length] if repeated or counted else nothing)
        options.update(prompts.arrays("prompt"))
        options.update(outputs.arrays("output"))

    def _add_bias_and_bans(self, options: dict[str, Any], uses: int, rows: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> None:
        if not uses & (_USES["logit_bias"] | _USES["min_tokens"]):
            return
        biased, banned = _Lists(), _Lists()
        values: list[float] = []
        for row, length in zip(rows, lengths, strict=True):
            start = self._rows.starts[row]
            assert start is not None
            bias = start.params.logit_bias or {}
            biased.add(np.fromiter(bias, np.int32, len(bias)))
            values += bias.values()
            early = length - self._rows.num_prompt[row] < start.params.min_tokens
            # A model may name an end-of-text token beyond its vocabulary; it can't be sampled anyway.
            banned.add(np.array([t for t in start.stop_ids if early and t < self._vocab_size], np.int32))
        if values:
            options.update(biased.arrays("bias"))
            options["bias_values"] = np.array(values, np.float32)
        if banned.start[-1]:
            options.update(banned.arrays("banned"))
