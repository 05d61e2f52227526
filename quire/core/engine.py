"""Engine: inbox → schedule → execute → commit → outputs, in a loop. Start reading here.

One step:

    plan    = scheduler.schedule()       # running first, then admission; token budget; blocks, forks, copies
    result  = backend.execute(plan)      # copies, write KV, attention, logits, sample
    outputs = scheduler.commit(plan, result)  # advance counters, publish full blocks, finish, free

On a device that works beside the host, steps overlap: the next one is planned and launched before the tokens of the last are read,
so that the device never waits for the host (flight.py).

The engine knows nothing about text, tensors or sockets, and belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, Protocol, cast

from quire.config import EngineConfig
from quire.core.admission import AdmissionPolicy, NoEvict, RequestLimits, Watermark
from quire.core.beam import BeamSearch
from quire.core.block_manager import BlockManager
from quire.core.constraint import Constraints
from quire.core.events import Listener, chain
from quire.core.groups import ONE_GROUP, KVGroups
from quire.core.past_future import PastFuture
from quire.core.plan import StepExtent, StepPlan, StepResult
from quire.core.scheduler import Scheduler
from quire.core.sequence import Group, Request, Sequence, derive_seed
from quire.core.snapshot import Watch
from quire.core.speculation import Speculation
from quire.core.stats import EngineStats, StepTimes
from quire.errors import CapacityError, InvalidRequestError, QueueFullError, StepMemoryError
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
    def num_host_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def groups(self) -> KVGroups: ...
    @property
    def overlaps(self) -> bool:
        """Steps are launched and collected: it is an OverlappingExecutor."""
        ...

    def execute(self, plan: StepPlan) -> StepResult: ...


class OverlappingExecutor(Executor, Protocol):
    """What the engine needs of a backend with steps that overlap; see quire.backends.base.OverlappingBackend."""

    def launch(self, plan: StepPlan) -> Any: ...
    def collect(self, pending: Any) -> StepResult: ...


class Engine:
    """Runs requests on a backend. ``add`` and ``abort`` between steps; ``step`` while ``has_work``.

    clock: seconds from any start; retention hints decay by it, and steps and queues are timed by it. manager, policy: take the place
    of paged memory and of the configured admission. constraints: for requests whose tokens are constrained; without it they are
    refused. Raises CapacityError where the backend's pool can't hold one sequence of ``max_model_len`` tokens, or one block of each
    group of layers for each of ``max_num_seqs`` sequences.
    """

    def __init__(
        self,
        backend: Executor,
        config: EngineConfig,
        clock: Callable[[], float] = lambda: 0.0,
        *,
        manager: BlockManager | None = None,
        policy: AdmissionPolicy | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self.backend = backend
        self.constraints = constraints
        manager = manager or BlockManager(
            backend.num_blocks,
            backend.block_size,
            caching=config.prefix_caching,
            groups=backend.groups,
            step=config.max_num_batched_tokens,
            num_host_blocks=backend.num_host_blocks,
            clock=clock,
        )
        _check_pool(backend, config)
        self._max_num_seqs = config.num_seqs(backend.num_blocks, backend.groups.width)
        self.limits = RequestLimits(
            backend.max_model_len, backend.spec.vocab_size, self._max_num_seqs, backend.num_blocks, backend.block_size, backend.groups
        )
        self._clock = clock
        self._max_waiting = config.max_waiting
        policy = policy or admission_policy(config, backend.block_size, backend.max_model_len, backend.groups)
        speculation = None
        if config.speculation != "off":
            most = min(config.speculation_positions, config.max_num_batched_tokens)
            speculation = Speculation(manager, most, strict=config.admission == "no-evict")
        self.scheduler = Scheduler(
            manager,
            policy,
            self._max_num_seqs,
            config.max_num_batched_tokens,
            swap=backend.num_host_blocks > 0,
            speculation=speculation,
            clock=clock,
        )
        self._overlapping = cast(OverlappingExecutor, backend) if backend.overlaps else None
        self._in_flight: tuple[StepPlan, Any] | None = None
        """A step that was launched and not collected."""
        self._live: dict[str, Group] = {}
        self._arrivals = 0
        self._extent = StepExtent()
        self._times = StepTimes()
        self._listeners: list[Listener] = []
        self._preemption_listeners: list[Listener] = []

    @property
    def has_work(self) -> bool:
        """``step`` has something to do. A step in flight is to be collected, though nobody may want its tokens any more."""
        return bool(self._live) or self._in_flight is not None

    def add(self, request: Request, resumed: Seq[list[int] | None] = ()) -> None:
        """Queue a request. Raises InvalidRequestError, or QueueFullError where too many wait (nothing is changed then).

        resumed: what another engine made of it, the tokens of each sequence, None for one that has ended; it goes on from there, and
        ends as it would have ended. (Beams put nothing out before they end.)
        """
        params, prompt = request.params, request.prompt_token_ids
        self.limits.check(prompt, params)
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use", param="request_id")
        max_tokens = self.limits.max_tokens(prompt, params)
        if len(self.scheduler.waiting) >= self._max_waiting:
            raise QueueFullError(
                f"{len(self.scheduler.waiting):,} sequences are waiting, and --max-waiting is {self._max_waiting:,}: try again later"
            )
        group = Group(request, added=self._clock())
        count = params.num_sequences
        if params.use_beam_search:
            count = 1
            group.search = BeamSearch(
                params.num_beams,
                max_tokens,
                () if params.ignore_eos else request.eos_token_ids,
                stop_token_ids=params.stop_token_ids or (),
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                num_return=params.n,
            )
        elif count > params.n and params.logprobs is None:
            params = replace(params, logprobs=0)  # the best of several are found by their log-probabilities
        for index in range(count):
            made = resumed[index] if resumed and group.search is None else []
            if made is None:
                continue
            order = (request.priority, self._arrivals, index)
            seed = derive_seed(request.seed, index)
            seq = Sequence(group, request, index, [*prompt, *made], len(prompt), seed, max_tokens, params, order)
            if index == 0 and not made:  # else they were put out with its first token
                seq.unscored = request.scored()
                seq.scores = None if params.prompt_logprobs is None else []
            if params.constrained:
                if self.constraints is None:
                    raise InvalidRequestError("this engine has no tokenizer, which constrained outputs need")
                seq.constraint = self.constraints.open(params, made)
            group.sequences.append(seq)
        self._arrivals += 1
        self._live[request.request_id] = group
        for seq in group.sequences:
            self.scheduler.add(seq)

    def abort(self, request_id: str, index: int | None = None) -> list[SequenceOutput]:
        """End a request, or only its ``index``-th sequence, and free its blocks at once. Beams end together.

        Returns the final outputs; none for what is unknown or has ended.
        """
        group = self._live.get(request_id)
        if group is None:
            return []
        if group.search is not None:
            ended = list(range(group.request.params.n))
            gone = list(group.sequences)
        else:
            gone = [seq for seq in group.sequences if index is None or seq.index == index]
            ended = [seq.index for seq in gone]
        for seq in gone:
            self.scheduler.policy.ended(seq.num_generated, False)
            self.scheduler.remove(seq)
        self._forget(group)
        return [SequenceOutput(request_id, i, [], None, "abort") for i in ended]

    def step(self) -> list[SequenceOutput]:
        """Run one step; what it added to each sequence. Where steps overlap: launch one, and say what the one before it added."""
        if self._overlapping is not None:
            return self._step_ahead(self._overlapping)
        plan = self._schedule()
        if not plan.work:
            return []
        began = self._clock()
        try:
            result = self.backend.execute(plan)
        except StepMemoryError:
            self._retreat(plan)
            return []
        seconds = self._clock() - began
        self._times.execute += seconds
        if self.scheduler.speculation is not None:
            self.scheduler.speculation.timed(seconds)
        return self._commit(plan, result)

    def _step_ahead(self, backend: OverlappingExecutor) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        plan = self._schedule()
        if not plan.work and self._in_flight is not None:  # nothing can run without the tokens in flight
            outputs = self._collect(backend, self._in_flight)
            self._in_flight = None
            plan = self._schedule()
        last, self._in_flight = self._in_flight, None
        if plan.work:
            began = self._clock()
            try:
                self._in_flight = plan, backend.launch(plan)
            except StepMemoryError:
                self._retreat(plan)
            else:
                self._times.execute += self._clock() - began
                self.scheduler.launch(plan)
        if last is not None:
            outputs = self._collect(backend, last)
        return outputs

    def _retreat(self, plan: StepPlan) -> None:
        """Try a smaller step; raises the device's error where there is none."""
        if plan.num_tokens == 1:
            raise
        self.scheduler.retreat(plan)

    def _schedule(self) -> StepPlan:
        began = self._clock()
        plan = self.scheduler.schedule()
        self._times.schedule += self._clock() - began
        return plan

    def _collect(self, backend: OverlappingExecutor, in_flight: tuple[StepPlan, Any]) -> list[SequenceOutput]:
        plan, pending = in_flight
        began = self._clock()
        result = backend.collect(pending)
        self._times.execute += self._clock() - began
        return self._commit(plan, result)

    def _commit(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        times, began = self._times, self._clock()
        outputs = self.scheduler.commit(plan, result)
        self._extent.add(plan.extent(self.backend.groups.window))
        for output in outputs:
            if output.finish_reason is not None and (group := self._live.get(output.request_id)) is not None:
                self._forget(group)
        times.execute -= result.sample_s
        times.sample += result.sample_s
        times.commit += self._clock() - began
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget what was computed: no later request finds it. Running sequences go on."""
        self.scheduler.manager.reset(seq for group in self._live.values() for seq in group.sequences)

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` too what happens to blocks and sequences from now on; see events.py. Not from within a listener."""
        self._listeners.append(listener)
        self._connect()

    def on_preemption(self, listener: Listener) -> None:
        """Tell ``listener`` too of preemptions alone: unlike ``listen`` it costs nothing while none happen."""
        self._preemption_listeners.append(listener)
        self._connect()

    def unlisten(self, listener: Listener) -> None:
        """Tell ``listener``, which listens, nothing more."""
        (self._listeners if listener in self._listeners else self._preemption_listeners).remove(listener)
        self._connect()

    def watch(self) -> Watch:
        """For somebody who wants to see every block and sequence now and then; to be closed."""
        watch = Watch(self.scheduler, self._clock, self.stats, self.unlisten)
        self.listen(watch.note)
        return watch

    def stats(self) -> EngineStats:
        scheduler, counters = self.scheduler, self.scheduler.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self._extent.steps,
            tokens_computed=self._extent.positions,
            tokens_sampled=counters.tokens_sampled,
            kv=scheduler.manager.stats(scheduler.running),
            tokens_drafted=counters.tokens_drafted,
            tokens_accepted=counters.tokens_accepted,
            positions_discarded=counters.positions_discarded,
            queue=scheduler.queue(),
            extent=replace(self._extent),
            times=replace(self._times),
        )

    def check(self) -> None:
        """Prove that no block is lost or doubly owned. Raises AssertionError."""
        live = [seq for group in self._live.values() for seq in group.sequences]
        self.scheduler.check(live)

    def _connect(self) -> None:
        self.scheduler.listener = chain([*self._preemption_listeners, *self._listeners])
        self.scheduler.manager.listen(chain(self._listeners))

    def _forget(self, group: Group) -> None:
        if not group.sequences:
            self._live.pop(group.request.request_id, None)


def admission_policy(config: EngineConfig, block_size: int, max_model_len: int, groups: KVGroups = ONE_GROUP) -> AdmissionPolicy:
    """The policy that ``--admission`` names; ``auto`` goes by the device."""
    name = config.admission
    if name == "auto":
        name = "past-future" if config.device == "cpu" else "watermark"
    if name == "watermark":
        return Watermark(block_size, groups)
    return NoEvict(block_size, groups) if name == "no-evict" else PastFuture(block_size, max_model_len, groups)


def _check_pool(backend: Executor, config: EngineConfig) -> None:
    most = backend.block_size, config.max_num_batched_tokens
    positions = backend.groups.positions(backend.num_blocks, *most)
    pool = f"the KV pool holds {positions:,} token positions ({backend.num_blocks:,} blocks of {backend.block_size})"
    if backend.groups.blocks(backend.max_model_len, *most) > backend.num_blocks:
        raise CapacityError(
            f"{pool}, but one request may need {backend.max_model_len:,}: raise --kv-memory, or lower --max-model-len to at most "
            f"{positions:,}"
        )
    width = backend.groups.width
    fits = backend.num_blocks // width
    if config.num_seqs(backend.num_blocks, width) > fits:
        each = "one block" if width == 1 else f"{width} blocks, one of each group of layers,"
        raise CapacityError(
            f"{pool}, less than {each} for each of {config.max_num_seqs:,} sequences: raise --kv-memory, or lower --max-num-seqs to "
            f"at most {fits:,}"
        )
