"""The sampling parameters of a backend's rows, as arrays, and what the rows of a step have in lists: biases, bans, masks.

What no row of a step uses is not handed to the device, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.rows import Rows
from quire.core.plan import RowStart, RowWork
from quire.outputs import TokenLogprobs

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
OFF = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
USES = {name: 1 << i for i, name in enumerate((*OFF, "top_k", "logit_bias", "min_tokens", "logprobs"))}
"""A bit for each parameter that costs something where a row has it."""
REPEATS = USES["repetition_penalty"]
COUNTS = USES["frequency_penalty"] | USES["presence_penalty"]

FAILURES = {
    1: "the model's logits are not finite numbers: the weights may be damaged, or too large for their width",
    2: "no token may be chosen: before min_tokens every token is banned as a stop token; lower min_tokens, or name fewer stop_token_ids",
    3: "no token may be chosen: structured output, allowed_token_ids, bad_words and min_tokens (which bans stop tokens) leave none; "
    "lower min_tokens, or constrain the output less",
}
"""A sampler's status of a row → what its request is told; 3 where it is 2 under a mask."""
NOT_FINITE = "the model's hidden states are not finite numbers: the weights may be damaged, or too large for their width"
"""What is told of a pooled vector."""

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Lists:
    """Lists of token ids of several rows, end to end: row i has ``ids[start[i]:start[i + 1]]``."""

    start: list[int] = field(default_factory=lambda: [0])
    ids: list[I32] = field(default_factory=list)

    def add(self, ids: I32) -> None:
        self.ids.append(ids)
        self.start.append(self.start[-1] + len(ids))

    def arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        joined = np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32)
        return {f"{name}_start": np.array(self.start, np.int32), f"{name}_ids": joined}


class Parameters:
    """Of every row."""

    def __init__(self, rows: Rows, vocab_size: int) -> None:
        count = len(rows.starts)
        self._rows = rows
        self._vocab_size = vocab_size
        self.floats = {name: np.zeros(count, np.float32) for name in FLOATS}
        self.top_k = np.zeros(count, np.int32)
        self.seed = np.zeros(count, np.uint64)
        self.num_logprobs = np.full(count, -1, np.int32)
        self.uses = np.zeros(count, np.int32)
        """[rows] bits of USES."""
        self.beams = np.zeros(count, bool)
        """[rows] which rows report candidates, and get their token from the next plan."""

    def begin(self, start: RowStart) -> None:
        """A sequence takes a row."""
        row, params = start.row, start.params
        for name, values in self.floats.items():
            values[row] = getattr(params, name)
        self.top_k[row] = max(0, params.top_k)
        self.seed[row] = start.seed
        self.num_logprobs[row] = -1 if params.logprobs is None else min(params.logprobs, self._vocab_size)
        self.beams[row] = start.num_candidates > 0
        if start.num_candidates:  # the search chooses; what is drawn here is not used
            self.floats["temperature"][row] = 0.0
            self.num_logprobs[row] = min(start.num_candidates, self._vocab_size)
        used = {name: self.floats[name][row] != off for name, off in OFF.items()}
        used |= {
            "top_k": self.top_k[row] > 0,
            "logit_bias": bool(params.logit_bias),
            "min_tokens": params.min_tokens > 0,
            "logprobs": self.num_logprobs[row] >= 0,
        }
        self.uses[row] = sum(USES[name] for name, is_used in used.items() if is_used)

    def used(self, rows: I32) -> int:
        """Bits of USES that some of ``rows`` have."""
        return int(np.bitwise_or.reduce(self.uses[rows]))

    def biases(self, rows: I32) -> tuple[Lists, npt.NDArray[np.float32]]:
        """Tokens with a bias, and their biases, of rows of which some have some."""
        biased = Lists()
        values: list[float] = []
        for row in rows:
            start = self._rows.starts[row]
            assert start is not None
            bias = start.params.logit_bias or {}
            biased.add(np.fromiter(bias, np.int32, len(bias)))
            values += bias.values()
        return biased, np.array(values, np.float32)

    def bans(self, rows: I32, lengths: I64) -> Lists:
        """Tokens that may not come after the first ``lengths`` tokens, since fewer than min_tokens were generated."""
        banned = Lists()
        for row, length in zip(rows, lengths, strict=True):
            start = self._rows.starts[row]
            assert start is not None
            early = length - self._rows.num_prompt[row] < start.params.min_tokens
            # A model may name an end-of-text token beyond its vocabulary; it can't be sampled anyway.
            banned.add(np.array([t for t in start.stop_ids if early and t < self._vocab_size], np.int32))
        return banned

    def mask_words(self, masks: Sequence[bytes | None]) -> tuple[I32, npt.NDArray[np.uint32]]:
        """(index [rows] into the words, -1 without a mask; words [masks, ceil(vocab / 32)])"""
        words = -(-self._vocab_size // 32)
        present = np.array([mask is not None for mask in masks])
        joined = b"".join([mask[: 4 * words] for mask in masks if mask is not None])
        return np.where(present, np.cumsum(present) - 1, -1).astype(np.int32), np.frombuffer(joined, np.uint32).reshape(-1, words)


def sampled_masks(work: Sequence[RowWork]) -> list[bytes | None]:
    """The mask of each row that is sampled, in the plan's order; empty where none has one."""
    masks: list[bytes | None] = []
    if any(mask is not None for w in work for mask in w.masks):
        for w in work:
            if w.sample:
                masks += w.masks or [None] * (1 + len(w.draft))
    return masks


def failure(status: int, masked: bool) -> str:
    """What the request of a row is told that a sampler could not sample."""
    return FAILURES[3 if status == 2 and masked else status]


def entry(logprob: Any, rank: Any, top_ids: npt.NDArray[Any], top_logprobs: npt.NDArray[Any]) -> TokenLogprobs:
    return TokenLogprobs((float(logprob), int(rank)), list(zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)))
