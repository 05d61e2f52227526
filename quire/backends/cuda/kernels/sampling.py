"""The draw, in two kernels, or four where some row has top_k, top_p or min_p. None of them depends on the parameters' values in its
grid, so one CUDA graph serves them all.

    scan             rows x chunks   reads all logits, once: maxima and masses
    _draw            rows            status; the likeliest token; the draw from all tokens: finds the chunk, and reads it
    _list_wanted     rows            which runs have tokens that may be kept (candidates.py)
    _draw_truncated  rows            reads those: what is kept, and the draw from it
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.candidates import Scanned, list_wanted
from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.programmatic import start_next, wait
from quire.backends.cuda.kernels.selection import (
    ALL_TOKENS,
    CHUNK,
    MAX_REGISTERS,
    TILE,
    TILE_RUNS,
    UNIT,
    kept_of_tile,
    key_of,
    load_tile,
    reciprocal,
    row_of_chunks,
    search,
    sums_at_least,
    uniform,
    weight,
)
from quire.backends.cuda.sampling_tensors import SamplingTensors


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """As in reference/. Rows are contiguous; they may be apart."""
    rows, vocab = logits.shape
    scanned = Scanned(logits, params.temperature)
    found = torch.empty((2, rows), dtype=torch.int32, device=logits.device)
    token, status = found
    top = torch.empty(rows, dtype=torch.float32, device=logits.device)
    total = torch.empty(rows, dtype=torch.float64, device=logits.device)
    if not rows:
        return found
    arguments = (
        logits, logits.stride(0), params.temperature, params.seed, params.position, scanned.tops, scanned.masses, token, status, top, total,
        vocab, scanned.chunks,
    )  # fmt: skip
    _draw.launch((rows,), arguments, (scanned.padded_chunks,), warps=8)
    if params.truncates:
        cuts = params.temperature, params.top_k, params.top_p, params.min_p
        listed = list_wanted(scanned, *cuts, status, top, total)
        drawn = params.seed, params.position, top, total, *listed, token, vocab, scanned.runs
        _draw_truncated.launch((rows,), (logits, logits.stride(0), *cuts, *drawn), warps=8, registers=MAX_REGISTERS)
    return found


@Kernel
@triton.jit(do_not_specialize_on_alignment=["status"])  # parts of one tensor: where they start hangs on the number of rows
def _draw(logits, stride, temperature, seed, position, tops, masses, token, status, top, total, vocab, chunks, CHUNKS: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_next(PDL)
    wait(PDL)
    heat = tl.load(temperature + row)
    inverse = reciprocal(heat)
    most, state, chunk_tops, chunk_masses = row_of_chunks(tops, masses, row, chunks, inverse, CHUNKS)
    c = tl.arange(0, CHUNKS)
    before = tl.cumsum(chunk_masses, 0)
    mass = tl.sum(tl.where(c == CHUNKS - 1, before, 0.0), 0)
    target = uniform(tl.load(seed + row), tl.load(position + row).to(tl.int64)) * mass
    tl.store(status + row, state)
    tl.store(top + row, most)
    tl.store(total + row, mass)
    # The chunk in which the mass passes the target; rounding may let it end short of that.
    drawn = tl.minimum(tl.min(tl.where(before > target, c, CHUNKS), 0), tl.max(tl.where(chunk_masses > 0.0, c, 0), 0))
    chunk = tl.where(heat == 0.0, tl.min(tl.where(chunk_tops == most, c, CHUNKS - 1), 0), drawn)
    reached = tl.sum(tl.where(c == chunk - 1, before, 0.0), 0)
    id = chunk * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + row * stride + id, mask=id < vocab, other=float("-inf")).to(tl.float32)
    w = weight(z, tl.where(state == 0, most, 0.0), inverse)
    passed = (tl.cumsum(w.to(tl.float64), 0) + reached > target) & (w > 0.0)
    last = tl.max(tl.where(w > 0.0, id, 0), 0)
    found = tl.where(heat == 0.0, tl.min(tl.where(z == most, id, vocab), 0), tl.minimum(tl.min(tl.where(passed, id, vocab), 0), last))
    tl.store(token + row, tl.where(state == 0, found, -1))


@Kernel
@triton.jit(do_not_specialize_on_alignment=["top_p", "min_p", "bound"])
def _draw_truncated(
    logits, stride, temperature, top_k, top_p, min_p, seed, position, top, total, listed, number, bound, floor, token, vocab, runs
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(number + row)
    if count > 0:
        z, list_ = logits + row * stride, listed + row * runs
        k, p, least = tl.load(top_k + row).to(tl.int64), tl.load(top_p + row), tl.load(min_p + row)
        k = tl.where(k < vocab, k, 0)
        inverse, most, at_least = reciprocal(tl.load(temperature + row)), tl.load(top + row), tl.load(floor + row)
        low, end = tl.load(bound + row).to(tl.int64), key_of(most).to(tl.int64) + 1
        low32 = low.to(tl.int32)
        n_low, _, _, m_low, _, _ = sums_at_least(z, list_, count, vocab, most, inverse, at_least, low32, low32, low32, True)
        # Kept are all keys from `high` upwards, and of the tokens with keys from `low` to there the `ties` with the lowest ids: all
        # of them, or as many as there is room for among tokens with the same logit.
        high, n_high, m_high = end, tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        ties, kept = n_low, m_low
        if (k > 0) & (n_low > k):
            low, high, n_low, m_low, n_high, m_high = search(
                z, list_, count, vocab, most, inverse, at_least, True, k, low, high, n_low, m_low, n_high, m_high, ALL_TOKENS, True
            )
            ties = k - n_high
            kept = m_high + ties * ((m_low - m_high) // (n_low - n_high))
        if p < 1.0:
            whole = tl.where((k > 0) | (least > 0.0), kept.to(tl.float64), tl.load(total + row) * UNIT)
            want = tl.maximum(tl.ceil(p.to(tl.float64) * whole).to(tl.int64), 1)  # of no share there is the likeliest token
            if m_high >= want:  # the nucleus ends above the tokens that top_k divides
                low, n_low, m_low = high, n_high, m_high
                high, n_high, m_high = end, tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
            if m_low >= want:
                low, high, n_low, m_low, n_high, m_high = search(
                    z, list_, count, vocab, most, inverse, at_least, False, want, low, high, n_low, m_low, n_high, m_high, ALL_TOKENS, True
                )
                each = (m_low - m_high) // (n_low - n_high)
                ties = (want - m_high + each - 1) // each
                kept = m_high + ties * each
        target = uniform(tl.load(seed + row), tl.load(position + row).to(tl.int64)) * kept.to(tl.float64)
        low32, high32 = low.to(tl.int32), high.to(tl.int32)
        tl.store(token + row, _draw_kept(z, list_, count, vocab, most, inverse, at_least, low32, high32, ties, target))


@triton.jit
def _draw_kept(z, listed, count, vocab, top, inverse, floor, low, high, ties, target):
    """The first kept token up to which the kept mass is greater than ``target``; where rounding lets it end short of that, the last."""
    reached = tl.full((), 0, tl.int64)
    ties_before = 0
    found, last = vocab, 0
    for first in range(0, count, TILE_RUNS):
        id, value, inside = load_tile(z, listed, first, count, vocab, True)
        kept, units, ties_before = kept_of_tile(value, inside, top, inverse, floor, low, high, ties, ties_before)
        units = tl.where(kept, units, 0)
        id = tl.reshape(id, (TILE,))
        passed = (reached + tl.cumsum(units, 0)).to(tl.float64) > target
        found = tl.minimum(found, tl.min(tl.where(passed & kept, id, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(units > 0, id, 0), 0))
        reached += tl.sum(units, 0)
    return tl.minimum(found, last)
