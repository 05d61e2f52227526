"""Sharing as its users see it: samples, beams, prefixes; who finds what, who never does, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from core.fake_backend import FakeBackend, expected_output
from quire.config import EngineConfig
from quire.core import prefix_cache
from quire.core.engine import Engine
from quire.core.events import BlockCopied, BlockEvicted, BlockRemoved, BlockShared, BlockStored, Event, Preempted
from quire.core.sequence import Request, Retention, derive_seed
from quire.errors import CapacityError, InvalidRequestError, QueueFullError
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams


def make(num_blocks: int = 64, block_size: int = 4, *, clock: Any = lambda: 0.0, **options: Any) -> Engine:
    backend_options = {name: options.pop(name) for name in ("num_host_blocks", "window", "vocab_size") if name in options}
    backend = FakeBackend(num_blocks, block_size, options.pop("max_model_len", 64), **backend_options)
    return Engine(backend, EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, "admission": "watermark", **options}), clock)


def ask(
    name: str,
    prompt: list[int],
    seed: int = 0,
    *,
    salt: bytes = b"",
    priority: int = 0,
    retention: Retention | None = None,
    **params: Any,
) -> Request:
    return Request(name, prompt, SamplingParams(**params), seed, (), priority, salt, retention)


def drain(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine.check()
    return outputs


def run(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[SequenceOutput]]:
    for request in requests:
        engine.add(request)
    return drain(engine)


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("caching", [True, False])
def test_samples_compute_the_prompt_once_and_copy_its_last_block_on_write(caching: bool) -> None:
    engine = make(prefix_caching=caching)
    prompt = list(range(10))  # two blocks and a half
    engine.add(ask("a", prompt, 3, n=4, max_tokens=5))
    engine.step()
    assert engine.stats().tokens_computed == 10
    assert (engine.stats().running, engine.stats().waiting) == (1, 3)
    engine.step()
    kv = engine.stats().kv
    # The first goes on; the others share all three blocks, and compute the last position for their first tokens.
    assert engine.stats().tokens_computed == 10 + 1 + 3
    assert (kv.shared_blocks, kv.saved_blocks, kv.positions_used) == (3, 3 * 3, 11)
    drain(engine)
    assert engine.stats().kv.counters.blocks_copied == 3
    assert engine.stats().tokens_computed == 10 + 3 + 4 * 4
    outputs = run(engine, ask("b", prompt, 3, n=4, max_tokens=5))
    for index in range(4):
        assert tokens(outputs[("b", index)]) == expected_output(prompt, derive_seed(3, index), 5)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 2])
def test_samples_that_end_at_once_compute_the_prompt_once(caching: bool, max_tokens: int) -> None:
    engine = make(prefix_caching=caching, max_num_batched_tokens=16)
    prompt = list(range(40))
    outputs = run(engine, ask("a", prompt, n=5, max_tokens=max_tokens))
    assert [tokens(outputs[("a", i)]) for i in range(5)] == [expected_output(prompt, derive_seed(0, i), max_tokens) for i in range(5)]
    assert engine.stats().tokens_computed == 40 + 4 + 5 * (max_tokens - 1), "each of the others computes the last position again"


def test_samples_that_come_later_still_find_the_prompt() -> None:
    engine = make(max_num_seqs=1)
    outputs = run(engine, ask("a", list(range(10)), n=3, max_tokens=4))
    assert engine.stats().tokens_computed == 10 + 3 + 2 * (1 + 3)
    assert all(len(tokens(output)) == 4 for output in outputs.values())


def test_best_of_reports_log_probabilities_for_the_choice() -> None:
    outputs = run(make(), ask("a", [1, 2], n=1, best_of=3, max_tokens=3))
    assert set(outputs) == {("a", 0), ("a", 1), ("a", 2)}
    assert all(output.logprobs is not None for stream in outputs.values() for output in stream)


def test_beams_share_and_end_together() -> None:
    engine = make()
    events: list[Event] = []
    engine.listen(events.append)
    outputs = run(engine, ask("a", list(range(10)), n=2, beam_width=4, max_tokens=6))
    assert set(outputs) == {("a", 0), ("a", 1)}
    assert [len(stream) for stream in outputs.values()] == [1, 1]
    assert len(tokens(outputs[("a", 0)])) == 6
    assert engine.stats().tokens_computed == 10 + 5 * 4
    assert any(isinstance(event, BlockShared) for event in events)
    assert any(isinstance(event, BlockCopied) for event in events)


def test_beams_have_names_of_their_own() -> None:
    engine = make()
    engine.add(ask("a", list(range(10)), n=2, beam_width=4, max_tokens=12))
    while engine.has_work:
        engine.step()
        alive = [seq.index for seq in engine.scheduler.running + engine.scheduler.waiting]
        assert len(set(alive)) == len(alive)


def test_a_failing_beam_ends_its_search_only() -> None:
    engine = make()
    backend = engine.backend
    assert isinstance(backend, FakeBackend)
    engine.add(ask("beams", [1, 2, 3], n=2, beam_width=3, max_tokens=6))
    engine.add(ask("other", [4, 5], max_tokens=6))
    engine.step()
    backend.fail_rows.add(next(s for s in engine.scheduler.running if s.group.search).row)
    outputs = drain(engine)
    assert [outputs[("beams", i)][-1].finish_reason for i in (0, 1)] == ["error", "error"]
    assert tokens(outputs[("other", 0)]) == expected_output([4, 5], 0, 6)[1:]


def test_a_second_prompt_finds_the_first_ones_blocks_also_in_part() -> None:
    engine = make()
    first = list(range(20))
    run(engine, ask("a", first, max_tokens=4))
    before = engine.stats().tokens_computed
    # Same prompt: everything is found, the last position is computed for its logits.
    (output, *_) = run(engine, ask("b", first, max_tokens=1))[("b", 0)]
    assert output.cached_tokens == 19
    assert engine.stats().tokens_computed - before == 1
    # A prompt that leaves the first one's way inside its fourth block: two of that block's tokens are copied.
    (output, *_) = run(engine, ask("c", [*first[:14], 40, 41, 42], max_tokens=1))[("c", 0)]
    assert output.cached_tokens == 14
    # Chat: prompt and answer are the beginning of the next prompt.
    answer = expected_output(first, 0, 4)
    (output, *_) = run(engine, ask("d", [*first, *answer, 7, 7, 7, 7, 7], max_tokens=1))[("d", 0)]
    assert output.cached_tokens == 20 + 3, "all but the last token of the answer, which was never computed"
    kv = engine.stats().kv
    assert kv.counters.hit_tokens == 19 + 14 + 23
    assert kv.hit_rate == kv.counters.hit_tokens / (20 + 20 + 17 + 29)


def test_without_a_cache_nothing_is_found() -> None:
    engine = make(prefix_caching=False)
    run(engine, ask("a", list(range(20)), max_tokens=2))
    outputs = run(engine, ask("b", list(range(20)), max_tokens=2))
    assert outputs[("b", 0)][0].cached_tokens == 0
    assert engine.stats().kv.cached_blocks == 0


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    engine = make(max_num_batched_tokens=16)
    prompt = list(range(30))
    outputs = run(engine, *(ask(str(i), prompt, i, max_tokens=3) for i in range(5)))
    assert engine.stats().tokens_computed == 30 + 4 + 5 * 2
    for i in range(5):
        assert tokens(outputs[(str(i), 0)]) == expected_output(prompt, i, 3)


def test_short_equal_prompts_too() -> None:
    engine = make(block_size=16)
    run(engine, *(ask(str(i), [1, 2, 3], i, max_tokens=2) for i in range(4)))
    assert engine.stats().tokens_computed == 3 + 3 + 4


def test_prompts_with_an_equal_beginning_compute_it_once() -> None:
    engine = make()
    system = list(range(16))
    run(engine, *(ask(str(i), [*system, 30 + i, 31, 32], max_tokens=1) for i in range(4)))
    assert engine.stats().tokens_computed == 16 + 4 * 3


def test_tenants_share_nothing_and_can_not_tell() -> None:
    """By counters: the second tenant's request takes the steps and positions that it takes on a fresh engine."""

    def costs(engine: Engine, salt: bytes) -> tuple[int, int, int | None]:
        before = engine.stats()
        outputs = run(engine, ask("x", list(range(20)), max_tokens=3, salt=salt))
        after = engine.stats()
        return after.steps - before.steps, after.tokens_computed - before.tokens_computed, outputs[("x", 0)][0].cached_tokens

    cold = costs(make(), b"mine")
    engine = make()
    run(engine, ask("a", list(range(20)), max_tokens=3, salt=b"theirs"))
    assert costs(engine, b"mine") == cold
    assert costs(engine, b"mine") != cold
    # Nor together: nobody waits for another tenant's prompt.
    engine = make()
    run(engine, *(ask(str(i), list(range(20)), max_tokens=1, salt=bytes([i])) for i in range(3)))
    assert engine.stats().tokens_computed == 60
    assert engine.stats().steps == 1


class Colliding(bytes):
    """Bytes of which all have the same hash."""

    def __hash__(self) -> int:
        return 7

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return Colliding(part) if isinstance(part, bytes) else part


def test_a_hash_collision_serves_nobody_elses_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "encode", lambda tokens, encode=prefix_cache.encode: Colliding(encode(tokens)))
    engine = make()
    a, b = list(range(20)), list(range(1, 21))
    assert hash(prefix_cache.encode(a)) == hash(prefix_cache.encode(b))
    run(engine, ask("a", a, max_tokens=2))
    outputs = run(engine, ask("b", b, max_tokens=2), ask("again", a, max_tokens=2))
    assert outputs[("b", 0)][0].cached_tokens == 0
    assert outputs[("again", 0)][0].cached_tokens == 19
    assert tokens(outputs[("b", 0)]) == expected_output(b, 0, 2)


def test_what_is_computed_again_stays_findable() -> None:
    """Its first copy is idle, and evicted while the second is in use."""
    engine = make(24, max_num_seqs=2)
    prompt = list(range(8))
    first = tokens(run(engine, ask("a", prompt, max_tokens=24))[("a", 0)])
    engine.add(ask("b", prompt, max_tokens=24))
    for _ in range(22):
        engine.step()
    assert engine.stats().kv.cached_blocks <= 3, "what both have made is there once"
    engine.add(ask("c", [49] * 56, max_tokens=2))
    assert tokens(drain(engine)[("b", 0)])[-2:] == first[-2:]
    outputs = run(engine, ask("d", [*prompt, *first[:20], 48], max_tokens=1))
    assert outputs[("d", 0)][0].cached_tokens == 28


def test_what_another_has_made_stays_findable() -> None:
    """Two make the same at the same time. One ends, and its blocks are evicted while the other goes on."""
    engine = make(24, max_num_seqs=3)
    known: set[int] = set()
    orphans: list[Event] = []

    def listen(event: Event) -> None:
        if isinstance(event, BlockStored):
            if event.parent and event.parent not in known:
                orphans.append(event)
            known.add(event.content)
        elif isinstance(event, BlockEvicted | BlockRemoved):
            known.discard(event.content)

    engine.listen(listen)
    prompt = list(range(8))
    for name, count in (("a", 13), ("b", 32)):
        engine.add(ask(name, prompt, max_tokens=count))
    for _ in range(15):
        engine.step()
    engine.add(ask("c", [49] * 56, max_tokens=2))
    made = tokens(drain(engine)[("b", 0)])
    assert not orphans, "below what nobody can find"
    whole = expected_output(prompt, 0, 32)
    assert whole[-len(made) :] == made
    assert run(engine, ask("d", [*prompt, *whole[:28], 48], max_tokens=1))[("d", 0)][0].cached_tokens == 36


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    engine = make()
    engine.add(ask("a", list(range(12)), max_tokens=8))
    for _ in range(4):
        engine.step()
    engine.scheduler.preempt(0, "memory", "the test says so")
    engine.check()
    outputs = drain(engine)
    assert tokens(outputs[("a", 0)]) == expected_output(list(range(12)), 0, 8)[4:]
    assert (engine.stats().preemptions, engine.stats().tokens_recomputed) == (1, 0)


def test_swap_moves_blocks_to_the_host_and_back() -> None:
    engine = make(num_host_blocks=8, prefix_caching=False)
    events: list[Event] = []
    engine.listen(events.append)
    engine.add(ask("a", list(range(12)), max_tokens=8))
    for _ in range(4):
        engine.step()
    engine.scheduler.preempt(0, "memory", "the test says so")
    assert engine.stats().kv.host_blocks_used == 4
    assert [e for e in events if isinstance(e, Preempted)] == [Preempted("a", 0, 15, True, "memory", "the test says so")]
    outputs = drain(engine)
    assert tokens(outputs[("a", 0)]) == expected_output(list(range(12)), 0, 8)[4:]
    kv = engine.stats().kv
    assert (kv.counters.blocks_swapped_out, kv.counters.blocks_swapped_in, kv.host_blocks_used) == (4, 4, 0)
    assert engine.stats().tokens_recomputed == 0


def test_what_left_the_window_is_not_swapped() -> None:
    engine = make(num_host_blocks=16, window=8, prefix_caching=False)
    engine.add(ask("a", list(range(30)), max_tokens=8))
    for _ in range(4):
        engine.step()
    engine.scheduler.preempt(0, "memory", "the test says so")
    drain(engine)
    counters = engine.stats().kv.counters
    assert counters.blocks_swapped_in == counters.blocks_swapped_out > 0


def test_a_full_swap_pool_falls_back_to_computing_again() -> None:
    engine = make(num_host_blocks=2, prefix_caching=False)
    engine.add(ask("a", list(range(12)), max_tokens=8))
    engine.step()
    engine.scheduler.preempt(0, "memory", "the test says so")
    drain(engine)
    assert engine.stats().tokens_recomputed == 12


def test_priorities_order_the_queue_and_protect_from_preemption() -> None:
    engine = make(12, max_model_len=24)
    engine.add(ask("low", [1] * 10, priority=5, max_tokens=14))
    engine.add(ask("high", [2] * 10, priority=-5, max_tokens=14))
    engine.add(ask("middle", [3] * 10, max_tokens=14))
    engine.step()
    assert [s.request.request_id for s in engine.scheduler.running] == ["high", "middle", "low"]
    victims: list[str] = []
    engine.listen(lambda e: victims.append(e.request_id) if isinstance(e, Preempted) else None)
    drain(engine)
    assert victims
    assert "high" not in victims
    assert victims[0] == "low"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine = make(64, max_model_len=128, max_num_batched_tokens=16)
    engine.add(ask("long", list(range(40)) * 2, max_tokens=2))
    engine.step()
    engine.add(ask("short", [49] * 8, max_tokens=2))
    assert [o.request_id for o in engine.step()] == ["short"]
    drain(engine)


def first_step(engine: Engine, name: str) -> int:
    """In which a request has its first token."""
    return next(n for n in range(1, 2000) if any(output.request_id == name for output in engine.step()))


@pytest.mark.parametrize(("count", "n"), [(1, 1), (4, 1), (8, 1), (4, 17), (100, 1)])
def test_a_short_prompt_does_not_wait_for_many_long_ones(count: int, n: int) -> None:
    """More than are computed in chunks at a time, so that some wait before it."""
    engine = make(4000, max_model_len=1000, max_num_seqs=32)
    engine.backend._look = lambda *_: None  # type: ignore[attr-defined]  # takes the square of the length
    for i in range(count):
        engine.add(ask(f"long-{i}", [(i + k * 7) % 49 for k in range(900)], n=n, max_tokens=4))
    for _ in range(3):
        engine.step()
    engine.add(ask("short", [49, 48, 47], max_tokens=2))
    assert first_step(engine, "short") <= 2 + count // 64


@pytest.mark.parametrize("n", [64, 65, 128])
def test_nobody_waits_for_the_samples_of_another(n: int) -> None:
    """Those that wait for their request's prompt are not what is looked at of the queue."""
    engine = make(4000, max_model_len=1000, max_num_seqs=256)
    engine.backend._look = lambda *_: None  # type: ignore[attr-defined]  # takes the square of the length
    engine.add(ask("many", [k % 49 for k in range(900)], n=n, max_tokens=4))
    engine.step()
    engine.add(ask("short", [49, 48, 47], max_tokens=2))
    assert first_step(engine, "short") == 1


def test_blocks_that_left_the_window_are_given_back() -> None:
    engine = make(max_model_len=64, window=8)
    engine.add(ask("a", [1, 2, 3], max_tokens=50))
    most = 0
    while engine.has_work:
        engine.step()
        engine.check()
        most = max(most, engine.stats().kv.used_blocks)
    assert most <= 8 // 4 + 1
    outputs = run(engine, ask("b", [1, 2, 3, *expected_output([1, 2, 3], 0, 30)], max_tokens=2))
    assert outputs[("b", 0)][0].cached_tokens == 32, "what the window needs is found, though its beginning may be gone"


def test_content_that_was_found_again_survives_a_flood() -> None:
    engine = make(20, max_model_len=64)
    system = list(range(16))
    run(engine, ask("a", [*system, 40], max_tokens=1))
    run(engine, ask("b", [*system, 41], max_tokens=1))
    for i in range(12):  # each seen once, together many times the pool
        run(engine, ask(f"flood {i}", [(7 * i + k) % 50 for k in range(30)], max_tokens=2))
    outputs = run(engine, ask("c", [*system, 42], max_tokens=1))
    assert outputs[("c", 0)][0].cached_tokens == 16


@pytest.mark.parametrize("case", ["first", "later", "again"])
def test_retention_of_what_is_cached_already(case: str) -> None:
    """A wish counts for what others have computed, and can be renewed."""
    now = [0.0]
    engine = make(24, max_model_len=64, clock=lambda: now[0])
    wish = Retention(100, 30.0)
    for name, retention in {"first": [("a", wish), ("b", None)], "later": [("a", None), ("b", wish)], "again": [("a", wish), ("b", wish)]}[
        case
    ]:
        run(engine, ask(name, [40] * 16, max_tokens=1, retention=retention))
        now[0] += 29.0 if case == "again" else 0.0
    now[0] = 31.0 if case == "again" else now[0]
    for i in range(8):
        for j in range(2):
            run(engine, ask(f"flood {i} {j}", [(7 * i + k) % 39 for k in range(30)], max_tokens=2))
    assert run(engine, ask("c", [40] * 16, max_tokens=1))["c", 0][0].cached_tokens == 15


@pytest.mark.parametrize(("priority", "wait", "found"), [(0, 0, False), (100, 0, True), (100, 60, False), (1, 0, False)])
def test_retention_keeps_content_for_a_while_and_pins_nothing(priority: int, wait: float, found: bool) -> None:
    now = 0.0
    engine = make(16, max_model_len=64, clock=lambda: now)
    wish = Retention(priority, 30.0) if priority else None
    run(engine, ask("a", [40] * 16, max_tokens=1, retention=wish))
    now = wait
    for i in range(8):
        run(engine, ask(f"flood {i}", [(7 * i + k) % 39 for k in range(30)], max_tokens=2))
    outputs = run(engine, ask("b", [40] * 16, max_tokens=1))
    assert (outputs[("b", 0)][0].cached_tokens == 15) == found


def test_a_pool_full_of_retained_content_still_serves() -> None:
    engine = make(16, max_model_len=64)
    run(engine, ask("a", [40] * 16, max_tokens=1, retention=Retention(100, 3600.0)))
    for i in range(40):
        run(engine, ask(f"more {i}", [(11 * i + k) % 39 for k in range(50)], max_tokens=2, retention=Retention(100, 3600.0)))
    assert run(engine, ask("b", [40] * 16, max_tokens=1))[("b", 0)][0].cached_tokens == 0


def test_events_tell_what_can_be_found() -> None:
    engine = make(12, max_model_len=40)
    held: dict[int, tuple[int, tuple[int, ...]]] = {}
    seen: set[type] = set()

    def mirror(event: Event) -> None:
        seen.add(type(event))
        match event:
            case BlockStored(block, content, _, stored, _):
                assert block not in held
                held[block] = (content, stored)
            case BlockRemoved(block, content) | BlockEvicted(block, content):
                assert held.pop(block)[0] == content

    engine.listen(mirror)
    for i in range(6):
        run(engine, ask(str(i), [i % 3] * 9 + [i], n=2, max_tokens=8))
        assert len(held) == len(engine.scheduler.manager.cache)
    engine.reset_prefix_cache()
    assert not held
    assert seen >= {BlockStored, BlockRemoved, BlockEvicted, BlockShared, BlockCopied}


def test_several_may_listen() -> None:
    engine = make(prefix_caching=True)
    everything: list[Event] = []
    more: list[Event] = []
    preemptions: list[Event] = []
    engine.on_preemption(preemptions.append)
    assert engine.scheduler.manager.cache.listener is None, "blocks make no events for those who hear of preemptions alone"
    engine.listen(everything.append)
    engine.listen(more.append)
    engine.add(ask("a", list(range(12)), max_tokens=8))
    engine.step()
    engine.scheduler.preempt(0, "memory", "the test says so")
    assert preemptions == [event for event in everything if isinstance(event, Preempted)] != []
    assert len(everything) > 1
    assert more == everything
    engine.unlisten(more.append)
    engine.unlisten(preemptions.append)
    engine.step()
    engine.scheduler.preempt(0, "memory", "the test says so again")
    assert len(preemptions) == 1
    assert len(more) < len(everything)
    engine.unlisten(everything.append)
    assert engine.scheduler.listener is engine.scheduler.manager.cache.listener is None


def test_stored_content_says_under_which_salt() -> None:
    engine = make()
    stored: list[tuple[bytes, tuple[int, ...]]] = []
    engine.listen(lambda e: stored.append((e.salt, e.tokens)) if isinstance(e, BlockStored) else None)
    run(engine, ask("a", list(range(6)), max_tokens=1), ask("b", list(range(6)), max_tokens=1, salt=b"b"))
    assert sorted(stored) == [(b"", (0, 1, 2, 3)), (b"", (4, 5)), (b"b", (0, 1, 2, 3)), (b"b", (4, 5))]


def test_statistics_see_free_space_as_a_contiguous_allocator_would() -> None:
    engine = make(8, 4, max_model_len=16, prefix_caching=False)
    for i in range(4):
        engine.add(ask(str(i), [i] * 7, max_tokens=4))
    engine.step()
    engine.abort("0")
    engine.abort("2")
    kv = engine.stats().kv
    assert (kv.free_blocks, kv.largest_free_run, kv.fragmentation) == (4, 2, 0.5)


def test_the_queue_is_bounded() -> None:
    engine = make(max_waiting=2)
    engine.add(ask("a", [1]))
    engine.add(ask("b", [1]))
    with pytest.raises(QueueFullError, match="2 sequences are waiting, and --max-waiting is 2"):
        engine.add(ask("c", [1]))
    drain(engine)
    engine.add(ask("c", [1]))


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = make(10, max_model_len=40, max_num_seqs=4)
    with pytest.raises(InvalidRequestError, match="5 beams > --max-num-seqs 4"):
        engine.add(ask("a", [1], beam_width=5))
    with pytest.raises(InvalidRequestError, match=r"4 beams of up to 33 tokens may need 27 KV blocks of 4, but the pool has 10"):
        engine.add(ask("a", list(range(13)), beam_width=4, max_tokens=20))
    assert not engine.has_work
    with pytest.raises(CapacityError, match="less than one block for each of 9 sequences"):
        make(8, max_model_len=16, max_num_seqs=9)


def test_a_prompt_that_does_not_fit_starts_early_and_gives_way() -> None:
    engine = make(20, max_model_len=80, max_num_batched_tokens=16)
    engine.add(ask("first", [1] * 40, max_tokens=30))
    for _ in range(4):
        engine.step()
    long = list(range(44))
    engine.add(ask("long", long, max_tokens=4))
    engine.step()
    early = engine.scheduler.early
    assert early is not None
    assert 0 < early.num_computed < 44, "part of its prompt is computed in what is free"
    held = early.num_computed
    engine.add(ask("urgent", [9] * 4, priority=-1, max_tokens=2))
    outputs: dict[str, int] = {}
    steps = 0
    while engine.has_work:
        steps += 1
        for output in engine.step():
            outputs.setdefault(output.request_id, steps)
        engine.check()
    assert outputs["urgent"] <= 2, "what comes before it does not wait for it"
    counters = engine.stats().kv.counters
    assert counters.preempted == {"memory": 0, "order": 1, "beams": 0, "device": 0}
    assert counters.preemptions == 1
    assert engine.stats().tokens_recomputed <= 2 * held
    (output, *_) = run(engine, ask("again", long, max_tokens=1))[("again", 0)]
    assert output.token_ids == expected_output(long, 0, 1)
