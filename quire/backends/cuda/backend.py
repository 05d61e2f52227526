"""CudaBackend: a model in PyTorch, behind the Backend protocol. ``launch`` queues a step, ``collect`` waits for its tokens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.backends.cuda import limits
from quire.backends.cuda.batches import Arrays, arrange, decoding_first, no_arrays
from quire.backends.cuda.cache import KVPool
from quire.backends.cuda.decoder import Decoder, Step
from quire.backends.cuda.graphs import Graphs, sizes
from quire.backends.cuda.group import Group
from quire.backends.cuda.ranks import Ranks
from quire.backends.cuda.sampler import Sampled, Sampler, read
from quire.backends.cuda.scorer import Scorer, Scores
from quire.backends.cuda.staging import to_device
from quire.backends.cuda.steps import Samples, Steps
from quire.backends.cuda.swap import Copier
from quire.backends.cuda.tables import Tables, Updates
from quire.backends.memory import KVMemory, kv_layout, read_note
from quire.backends.parameters import Parameters, sampled_masks
from quire.backends.progress import Progress
from quire.backends.rows import Batch, Rows, fresh_blocks
from quire.config import EngineConfig
from quire.core.plan import RowStart, RowWork, StepPlan, StepResult
from quire.errors import EngineError, StepMemoryError
from quire.models.spec import TransformerSpec


@dataclass(slots=True)
class Pending:
    """A step on its way."""

    work: list[RowWork]
    """Its work in the order in which it is computed."""
    order: npt.NDArray[np.int64] | None
    """Which sample of the device is the plan's i-th; None where they are the same."""
    starts: list[RowStart | None]
    """What the rows of ``work`` held when the step was launched."""
    sampled: Sampled | None = None
    scores: list[Scores] = field(default_factory=list)
    hosts: list[Tensor] = field(default_factory=list)
    """All that comes back, in the order of ``sampled`` and ``scores``."""
    done: Any = None
    """The event behind the copies to the host; None on a CPU."""


class CudaBackend:
    """Executes plans with a Decoder, a Sampler and a Scorer over tables on the device."""

    overlaps = True

    def __init__(
        self, spec: TransformerSpec, folder: Path, decoder: Decoder, ops: Any, config: EngineConfig, memory: KVMemory, max_model_len: int,
        device: torch.device, group: Group | None = None,
    ) -> None:  # fmt: skip
        """spec: of the whole model; decoder.spec: of what this device has of it, where it shares the model with a ``group``."""
        self.spec, self.folder, self.decoder, self.device = spec, folder, decoder, device
        self.num_blocks, self.num_host_blocks = memory.num_blocks, memory.num_host_blocks
        self.memory_note = memory.note
        self.arithmetic = str(decoder.dtype).removeprefix("torch.")
        self.weight_note = ""
        if config.quantize is not None:
            self.weight_note = (
                f"{config.quantize} with one scale for each output: {read_note(decoder.weight_bytes(), decoder.expert_bytes())}"
            )
        self.block_size, self.max_model_len = config.block_size, max_model_len
        layout = kv_layout(spec, max_model_len, config.block_size)
        self.groups, self.kv_layers = layout.groups, layout.slots
        self._ops, self._poison, self._same = ops, config.kv_debug, config.deterministic
        rows = config.num_seqs(memory.num_blocks, self.groups.width)
        local = decoder.spec
        kv_dtype = config.kv_width(spec.dtype)
        self._pool = KVPool(layout.slots, memory.num_blocks, local.num_kv_heads, config.block_size, spec.head_dim, kv_dtype, device)
        decoder.use(self._pool, layout)
        self._copier = Copier(self._pool, memory.num_blocks, memory.num_host_blocks, ops)
        self._rows = Rows(rows, max_model_len, config.block_size, self.groups.width)
        self._tables = Tables(rows, max_model_len, config.block_size, self.groups.width, device)
        self._parameters = Parameters(self._rows, spec.vocab_size)
        self._sampler = Sampler(self._tables, self._parameters, ops, None if group is None else group.share)
        self._scorer = Scorer(self._rows, decoder, ops)
        self._group = group
        self._ranks: Ranks | None = None
        self._graphs: Graphs | None = None
        self._sizes: list[int] = []
        self._steps = Steps(
            decoder, self._tables, num_blocks=memory.num_blocks, block_size=config.block_size, groups=self.groups, kv_dtype=kv_dtype,
            max_len=max_model_len, device=device,
        )  # fmt: skip

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. See Backend."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Queue one step. See Backend."""
        try:
            return self._launch_all(plan)
        except torch.OutOfMemoryError as e:
            if self._group is not None:
                raise  # the others have computed it, or wait
            torch.cuda.empty_cache()
            raise StepMemoryError(
                f"the device has no memory for a step of {plan.num_tokens:,} positions: {str(e).splitlines()[0]}"
            ) from None

    def _launch_all(self, plan: StepPlan) -> Pending:
        """On this device, and on those that share the model."""
        if self._ranks is None:
            return self._launch(plan)
        with self._ranks.together():
            self._ranks.send(plan)
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> Pending:
        for start in plan.starts:
            self._rows.begin(start)
            self._parameters.begin(start)
            self._scorer.begin(start)
        if plan.copies:
            self._copy(plan.copies)
        if self._poison:
            self._poison_fresh(plan)
        work, decoding, order = decoding_first(plan.work, self._rows.num_prompt if self._same else None)
        updates = Updates(self._tables, plan.starts, work, self._rows.lengths, self._parameters)
        batch = self._rows.batch(work)
        pending = Pending(work, order, [self._rows.starts[w.row] for w in work] if batch.drafts else [])
        self._compute(batch, arrange(batch, decoding, self.block_size), updates, sampled_masks(work), pending)
        # What the tokens are is on the device; the host needs their number alone, which for those with a draft is known by ``collect``. The
        # others may be planned before that.
        rows = np.array([w.row for w in work if w.sample and not w.draft], np.int32) if batch.drafts else batch.sampled
        rows = rows[~self._parameters.beams[rows]]
        self._rows.append(rows, np.zeros(len(rows), np.int32))
        return pending

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        """They count even where there is no memory for the step: without them the engine can't go on."""
        try:
            self._copier.copy(pairs)
        except torch.OutOfMemoryError as e:
            raise EngineError(f"the device has no memory left to copy blocks: {str(e).splitlines()[0]}") from None

    def lead(self, ranks: Ranks) -> None:
        """``ranks`` compute their parts of every step from now on."""
        ranks.loaded()
        self._ranks = ranks

    def follow(self, plan: StepPlan) -> None:
        """A step of which this device has a part, and the result is somebody else's."""
        pending = self.launch(plan)
        if any(w.draft for w in plan.work):  # how many are right decides how long the rows are
            self.collect(pending)

    @torch.inference_mode()
    def collect(self, pending: Pending) -> StepResult:
        """Wait for a step's tokens. See Backend."""
        if pending.done is not None:
            pending.done.synchronize()
        result = StepResult()
        arrays = [host.numpy() for host in pending.hosts]
        if pending.sampled is not None:
            count = 1 + len(pending.sampled.reported)
            read(pending.sampled, arrays[:count], result)
            del arrays[:count]
            if any(w.draft for w in pending.work):
                self._rows.append_accepted(pending.work, result.tokens, self._parameters.beams, pending.starts)
            if pending.order is not None:
                result.tokens = [result.tokens[i] for i in pending.order]
                result.logprobs = [result.logprobs[i] for i in pending.order]
        for scores in pending.scores:
            scores.read(arrays[: len(scores.tensors)], result)
            del arrays[: len(scores.tensors)]
        return result

    def limits(self) -> tuple[float, float]:
        """Measured limits of the device: bytes/s that a copy reads and writes, operations/s of a product. See Backend."""
        found = limits.copy_bandwidth(self.device), limits.matmul_peak(self.device, self.decoder.dtype)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # there is little beside the KV pool
        return found

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return self.decoder.weight_bytes()

    def table_bytes(self) -> int:
        """Bytes of the tables of rows and of the scratch of attention."""
        return self._tables.nbytes + self._steps.scratch.nbytes

    def head_bytes(self) -> int:
        """Of which only a step with a row of logits reads."""
        return self.decoder.lm_head.nbytes

    def expert_bytes(self) -> int:
        """Of which a step reads the experts that its positions take."""
        return self.decoder.expert_bytes()

    def _compute(self, batch: Batch, arrays: Arrays, updates: Updates, masks: list[bytes | None], pending: Pending) -> None:
        """Send what the step needs, and queue it; into ``pending`` what comes of it."""
        if batch.uniform and arrays.num_decoding == len(arrays.rows) and (size := self._captured_size(arrays, updates)):
            self._replay(size, batch, arrays, updates, masks, pending)
            return
        step, samples = self._steps.send(arrays, updates)
        hidden = self.decoder.hidden(step)
        if batch.scored is not None:
            pending.scores = self._scorer.score(hidden, batch.scored.rows)
        if samples.at is not None:
            hidden = hidden.index_select(0, samples.at)
        if len(arrays.sampled):
            logits = self.decoder.logits(hidden)
            pending.sampled = self._sampler.sample(logits, (samples.rows, samples.lengths), arrays.sampled, batch.lengths, masks)
        self._fetch(pending)

    def capture(self) -> None:
        """Capture decode steps of a few sizes, each as it samples with and without truncation."""
        rows, dtype = self._tables.spare, self.decoder.dtype
        self._graphs, self._sizes = Graphs(self.device), sizes(rows)
        self._logits = torch.empty((rows, self.spec.vocab_size), dtype=dtype, device=self.device)
        nobody = Updates(self._tables, [], [], self._rows.lengths, self._parameters)
        with Progress("capturing steps", len(self._sizes), "size") as progress, torch.inference_mode():
            for size in reversed(self._sizes):  # the largest first: the others find their memory there
                step, samples = self._steps.send_padded(no_arrays(self.groups.width), nobody, size)
                for truncates in (False, True):
                    self._graphs.capture((size, truncates), partial(self._decode, step, samples, truncates))
                progress.add(1)

    def _decode(self, step: Step, samples: Samples, truncates: bool) -> tuple[Tensor, Tensor]:
        tensors = self._sampler.tensors(samples.rows, samples.lengths, truncates)  # first: what follows starts kernel by kernel early
        logits = self.decoder.logits(self.decoder.hidden(step), self._logits[: step.num_decoding])
        return logits, self._sampler.plain(logits, samples.rows, tensors)

    def _captured_size(self, arrays: Arrays, updates: Updates) -> int | None:
        """Of the smallest captured step that the batch fits into; None where it fits into none."""
        at = bisect_left(self._sizes, len(arrays.rows))
        if at == len(self._sizes):
            return None
        size = self._sizes[at]
        return size if self._steps.fits(arrays.decode_lengths, size) and self._steps.stays(updates, size) else None

    def _replay(self, size: int, batch: Batch, arrays: Arrays, updates: Updates, masks: list[bytes | None], pending: Pending) -> None:
        """``_compute`` by a captured step of ``size`` sequences."""
        assert self._graphs is not None
        _, samples = self._steps.send_padded(arrays, updates, size)
        logits, found = self._graphs.replay((size, self._sampler.truncates(arrays.sampled)))
        if self._sampler.is_plain(arrays.sampled, masks):
            pending.sampled = Sampled(found, arrays.sampled, [False] * len(arrays.sampled))
        else:  # sampled again: what the step has put into the tables is put there anew
            count = len(arrays.sampled)
            there = (samples.rows[:count], samples.lengths[:count])
            pending.sampled = self._sampler.sample(logits[:count], there, arrays.sampled, batch.lengths, masks)
        self._fetch(pending)

    def _fetch(self, pending: Pending) -> None:
        """Queue the copies of what the step found to the host."""
        sampled = pending.sampled
        found = [] if sampled is None else [sampled.found, *sampled.reported]
        found += [tensor for scores in pending.scores for tensor in scores.tensors]
        if self.device.type != "cuda":
            pending.hosts = found
            return
        for tensor in found:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            pending.hosts.append(host.copy_(tensor, non_blocking=True))
        pending.done = torch.cuda.Event()
        pending.done.record()

    def _poison_fresh(self, plan: StepPlan) -> None:
        """Fill blocks that this step begins to write with NaN: what reads them before they are written shows."""
        if fresh := fresh_blocks(plan, self.block_size, self.groups.width):
            self._ops.fill_blocks(self._pool, to_device(np.array(fresh, np.int32), self.device), float("nan"))
