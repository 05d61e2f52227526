"""What changes logits before the draw, in this order: restrict, ban, bias, penalize. Rows without any of it cost a look at a number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.launching import Kernel

_WORDS = tl.constexpr(128)
"""Of a mask, that a program applies."""
_LIST = tl.constexpr(256)
_HISTORY = tl.constexpr(512)
"""Tokens of a row that a program looks at at a time; there are _SPLITS programs a row."""
_SPLITS = tl.constexpr(8)
_IN_PROMPT = tl.constexpr(1 << 30)
PENALIZED_ROWS = 64
"""Counted at a time, in a number for each token of the vocabulary."""


def restrict(logits: Tensor, mask_words: Tensor, mask_index: Tensor) -> None:
    """As in reference/. Rows are contiguous; they may be apart."""
    rows, vocab = logits.shape
    if rows and len(mask_words):
        grid = rows, triton.cdiv(vocab, 32 * _WORDS.value)
        _restrict.launch(grid, (logits, logits.stride(0), mask_words, mask_words.stride(0), mask_index, vocab))


def ban(logits: Tensor, start: Tensor, ids: Tensor) -> None:
    """As in reference/. Rows are contiguous; they may be apart."""
    if len(logits):
        _edit.launch((len(logits),), (logits, logits.stride(0), start, ids, None))


def bias(logits: Tensor, start: Tensor, ids: Tensor, values: Tensor) -> None:
    """As in reference/. Rows are contiguous; they may be apart."""
    if len(logits):
        _edit.launch((len(logits),), (logits, logits.stride(0), start, ids, values))


def penalize(
    logits: Tensor, tokens: Tensor, rows: Tensor, num_prompt: Tensor, lengths: Tensor, repetition: Tensor, frequency: Tensor,
    presence: Tensor,
) -> None:  # fmt: skip
    """As in reference/. Rows are contiguous; they may be apart."""
    count, vocab = logits.shape
    counts = torch.zeros((min(count, PENALIZED_ROWS), vocab), dtype=torch.int32, device=logits.device)
    for first in range(0, count, PENALIZED_ROWS):
        part = slice(first, first + PENALIZED_ROWS)
        history = tokens, tokens.stride(0), rows[part], num_prompt[part], lengths[part]
        penalties = repetition[part], frequency[part], presence[part]
        grid = len(rows[part]), _SPLITS.value
        _count.launch(grid, (counts, *history, *penalties, vocab))
        # A product and a difference are two roundings here as on the CPU.
        _penalize.launch(grid, (logits[part], logits.stride(0), counts, *history, *penalties, vocab), fuse=False)


@Kernel
@triton.jit
def _restrict(logits, stride, mask_words, mask_stride, mask_index, vocab):
    row, index = tl.program_id(0).to(tl.int64), tl.load(mask_index + tl.program_id(0)).to(tl.int64)
    if index >= 0:
        word, bit = tl.program_id(1) * _WORDS + tl.arange(0, _WORDS), tl.arange(0, 32)
        allowed = tl.load(mask_words + index * mask_stride + word, mask=word * 32 < vocab, other=-1)
        token = word[:, None] * 32 + bit[None, :]
        forbidden = (((allowed[:, None] >> bit[None, :]) & 1) == 0) & (token < vocab)
        z = tl.load(logits + row * stride + token, mask=forbidden, other=0.0)
        # What is no number, or infinite, stays for the sampler to see.
        tl.store(logits + row * stride + token, tl.where(z < float("inf"), float("-inf"), z), mask=forbidden)


@Kernel
@triton.jit
def _edit(logits, stride, start, ids, values):
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(start + row + 1)
    for first in range(tl.load(start + row), end, _LIST):
        at = first + tl.arange(0, _LIST)
        here = logits + row * stride + tl.load(ids + at, mask=at < end, other=0)
        z = tl.load(here, mask=at < end, other=0.0)
        if values is None:
            z = tl.where(z < float("inf"), float("-inf"), z)
        else:
            z += tl.load(values + at, mask=at < end, other=0.0)
        tl.store(here, z, mask=at < end)


@triton.jit
def _history(rows, num_prompt, lengths, repetition, frequency, presence, row):
    """(row of the table, end of the prompt, first token that counts, end): the prompt does for repetition alone, nothing where none is."""
    repeats = tl.load(repetition + row) != 1.0
    penalized = repeats | (tl.load(frequency + row) != 0.0) | (tl.load(presence + row) != 0.0)
    prompt = tl.load(num_prompt + row)
    return tl.load(rows + row).to(tl.int64), prompt, tl.where(repeats, 0, prompt), tl.where(penalized, tl.load(lengths + row), 0)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["repetition", "frequency", "presence"])
def _count(counts, tokens, tokens_stride, rows, num_prompt, lengths, repetition, frequency, presence, vocab):
    """How often each token is in the output, and whether it is in the prompt."""
    row = tl.program_id(0).to(tl.int64)
    table_row, prompt, begin, end = _history(rows, num_prompt, lengths, repetition, frequency, presence, row)
    for first in range(begin + tl.program_id(1) * _HISTORY, end, _HISTORY * _SPLITS):
        at = first + tl.arange(0, _HISTORY)
        token = tl.load(tokens + table_row * tokens_stride + at, mask=at < end, other=-1)
        known = (token >= 0) & (token < vocab)
        here = counts + row * vocab + tl.where(known, token, 0)
        tl.atomic_add(here, 1, mask=known & (at >= prompt), sem="relaxed")
        tl.atomic_or(here, _IN_PROMPT, mask=known & (at < prompt), sem="relaxed")


@Kernel
@triton.jit(do_not_specialize_on_alignment=["repetition", "frequency", "presence"])
def _penalize(
    logits, stride, counts, tokens, tokens_stride, rows, num_prompt, lengths, repetition, frequency, presence, vocab
):  # fmt: skip
    """Whoever comes first to a token takes its count away, and changes its logit: once, and all counts are 0 in the end."""
    row = tl.program_id(0).to(tl.int64)
    table_row, _prompt, begin, end = _history(rows, num_prompt, lengths, repetition, frequency, presence, row)
    repeated, often, present = tl.load(repetition + row), tl.load(frequency + row), tl.load(presence + row)
    for first in range(begin + tl.program_id(1) * _HISTORY, end, _HISTORY * _SPLITS):
        at = first + tl.arange(0, _HISTORY)
        token = tl.load(tokens + table_row * tokens_stride + at, mask=at < end, other=-1)
        known = (token >= 0) & (token < vocab)
        token = tl.where(known, token, 0)
        count = tl.atomic_xchg(counts + row * vocab + token, 0, mask=known, sem="relaxed")
        taken, count = known & (count != 0), count & (_IN_PROMPT - 1)
        here = logits + row * stride + token
        z = tl.load(here, mask=taken, other=0.0)
        z = tl.where(z > 0.0, tl.div_rn(z, repeated), z * repeated)
        z -= often * count.to(tl.float32)
        tl.store(here, tl.where(count > 0, z - present, z), mask=taken)
