"""Contiguous allocators: no two owners share a unit, a run is as long as promised, and everything coalesces back. And sequences on
contiguous memory, which give the outputs that they give on paged memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.fake_backend import FakeBackend, expected_output
from quire.config import EngineConfig
from quire.core.contiguous import RESERVATIONS, Buddy, ContiguousAllocator, ContiguousManager, FirstCome, FirstFit, reservation
from quire.core.engine import Engine
from quire.core.prefix_cache import NOTHING
from quire.core.sequence import Request, derive_seed
from quire.errors import ConfigError
from quire.sampling_params import SamplingParams

KINDS = [Buddy, FirstFit]
Kind = type[ContiguousAllocator]


def longest_run(kind: Kind, owned: set[int], size: int) -> int:
    """``largest_free_run``, unit by unit, for small pools."""
    longest = 0
    for units in range(1, size + 1):
        if kind is Buddy and units & (units - 1):
            continue
        step = units if kind is Buddy else 1
        if any(owned.isdisjoint(range(start, start + units)) for start in range(0, size - units + 1, step)):
            longest = units
    return longest


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(1, 70), operations=st.lists(st.integers(-20, 40), max_size=60))
def test_random_operations(kind: Kind, size: int, operations: list[int]) -> None:
    """Positive: allocate so many units. Others: free one of the runs."""
    pool, runs = kind(size), {}
    for operation in operations:
        if operation > 0:
            possible = operation <= pool.largest_free_run
            start = pool.allocate(operation)
            assert (start is not None) == possible, "largest_free_run is what can be allocated"
            if start is not None:
                granted = pool.granted(start)
                assert granted == operation if kind is FirstFit else operation <= granted < 2 * operation
                assert 0 <= start <= size - granted
                runs[start] = set(range(start, start + granted))
        elif runs:
            start = sorted(runs)[-operation % len(runs)]
            pool.free(start)
            del runs[start]
        pool.check()
        owned = set().union(*runs.values())
        assert len(owned) == sum(map(len, runs.values())), "two runs overlap"
        assert pool.free_units == size - len(owned)
        assert pool.largest_free_run == longest_run(kind, owned, size)
    for start in runs:
        pool.free(start)
    pool.check()
    assert sorted(pool._holes()) == sorted(kind(size)._holes()), "everything coalesces back"


def test_first_fit_takes_the_lowest_hole_that_is_long_enough() -> None:
    pool = FirstFit(10)
    assert [pool.allocate(n) for n in (2, 1, 3, 1)] == [0, 2, 3, 6]
    pool.free(0)
    pool.free(3)
    assert pool.allocate(3) == 3, "the hole at 0 is too short"
    assert pool.allocate(1) == 0
    assert pool.allocate(4) is None, "4 units are free, in two holes"
    assert (pool.free_units, pool.largest_free_run) == (4, 3)
    pool.free(6)
    assert pool.allocate(4) == 6


def test_buddy_splits_rounds_up_and_joins() -> None:
    pool = Buddy(13)  # 8 + 4 + 1
    assert pool.largest_free_run == 8
    assert [pool.allocate(n) for n in (1, 3, 2, 5)] == [12, 8, 0, None], "the shortest run that fits, then the lowest"
    assert [pool.granted(s) for s in (12, 8, 0)] == [1, 4, 2]
    assert (pool.free_units, pool.largest_free_run) == (6, 4)
    pool.free(0)
    assert pool.allocate(5) == 0
    assert pool.granted(0) == 8
    assert pool.allocate(1) is None
    for start in (0, 8):
        pool.free(start)
    assert [pool.allocate(1) for _ in range(4)] == [8, 9, 10, 11]
    for start in (10, 8):
        pool.free(start)
    assert pool.allocate(1) == 8, "the lowest, whichever was freed last"


@pytest.mark.parametrize("kind", KINDS)
def test_misuse(kind: Kind) -> None:
    with pytest.raises(ValueError, match="at least 1 unit, got 0"):
        kind(0)
    pool = kind(4)
    with pytest.raises(ValueError, match="at least 1 unit, got 0"):
        pool.allocate(0)
    start = pool.allocate(4)
    assert start == 0
    pool.free(start)
    for wrong in (0, 1):
        with pytest.raises(KeyError):
            pool.free(wrong)
    pool.check()


@pytest.mark.parametrize("kind", KINDS)
def test_check_sees_a_lost_unit(kind: Kind) -> None:
    pool = kind(8)
    start = pool.allocate(4)
    del pool._runs[start]
    with pytest.raises(AssertionError):
        pool.check()


def test_reservation() -> None:
    def all_three(prompt: int, output: int) -> tuple[int, ...]:
        return tuple(reservation(policy, prompt, output, 100) for policy in RESERVATIONS)

    assert all_three(10, 25) == (100, 42, 35), "the paper's example: 25 becomes 32"
    assert all_three(10, 32) == (100, 42, 42)
    assert all_three(10, 1) == (100, 11, 11)
    assert all_three(50, 40) == (100, 100, 90), "no more than the longest sequence"
    with pytest.raises(ConfigError, match="no reservation policy 'most'; choose from: max, pow2, oracle"):
        reservation("most", 1, 1, 10)


# The manager, on the engine's scheduler.


def engine(kind: Kind, blocks: int, block_size: int, reserve: int, rows: int = 8) -> tuple[Engine, ContiguousManager]:
    backend = FakeBackend(blocks, block_size, 32)
    manager = ContiguousManager(kind(blocks), block_size, lambda seq: reserve or seq.num_prompt + seq.max_tokens)
    config = EngineConfig(max_num_seqs=min(rows, blocks), max_num_batched_tokens=16)
    return Engine(backend, config, manager=manager, policy=FirstCome()), manager


def request(number: int, prompt: int, output: int, n: int = 1) -> Request:
    tokens = [(7 * number + i) % 50 for i in range(prompt)]
    return Request(str(number), tokens, SamplingParams(n=n, max_tokens=output, ignore_eos=True), number)


@pytest.mark.parametrize("kind", KINDS)
@given(
    block_size=st.sampled_from([1, 2, 4]),
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=8),
    reserve=st.sampled_from([0, 24]),
    aborted=st.integers(0, 8),
)
def test_outputs_are_those_of_paged_memory(
    kind: Kind, block_size: int, lengths: list[tuple[int, int, int]], reserve: int, aborted: int
) -> None:
    """FakeBackend sees every read; each output is what an undisturbed run gives; and nothing is ever preempted or shared."""
    blocks = 64 // block_size
    run, manager = engine(kind, blocks, block_size, reserve)
    outputs: dict[tuple[int, int], list[int]] = {}
    for number, (prompt, output, n) in enumerate(lengths):
        run.add(request(number, prompt, output, n))
    for _ in range(3):
        run.step()
    run.abort(str(aborted))
    while run.has_work:
        for output in run.step():
            outputs.setdefault((int(output.request_id), output.index), []).extend(output.token_ids)
        run.check()
        stats = run.stats().kv
        assert stats.saved_blocks == stats.shared_blocks == stats.counters.preemptions == 0
        assert stats.free_blocks == blocks - sum(map(len, manager._runs.values()))
        assert stats.positions_used == sum(seq.num_computed for seq in run.scheduler.running)
    for (number, index), tokens in outputs.items():
        prompt, output, _ = lengths[number]
        if number != aborted:
            expected = expected_output(request(number, prompt, output).prompt_token_ids, derive_seed(number, index), output)
            assert tokens == expected[-len(tokens) :]
    assert run.stats().kv.free_blocks == blocks
    run.check()


def test_a_sequence_waits_for_its_run() -> None:
    run, manager = engine(Buddy, 64, 1, 20)  # two runs of 32
    for number in range(4):
        run.add(request(number, 4, 5 + 2 * number))
    run.step()
    assert [seq.request.request_id for seq in run.scheduler.running] == ["0", "1"]
    assert run.scheduler.short
    assert run.stats().kv.positions_allocated == 64, "what is reserved has an owner"
    assert run.stats().kv.positions_used == 8
    assert manager.needs.start(run.scheduler.waiting[0], NOTHING) > 64
    for _ in range(5):
        run.step()
    assert [seq.request.request_id for seq in run.scheduler.running] == ["1", "2"], "in order, as runs come back"
    while run.has_work:
        run.step()
    assert not run.scheduler.short


def test_what_contiguous_memory_does_not_do() -> None:
    run, manager = engine(FirstFit, 64, 1, 20)
    run.add(request(0, 4, 8))
    run.step()
    (seq,) = run.scheduler.running
    assert not manager.can_fork(seq, 1)
    assert not manager.swap_out(seq)
    with pytest.raises(NotImplementedError):
        manager.fork(seq, seq, 1)
    with pytest.raises(AssertionError, match="21 positions in a run of 20 blocks of 1"):
        manager.grow(seq, 21)
    run.check()
    seq.block_table.reverse()
    with pytest.raises(AssertionError, match="a table differs from its run"):
        run.check()
    seq.block_table.reverse()
    manager._runs.clear()
    with pytest.raises(AssertionError, match="a run has no owner"):
        run.check()
