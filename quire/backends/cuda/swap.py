"""Copies of blocks within the KV pool, and to and from the swap pool in host memory.

A block that goes to the host is gathered on the device first, in order with the steps, so that its memory may be written again at
once; the copy to the host then runs beside what follows. One that comes back is copied beside what runs, and put in its place in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.backends.cuda.cache import KVPool
from quire.backends.cuda.hazards import hazard_free
from quire.backends.cuda.staging import to_device
from quire.errors import CapacityError

AT_ONCE = 64 << 20
"""Bytes that are gathered at a time: where a step has no memory, its copies still find it."""
PIECE = 256 << 20
"""Bytes of host memory that are taken at a time."""


class HostBlocks:
    """Memory for blocks of ``shape`` bytes. In pieces: pinned memory comes in powers of two, so that one of 33 GiB would take 64."""

    def __init__(self, count: int, shape: tuple[int, ...], pinned: bool) -> None:
        self.shape, self.nbytes = shape, prod(shape)
        self._each = max(1, PIECE // self.nbytes)
        counts = [min(self._each, count - begin) for begin in range(0, count, self._each)]
        try:
            self._pieces = [torch.empty((n, *shape), dtype=torch.uint8, pin_memory=pinned) for n in counts]
        except RuntimeError as e:
            wanted, why = count * self.nbytes, str(e).splitlines()[0]
            raise CapacityError(f"--swap-memory: the host has no {wanted:,} bytes of pinned memory to give ({why}): lower it") from None

    def __getitem__(self, block: int) -> Tensor:
        return self._pieces[block // self._each][block % self._each]


class SwapPool:
    """Host memory for ``num_blocks`` blocks of a pool, as bytes, each of them contiguous; pinned where there is a GPU."""

    def __init__(self, pool: KVPool, num_blocks: int, ops: Any) -> None:
        self._ops = ops
        self._stores = [memory.view(torch.uint8) for memory in pool.memories]
        pinned = pool.data.device.type == "cuda"
        self._hosts = [HostBlocks(num_blocks, (*memory.shape[:2], *memory.shape[3:]), pinned) for memory in self._stores]
        self._stream = torch.cuda.Stream(pool.data.device) if pinned else None

    def take(self, blocks: list[int], places: list[int]) -> None:
        """Blocks of the pool to ``places`` here."""
        for memory, host in zip(self._stores, self._hosts, strict=True):
            for part in _parts(len(blocks), host):
                gathered = torch.empty((len(blocks[part]), *host.shape), dtype=memory.dtype, device=memory.device)
                self._ops.copy_blocks(memory, gathered.movedim(0, 2), _pairs(zip(blocks[part], count(), strict=False), memory))
                with _Beside(self._stream, gathered):
                    for i, place in enumerate(places[part]):
                        host[place].copy_(gathered[i], non_blocking=True)

    def give(self, places: list[int], blocks: list[int]) -> None:
        """Back to ``blocks`` of the pool."""
        for memory, host in zip(self._stores, self._hosts, strict=True):
            for part in _parts(len(blocks), host):
                with _Beside(self._stream) as beside:  # its memory too is the other stream's: nothing that is queued here has used it
                    arrived = torch.empty((len(places[part]), *host.shape), dtype=memory.dtype, device=memory.device)
                    for i, place in enumerate(places[part]):
                        arrived[i].copy_(host[place], non_blocking=True)
                beside.wait(arrived)
                self._ops.copy_blocks(arrived.movedim(0, 2), memory, _pairs(enumerate(blocks[part]), memory))


class Copier:
    """What a plan's ``copies`` say, in order."""

    def __init__(self, pool: KVPool, num_blocks: int, num_host_blocks: int, ops: Any) -> None:
        self._pool, self._num_blocks, self._ops = pool, num_blocks, ops
        self._swap = SwapPool(pool, num_host_blocks, ops) if num_host_blocks else None

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """(source, destination); ids from ``num_blocks`` on are blocks of the swap pool."""
        here = self._num_blocks
        for group in hazard_free(pairs):
            within = [pair for pair in group if max(pair) < here]
            if within:
                for memory in self._pool.memories:
                    self._ops.copy_blocks(memory, memory, _pairs(within, memory))
            if self._swap is not None:
                if out := [(source, to - here) for source, to in group if to >= here]:
                    self._swap.take([source for source, _ in out], [to for _, to in out])
                if back := [(source - here, to) for source, to in group if source >= here]:
                    self._swap.give([source for source, _ in back], [to for _, to in back])


class _Beside:
    """Work on another stream; on ``tensor``: after what the current one has queued so far. Without a stream: just here."""

    def __init__(self, stream: Any, tensor: Tensor | None = None) -> None:
        self._stream, self._tensor = stream, tensor
        self._context: Any = None

    def __enter__(self) -> _Beside:
        if self._stream is not None:
            if self._tensor is not None:
                self._stream.wait_stream(torch.cuda.current_stream())
                self._tensor.record_stream(self._stream)  # its memory is not reused before that is done
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._context is not None:
            self._context.__exit__(*error)

    def wait(self, tensor: Tensor) -> None:
        """What the current stream does from now on comes after it, and may use ``tensor``, which was made there."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            tensor.record_stream(torch.cuda.current_stream())


def _parts(count: int, host: HostBlocks) -> list[slice]:
    """Of ``count`` blocks, as many as may be gathered at a time."""
    each = max(1, AT_ONCE // host.nbytes)
    return [slice(begin, begin + each) for begin in range(0, count, each)]


def _pairs(pairs: Iterable[tuple[int, int]], memory: Tensor) -> Tensor:
    """[N, 2] int32, beside ``memory``."""
    return to_device(np.array(list(pairs), np.int32), memory.device)
