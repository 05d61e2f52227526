"""Steps that overlap: the next one is launched before the tokens of the last are read. Outputs are those of steps one by one, nothing of
what is thrown away shows, and nothing leaks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.fake_backend import FakeBackend, LateBackend, ScriptedDrafter, expected_output
from core.test_constraint import FORM, Rules
from core.test_constraint import Outcome as Guesses
from core.test_constraint import expected as expected_form
from core.test_properties import DEPTH, CoreMachine
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.plan import StepPlan, StepResult
from quire.core.sequence import Request, Status
from quire.errors import QuireError
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams

VOCAB = 50
BROKEN = ("error", "the rule is broken", True)


def make(backend: FakeBackend | None = None, **options: Any) -> Engine:
    defaults: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "admission": "watermark", "speculation": "off"}
    return Engine(backend or LateBackend(num_blocks=32), EngineConfig(**defaults | options), constraints=Rules())


def request(name: str, prompt: list[int], seed: int = 0, eos: tuple[int, ...] = (), priority: int = 0, **params: Any) -> Request:
    return Request(name, prompt, SamplingParams(**params), seed, eos, priority)


def drain(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    found: dict[tuple[str, int], list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    assert engine.stats().kv.used_blocks == 0
    return found


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


class Diary(LateBackend):
    """Notes what is launched and collected, in order."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.diary: list[tuple[str, int]] = []

    def launch(self, plan: StepPlan) -> StepPlan:
        super().launch(plan)
        self.diary.append(("launch", len(self.plans)))
        return plan

    def collect(self, pending: StepPlan) -> StepResult:
        self.diary.append(("collect", next(i for i, plan in enumerate(self.plans) if plan is pending) + 1))
        return super().collect(pending)


def test_a_step_is_launched_before_the_last_one_is_read() -> None:
    backend = Diary()
    engine = make(backend)
    engine.add(request("a", [1, 2, 3], max_tokens=4))
    assert engine.step() == [], "its tokens come with the next step"
    assert tokens(drain(engine)["a", 0]) == expected_output([1, 2, 3], 0, 4)
    assert backend.diary == [
        ("launch", 1), ("launch", 2), ("collect", 1), ("launch", 3), ("collect", 2), ("launch", 4), ("collect", 3), ("collect", 4),
    ]  # fmt: skip
    assert [(work.start, work.count, work.tokens) for plan in backend.plans for work in plan.work] == [
        (0, 3, ()), (3, 1, ()), (4, 1, ()), (5, 1, ())
    ]  # fmt: skip
    assert engine.stats().positions_discarded == 0, "a limit is foreseen"


def test_an_end_is_seen_one_step_late_and_nothing_of_that_step_shows() -> None:
    path = expected_output([5], 0, 10)
    third = path[2]
    engine = make()
    engine.add(request("a", [5], eos=(third,), max_tokens=10))
    outputs = drain(engine)["a", 0]
    assert tokens(outputs) == path[:3]
    assert (outputs[-1].finish_reason, len(outputs)) == ("stop", 3)
    stats = engine.stats()
    assert (stats.positions_discarded, stats.tokens_sampled, stats.tokens_computed, stats.steps) == (1, 3, 4, 4)
    # What was sampled and thrown away is no content that anybody finds.
    engine.add(request("b", [5, *path], max_tokens=1))
    (output,) = drain(engine)["b", 0]
    assert output.cached_tokens == 4, "the end's own position was computed"
    assert tokens([output]) == expected_output([5, *path], 0, 1)


def test_blocks_and_row_of_one_that_ended_are_free_while_its_last_step_runs() -> None:
    path = expected_output([5], 0, 10)
    backend = LateBackend(num_blocks=8)
    engine = make(backend, max_num_seqs=1)
    engine.add(request("a", [5], eos=(path[2],), max_tokens=10))
    engine.add(request("b", [6] * 9, max_tokens=10))
    while not any(output.finish_reason for output in engine.step()):
        pass
    assert len(backend.in_flight) == 1, "a step that computes one position more of it"
    assert engine.stats().kv.used_blocks == 0
    engine.check()
    engine.step()
    assert engine.scheduler.running[0].request.request_id == "b"
    assert [start.row for plan in backend.plans for start in plan.starts] == [0, 0]
    assert tokens(drain(engine)["b", 0]) == expected_output([6] * 9, 0, 10)


def test_the_engine_has_work_until_the_last_step_is_collected() -> None:
    backend = LateBackend()
    engine = make(backend)
    engine.add(request("a", [1, 2], max_tokens=9))
    engine.step()
    engine.step()
    assert [output.finish_reason for output in engine.abort("a")] == ["abort"]
    assert engine.stats().kv.used_blocks == 0
    assert engine.has_work
    engine.add(request("a", [3], max_tokens=2))  # the name is free at once
    found = drain(engine)
    assert tokens(found["a", 0]) == expected_output([3], 0, 2)
    assert engine.stats().positions_discarded == 1
    engine.add(request("a", [3], max_tokens=2))
    engine.step()
    engine.abort("a")
    assert engine.step() == []
    assert not engine.has_work
    assert not backend.in_flight
    assert engine.step() == []


def test_a_constraint_is_asked_for_its_mask_when_the_token_before_is_known() -> None:
    backend = Diary(num_blocks=32)
    engine = make(backend)
    engine.add(request("a", [7, 8], max_tokens=20, structured=FORM, logprobs=0))
    drain(engine)
    assert backend.diary[:5] == [("launch", 1), ("collect", 1), ("launch", 2), ("collect", 2), ("launch", 3)]
    assert len(backend.plans) == 14, "no step is lost"


def test_few_that_have_to_wait_do_not_keep_the_others_from_overlapping() -> None:
    backend = LateBackend(num_blocks=64)
    engine = make(backend, max_num_seqs=8)
    for i in range(7):
        engine.add(request(str(i), [i], max_tokens=12))
    engine.add(request("form", [7], max_tokens=12, structured=FORM, logprobs=0))
    drain(engine)
    rows = [len(plan.work) for plan in backend.plans]
    assert rows[:6] == [8, 7, 8, 7, 8, 7]
    backend = LateBackend(num_blocks=64)
    engine = make(backend, max_num_seqs=8)
    for i in range(8):
        engine.add(request(str(i), [i], max_tokens=12, logprobs=0, structured=FORM if i < 3 else None))
    drain(engine)
    assert [len(plan.work) for plan in backend.plans] == [8] * 12


def test_one_that_is_preempted_in_flight_gets_its_token_first() -> None:
    for host in (0, 8):
        engine = make(LateBackend(num_blocks=16, num_host_blocks=host))
        engine.add(request("a", [1, 2, 3], max_tokens=6))
        engine.step()
        (seq,) = engine.scheduler.running
        engine.scheduler.preempt(0, "memory", "the test says so")
        engine.check()
        assert (seq.status, seq.in_flight) == (Status.WAITING, 1)
        first = engine.step()
        assert tokens(first) == expected_output([1, 2, 3], 0, 1)
        assert (seq.status, seq.in_flight) == (Status.RUNNING, 0 + 1), "it came back with the step that read the token"
        assert tokens([*first, *drain(engine)["a", 0]]) == expected_output([1, 2, 3], 0, 6)


def test_one_that_is_preempted_before_its_last_token_ends_in_the_queue() -> None:
    for params in ({"max_tokens": 1}, {"max_tokens": 0, "prompt_logprobs": 0}):
        engine = make()
        engine.add(request("a", [1, 2, 3], **params))
        engine.step()
        engine.scheduler.preempt(0, "memory", "the test says so")
        (output,) = drain(engine)["a", 0]
        assert (output.finish_reason, output.preemptions, len(output.token_ids)) == ("length", 1, params["max_tokens"])
        assert len(engine.backend.plans) == 1  # type: ignore[attr-defined]


def test_prompts_are_shared_without_waiting_for_a_token() -> None:
    backend = LateBackend(num_blocks=64)
    engine = make(backend)
    engine.add(request("a", list(range(10)), seed=3, n=3, max_tokens=5))
    engine.step()
    engine.step()
    assert [work.count for work in backend.plans[1].work] == [1, 1, 1]
    drain(engine)
    assert engine.stats().tokens_computed == 10 + 2 + 3 * 4


def test_nobody_guesses_behind_a_token_in_flight() -> None:
    engine = make(LateBackend(num_blocks=16), speculation="prompt-lookup", speculation_positions=8)
    engine.add(request("a", [1, 2, 1, 2, 1, 2], max_tokens=20))
    (seq,) = engine.scheduler.waiting
    seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, random.Random(0))
    drain(engine)
    assert engine.stats().tokens_drafted == 0


@pytest.mark.parametrize("host", [0, 8])
@pytest.mark.parametrize("seed", range(8))
def test_one_that_is_preempted_with_a_draft_in_flight(seed: int, host: int) -> None:
    backend = LateBackend(num_blocks=16, num_host_blocks=host)
    engine = make(backend, speculation="prompt-lookup", speculation_positions=8)
    engine.add(request("a", [1, 2, 3], max_tokens=20))
    (seq,) = engine.scheduler.waiting
    seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, random.Random(seed))
    found: list[SequenceOutput] = []
    engine.step()
    while engine.has_work:
        if seq.status is Status.RUNNING and (seq.in_flight > 1 or len(found) % 3 == 0):  # it guesses where it has just come back
            engine.scheduler.preempt(0, "memory", "the test says so")
            engine.check()
        found += engine.step()
        engine.check()
    assert tokens(found) == expected_output([1, 2, 3], 0, 20)
    assert engine.stats().tokens_drafted > 0


def test_one_that_is_aborted_with_a_draft_in_flight_leaves_the_others_their_tokens() -> None:
    backend = LateBackend(num_blocks=32, max_model_len=40)
    engine = make(backend, speculation="prompt-lookup", speculation_positions=8)
    for name in "ab":
        engine.add(request(name, [7, 8], max_tokens=20, structured=FORM))
    whole = [7, 8, *expected_form([7, 8], 0, 14)]
    for seq in engine.scheduler.waiting:
        seq.drafter = Guesses(seq.tokens, whole, random.Random(1))
    found: list[SequenceOutput] = []
    while not (backend.in_flight and len(backend.plans[-1].work[0].draft) > 1):
        found += engine.step()
    lost = backend.plans[-1].work[0].count
    engine.abort("a")
    found += drain(engine)["b", 0]
    assert tokens([output for output in found if output.request_id == "b"]) == whole[2:]
    assert engine.stats().positions_discarded == lost


def test_one_that_fails_leaves_no_content_of_the_step_behind() -> None:
    backend = LateBackend()
    backend.fail_rows.add(0)
    engine = make(backend)
    engine.add(request("a", [1, 2, 3, 4], max_tokens=9))
    outputs = drain(engine)["a", 0]
    assert [output.finish_reason for output in outputs] == ["error"]
    assert backend.plans[1].work[0].start == 4, "the position of a token that could not be sampled"
    assert engine.stats().kv.cached_blocks == 1


@dataclass
class Workload:
    """What is done to an engine, before which step."""

    options: dict[str, Any]
    backend: dict[str, Any]
    guesses: bool
    requests: list[tuple[int, Request]]
    aborts: list[tuple[int, str, int | None]]
    preemptions: set[int]


@dataclass
class Heard:
    """Of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    end: tuple[Any, ...] = ()
    scores: Any = None
    vector: Any = None


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 5, 16]))
    blocks = draw(st.integers(2, 20))
    longest = max(3, min(30, blocks * block_size - block_size // 2))
    blocks = max(blocks, -(-longest // block_size))
    guesses = draw(st.sampled_from([0, 0, 2, 5, 8]))
    options = {
        "max_num_seqs": min(draw(st.integers(1, 8)), blocks),
        "max_num_batched_tokens": draw(st.integers(1, 24)),
        "prefix_caching": draw(st.sampled_from([True, True, False])),
        "admission": draw(st.sampled_from(["watermark", "no-evict", "past-future"])),
        "max_waiting": 1000,
        "speculation": "prompt-lookup" if guesses else "off",
        "speculation_positions": guesses or 2,
    }
    backend = {
        "num_blocks": blocks,
        "block_size": block_size,
        "max_model_len": longest,
        "vocab_size": VOCAB,
        "num_host_blocks": draw(st.sampled_from([0, 0, 3, 20])),
        "window": draw(st.sampled_from([0, 0, 0, 1, 3, 6])),
        "fails": draw(st.sampled_from([0, 0, 0, 40])),
    }
    requests: list[tuple[int, Request]] = []
    for i in range(draw(st.integers(1, 9))):
        length = draw(st.integers(1, longest - 1))
        pattern = draw(st.integers(0, 3))
        prompt = [pattern % 2] * length
        if pattern > 1:  # equal up to somewhere
            prompt[length * 2 // 3 :] = [5 + k for k in range(length - length * 2 // 3)]
        limit = draw(st.integers(1, longest - length))
        size = draw(st.integers(1, 3))
        logprobs = draw(st.sampled_from([None, 0]))
        kind = draw(st.sampled_from(["one", "one", "one", "n", "beams", "form", "form", "scored", "prompt only", "mean", "last"]))
        params = {
            "one": {"max_tokens": draw(st.sampled_from([limit, None])), "min_tokens": draw(st.integers(0, limit))},
            "n": {"max_tokens": limit, "n": size},
            "beams": {"max_tokens": limit, "n": size, "beam_width": size + 1},
            "form": {"max_tokens": limit, "n": size, "structured": FORM},
            "scored": {"max_tokens": limit, "n": size, "prompt_logprobs": 0},
            "prompt only": {"max_tokens": 0, "n": size, "prompt_logprobs": 0},
        }.get(kind, {"max_tokens": 0})
        if kind in ("one", "n", "form"):
            params |= {"logprobs": logprobs, "stop_token_ids": draw(st.lists(st.integers(0, VOCAB - 1), max_size=4, unique=True))}
        eos = tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=5, unique=True)))
        pooling: Any = kind if kind in ("mean", "last") else None
        salt = draw(st.sampled_from([b"", b"", b"tenant"]))
        asked = Request(str(i), prompt, SamplingParams(**params), i, eos, draw(st.integers(-1, 1)), salt, None, pooling)
        requests.append((draw(st.integers(0, 25)), asked))
    names = [request.request_id for _, request in requests]
    aborts = draw(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(names), st.sampled_from([None, 0, 1])), max_size=2))
    preemptions = draw(st.sets(st.integers(0, 40), max_size=5))
    return Workload(options, backend, guesses > 0, requests, aborts, preemptions)


def run(workload: Workload, backend: FakeBackend) -> tuple[Engine, dict[tuple[str, int], Heard]]:
    engine = Engine(backend, EngineConfig(**workload.options), constraints=Rules(9, broken_at=8))
    found: dict[tuple[str, int], Heard] = {}
    step = 0

    def hear(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            outcome = found.setdefault((output.request_id, output.index), Heard())
            assert not outcome.end, "a sequence goes on after its end"
            outcome.tokens += output.token_ids
            outcome.logprobs += output.logprobs or []
            outcome.scores = outcome.scores or output.prompt_logprobs
            outcome.vector = outcome.vector or output.vector
            if output.finish_reason is not None:
                outcome.end = output.finish_reason, output.stop_reason, output.end_token

    while engine.has_work or step <= 30:
        assert step < 3000, "the engine does not come to an end"
        for at, asked in workload.requests:
            if at == step:
                try:
                    engine.add(asked)
                except QuireError:  # beams that can't fit at the same time
                    continue
                for seq in engine.scheduler.waiting if workload.guesses else ():
                    if seq.request is asked and seq.group.search is None and seq.constraint is None:
                        seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, random.Random(step))
        for at, name, index in workload.aborts:
            if at == step:
                hear(engine.abort(name, index))
        if step in workload.preemptions and engine.scheduler.running:
            engine.scheduler.preempt(step % len(engine.scheduler.running), "memory", "the test says so")
        engine.check()
        hear(engine.step())
        engine.check()
        step += 1
    kv = engine.stats().kv
    assert (kv.used_blocks, kv.host_blocks_used, kv.saved_blocks) == (0, 0, 0)
    assert all(outcome.end for outcome in found.values())
    return engine, found


@settings(max_examples=400 * DEPTH, deadline=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_outputs_are_those_of_steps_one_by_one(workload: Workload) -> None:
    one_by_one, expected = run(workload, FakeBackend(**workload.backend))
    late = LateBackend(**workload.backend)
    overlapped, found = run(workload, late)
    assert not late.in_flight
    assert one_by_one.stats().positions_discarded == 0 or any(request.params.use_beam_search for _, request in workload.requests)
    aborted = {name for _, name, _ in workload.aborts}
    for key in expected.keys() | found.keys():
        if key[0] not in aborted and not (workload.guesses and expected[key].end == BROKEN):
            assert found.get(key) == expected.get(key)
        elif key in expected and key in found:  # it was aborted earlier in one of the two, or had ended
            # A constraint that breaks takes with it what was guessed right before, in the same step.
            assert key[0] in aborted or found[key].end == BROKEN
            common = min(len(found[key].tokens), len(expected[key].tokens))
            assert found[key].tokens[:common] == expected[key].tokens[:common]
            assert found[key].logprobs[:common] == expected[key].logprobs[:common]
    if not aborted and not workload.preemptions and overlapped.stats().preemptions == one_by_one.stats().preemptions == 0:
        sampled = sum(len(outcome.tokens) for outcome in found.values())
        if all(request.params.structured is None and not request.params.use_beam_search for _, request in workload.requests):
            failed = sum(outcome.end[0] == "error" for outcome in found.values())
            assert overlapped.stats().tokens_sampled - failed == sampled, "what is thrown away counts as sampled"


class OverlappedMachine(CoreMachine):
    """The same random operations as one by one."""

    device = LateBackend


TestOverlapped = OverlappedMachine.TestCase
TestOverlapped.settings = settings(max_examples=500 * DEPTH, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
