"""Clients: they send requests to an engine when their time has come, and note when what comes back."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from quire.core.engine import Engine
from quire.core.plan import StepPlan
from quire.core.sequence import Request
from quire.errors import InvalidRequestError, QueueFullError
from quire.sampling_params import SamplingParams
from quire.simulator.clock import Time
from quire.simulator.devices import Forced
from quire.workload import TraceRequest


@dataclass(slots=True)
class Served:
    """What became of one request. Seconds from the start of the run."""

    sent: float
    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int = 0
    queued: float = 0.0
    """Seconds before anything of it was computed."""
    first: float = 0.0
    """When its first token came; 0 before."""
    last: float = 0.0
    refused: str | None = None
    """Why the server did not take it: ``queue`` (429), or ``length`` (400)."""


@dataclass(slots=True)
class Run:
    """What the clients saw, and how the pool was filled meanwhile."""

    served: list[Served] = field(default_factory=list)
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between a request's tokens, all requests together."""
    steps: int = 0
    seconds: float = 0.0
    stepping: float = 0.0
    """Seconds in which a step ran."""
    rows: float = 0.0
    """Sequences in a step, on average over the seconds of steps."""
    blocks: float = 0.0
    """Blocks with an owner, the same."""
    most_blocks: int = 0
    most_rows: int = 0
    most_waiting: int = 0
    timeline: list[tuple[float, int, int, int]] = field(default_factory=list)
    """(second, sequences in a step, that wait, blocks with an owner) when the device has the step; thinned out."""


POINTS = 512
"""Of a timeline, at most twice as many."""


class Clients:
    """They send ``requests``, which are in the order in which they come.

    device: what ``engine`` runs on, or has under it. prompt: a request and its number → its tokens. Every request's number is its
    seed, and ``lengths`` (seed → tokens that it generates) is filled in as they are sent. concurrency: most of them in flight; the
    others wait with their clients. max_tokens: what clients ask for at most; None: as much as the context has room for.
    """

    def __init__(
        self,
        engine: Engine,
        device: Forced,
        time: Time,
        requests: Sequence[TraceRequest],
        prompt: Callable[[TraceRequest, int], list[int]],
        lengths: dict[int, int],
        eos: tuple[int, ...],
        concurrency: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._engine, self._time, self._requests = engine, time, requests
        self._prompt, self._lengths, self._eos = prompt, lengths, eos
        self._open = concurrency is None
        self._concurrency = concurrency or len(requests)
        self._max_tokens = max_tokens
        self._next = self._in_flight = self._ended = self._rows = self._blocks = 0
        self._every = 1
        self.run = Run()
        device.watch = self._saw

    def drive(self, title: str) -> Run:
        """Until all requests have ended. title: of the progress bar."""
        engine, run, requests = self._engine, self.run, self._requests
        with tqdm(total=len(requests), desc=title, unit="request", delay=1, disable=None) as progress:
            while True:
                self._send()
                if engine.has_work:
                    began = self._time.now()
                    outputs = engine.step()
                    now = self._time.now()
                    for output in outputs:
                        self._note(int(output.request_id), len(output.token_ids), now, output.cached_tokens, output.queued_s)
                        if output.finish_reason is not None:
                            self._in_flight -= 1
                            self._ended += 1
                    self._passed(now - began)
                elif self._next < len(requests):
                    self._time.wait_until(requests[self._next].arrival_s or 0.0)
                else:
                    break
                progress.update(self._ended - progress.n)
        run.seconds = self._time.now()
        if run.stepping:
            run.rows, run.blocks = run.rows / run.stepping, run.blocks / run.stepping
        return run

    def _send(self) -> None:
        now = self._time.now()
        while self._next < len(self._requests) and self._in_flight < self._concurrency:
            work = self._requests[self._next]
            arrival = work.arrival_s or 0.0
            if arrival > now:
                break
            self._add(work, self._next, arrival if self._open else now)
            self._next += 1

    def _add(self, work: TraceRequest, number: int, sent: float) -> None:
        served = Served(sent, work.prompt_tokens)
        self.run.served.append(served)
        room = self._engine.limits.max_model_len - work.prompt_tokens
        if room < 1:  # what no server takes need not be made
            served.refused = "length"
            self._ended += 1
            return
        length = min(work.output_tokens, room, self._max_tokens or work.output_tokens)
        # The model may not end it before its length; then Forced does.
        params = SamplingParams(max_tokens=self._max_tokens, min_tokens=length - 1)
        try:
            self._engine.add(Request(str(number), self._prompt(work, number), params, number, self._eos))
        except (QueueFullError, InvalidRequestError) as e:
            served.refused = "queue" if isinstance(e, QueueFullError) else "length"
            self._ended += 1
            return
        self._lengths[number] = length
        served.queued = self._time.now() - sent
        self._in_flight += 1

    def _note(self, number: int, tokens: int, now: float, cached: int | None, queued: float | None) -> None:
        served = self.run.served[number]
        if tokens:
            if served.output_tokens:
                self.run.gaps.append(now - served.last)
            else:
                served.first = now
            served.output_tokens += tokens
            served.last = now
        if cached is not None:
            served.cached_tokens = cached
        if queued is not None:
            served.queued += queued

    def _saw(self, plan: StepPlan) -> None:
        """The device has this step: what it runs, and what memory it has for that."""
        run, scheduler = self.run, self._engine.scheduler
        self._rows, self._blocks = len(plan.work), scheduler.manager.pool.num_owned
        waiting = len(scheduler.waiting)
        run.steps += 1
        run.most_rows, run.most_blocks = max(run.most_rows, self._rows), max(run.most_blocks, self._blocks)
        run.most_waiting = max(run.most_waiting, waiting)
        if run.steps % self._every == 0:
            run.timeline.append((self._time.now(), self._rows, waiting, self._blocks))
            if len(run.timeline) > 2 * POINTS:
                run.timeline, self._every = run.timeline[1::2], 2 * self._every

    def _passed(self, seconds: float) -> None:
        self.run.stepping += seconds
        self.run.rows += self._rows * seconds
        self.run.blocks += self._blocks * seconds
