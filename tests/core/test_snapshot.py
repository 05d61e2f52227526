"""What a watcher of an engine sees, and that looking changes nothing."""

from __future__ import annotations

from array import array

from core.fake_backend import FakeBackend
from quire.config import EngineConfig
from quire.core.block_pool import EMPTY, IDLE, OWNED
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.core.snapshot import MAX_WAITING, Snapshot
from quire.core.stats import Queue
from quire.sampling_params import SamplingParams


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(num_blocks: int = 16, clock: Clock | None = None, **options: object) -> Engine:
    config = EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 64, "admission": "watermark", "speculation": "off", **options})
    return Engine(FakeBackend(num_blocks, 4, 32, 50), config, clock or Clock())


def ask(name: str, prompt: list[int], max_tokens: int = 8, **params: object) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), 0)


def since(snapshot: Snapshot) -> array[float]:
    return array("d", snapshot.since)


def test_blocks_say_their_state_and_since_when() -> None:
    clock = Clock()
    engine = make(clock=clock)
    watch = engine.watch()
    assert watch.snapshot().states == b""  # nothing was ever used
    clock.now = 5.0
    engine.add(ask("a", list(range(10)), max_tokens=3))
    engine.step()
    seen = watch.snapshot()
    assert list(seen.states) == [OWNED] * 3
    assert list(since(seen)) == [5.0] * 3
    (view,) = seen.sequences
    assert (view.request_id, view.index, view.num_prompt, view.num_tokens, view.num_computed) == ("a", 0, 10, 11, 10)
    assert (view.blocks, view.most_tokens, view.waits_for, view.preempted) == ([0, 1, 2], 13, None, False)
    assert view.row >= 0
    clock.now = 9.0
    while engine.has_work:
        engine.step()
    seen = watch.snapshot()
    assert list(seen.states) == [IDLE] * 3
    assert list(since(seen)) == [9.0] * 3
    assert not seen.sequences
    engine.reset_prefix_cache()
    assert list(watch.snapshot().states) == [EMPTY] * 3
    engine.check()


def test_copies_and_evictions_are_told_once() -> None:
    engine = make()
    watch = engine.watch()
    engine.add(ask("a", list(range(10)), n=4))
    copied: list[int] = []
    shared = False
    while engine.has_work:
        engine.step()
        seen = watch.snapshot()
        copied += seen.copied
        tables = [view.blocks for view in seen.sequences]
        shared = shared or (len(tables) == 4 and len({tuple(table[:1]) for table in tables}) == 1)
    assert shared, "four samples share the prompt's first block"
    assert len(copied) == 3, "each sample but one copies the partly filled block"
    assert not watch.snapshot().copied
    for i in range(12):
        engine.add(ask(str(i), [40 - i] * 20, max_tokens=1))
    evicted: list[int] = []
    while engine.has_work:
        engine.step()
        evicted += watch.snapshot().evicted
    assert evicted
    assert set(evicted) <= set(range(16))


def test_why_sequences_wait() -> None:
    engine = make(num_blocks=16, max_num_seqs=2)
    watch = engine.watch()
    for name in "abc":
        engine.add(ask(name, [ord(name) % 50] * 9))
    engine.step()
    assert watch.snapshot().stats.queue == Queue(rows=1)

    engine = make(num_blocks=8)
    watch = engine.watch()
    engine.add(ask("a", [1] * 20))
    engine.add(ask("b", [2] * 20))
    engine.step()
    engine.step()
    engine.add(ask("c", [3] * 20))
    engine.step()
    seen = watch.snapshot()
    assert seen.sequences[-1].waits_for == "memory"
    assert seen.stats.queue.memory == seen.stats.waiting > 0

    engine = make(num_blocks=16, max_num_batched_tokens=8)
    watch = engine.watch()
    engine.add(ask("a", list(range(20)), n=2))
    engine.step()
    assert watch.snapshot().stats.queue == Queue(prompt=1), "a sample waits for the one that computes their prompt"


def test_preemptions_are_told_in_words_and_a_long_queue_is_counted() -> None:
    engine = make(num_blocks=8, max_waiting=100)
    watch = engine.watch()
    for i in range(50):
        engine.add(ask(f"r{i}", [i] * 6, max_tokens=20))
    told: list[str] = []
    preempted = False
    for _ in range(60):
        engine.step()
        seen = watch.snapshot()
        told += seen.preemptions
        preempted = preempted or any(view.preempted for view in seen.sequences)
        assert len(seen.sequences) <= seen.stats.running + MAX_WAITING
    assert told
    assert "was preempted" in told[0]
    assert preempted


def test_looking_changes_nothing_and_ends_with_the_watch() -> None:
    def outputs(*, watched: bool) -> list[object]:
        engine = make(num_blocks=12)
        watch = engine.watch() if watched else None
        for i in range(6):
            engine.add(ask(str(i), [i] * (5 + i), n=1 + i % 2))
        got: list[object] = []
        while engine.has_work:
            got += engine.step()
            if watch is not None:
                watch.snapshot()
                engine.check()
        if watch is not None:
            watch.close()
            assert engine.scheduler.listener is None
            assert engine.scheduler.manager.cache.listener is None
        return got

    assert outputs(watched=True) == outputs(watched=False)
