"""Tokens of rows: their embeddings, and those that were drawn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.programmatic import start_next, wait

MAX_COLUMNS = 1024
"""Of a program of ``embed``."""
_TOKENS = 128
"""Of a program of ``put_tokens``."""


def embed(tokens: Tensor, rows: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    """As in reference/. The last dimension of tokens is contiguous, and weight is."""
    count, width = rows.shape[0], weight.shape[1]
    out = torch.empty((count, width), dtype=weight.dtype, device=weight.device)
    block = min(MAX_COLUMNS, 1 << (width - 1).bit_length())
    if count:
        _embed.launch((count, -(-width // block)), (tokens, tokens.stride(0), rows, positions, weight, out), (width, block))
    return out


def put_tokens(tokens: Tensor, rows: Tensor, positions: Tensor, found: Tensor) -> None:
    """As in reference/. The last dimension of tokens is contiguous."""
    count = rows.shape[0]
    if count:
        _put.launch((-(-count // _TOKENS),), (tokens, tokens.stride(0), rows, positions, found, count), (_TOKENS,))


@Kernel
@triton.jit
def _embed(tokens, stride, rows, positions, weight, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait(PDL)
    at = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + tl.load(rows + at).to(tl.int64) * stride + tl.load(positions + at)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    tl.store(out + at * WIDTH + columns, tl.load(weight + token * WIDTH + columns, mask=inside), mask=inside)


@Kernel
@triton.jit(do_not_specialize=["count"])
def _put(tokens, stride, rows, positions, found, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    row, position = tl.load(rows + i, mask=inside, other=0).to(tl.int64), tl.load(positions + i, mask=inside, other=0)
    tl.store(tokens + row * stride + position, tl.maximum(tl.load(found + i, mask=inside, other=0), 0), mask=inside)
