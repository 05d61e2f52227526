"""CpuBackend: a model on the CPU kernels, behind the Backend protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from quire.backends.cpu import _native as native
from quire.backends.cpu.decoder import Decoder
from quire.backends.cpu.memory import available_bytes
from quire.backends.cpu.rows import Rows
from quire.backends.cpu.sampler import Sampler
from quire.config import EngineConfig
from quire.core.plan import StepPlan, StepResult
from quire.errors import CapacityError, ConfigError
from quire.models.spec import TransformerSpec
from quire.models.weights import load_model, resolve_model


class CpuBackend:
    """Executes plans with a Decoder and a Sampler over a table of rows."""

    def __init__(
        self, spec: TransformerSpec, folder: Path, decoder: Decoder, config: EngineConfig, num_blocks: int, max_model_len: int
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.decoder = decoder
        self.num_blocks = num_blocks
        self.block_size = config.block_size
        self.max_model_len = max_model_len
        self._poison = config.kv_debug
        self._rows = Rows(config.max_num_seqs, max_model_len, config.block_size)
        self._sampler = Sampler(self._rows, spec.vocab_size)

    @classmethod
    def open(cls, config: EngineConfig, report: Callable[[str, float], None] | None = None) -> CpuBackend:
        """Load ``config.model``. ``report`` hears each phase's name and seconds. Raises as ``open_backend``."""
        tell = report or (lambda phase, seconds: None)
        start = perf_counter()
        native.set_num_threads(config.threads or native.default_num_threads())
        model = load_model(resolve_model(config.model))
        spec = model.spec
        max_model_len = _context(config, spec)
        num_blocks = _num_blocks(config, spec, max_model_len)
        tell("map weights", perf_counter() - start)
        start = perf_counter()
        decoder = Decoder(
            spec,
            model.tensors,
            num_blocks=num_blocks,
            block_size=config.block_size,
            kv_dtype=config.kv_dtype,
            max_tokens=config.max_num_batched_tokens,
            max_rows=config.max_num_seqs,
            max_model_len=max_model_len,
            weight_dtype=None if config.dtype == "auto" else config.dtype,
        )
        tell("pack weights", perf_counter() - start)
        return cls(spec, model.folder, decoder, config, num_blocks, max_model_len)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. See Backend."""
        for start in plan.starts:
            self._rows.begin(start)
            self._sampler.begin(start)
        if plan.copies:
            self.decoder.copy_blocks(plan.copies)
        if self._poison and (fresh := [block for work in plan.work for block in work.new_blocks]):
            self.decoder.poison_blocks(fresh)
        logits = self.decoder.forward(self._rows.batch(plan.work))
        sampling = np.array([work.row for work in plan.work if work.sample], np.int32)
        if len(sampling) == 0:
            return StepResult()
        result = self._sampler.sample(logits, sampling)
        self._rows.append(sampling, np.maximum(result.tokens, 0))
        return result

    def limits(self) -> tuple[float, float]:
        """Measured limits of this machine with the threads in use: memory read bandwidth in bytes/s, float32 peak in FLOP/s."""
        return native.measure_read_bandwidth() * 1e9, native.measure_fma_peak() * 1e9

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self.decoder.weight_bytes()


def _context(config: EngineConfig, spec: TransformerSpec) -> int:
    if config.max_model_len is None:
        return spec.max_positions
    if config.max_model_len > spec.max_positions:
        raise ConfigError(
            f"--max-model-len {config.max_model_len:,} > the model's context of {spec.max_positions:,} tokens: "
            f"lower it to at most {spec.max_positions:,}",
            param="max_model_len",
        )
    return config.max_model_len


def _num_blocks(config: EngineConfig, spec: TransformerSpec, max_model_len: int) -> int:
    """Blocks that the KV memory holds. Raises CapacityError where one request does not fit, or the machine lacks the memory."""
    per_block = spec.kv_bytes_per_token(config.kv_dtype) * config.block_size
    num_blocks = config.kv_bytes // per_block
    need = -(-max_model_len // config.block_size)
    if num_blocks < need:
        fits = num_blocks * config.block_size
        lower = f", or lower --max-model-len to at most {fits:,}" if fits > 1 else ""
        raise CapacityError(
            f"--kv-memory {config.kv_memory} holds {fits:,} token positions ({num_blocks:,} blocks of {config.block_size}, "
            f"{per_block:,} bytes each), but one request may need {max_model_len:,}: "
            f"raise --kv-memory to at least {-(-need * per_block >> 20)}MiB{lower}"
        )
    available = available_bytes()
    weights = spec.weight_bytes(None if config.dtype == "auto" else config.dtype)
    if available is not None and config.kv_bytes + weights > available:
        room = max(0, available - weights) >> 20
        fits = (room << 20) // per_block * config.block_size
        if fits >= max_model_len:
            remedy = f"lower --kv-memory to at most {room}MiB"
        elif fits > 1:
            remedy = f"lower --kv-memory to at most {room}MiB, and --max-model-len to at most {fits:,}"
        else:
            remedy = "free some, or take a smaller model"
        raise CapacityError(
            f"--kv-memory {config.kv_memory} ({config.kv_bytes / 1e9:.1f} GB) and the weights ({weights / 1e9:.1f} GB) need more than the "
            f"{available / 1e9:.1f} GB of memory that are free: {remedy}"
        )
    return num_blocks
