"""Layers that see differently far: what a window has left behind is somebody else's memory, and nothing else of the engine changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.fake_backend import FakeBackend, expected_output
from core.test_admission import serve
from core.test_sharing import ask, run, tokens
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.events import BlockEvicted, BlockStored, Event
from quire.core.groups import KVGroups
from quire.errors import CapacityError

MIXED = [(1, 1), (1, 3), (2, 1)]


def make(num_blocks: int, groups: tuple[int, int], window: int = 8, *, host: int = 0, **options: Any) -> Engine:
    backend = FakeBackend(num_blocks, 4, options.pop("max_model_len", 64), num_host_blocks=host, window=window, groups=groups)
    return Engine(backend, EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 16, "admission": "watermark", **options}))


@pytest.mark.parametrize("groups", MIXED)
def test_windowed_groups_keep_a_window(groups: tuple[int, int]) -> None:
    full, windowed = groups
    engine = make(200, groups)
    engine.add(ask("a", [1, 2, 3], max_tokens=50))
    held = []
    while engine.has_work:
        engine.step()
        engine.check()
        held.append(engine.stats().kv.used_blocks)
    assert max(held) == full * 13 + windowed * 3, "13 blocks of 4 positions; a window of 8 and the one that is being written"
    assert engine.stats().kv.free_blocks == 200


@settings(max_examples=150)
@given(
    groups=st.sampled_from([(0, 1), (0, 2), *MIXED]), window=st.integers(1, 30), size=st.sampled_from([1, 2, 4, 16]),
    step=st.integers(1, 40), prompt=st.integers(1, 60), output=st.integers(1, 30),
)  # fmt: skip
def test_a_sequence_never_takes_more_than_was_reckoned(
    groups: tuple[int, int], window: int, size: int, step: int, prompt: int, output: int
) -> None:
    """A pool of exactly those blocks runs it to its end, without a preemption, in steps of so many positions."""
    kinds, length = KVGroups(*groups, window), prompt + output
    backend = FakeBackend(kinds.blocks(length, size, step), size, length, window=window, groups=groups)
    engine = Engine(backend, EngineConfig(max_num_seqs=1, max_num_batched_tokens=step, speculation="off"))
    outputs = run(engine, ask("a", [i % 40 for i in range(prompt)], max_tokens=output))
    assert tokens(outputs[("a", 0)]) == expected_output([i % 40 for i in range(prompt)], 0, output)
    assert engine.stats().preemptions == 0
    fits = kinds.positions(backend.num_blocks, size, step)
    assert fits >= length or not kinds.full, "with windows alone, more than is held at a time"
    assert kinds.blocks(fits, size, step) <= backend.num_blocks


def test_the_memory_goes_to_others() -> None:
    """Three sequences of 48 positions take 36 blocks in a pool of 24: of one that sees everything they would."""
    engine = make(24, (1, 1), max_num_seqs=3, speculation="off", admission="no-evict")
    requests = [ask(str(i), [i], max_tokens=40) for i in range(3)]
    alone = make(24, (1, 1), max_num_seqs=1)
    assert {key: tokens(each) for key, each in run(engine, *requests).items()} == {
        key: tokens(each) for request in requests for key, each in run(alone, request).items()
    }
    assert engine.stats().preemptions == 0
    assert max(plan.num_tokens for plan in engine.backend.plans[-30:]) == 2, "two at a time: 2 * (11 + 3) blocks are too many for three"


@pytest.mark.parametrize("groups", MIXED)
def test_a_conversation_goes_on_with_what_its_windows_hold(groups: tuple[int, int]) -> None:
    engine = make(200, groups)
    said = [1, 2, 3, *tokens(run(engine, ask("a", [1, 2, 3], max_tokens=42))[("a", 0)])]
    outputs = run(engine, ask("b", [*said, 7, 8], max_tokens=3))
    assert outputs[("b", 0)][0].cached_tokens == 44, "the last token was never computed"
    assert tokens(outputs[("b", 0)]) == expected_output([*said, 7, 8], 0, 3)


@pytest.mark.parametrize("groups", MIXED)
def test_what_windows_lost_is_computed_again(groups: tuple[int, int]) -> None:
    """A prompt that begins like another finds it as far as a window's worth of every group is there."""
    full, windowed = groups
    engine = make(full * 16 + windowed * 7, groups)
    prompt = [k % 40 for k in range(40)]
    cache = engine.scheduler.manager.cache
    events: list[Event] = []
    engine.listen(events.append)
    run(engine, ask("a", prompt, max_tokens=20))
    stored = [event.content for event in events if isinstance(event, BlockStored)]
    assert len(stored) == len(set(stored)), "content is told once, whatever its groups"
    lost = [event for event in events if isinstance(event, BlockEvicted)]
    assert lost
    assert {event.content for event in lost} == {0}, "windowed blocks made way, and the content is there"
    middle = cache.match(b"", prompt[:24])
    assert middle.num_positions == 0, "the windowed blocks before it went first"
    outputs = run(engine, ask("b", [*prompt[:24], 49], max_tokens=4))
    assert outputs[("b", 0)][0].cached_tokens == 0
    assert tokens(outputs[("b", 0)]) == expected_output([*prompt[:24], 49], 0, 4)
    outputs = run(engine, ask("c", [*prompt[:24], 48], max_tokens=4))
    assert outputs[("c", 0)][0].cached_tokens == 24, "computed again, and found"


@pytest.mark.parametrize("groups", MIXED)
def test_swapped_out_and_in(groups: tuple[int, int]) -> None:
    full, windowed = groups
    engine = make(60, groups, host=60, prefix_caching=False)
    engine.add(ask("a", [1, 2, 3], max_tokens=40))
    for _ in range(31):
        engine.step()
    scheduler = engine.scheduler
    scheduler.preempt(0, "memory", "the test wants it")
    assert engine.stats().kv.host_blocks_used == full * 9 + windowed * 3, "33 positions"
    engine.check()
    got = run(engine)
    assert scheduler.manager.counters.blocks_swapped_in == full * 9 + windowed * 3
    assert len(tokens(got[("a", 0)])) == 40 - 31
    assert tokens(got[("a", 0)]) == expected_output([1, 2, 3], 0, 40)[31:]


@pytest.mark.parametrize("groups", [(0, 1), (1, 1)])
def test_what_the_window_has_left_is_not_taken_beside_what_was_swapped_out(groups: tuple[int, int]) -> None:
    """The cache holds the beginning of one that was swapped out behind it. In a pool that is just large enough for that one."""
    kinds, prompt = KVGroups(*groups, 6), list(range(16))
    backend = FakeBackend(kinds.blocks(18, 2, 5), 2, 18, num_host_blocks=16, window=6, groups=groups)
    engine = Engine(backend, EngineConfig(max_num_seqs=1, max_num_batched_tokens=5, admission="watermark", speculation="off"))
    engine.add(ask("a", prompt, priority=1, max_tokens=2))
    engine.step()
    engine.step()
    engine.scheduler.preempt(0, "memory", "the test wants it")
    engine.reset_prefix_cache()
    outputs = run(engine, ask("b", prompt[:7], max_tokens=1))
    assert engine.scheduler.manager.counters.blocks_swapped_in == 2 * sum(groups), "three of the five are found"
    assert tokens(outputs[("a", 0)]) == expected_output(prompt, 0, 2)


def test_the_last_blocks_memory_may_become_its_own_copy() -> None:
    """Of a prompt that ends within cached blocks, one of each group is copied; where those are the very blocks that are handed out for it,
    each stays in its place. (A copy into another group's source would come before that is read.)"""
    engine = make(12, (1, 2), max_model_len=12, max_num_seqs=1)
    run(engine, ask("a", [1, 2, 3, 4, 5, 6, 7], max_tokens=2))
    run(engine, ask("between", [9, 9], max_tokens=1))
    outputs = run(engine, ask("b", [1, 2, 3, 4, 5, 6, 8, 8], max_tokens=4))
    assert tokens(outputs[("b", 0)]) == expected_output([1, 2, 3, 4, 5, 6, 8, 8], 0, 4)


@pytest.mark.parametrize("groups", [(0, 1), *MIXED])
@pytest.mark.parametrize("seed", range(3))
def test_no_evict_never_preempts(seed: int, groups: tuple[int, int]) -> None:
    """Sequences of lognormal lengths around three windows, in a pool for a few of them."""
    preemptions, _, used = serve("no-evict", seed, groups=KVGroups(*groups, 16))
    assert preemptions == 0
    assert used > (0.25 if groups[0] else 0.1), "where all have a window, outputs count as if they grew on and on"


@pytest.mark.parametrize("groups", MIXED)
@pytest.mark.parametrize("seed", range(3))
def test_past_future_foresees_windows(seed: int, groups: tuple[int, int]) -> None:
    preemptions, recomputed, used = serve("past-future", seed, groups=KVGroups(*groups, 16))
    assert preemptions <= 10
    assert recomputed < 400
    assert used > 0.75


def test_a_pool_that_is_too_small_says_what_fits() -> None:
    with pytest.raises(CapacityError, match=r"12 blocks of 4\), but one request may need 64: .* lower --max-model-len to at most 24"):
        make(12, (1, 1))
    with pytest.raises(CapacityError, match=r"less than 3 blocks, one of each group of layers, for each of 8 .* to at most 7"):
        make(23, (1, 2), max_model_len=16)


@pytest.mark.parametrize("groups", [(0, 1), *MIXED])
def test_as_many_sequences_run_as_there_are_blocks_of_each_group(groups: tuple[int, int]) -> None:
    """Where nobody says how many: each takes one of every group at least."""
    engine = make(24, groups, max_model_len=16, max_num_seqs=None, max_num_batched_tokens=32)
    width = sum(groups)
    assert engine.limits.max_num_seqs == 24 // width
    for i in range(30):
        engine.add(ask(str(i), [i], max_tokens=3))
    engine.step()
    assert len(engine.scheduler.running) == 24 // width
    run(engine)


@pytest.mark.parametrize("groups", [(0, 1), *MIXED])
def test_a_common_beginning_is_kept_in_a_flood(groups: tuple[int, int]) -> None:
    """A system prompt is found, though each request goes on until its window has left it, and others fill the pool between them."""
    full, windowed = groups
    engine = make(full * 20 + windowed * 16, groups)
    system = [k % 40 for k in range(24)]
    found = []
    for i in range(8):
        outputs = run(engine, ask(f"a{i}", [*system, 40 + i, 41], max_tokens=20))
        found.append(outputs[(f"a{i}", 0)][0].cached_tokens)
        run(engine, ask(f"flood {i}", [(7 * i + k * k) % 50 for k in range(30)], max_tokens=10))
    assert found[3:] == [24] * 5, "computed again at most until it has proved to be wanted"


@pytest.mark.parametrize("groups", MIXED)
def test_what_windows_left_goes_before_what_may_come_again(groups: tuple[int, int]) -> None:
    """A conversation that pauses keeps its end, while a long one beside it takes what it leaves behind itself."""
    full, windowed = groups
    engine = make(full * 24 + windowed * 8, groups)
    paused = [1, 2, 3, *tokens(run(engine, ask("a", [1, 2, 3], max_tokens=22))[("a", 0)])]
    run(engine, ask("long", [9, 8, 7], max_tokens=50))
    outputs = run(engine, ask("b", [*paused, 5], max_tokens=2))
    assert outputs[("b", 0)][0].cached_tokens == 24


@pytest.mark.parametrize("groups", [(0, 1), (0, 2), *MIXED])
def test_a_prompt_that_does_not_fit_starts_early(groups: tuple[int, int]) -> None:
    """And goes back block by block, as long as its window has left nothing."""
    engine = make(16 * sum(groups), groups, window=40, max_num_batched_tokens=8)
    engine.add(ask("first", [1] * 32, max_tokens=30))
    for _ in range(5):
        engine.step()
    long = [k % 40 for k in range(56)]
    engine.add(ask("long", long, max_tokens=4))
    engine.step()
    early = engine.scheduler.early
    assert early is not None
    assert early.num_computed == 7, "what the other leaves of a step"
    outputs = run(engine)
    assert tokens(outputs[("long", 0)]) == expected_output(long, 0, 4)
    assert engine.stats().preemptions == 0
    assert engine.stats().tokens_recomputed > 0, "it gave blocks back, for the other's output"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("groups", MIXED)
def test_one_that_started_early_and_can_not_go_back_is_preempted_once(groups: tuple[int, int], caching: bool) -> None:
    full, windowed = groups
    engine = make(full * 16 + windowed * 7, groups, prefix_caching=caching)
    engine.add(ask("first", [1] * 24, max_tokens=38))
    for _ in range(3):
        engine.step()
    long = [k % 40 for k in range(60)]
    engine.add(ask("long", long, max_tokens=4))
    engine.step()
    early = engine.scheduler.early
    assert early is not None
    assert early.num_trimmed > 0, "its window goes on"
    got: list[int] = []
    while engine.has_work:
        for output in engine.step():
            got += output.token_ids if output.request_id == "long" else []
        engine.check()
        assert not (engine.stats().preemptions and engine.scheduler.early), "it would lose again what it computes"
    assert engine.stats().preemptions == engine.stats().kv.counters.preempted["memory"] == 1
    assert got == expected_output(long, 0, 4)


@pytest.mark.parametrize("admission", ["watermark", "no-evict", "past-future"])
def test_a_prompt_longer_than_all_windows_waits_for_a_window(admission: str) -> None:
    """Not for memory for all of its positions: 12 blocks are all that it ever holds of the 25 of its prompt."""
    engine = make(24, (0, 1), window=16, max_model_len=128, admission=admission, max_num_batched_tokens=32)
    for i in range(2):
        engine.add(ask(str(i), [i] * 100, max_tokens=4))
    for _ in range(6):
        engine.step()
    assert len(engine.scheduler.running) == 2, "while the first is not done"
    assert engine.scheduler.early is None
    outputs = run(engine)
    assert engine.stats().preemptions == 0
    assert tokens(outputs[("1", 0)]) == expected_output([1] * 100, 0, 4)
