"""From a configuration to a CudaBackend: the device, the weights, the memory for the KV pool, captured steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from quire.backends.cuda import parallel
from quire.backends.cuda.backend import CudaBackend
from quire.backends.cuda.decoder import Decoder
from quire.backends.cuda.device import check_fp8, open_device, operations
from quire.backends.cuda.group import Group
from quire.backends.cuda.kernels.attention_configs import LARGEST_HEAD, padded
from quire.backends.cuda.memory import device_room
from quire.backends.cuda.ranks import Ranks
from quire.backends.cuda.weights import Loader
from quire.backends.memory import KVMemory, context_length, kv_memory
from quire.backends.progress import Progress
from quire.config import EngineConfig
from quire.errors import CapacityError, ConfigError
from quire.models.parallel import check as check_parallel
from quire.models.weights import load_model, load_spec, resolve_model

Report = Callable[[str, float], None]


def open_cuda(config: EngineConfig, report: Report | None = None) -> CudaBackend:
    """Load ``config.model``. ``report`` hears each phase's name and seconds. Raises as ``backends.base.open_backend``."""
    size = config.tensor_parallel
    if size == 1:
        return open_rank(config, report=report)
    open_device(config.device, size - 1)
    config = replace(config, model=str(resolve_model(config.model)))  # once for all ranks: a model of the Hub may have to be downloaded
    check_parallel(load_spec(config.model), size)
    ranks = Ranks(config, size)
    try:
        backend = open_rank(config, 0, ranks.folder, report)
    except BaseException:
        ranks.close()
        raise
    backend.lead(ranks)
    return backend


def open_rank(config: EngineConfig, rank: int = 0, folder: Path | None = None, report: Report | None = None) -> CudaBackend:
    """The part of ``rank`` of the devices that share the model. folder: where they meet."""
    try:
        return _open_rank(config, rank, folder, report)
    except torch.OutOfMemoryError as e:
        raise CapacityError(
            f"the device has no memory left while the model is loaded ({str(e).splitlines()[0]}): free some, lower --max-num-seqs, "
            "--max-num-batched-tokens or a stated --kv-memory, or take a smaller model"
        ) from None


def _open_rank(config: EngineConfig, rank: int, folder: Path | None, report: Report | None) -> CudaBackend:
    tell = report or (lambda phase, seconds: None)
    start = perf_counter()
    device = open_device(config.device, rank)
    if device.type == "cuda":
        check_fp8(config, rank)
    if device.type == "cpu" and config.threads is not None:
        torch.set_num_threads(config.threads)
    ops = operations(device)
    group = None if folder is None else Group(rank, config.tensor_parallel, folder, device)
    tell("open the device", perf_counter() - start)
    start = perf_counter()
    model = load_model(resolve_model(config.model))
    spec, tensors, nbytes = model.spec, model.tensors, model.nbytes
    config = config.as_stored(spec.quantized)
    if padded(spec.head_dim) > LARGEST_HEAD:
        raise ConfigError(
            f"--device {config.device}: heads of {spec.head_dim} numbers: the attention kernels have tiles for {LARGEST_HEAD} at most: "
            "use --device cpu",
            param="device",
        )
    local = spec
    max_model_len = context_length(config, spec)
    if group is not None:
        local, tensors = parallel.shard(spec, tensors, rank, group.size)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
    quantize: Any = config.quantize  # int8 or fp8: EngineConfig refuses others
    with Progress("loading the weights", nbytes) as progress:
        loader = Loader(tensors, device, config.weight_width(spec.dtype), quantize, ops, progress, model.release, config.deterministic)
        decoder = Decoder(local, loader, ops, device, max_model_len, group)
    tensors = {}
    model.close()
    tell("load the weights", perf_counter() - start)
    start = perf_counter()
    make = partial(CudaBackend, spec, model.folder, decoder, ops, config, max_model_len=max_model_len, device=device, group=group)
    memory = kv_memory(config, local, max_model_len, device_room(config, decoder, max_model_len, device, make))
    if group is not None:
        memory = KVMemory(group.least(memory.num_blocks), group.least(memory.num_host_blocks), memory.note)
    backend = make(memory=memory)
    tell("find memory for the KV pool", perf_counter() - start)
    if config.cuda_graphs:
        start = perf_counter()
        backend.capture()
        tell("capture decode steps", perf_counter() - start)
    return backend
