"""Drive the CPU decoder by hand, without engine and sampler: the logits of every position of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu.decoder import Decoder
from quire.backends.cpu.packer import Packer
from quire.backends.rows import Rows
from quire.core.plan import RowStart, RowWork
from quire.models.weights import Model
from quire.sampling_params import SamplingParams


def decode_logits(
    model: Model, tokens: Sequence[int], chunks: Sequence[int], *, block_size: int = 16, kv_dtype: str = "float32", dtype: str | None = None
) -> npt.NDArray[Any]:
    """[len(tokens), vocab] float32, computed in steps of ``chunks`` positions, the last size repeated; KV in blocks out of order.
    dtype: of the weights; None: as stored."""
    count = len(tokens)
    num_blocks = -(-count // block_size)
    decoder = Decoder(
        model.spec,
        model.tensors,
        num_blocks=num_blocks + 2,
        block_size=block_size,
        kv_dtype=kv_dtype,
        max_tokens=max(chunks),
        max_rows=max(chunks),
        max_model_len=count,
        packer=Packer(dtype),
    )
    decoder.poison_blocks(list(range(num_blocks + 2)))  # a read of memory that was never written shows as NaN
    rows = Rows(2, count, block_size)
    rows.begin(RowStart(1, list(tokens), count, SamplingParams(), 0, ()))
    free = np.random.default_rng(0).permutation(num_blocks + 2).tolist()
    out, start, sizes = [], 0, list(chunks)
    while start < count:
        size = min(sizes.pop(0) if len(sizes) > 1 else sizes[0], count - start)
        held = -(-start // block_size)
        needed = -(-(start + size) // block_size) - held
        batch = rows.batch([RowWork(1, start, size, [free.pop() for _ in range(needed)], True, held)])
        batch.asked = None  # logits of every position, not of the last one only
        out.append(decoder.forward(batch).copy())
        start += size
    return np.concatenate(out)
