"""RequestMeter: what became of every request, and how long it took, as a client sees it: from the front's side of the engine.

It is told once a step what the engine has made, for all requests together; a request that outlives its engine is one request here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.core.sequence import Request
from quire.outputs import SequenceOutput
from quire.server.metrics.histogram import Histogram, decades

FINISHED_REASONS = ("stop", "length", "abort", "error")
"""A request's reason is that of its sequences which comes last here."""
ANSWERED = ("stop", "length")
"""Only these requests have durations: an abort says how patient its client was."""

# Wide enough for a model of a few million parameters, and for one of a few hundred billion.
SECONDS = decades(0.001, 600, (1, 2.5, 5))
TOKEN_SECONDS = decades(0.0001, 10, (1, 2.5, 5))
TOKENS = decades(1, 1_000_000)
SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128)
ENDED = -1.0
PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50)


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are the meter's clock, in seconds."""

    request: Request
    arrived: float
    open: int
    """Sequences that have not ended."""
    last: list[float] = field(default_factory=list)
    """When each sequence last made a token; 0 before, and ENDED after its end."""
    first_output: float = 0.0
    """When its prompt was computed, and with it the first token, if any was wanted; 0 before."""
    last_output: float = 0.0
    generated: int = 0
    """Tokens, of all sequences."""
    cached: int = 0
    queued_s: float | None = None
    preemptions: int = 0
    finished_reason: str = "stop"
    trace: dict[str, str] | None = None
    """The trace that its call belongs to (W3C's traceparent and tracestate); noted by ``begun``."""
    ended: set[int] = field(default_factory=set)

    @property
    def prefill_s(self) -> float:
        """From the end of the queue to the first token."""
        return max(0.0, self.first_output - self.arrived - (self.queued_s or 0.0))

    @property
    def decode_s(self) -> float:
        return self.last_output - self.first_output


class RequestMeter:
    """``clock``: seconds from any start. All calls come from one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: dict[str, RequestRecord] = {}
        self.begun: Callable[[RequestRecord], None] | None = None
        """Told of each request that is queued."""
        self.ended: Callable[[RequestRecord, float], None] | None = None
        """Told of each request that has ended, and when."""
        self.received = 0
        self.finished = dict.fromkeys(FINISHED_REASONS, 0)
        self.rejections: Counter[str] = Counter()
        """Requests that were refused, by the code of their error."""
        self.prompt_tokens = 0
        """Of requests whose prompts were computed."""
        self.cached_tokens = 0
        """Those of them that were found in the prefix cache."""
        self.generation_tokens = 0
        self.time_to_first_token = Histogram(SECONDS)
        self.inter_token_latency = Histogram(TOKEN_SECONDS)
        self.e2e = Histogram(SECONDS)
        self.queue = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.decode = Histogram(SECONDS)
        self.inference = Histogram(SECONDS)
        self.time_per_output_token = Histogram(TOKEN_SECONDS)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)
        self.request_n = Histogram(SAMPLES)
        self.request_max_tokens = Histogram(TOKENS)
        self.request_preemptions = Histogram(PREEMPTIONS)

    def begin(self, requests: Sequence[Request]) -> None:
        """They were taken, and are queued."""
        now = self._clock()
        for request in requests:
            count = request.params.num_outputs
            record = self._live[request.request_id] = RequestRecord(request, now, count, [0.0] * count)
            self.received += 1
            if self.begun is not None:
                self.begun(record)

    def refuse(self, code: str) -> None:
        """A request was not taken."""
        self.rejections[code] += 1

    def step(self, outputs: Sequence[SequenceOutput]) -> None:
        """What the engine has made since the last call."""
        now, live, latency = self._clock(), self._live, self.inter_token_latency
        for output in outputs:
            record = live.get(output.request_id)
            if record is None or output.index in record.ended:
                continue
            if not record.first_output and output.cached_tokens is not None:
                self._first(record, output, now)
            if count := len(output.token_ids):
                self.generation_tokens += count
                record.generated += count
                if (last := record.last[output.index]) > 0:
                    latency.observe((now - last) / count, count)
                record.last[output.index] = record.last_output = now
            if output.finish_reason is not None:
                if output.preemptions is not None:
                    record.preemptions = max(record.preemptions, output.preemptions)
                self.end(output.request_id, output.index, output.finish_reason)

    def now(self) -> float:
        return self._clock()

    def last(self, request_id: str) -> float:
        """When a request of one sequence last made a token; 0 before."""
        record = self._live.get(request_id)
        return 0.0 if record is None else max(0.0, record.last[0])

    def carried(self, intervals: Sequence[tuple[float, int]], now: float) -> None:
        """Sequences have made a token each that nothing else is told of: since when they were awaited, and by how many. ``count`` follows
        for each of the requests."""
        for since, count in intervals:
            self.generation_tokens += count
            if since > 0:
                self.inter_token_latency.observe(now - since, count)

    def count(self, request_id: str, tokens: int, last: float) -> None:
        """So many were ``carried`` of a request of one sequence, the last one then."""
        if (record := self._live.get(request_id)) is not None and record.last[0] != ENDED:
            record.generated += tokens
            record.last[0] = record.last_output = last

    def tokens(self, tokens: Sequence[tuple[str, int, int]]) -> None:
        """As ``step``, for sequences that have made a token, and nothing else: request id, index, token."""
        now, live = self._clock(), self._live
        since: dict[float, int] = {}  # when the token before was made → by how many sequences: most go in step
        for request_id, index, _ in tokens:
            record = live.get(request_id)
            if record is None or (last := record.last[index]) == ENDED:
                continue
            record.generated += 1
            since[last] = since.get(last, 0) + 1
            record.last[index] = record.last_output = now
        for last, count in since.items():
            self.generation_tokens += count
            if last > 0:
                self.inter_token_latency.observe(now - last, count)

    def end(self, request_id: str, index: int, reason: str) -> None:
        """A sequence has ended, or nobody wants it any more. Once is enough, more is fine."""
        record = self._live.get(request_id)
        if record is None or index in record.ended:
            return
        record.ended.add(index)
        record.last[index] = ENDED
        record.open -= 1
        if FINISHED_REASONS.index(reason) > FINISHED_REASONS.index(record.finished_reason):
            record.finished_reason = reason
        if record.open == 0:
            del self._live[request_id]
            self._finish(record, self._clock())

    def _first(self, record: RequestRecord, output: SequenceOutput, now: float) -> None:
        record.first_output = record.last_output = now
        record.cached = output.cached_tokens or 0
        record.queued_s = output.queued_s
        self.prompt_tokens += len(record.request.prompt_token_ids)
        self.cached_tokens += record.cached
        if output.token_ids:
            self.time_to_first_token.observe(now - record.arrived)
        self.queue.observe(record.queued_s or 0.0)
        self.prefill.observe(record.prefill_s)

    def _finish(self, record: RequestRecord, now: float) -> None:
        params = record.request.params
        self.finished[record.finished_reason] += 1
        self.request_prompt_tokens.observe(len(record.request.prompt_token_ids))
        self.request_generation_tokens.observe(record.generated)
        self.request_n.observe(params.n)
        if params.max_tokens is not None:
            self.request_max_tokens.observe(params.max_tokens)
        self.request_preemptions.observe(record.preemptions)
        if record.finished_reason in ANSWERED:
            self.e2e.observe(now - record.arrived)
            self.decode.observe(record.decode_s)
            self.inference.observe(record.prefill_s + record.decode_s)
            if (rest := record.generated - params.num_outputs) > 0:
                self.time_per_output_token.observe(record.decode_s * params.num_outputs / rest)
        if self.ended is not None:
            self.ended(record, now)
