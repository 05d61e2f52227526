"""Engine: inbox → schedule → execute → commit → outputs, in a loop. Start reading here.

One step:

    plan    = scheduler.schedule()       # running first, then admission; token budget; blocks
    result  = backend.execute(plan)      # write KV, attention, logits, sample
    outputs = scheduler.commit(plan, result)  # advance counters, finish, free

The engine knows nothing about text, tensors or sockets, and belongs to one thread.
"""

from __future__ import annotations

from typing import Protocol

from quire.config import EngineConfig
from quire.core.admission import RequestLimits
from quire.core.block_manager import BlockManager
from quire.core.plan import StepPlan, StepResult
from quire.core.scheduler import Scheduler
from quire.core.sequence import Request, Sequence, derive_seed
from quire.core.stats import EngineStats
from quire.errors import CapacityError, InvalidRequestError
from quire.outputs import SequenceOutput


class Vocabulary(Protocol):
    """The one number of a model that the engine checks tokens against."""

    @property
    def vocab_size(self) -> int: ...


class Executor(Protocol):
    """What the engine needs of a backend."""

    @property
    def spec(self) -> Vocabulary: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    def execute(self, plan: StepPlan) -> StepResult: ...


class Engine:
    """Runs requests on a backend. ``add`` and ``abort`` between steps; ``step`` while ``has_work``.

    Raises CapacityError where the backend's pool can't hold one sequence of ``max_model_len`` tokens.
    """

    def __init__(self, backend: Executor, config: EngineConfig) -> None:
        self.backend = backend
        manager = BlockManager(backend.num_blocks, backend.block_size)
        need = manager.blocks_for(backend.max_model_len)
        if need > backend.num_blocks:
            positions = backend.num_blocks * backend.block_size
            raise CapacityError(
                f"the KV pool holds {positions:,} token positions ({backend.num_blocks:,} blocks of {backend.block_size}), but one request "
                f"may need {backend.max_model_len:,}: raise --kv-memory, or lower --max-model-len to at most {positions:,}"
            )
        self.limits = RequestLimits(backend.max_model_len, backend.spec.vocab_size)
        self.scheduler = Scheduler(manager, config.max_num_seqs, config.max_num_batched_tokens)
        self._live: dict[str, list[Sequence]] = {}
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError (nothing is changed then)."""
        self.limits.check(request.prompt_token_ids, request.params)
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use", param="request_id")
        max_tokens = self.limits.max_tokens(request.prompt_token_ids, request.params)
        sequences = []
        for index in range(request.params.n):
            tokens = list(request.prompt_token_ids)
            sequences.append(Sequence(request, index, tokens, len(tokens), derive_seed(request.seed, index), max_tokens))
        self._live[request.request_id] = sequences
        for seq in sequences:
            self.scheduler.add(seq)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        """End a request, or only its ``index``-th sequence, and free its blocks at once.

        Returns the final outputs; none for what is unknown or has ended.
        """
        outputs = []
        for seq in self._live.get(request_id, []):
            if index is None or seq.index == index:
                self.scheduler.remove(seq)
                outputs.append(SequenceOutput(request_id, seq.index, [], None, "abort"))
        for output in outputs:
            self._forget(request_id, output.index)
        return outputs

    def step(self) -> list[SequenceOutput]:
        """Run one step; what it added to each sequence."""
        plan = self.scheduler.schedule()
        if not plan.work:
            return []
        result = self.backend.execute(plan)
        outputs = self.scheduler.commit(plan, result)
        self._steps += 1
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id, output.index)
        return outputs

    def stats(self) -> EngineStats:
        scheduler, counters = self.scheduler, self.scheduler.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self._steps,
            tokens_computed=counters.tokens_computed,
            tokens_sampled=counters.tokens_sampled,
            preemptions=counters.preemptions,
            tokens_recomputed=counters.tokens_recomputed,
            kv=scheduler.manager.stats(scheduler.running),
        )

    def check(self) -> None:
        """Prove that no block is lost or doubly owned. Raises AssertionError."""
        live = [seq for sequences in self._live.values() for seq in sequences]
        self.scheduler.manager.check(live)
        assert len(live) == len(self.scheduler.running) + len(self.scheduler.waiting), "a live sequence is neither running nor waiting"

    def _forget(self, request_id: str, index: int) -> None:
        left = [seq for seq in self._live[request_id] if seq.index != index]
        if left:
            self._live[request_id] = left
        else:
            del self._live[request_id]
