"""RequestMeter on a clock that the test turns: every duration to the second."""

from __future__ import annotations

from typing import Any

import pytest

from quire.core.sequence import Request
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.server.metrics.histogram import Histogram, decades
from quire.server.metrics.meter import RequestMeter, RequestRecord


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def ask(name: str, **params: Any) -> Request:
    return Request(name, [1] * 10, SamplingParams(**params), 0)


def test_durations() -> None:
    clock = Clock()
    meter = RequestMeter(clock)
    ended: list[tuple[RequestRecord, float]] = []
    meter.ended = lambda record, now: ended.append((record, now))
    meter.begin([ask("a", n=2, max_tokens=4)])
    clock.now = 103.0
    meter.step([SequenceOutput("a", 0, [7], cached_tokens=4, queued_s=1.0), SequenceOutput("a", 1, [7], cached_tokens=4, queued_s=1.0)])
    clock.now = 105.0
    meter.step([SequenceOutput("a", 0, [7, 8, 9, 9])])  # guessed, and right: four tokens in one step
    clock.now = 106.0
    meter.step([SequenceOutput("a", 0, [], None, "length", preemptions=3), SequenceOutput("a", 1, [5], None, "stop", preemptions=2)])
    assert (meter.prompt_tokens, meter.cached_tokens, meter.generation_tokens) == (10, 4, 7)
    assert meter.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}
    ((record, now),) = ended
    assert (now, record.prefill_s, record.decode_s, record.preemptions, record.generated) == (106.0, 2.0, 3.0, 3, 7)
    for histogram, count, total in (
        (meter.time_to_first_token, 1, 3), (meter.queue, 1, 1), (meter.prefill, 1, 2), (meter.decode, 1, 3), (meter.inference, 1, 5),
        (meter.e2e, 1, 6), (meter.inter_token_latency, 5, 2 + 3), (meter.request_preemptions, 1, 3),
        (meter.request_generation_tokens, 1, 7),
    ):  # fmt: skip
        assert (histogram.count, histogram.sum) == (count, total)
    assert meter.time_per_output_token.sum == pytest.approx(2 * 3 / 5)


def test_a_request_without_tokens_has_a_prompt_and_no_first_token() -> None:
    meter = RequestMeter(Clock())
    meter.begin([ask("a")])
    meter.step([SequenceOutput("a", 0, [], None, "length", cached_tokens=2, queued_s=0.0)])
    assert (meter.prompt_tokens, meter.cached_tokens, meter.queue.count, meter.prefill.count) == (10, 2, 1, 1)
    assert (meter.time_to_first_token.count, meter.inter_token_latency.count, meter.e2e.count) == (0, 0, 1)


def test_ends_count_once_and_the_worst_counts() -> None:
    meter = RequestMeter(Clock())
    meter.begin([ask("a", n=2), ask("b"), ask("c")])
    meter.step([SequenceOutput("a", 0, [1], cached_tokens=0), SequenceOutput("a", 0, [], None, "stop")])
    meter.end("a", 0, "abort")  # it has ended
    meter.step([SequenceOutput("a", 0, [1])])  # what comes behind the end is nothing
    assert meter.generation_tokens == 1
    meter.end("a", 1, "abort")
    meter.step([SequenceOutput("b", 0, [], None, "error", "no")])
    meter.end("b", 0, "abort")
    meter.end("nobody", 0, "stop")
    assert meter.finished == {"stop": 0, "length": 0, "abort": 1, "error": 1}
    assert (meter.received, meter.e2e.count) == (3, 0)


def test_a_resumed_request_is_one_request() -> None:
    """The next engine says again what was cached, of the prompt and what had been made."""
    clock = Clock()
    meter = RequestMeter(clock)
    meter.begin([ask("a")])
    meter.step([SequenceOutput("a", 0, [1], cached_tokens=2, queued_s=0.0)])
    clock.now += 5
    meter.step([SequenceOutput("a", 0, [1], None, "length", cached_tokens=9, queued_s=4.0)])
    assert (meter.prompt_tokens, meter.cached_tokens, meter.queue.count, meter.time_to_first_token.count) == (10, 2, 1, 1)
    assert meter.inter_token_latency.sum == 5


def test_histograms() -> None:
    histogram = Histogram((1, 2.5))
    for value in (0.5, 1, 2, 3):
        histogram.observe(value)
    histogram.observe(0.25, 4)
    assert histogram.buckets() == [("1.0", 6), ("2.5", 7), ("+Inf", 8)]
    assert (histogram.count, histogram.sum) == (8, 7.5)
    assert decades(0.001, 0.2, (1, 2.5, 5)) == [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1]


def test_single_tokens_are_counted_as_outputs_are() -> None:
    clock = Clock()
    one, other = RequestMeter(clock), RequestMeter(clock)
    for meter in (one, other):
        clock.now = 100.0
        meter.begin([ask("a", n=2), ask("b")])
        meter.step([SequenceOutput("a", 0, [7], cached_tokens=0), SequenceOutput("b", 0, [7], cached_tokens=0)])
        for now, made in ((101.0, [("a", 0, 1), ("b", 0, 2), ("gone", 0, 3)]), (103.0, [("a", 1, 1), ("a", 0, 1)]), (104.0, [("b", 0, 5)])):
            clock.now = now
            if meter is one:
                meter.step([SequenceOutput(name, index, [token]) for name, index, token in made])
            else:
                meter.tokens(made)
        meter.end("b", 0, "stop")
        meter.tokens([("b", 0, 6)])
        meter.end("a", 0, "abort")
        meter.tokens([("a", 0, 6)])
        meter.end("a", 1, "length")
    assert one.generation_tokens == other.generation_tokens == 7
    for name in ("inter_token_latency", "request_generation_tokens", "decode", "time_per_output_token"):
        mine, its = getattr(one, name), getattr(other, name)
        assert (mine.counts, mine.sum) == (its.counts, its.sum)
    assert other.inter_token_latency.sum == 1 + 1 + 2 + 3
