"""Log-probabilities of the raw logits: of a token, and of the likeliest ones.

    scan                rows x chunks   reads all logits, once: maxima and masses
    _count_greater      rows x chunks   how many logits are greater than the token's: reads runs whose maximum is
    _report             rows            log-probability and rank
    _list_wanted, _pick rows            the likeliest tokens, found as those of top_k are (candidates.py)
    _place              rows x places   put in order, by counting which come before each

Where many are asked for, a sort takes the place of the last but one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.candidates import Scanned, list_wanted
from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.selection import (
    ALL_TOKENS,
    CHUNK_RUNS,
    MAX_REGISTERS,
    RUN,
    TILE,
    TILE_RUNS,
    kept_of_tile,
    key_of,
    load_tile,
    row_of_chunks,
    search,
    sums_at_least,
)

MAX_ORDERED = 1024
"""The widest list that is ordered by comparing all with all."""
_PLACES = tl.constexpr(64)


def report(logits: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in reference/. Rows are contiguous; they may be apart."""
    (rows, vocab), device = logits.shape, logits.device
    scanned = Scanned(logits, None)
    logprob, top = torch.empty((2, rows), dtype=torch.float32, device=device)
    rank, status = torch.empty((2, rows), dtype=torch.int32, device=device)
    log_sum = torch.empty(rows, dtype=torch.float64, device=device)
    greater = torch.empty((rows, scanned.chunks), dtype=torch.int32, device=device)
    top_ids = torch.full((rows, width), -1, dtype=torch.int32, device=device)
    top_logprobs = torch.full((rows, width), -torch.inf, dtype=torch.float32, device=device)
    if not rows:
        return logprob, rank, top_ids, top_logprobs
    counted = logits, logits.stride(0), tokens, scanned.maxima, greater, vocab, scanned.chunks
    _count_greater.launch((rows, scanned.chunks), counted)
    arguments = (
        logits, logits.stride(0), tokens, scanned.tops, scanned.masses, greater, logprob, rank, status, top, log_sum, scanned.chunks,
    )  # fmt: skip
    _report.launch((rows,), arguments, (scanned.padded_chunks,), warps=1)
    if width:
        few = width <= MAX_ORDERED and width < vocab
        if few:
            ids = _likeliest(scanned, logits, status, top, width)
        else:
            ids = logits.sort(dim=1, descending=True, stable=True).indices[:, :width].int().contiguous()
        placed = logits, logits.stride(0), ids, ids.stride(0), ids.shape[1], status, top, log_sum, top_ids, top_logprobs, width
        _place.launch((rows, triton.cdiv(width, _PLACES.value)), placed, (not few,))
    return logprob, rank, top_ids, top_logprobs


def _likeliest(scanned: Scanned, logits: Tensor, status: Tensor, top: Tensor, width: int) -> Tensor:
    """[N, width] int32: the likeliest tokens, fewer than there are, by ascending ids."""
    rows, device = len(logits), logits.device
    ones, zeros = torch.ones(rows, device=device), torch.zeros(rows, device=device)
    top_k = torch.full((rows,), width, dtype=torch.int32, device=device)
    listed, number, bound, _ = list_wanted(scanned, ones, top_k, ones, zeros, status, top, zeros.double())
    ids = torch.empty((rows, width), dtype=torch.int32, device=device)
    arguments = logits, logits.stride(0), top, listed, number, bound, ids, width, scanned.vocab, scanned.runs
    _pick.launch((rows,), arguments, warps=8, registers=MAX_REGISTERS)
    return ids


@triton.jit
def _logprob(z, top, log_sum):
    """float32 of z - log_sum (float64); the next smaller number where it is less than the top, but rounded the same."""
    value, most = (z.to(tl.float64) - log_sum).to(tl.float32), (top.to(tl.float64) - log_sum).to(tl.float32)
    next_bits = tl.where(most == 0.0, -(2**31) + 1, most.to(tl.int32, bitcast=True) + 1)  # most <= 0
    return tl.where((z < top) & (value == most), next_bits.to(tl.float32, bitcast=True), value)


@Kernel
@triton.jit
def _count_greater(logits, stride, tokens, maxima, greater, vocab, chunks):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = tl.load(logits + row * stride + tl.maximum(tl.load(tokens + row), 0)).to(tl.float32)
    run = chunk * CHUNK_RUNS + tl.arange(0, CHUNK_RUNS)
    reaches = tl.load(maxima + row * chunks * CHUNK_RUNS + run) > own
    token = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    z = tl.load(logits + row * stride + token, mask=reaches[:, None] & (token < vocab), other=float("-inf")).to(tl.float32)
    tl.store(greater + row * chunks + chunk, tl.sum(tl.sum((z > own).to(tl.int32), 1), 0))


@Kernel
@triton.jit(do_not_specialize_on_alignment=["status", "top"])
def _report(
    logits, stride, tokens, tops, masses, greater, logprob, rank, status, top, log_sum, chunks, CHUNKS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    most, state, _, chunk_masses = row_of_chunks(tops, masses, row, chunks, 1.0, CHUNKS)
    state = tl.where(token < 0, 2, state)
    sum_ = most.to(tl.float64) + tl.log(tl.sum(chunk_masses, 0))
    own = tl.load(logits + row * stride + tl.maximum(token, 0)).to(tl.float32)
    c = tl.arange(0, CHUNKS)
    count = tl.sum(tl.load(greater + row * chunks + c, mask=c < chunks, other=0), 0)
    tl.store(logprob + row, tl.where(state == 0, _logprob(own, most, sum_), float("-inf")))
    tl.store(rank + row, tl.where(state == 0, 1 + count, -1))
    tl.store(status + row, state)
    tl.store(top + row, most)
    tl.store(log_sum + row, sum_)


@Kernel
@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["top", "bound"])
def _pick(logits, stride, top, listed, number, bound, ids, width, vocab, runs):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(number + row)
    if count > 0:
        z, list_, most = logits + row * stride, listed + row * runs, tl.load(top + row)
        low, high = tl.load(bound + row).to(tl.int64), key_of(most).to(tl.int64) + 1
        low32 = low.to(tl.int32)
        n_low, _, _, m_low, _, _ = sums_at_least(z, list_, count, vocab, most, 1.0, -1.0, low32, low32, low32, True)
        nothing = tl.full((), 0, tl.int64)
        low, high, n_low, m_low, n_high, _m_high = search(
            z, list_, count, vocab, most, 1.0, -1.0, True, width, low, high, n_low, m_low, nothing, nothing, ALL_TOKENS, True
        )
        ties_before, written = 0, 0
        for first in range(0, count, TILE_RUNS):
            id, value, inside = load_tile(z, list_, first, count, vocab, True)
            kept, _units, ties_before = kept_of_tile(
                value, inside, most, 1.0, -1.0, low.to(tl.int32), high.to(tl.int32), width - n_high, ties_before
            )
            place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(ids + row * width + place, tl.reshape(id, (TILE,)), mask=kept)
            written += tl.sum(kept.to(tl.int32), 0)


@Kernel
@triton.jit(do_not_specialize=["width", "count", "ids_stride"], do_not_specialize_on_alignment=["status", "top"])
def _place(logits, stride, ids, ids_stride, count, status, top, log_sum, top_ids, top_logprobs, width, SORTED: tl.constexpr):
    """Where each of a row's ``count`` tokens comes, unless they are sorted already: after those that are likelier."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * _PLACES + tl.arange(0, _PLACES)
    if tl.load(status + row) == 0:
        z, from_ = logits + row * stride, ids + row * ids_stride
        id = tl.load(from_ + i, mask=i < count, other=0)
        value = tl.load(z + id, mask=i < count, other=0.0).to(tl.float32)
        place = i
        if not SORTED:
            place = tl.zeros((_PLACES,), tl.int32)
            for first in range(0, count, _PLACES):
                j = first + tl.arange(0, _PLACES)
                other_id = tl.load(from_ + j, mask=j < count, other=0)
                other = tl.load(z + other_id, mask=j < count, other=float("-inf")).to(tl.float32)
                # Ids ascend, so of equal ones the earlier comes first.
                before = (other[None, :] > value[:, None]) | ((other[None, :] == value[:, None]) & (j[None, :] < i[:, None]))
                place += tl.sum((before & (j < count)[None, :]).to(tl.int32), 1)
        tl.store(top_ids + row * width + place, id, mask=i < count)
        tl.store(top_logprobs + row * width + place, _logprob(value, tl.load(top + row), tl.load(log_sum + row)), mask=i < count)
