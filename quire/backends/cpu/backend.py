"""CpuBackend: a model on the CPU kernels, behind the Backend protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from quire.backends.cpu import _native as native
from quire.backends.cpu.decoder import Decoder
from quire.backends.cpu.machine import use_threads
from quire.backends.cpu.packed_cache import PackedCache
from quire.backends.cpu.packer import Packer
from quire.backends.cpu.sampler import Sampler
from quire.backends.cpu.scorer import Scorer
from quire.backends.memory import KVLayout, KVMemory, context_length, host_room, kv_layout, kv_memory, read_note
from quire.backends.parameters import sampled_masks
from quire.backends.progress import Progress
from quire.backends.rows import Rows, fresh_blocks
from quire.config import EngineConfig
from quire.core.plan import StepPlan, StepResult
from quire.models.quantization import Quantization
from quire.models.spec import TransformerSpec
from quire.models.weights import load_model, resolve_model


class CpuBackend:
    """Executes plans with a Decoder and a Sampler over a table of rows."""

    overlaps = False  # the host is the device

    def __init__(
        self,
        spec: TransformerSpec,
        folder: Path,
        decoder: Decoder,
        config: EngineConfig,
        memory: KVMemory,
        layout: KVLayout,
        max_model_len: int,
    ) -> None:
        self.spec = spec
        self.folder = folder
        self.decoder = decoder
        self.num_blocks = memory.num_blocks
        self.num_host_blocks = memory.num_host_blocks
        self.memory_note = memory.note
        kind = Quantization.of(config, spec)
        self.arithmetic = native.arithmetic(config.weight_width(spec.dtype) if kind is None else "int8")
        self.weight_note = "" if kind is None else f"{kind}: {read_note(decoder.weight_bytes(), decoder.expert_bytes())}"
        self.block_size = config.block_size
        self.max_model_len = max_model_len
        self.groups, self.kv_layers = layout.groups, layout.slots
        self._poison = config.kv_debug
        self._rows = Rows(config.num_seqs(memory.num_blocks, self.groups.width), max_model_len, config.block_size, self.groups.width)
        self._sampler = Sampler(self._rows, spec.vocab_size)
        self._scorer = Scorer(self._rows, decoder)

    @classmethod
    def open(cls, config: EngineConfig, report: Callable[[str, float], None] | None = None) -> CpuBackend:
        """Load ``config.model``. ``report`` hears each phase's name and seconds. Raises as ``open_backend``."""
        tell = report or (lambda phase, seconds: None)
        start = perf_counter()
        use_threads(config.threads)
        model = load_model(resolve_model(config.model), native.dequantize)
        spec = model.spec
        config = config.as_stored(spec.quantized)
        quantization = Quantization.of(config, spec)
        if quantization is not None:
            quantization.check(spec)
        max_model_len = context_length(config, spec)
        memory, layout = kv_memory(config, spec, max_model_len, host_room(config, spec)), kv_layout(spec, max_model_len, config.block_size)
        tell("map weights", perf_counter() - start)
        start = perf_counter()
        cache = None
        if quantization is not None and config.cache_dir is not None:
            cache = PackedCache(model.folder, config.cache_dir, quantization, model.reading)
            tell("check the weight cache", perf_counter() - start)
        start = perf_counter()
        try:
            with Progress("packing the weights", spec.num_parameters(), " weights") as progress:
                decoder = Decoder(
                    spec,
                    model.tensors,
                    num_blocks=memory.num_blocks + memory.num_host_blocks,  # the swap pool is more of the same memory
                    block_size=config.block_size,
                    layout=layout,
                    kv_dtype=config.kv_width(spec.dtype),
                    max_tokens=config.max_num_batched_tokens,
                    max_rows=max(config.num_seqs(memory.num_blocks, layout.groups.width), config.speculation_positions),
                    max_model_len=max_model_len,
                    packer=Packer(
                        None if config.dtype == "auto" else config.dtype, quantization, cache, progress, model.release, model.blocks
                    ),
                )
            tell("pack weights" if cache is None or not cache.found else "map packed weights", perf_counter() - start)
            if cache is not None and not cache.found:
                start = perf_counter()
                cache.finish()
                tell("write the weight cache", perf_counter() - start)
        finally:
            if cache is not None:
                cache.close()
        return cls(spec, model.folder, decoder, config, memory, layout, max_model_len)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. See Backend."""
        for start in plan.starts:
            self._rows.begin(start)
            self._sampler.begin(start)
            self._scorer.begin(start)
        if plan.copies:
            self.decoder.copy_blocks(plan.copies)
        if self._poison:
            self._poison_fresh(plan)
        batch = self._rows.batch(plan.work)
        sampled, result = batch.sampled, StepResult()
        if batch.scored is None:
            logits = self.decoder.forward(batch)
        else:
            hidden = self.decoder.hidden(batch)
            self._scorer.score(hidden, batch.scored.rows, result)
            logits = self.decoder.logits(hidden[batch.scored.sampled_at])
        if len(sampled) == 0:
            return result
        masks = sampled_masks(plan.work)
        began = perf_counter()
        self._sampler.sample(logits, sampled, batch.lengths, result, masks)
        result.sample_s = perf_counter() - began
        if batch.drafts:
            self._rows.append_accepted(plan.work, result.tokens, self._sampler.beams)
        else:
            tokens = np.maximum(result.tokens, 0)
            if (beams := self._sampler.beams[sampled]).any():
                sampled, tokens = sampled[~beams], tokens[~beams]
            self._rows.append(sampled, tokens)
        return result

    def _poison_fresh(self, plan: StepPlan) -> None:
        """Fill blocks that this step begins to write with NaN: what reads them before they are written shows."""
        if fresh := fresh_blocks(plan, self.block_size, self.groups.width):
            self.decoder.poison_blocks(fresh)

    def limits(self) -> tuple[float, float]:
        """Measured limits of this machine with the threads in use. See Backend."""
        return native.measure_read_bandwidth() * 1e9, native.measure_peak(self.arithmetic) * 1e9

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self.decoder.weight_bytes()

    def head_bytes(self) -> int:
        """Of which only a step with a row of logits reads."""
        return self.decoder.head_bytes()

    def expert_bytes(self) -> int:
        """Of which a step reads the experts that its positions take."""
        return self.decoder.expert_bytes()
