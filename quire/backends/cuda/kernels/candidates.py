"""Which runs of a row have tokens that top_k, top_p and min_p may leave, or that are among the likeliest: few, mostly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.selection import (
    CHUNK,
    CHUNK_RUNS,
    LOWEST_KEY,
    RUN,
    UNIT,
    key_of,
    reciprocal,
    scan,
    search,
    sums_at_least,
    weight,
)

_TILE = tl.constexpr(1024)


class Scanned:
    """What one pass over the logits leaves: see ``scan``. temperature: None for 1."""

    def __init__(self, logits: Tensor, temperature: Tensor | None) -> None:
        rows, self.vocab = logits.shape
        self.chunks = triton.cdiv(self.vocab, CHUNK.value)
        self.padded_chunks = triton.next_power_of_2(self.chunks)
        self.runs = self.chunks * CHUNK_RUNS.value
        self.maxima = torch.empty((rows, self.runs), dtype=torch.float32, device=logits.device)
        self.tops = torch.empty((rows, self.chunks), dtype=torch.float32, device=logits.device)
        self.masses = torch.empty((rows, self.chunks), dtype=torch.float64, device=logits.device)
        if rows:
            results = self.maxima, self.tops, self.masses
            scan.launch((rows, self.chunks), (logits, logits.stride(0), temperature, *results, self.vocab, self.chunks))


def list_wanted(
    scanned: Scanned, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, status: Tensor, top: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(listed [N, runs] int32, number [N] int32 of them, bound [N] int32, floor [N] float32): what may be kept is in the listed runs, has
    the key ``bound`` or greater, and weighs ``floor`` or more. Nothing is listed where everything is kept, or nothing is drawn."""
    rows, device = len(status), status.device
    listed = torch.empty((rows, scanned.runs), dtype=torch.int32, device=device)
    number, bound = torch.empty((2, rows), dtype=torch.int32, device=device)
    floor = torch.empty(rows, dtype=torch.float32, device=device)
    arguments = temperature, top_k, top_p, min_p, status, top, total, scanned.maxima, listed, number, bound, floor
    _list_wanted.launch((rows,), (*arguments, scanned.vocab, scanned.runs), warps=8)
    return listed, number, bound, floor


@Kernel
@triton.jit(do_not_specialize_on_alignment=["top_p", "min_p", "status", "top", "bound"])
def _list_wanted(temperature, top_k, top_p, min_p, status, top, total, maxima, listed, number, bound, floor, vocab, runs):
    row = tl.program_id(0).to(tl.int64)
    heat, p, least = tl.load(temperature + row), tl.load(top_p + row), tl.load(min_p + row)
    k = tl.load(top_k + row)
    k = tl.where(k < vocab, k, 0)
    if (tl.load(status + row) != 0) | (heat == 0.0) | ((k <= 0) & (p >= 1.0) & (least <= 0.0)):
        tl.store(number + row, 0)
    else:
        inverse, most, mass = reciprocal(heat), tl.load(top + row), tl.load(total + row)
        by_mass = (k <= 0) & (least <= 0.0)
        # Tokens below a share (1 - p) / vocab of the mass hold less than 1 - p together; half of that is far from any rounding.
        share = (0.5 * (1.0 - p.to(tl.float64)) * mass / vocab).to(tl.float32)
        at_least = tl.where(by_mass, share, tl.where(least > 0.0, least, -1.0))
        # More than p by far more than the sums may be off.
        want = tl.where(by_mass, (p.to(tl.float64) * mass * (1.0001 * UNIT)).to(tl.int64), k.to(tl.int64))
        want = tl.where((k <= 0) & (least > 0.0), 2**62, tl.maximum(want, 1))  # no bound but the floor
        here = maxima + row * runs
        key = bound_of_maxima(here, runs, most, inverse, at_least, k > 0, want)
        tl.store(number + row, list_runs(here, listed + row * runs, runs, most, inverse, at_least, key))
        tl.store(bound + row, key)
        tl.store(floor + row, at_least)


@triton.jit
def bound_of_maxima(maxima, runs, top, inverse, floor, by_count, want):
    """A key (int32) that all tokens of the wanted set reach: so many runs, or runs of such a mass, have a maximum with that key or a
    greater one. Not the greatest such key, but that would not leave much less to search."""
    lowest = tl.full((), LOWEST_KEY, tl.int64)
    lowest32 = lowest.to(tl.int32)
    count = tl.cdiv(runs, RUN)
    n, _, _, m, _, _ = sums_at_least(maxima, maxima, count, runs, top, inverse, floor, lowest32, lowest32, lowest32, False)
    if tl.where(by_count, n, m) >= want:
        high, nothing = key_of(top).to(tl.int64) + 1, tl.full((), 0, tl.int64)
        lowest, _, _, _, _, _ = search(
            maxima, maxima, count, runs, top, inverse, floor, by_count, want, lowest, high, n, m, nothing, nothing, 4, False
        )
    return lowest.to(tl.int32)


@triton.jit
def list_runs(maxima, listed, runs, top, inverse, floor, bound):
    """List, in ascending order, the runs that may have a token with the key ``bound`` or greater and the weight ``floor`` or more."""
    count = 0
    for first in range(0, runs, _TILE):
        run = first + tl.arange(0, _TILE)
        most = tl.load(maxima + run, mask=run < runs, other=float("-inf"))
        # A weight may be off by a unit in the last place, also against that of a greater logit.
        wanted = (run < runs) & (key_of(most) >= bound) & (weight(most, top, inverse) >= floor * 0.99999)
        tl.store(listed + count + tl.cumsum(wanted.to(tl.int32), 0) - 1, run, mask=wanted)
        count += tl.sum(wanted.to(tl.int32), 0)
    return count
