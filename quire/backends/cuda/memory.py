"""What the KV pool has to fit into: what the weights leave of the device's memory, less what the largest steps take, which are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from quire.backends.cuda.decoder import Decoder
from quire.backends.memory import GPU_SHARE, KVMemory, Room, host_room, kv_layout
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork, StepPlan
from quire.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quire.backends.cuda.backend import CudaBackend


def device_room(config: EngineConfig, decoder: Decoder, max_model_len: int, device: torch.device, make: Callable[..., CudaBackend]) -> Room:
    """After the weights are loaded. make: a backend with such a ``memory``."""
    if device.type != "cuda":
        room = host_room(config, decoder.spec)
        return Room(room.available, 0, room.buffers)
    width = kv_layout(decoder.spec, max_model_len, config.block_size).groups.width
    buffers = _step_bytes(config, width, device, make)
    decoder.forget_pool()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return Room(free, 0, buffers, GPU_SHARE, holds_swap=False)


def _step_bytes(config: EngineConfig, width: int, device: torch.device, make: Callable[..., CudaBackend]) -> int:
    """Bytes that steps take beside weights and KV pool: tables and scratch, the activations of the longest prefill, and once more of the
    largest decode step, since captured steps have memory of their own. width: groups of layers."""
    before = torch.cuda.memory_allocated(device)
    rows = config.num_seqs(1 << 30)
    backend = make(memory=KVMemory(rows * width, 0))  # enough for all rows, see EngineConfig.num_seqs
    pool = torch.cuda.memory_allocated(device) - before - backend.table_bytes()
    peaks = []
    for plan in (_prefill(rows, config.max_num_batched_tokens, backend), _decode(rows, backend)):
        torch.cuda.reset_peak_memory_stats(device)
        backend.execute(plan)
        peaks.append(torch.cuda.max_memory_allocated(device) - before - pool)
    return peaks[0] + peaks[1] - backend.table_bytes()


def _prefill(rows: int, tokens: int, backend: CudaBackend) -> StepPlan:
    """As many prompts as run at a time, of ``tokens`` positions together; all write into the same block."""
    each = min(max(1, tokens // rows), backend.max_model_len - 1)
    return _plan(min(rows, tokens), each, backend)


def _decode(rows: int, backend: CudaBackend) -> StepPlan:
    return _plan(rows, 1, backend)


def _plan(rows: int, count: int, backend: CudaBackend) -> StepPlan:
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, logprobs=1, frequency_penalty=0.1)
    blocks = [0] * (-(-count // backend.block_size) * backend.groups.width)
    starts = [RowStart(row, [0] * count, count, params, 0, ()) for row in range(rows)]
    return StepPlan(starts, [RowWork(row, 0, count, blocks, True) for row in range(rows)])
