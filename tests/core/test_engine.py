"""The engine on a backend without a model: requests end once, outputs do not depend on company, nothing leaks."""

from __future__ import annotations

import pytest

from core.fake_backend import FakeBackend, expected_output
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.plan import RowWork, StepExtent, StepPlan, StepResult
from quire.core.sequence import Request, derive_seed
from quire.core.stats import Queue
from quire.errors import CapacityError, ContextLengthError, InvalidRequestError
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams


def make(backend: FakeBackend | None = None, **options: int) -> Engine:
    return Engine(
        backend or FakeBackend(), EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 8, "admission": "watermark", **options})
    )


def request(name: str, prompt: list[int], seed: int = 0, eos: tuple[int, ...] = (), **params: object) -> Request:
    return Request(name, prompt, SamplingParams(**params), seed, eos)


def drain(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_one_request_ends_at_max_tokens() -> None:
    engine = make()
    engine.add(request("a", [1, 2, 3], seed=7, max_tokens=5))
    outputs = drain(engine)[("a", 0)]
    assert tokens(outputs) == expected_output([1, 2, 3], 7, 5)
    assert [o.finish_reason for o in outputs] == [None] * 4 + ["length"]
    assert engine.stats().kv.used_blocks == 0


def test_long_prompts_are_chunked_by_the_budget_and_mixed_with_decodes() -> None:
    backend = FakeBackend()
    engine = make(backend)
    engine.add(request("short", [1], max_tokens=12))
    engine.step()
    engine.add(request("long", list(range(20)), max_tokens=2))
    drain(engine)
    counts = [[w.count for w in plan.work] for plan in backend.plans]
    assert counts[:5] == [[1], [1, 7], [1, 7], [1, 6], [1, 1]]


def test_the_budget_bounds_every_step() -> None:
    backend = FakeBackend(num_blocks=64)
    engine = make(backend, max_num_batched_tokens=5, max_num_seqs=8)
    for i in range(12):
        engine.add(request(str(i), [i] * (1 + i), max_tokens=4))
    drain(engine)
    assert max(plan.num_tokens for plan in backend.plans) == 5
    assert max(len(plan.work) for plan in backend.plans) <= 8


def test_preempted_requests_give_what_they_would_have_given() -> None:
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    engine = make(FakeBackend(num_blocks=8), max_num_seqs=8)
    for i, prompt in enumerate(prompts):
        engine.add(request(str(i), prompt, seed=i, max_tokens=20))
    outputs = drain(engine)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.tokens_recomputed > 0
    for i, prompt in enumerate(prompts):
        assert tokens(outputs[(str(i), 0)]) == expected_output(prompt, i, 20)


def test_the_oldest_is_never_preempted() -> None:
    backend = FakeBackend(num_blocks=8)
    engine = make(backend, max_num_seqs=8)
    for i in range(8):
        engine.add(request(str(i), [i], max_tokens=30))
    drain(engine)
    starts = [start.tokens[0] for plan in backend.plans for start in plan.starts]
    assert starts.count(0) == 1, "a row is taken once, and again after each preemption"
    assert len(starts) == 8 + engine.stats().preemptions > 8


def test_eos_stop_tokens_ignore_eos_and_min_tokens() -> None:
    path = expected_output([5], 0, 10)
    third = path[2]
    assert third not in path[:2]

    def run(eos: tuple[int, ...] = (), **params: object) -> SequenceOutput:
        engine = make()
        engine.add(request("a", [5], eos=eos, max_tokens=10, **params))
        outputs = drain(engine)[("a", 0)]
        outputs[-1].token_ids = tokens(outputs)
        return outputs[-1]

    by_eos = run(eos=(third,))
    assert (by_eos.finish_reason, by_eos.stop_reason, by_eos.token_ids) == ("stop", None, path[:3])
    by_token = run(stop_token_ids=[third])
    assert (by_token.finish_reason, by_token.stop_reason, by_token.token_ids) == ("stop", third, path[:3])
    assert run(eos=(third,), ignore_eos=True).token_ids == path
    assert run(eos=(third,), min_tokens=4).token_ids[:4] == path[:4]


def test_n_samples_have_seeds_of_their_own() -> None:
    engine = make(FakeBackend(num_blocks=32))
    engine.add(request("a", [1, 2], seed=3, n=3, max_tokens=4))
    outputs = drain(engine)
    for index in range(3):
        assert tokens(outputs[("a", index)]) == expected_output([1, 2], derive_seed(3, index), 4)


def test_abort_frees_at_once_wherever_the_request_is() -> None:
    engine = make(max_num_seqs=1)
    engine.add(request("running", [1] * 6, max_tokens=9))
    engine.add(request("waiting", [2] * 6, max_tokens=9))
    engine.step()
    assert engine.stats().kv.used_blocks == 2
    assert [o.finish_reason for o in engine.abort("running")] == ["abort"]
    assert engine.stats().kv.used_blocks == 0
    assert [o.finish_reason for o in engine.abort("waiting")] == ["abort"]
    assert engine.abort("waiting") == []
    assert engine.abort("never") == []
    assert not engine.has_work
    engine.check()


def test_abort_of_one_sample_leaves_the_others() -> None:
    engine = make(FakeBackend(num_blocks=32))
    engine.add(request("a", [1, 2], n=2, max_tokens=4))
    engine.step()
    assert [o.index for o in engine.abort("a", 0)] == [0]
    assert set(drain(engine)) == {("a", 1)}


def test_a_failing_row_ends_its_own_request_only() -> None:
    backend = FakeBackend()
    engine = make(backend)
    engine.add(request("bad", [1], max_tokens=4))
    engine.add(request("good", [2], max_tokens=4))
    backend.fail_rows.add(0)
    outputs = drain(engine)
    assert outputs[("bad", 0)][-1].finish_reason == "error"
    assert "finite" in str(outputs[("bad", 0)][-1].stop_reason)
    assert tokens(outputs[("good", 0)]) == expected_output([2], 0, 4)


def test_max_tokens_none_fills_the_context() -> None:
    engine = make()
    engine.add(request("a", [1] * 5, max_tokens=None))
    assert len(tokens(drain(engine)[("a", 0)])) == 32 - 5


@pytest.mark.parametrize(
    ("prompt", "params", "error", "says"),
    [
        ([], {}, InvalidRequestError, "empty"),
        ([1] * 32, {"max_tokens": 1}, ContextLengthError, "32"),
        ([1] * 30, {"max_tokens": 4}, ContextLengthError, "at most 2"),
        ([50], {}, InvalidRequestError, "0 to 49"),
        ([-1], {}, InvalidRequestError, "-1"),
        ([1], {"stop_token_ids": [50]}, InvalidRequestError, "stop_token_ids"),
        ([1], {"logit_bias": {50: 1.0}}, InvalidRequestError, "logit_bias"),
    ],
)
def test_what_can_not_run_is_refused_with_the_numbers(
    prompt: list[int], params: dict[str, object], error: type[Exception], says: str
) -> None:
    engine = make()
    with pytest.raises(error, match=says):
        engine.add(request("a", prompt, **params))
    assert not engine.has_work


def test_a_request_id_is_unique_among_the_living() -> None:
    engine = make()
    engine.add(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="already in use"):
        engine.add(request("a", [1]))
    drain(engine)
    engine.add(request("a", [1]))


def test_a_pool_that_can_not_hold_one_request_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"28 token positions .* 32: raise --kv-memory, or lower --max-model-len to at most 28"):
        make(FakeBackend(num_blocks=7))


def test_kv_stats_count_positions_and_empty_tails() -> None:
    engine = make()
    engine.add(request("a", [1] * 6, max_tokens=4))
    engine.step()
    kv = engine.stats().kv
    assert (kv.used_blocks, kv.positions_used, kv.positions_allocated, kv.empty_tail) == (2, 6, 8, 2)


def test_steps_and_queues_are_timed_by_the_engines_clock() -> None:
    now = 0.0

    class Slow(FakeBackend):
        def execute(self, plan: StepPlan) -> StepResult:
            nonlocal now
            now += 1.0
            result = super().execute(plan)
            result.sample_s = 0.25
            return result

    engine = Engine(Slow(), EngineConfig(max_num_seqs=1, max_num_batched_tokens=8), lambda: now)
    engine.add(request("a", [1, 2], max_tokens=3))
    engine.add(request("b", [3], max_tokens=2))
    outputs = drain(engine)
    assert [o.queued_s for o in outputs["a", 0]] == [0.0, None, None]
    assert [o.queued_s for o in outputs["b", 0]] == [3.0, None], "it waited for the only row"
    assert [o.preemptions for o in outputs["a", 0]] == [None, None, 0]
    times = engine.stats().times
    assert (times.schedule, times.execute, times.sample, times.commit) == (0, 5 * 0.75, 5 * 0.25, 0)


def test_the_extent_of_steps_adds_up() -> None:
    engine = make(max_num_batched_tokens=4, speculation="off")
    engine.add(request("a", list(range(6)), max_tokens=3))
    drain(engine)
    # Positions 0 to 3, then 4 and 5, 6, 7; position p attends to p + 1 keys.
    assert engine.stats().extent == StepExtent(
        steps=4, sampling_steps=3, positions=8, keys=4 + 6 + 7 + 8, context=sum(range(1, 9)), rows=3, rows_context=6 + 7 + 8,
        near_keys=4 + 6 + 7 + 8, near_context=sum(range(1, 9)), near_rows_context=6 + 7 + 8,
    )  # fmt: skip


def test_the_queue_says_what_is_waited_for() -> None:
    engine = make(FakeBackend(num_blocks=10, max_model_len=32), max_num_batched_tokens=8, max_num_seqs=3)
    engine.add(request("a", list(range(28)), max_tokens=4))
    engine.add(request("same", [*range(27), 40], max_tokens=4))
    engine.step()
    assert engine.stats().queue == Queue(budget=1), "the first prompt took the whole step"
    engine.step()
    assert engine.stats().queue == Queue(prompt=1)
    engine.add(request("other", list(range(20, 48)), n=2, max_tokens=4))
    memory = []
    while engine.has_work:
        engine.step()
        memory.append(engine.stats().queue.memory)
    assert 2 in memory, "neither of the two samples fits beside the others"
    assert engine.stats().queue == Queue()
    engine = make(max_num_batched_tokens=2, max_num_seqs=2)
    for name in "abcd":
        engine.add(request(name, [ord(name) % 50] * 4, max_tokens=2))
    engine.step()
    assert engine.stats().queue.rows + engine.stats().queue.budget == engine.stats().waiting
    drain(engine)


def test_the_extent_counts_every_row_of_logits() -> None:
    plan = StepPlan(
        work=[
            RowWork(0, 3, 5, [], True, score=range(4, 7)),  # scored at 4, 5 and 6, sampled at 7
            RowWork(1, 10, 3, [], True, draft=(1, 2)),
            RowWork(2, 6, 1, [], False),
        ]
    )
    assert plan.extent() == StepExtent(
        steps=1,
        sampling_steps=1,
        positions=9,
        keys=8 + 13 + 7,
        context=(4 + 5 + 6 + 7 + 8) + (11 + 12 + 13) + 7,
        rows=3 + 1 + 3,
        rows_context=(5 + 6 + 7) + 8 + (11 + 12 + 13),
        near_keys=8 + 13 + 7,
        near_context=(4 + 5 + 6 + 7 + 8) + (11 + 12 + 13) + 7,
        near_rows_context=(5 + 6 + 7) + 8 + (11 + 12 + 13),
    )
    near = plan.extent(window=6)
    assert (near.keys, near.near_keys) == (8 + 13 + 7, 8 + (13 - 5) + 6), "position 3 sees what is before it, position 10 begins at 5"
    assert near.near_context == (4 + 5 + 6 + 6 + 6) + 3 * 6 + 6
    assert near.near_rows_context == (5 + 6 + 6) + 6 + 3 * 6
