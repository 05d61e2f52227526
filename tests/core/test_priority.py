"""Whoever has a higher priority does not wait for those of a lower one to end: not for a row, not for memory."""

from __future__ import annotations

from typing import Any

import pytest

from core.fake_backend import FakeBackend, expected_output
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.events import Preempted
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

LATER = 1 << 30


def make(num_blocks: int = 64, *, window: int = 0, **options: Any) -> tuple[Engine, list[str]]:
    engine = Engine(
        FakeBackend(num_blocks, 4, 64, window=window),
        EngineConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 64, "admission": "watermark", **options}),
    )
    victims: list[str] = []
    engine.listen(lambda event: victims.append(event.request_id) if isinstance(event, Preempted) else None)
    return engine, victims


def add(engine: Engine, name: str, prompt: list[int], priority: int, max_tokens: int, **params: Any) -> None:
    engine.add(Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), 0, (), priority))


def drain(engine: Engine) -> dict[str, tuple[int, list[int]]]:
    """Request → (step of its first token, tokens of its first sample)."""
    found: dict[str, tuple[int, list[int]]] = {}
    step = 0
    while engine.has_work:
        step += 1
        for output in engine.step():
            _, tokens = found.setdefault(output.request_id, (step, []))
            if output.index == 0:
                tokens += output.token_ids
        engine.check()
    return found


def test_rows_are_given_up_in_the_order_of_priority() -> None:
    engine, victims = make()
    for i in range(4):
        add(engine, f"later-{i}", [i] * 8, LATER, 20)
    engine.step()
    for name, priority in (("b", 0), ("a", -1), ("c", LATER), ("d", LATER - 1)):
        add(engine, name, [ord(name) % 50] * 8, priority, 10)
    found = drain(engine)
    assert {name: found[name][0] for name in "abd"} == {"a": 1, "b": 1, "d": 1}, "they do not wait for a single step"
    assert victims == ["later-3", "later-2", "later-1"], "the last first, and one for each that came"
    assert found["c"][0] > 1, "an equal priority preempts nobody"
    assert [len(tokens) for _, tokens in found.values()] == [19 if name.startswith("later") else 10 for name in found]
    assert found["later-3"][1] == expected_output([3] * 8, 0, 20)[1:], "and those that made way lose nothing (the first was put out before)"


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("admission", ["watermark", "no-evict", "past-future"])
def test_memory_is_given_up(admission: str, window: int) -> None:
    """The pool holds little more than two whole sequences."""
    engine, victims = make(44, admission=admission, window=window)
    for i in range(3):
        add(engine, f"later-{i}", [i] * 40, LATER, 24)
    for _ in range(3):
        engine.step()
    running = len(engine.scheduler.running)
    add(engine, "live-0", [9] * 40, 0, 24)
    add(engine, "live-1", [8] * 40, 0, 24)
    found = drain(engine)
    assert found["live-0"][0] <= 4, "a step or two for each that makes way"
    assert found["live-1"][0] <= 6
    assert set(victims) <= {f"later-{i}" for i in range(running)}
    assert found["live-0"][1] == expected_output([9] * 40, 0, 24)
    assert all(len(tokens) >= 20 for _, tokens in found.values())


def test_a_long_prompt_that_started_early_gets_the_memory_too() -> None:
    engine, victims = make(20, max_num_batched_tokens=16)
    add(engine, "later", [1] * 40, LATER, 20)
    for _ in range(4):
        engine.step()
    add(engine, "live", list(range(44)), 0, 4)
    found = drain(engine)
    assert victims == ["later"]
    assert found["live"][0] <= 6, "44 positions at 16 a step, and not after the other's twenty tokens"
    assert found["live"][1] == expected_output(list(range(44)), 0, 4)


def test_beams_and_samples_make_way_and_come_back() -> None:
    engine, _ = make(64)
    add(engine, "beams", [1] * 8, LATER, 12, use_beam_search=True, beam_width=4, temperature=0)
    for _ in range(3):
        engine.step()
    add(engine, "samples", [2] * 8, LATER - 1, 12, n=3)
    engine.step()
    for i in range(3):
        add(engine, f"live-{i}", [3 + i] * 8, 0, 6)
    found = drain(engine)
    assert all(found[f"live-{i}"][0] == 1 for i in range(3))
    assert len(found) == 5


def crowd(max_num_seqs: int, max_num_batched_tokens: int, **options: Any) -> tuple[Engine, list[str]]:
    """An engine whose rows all decode, at the lowest priority; and who was preempted."""
    backend = FakeBackend(num_blocks=4000, block_size=16, max_model_len=2000)
    backend._look = lambda *_: None  # type: ignore[method-assign]  # takes the square of the length
    config = EngineConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, speculation="off", admission="watermark", **options
    )
    engine = Engine(backend, config)
    victims: list[str] = []
    engine.listen(lambda event: victims.append(event.request_id) if isinstance(event, Preempted) else None)
    for i in range(max_num_seqs):
        add(engine, f"later-{i}", [i] * 20, LATER, 1000)
    while any(not seq.num_generated for seq in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    return engine, victims


@pytest.mark.parametrize("caching", [True, False])
def test_samples_take_rows_when_they_can_start(caching: bool) -> None:
    """And not while the first one computes their prompt, again and again in each of its steps."""
    engine, victims = crowd(8, 32, prefix_caching=caching)
    add(engine, "live", list(range(49)) * 10, 0, 4, n=4)
    while any(name.startswith("live") for name in engine._live):
        engine.step()
    assert len(victims) == 4, "one for each sample"


@pytest.mark.parametrize("count", [5, 12, 100])
def test_prompts_that_are_one_too_many_take_no_rows(count: int) -> None:
    """At most four are computed in chunks: a row for a fifth would be free in vain."""
    engine, victims = crowd(16, 64)
    for i in range(count):
        add(engine, f"live-{i}", [(i + k * 7) % 49 for k in range(500)], 0, 1)
    steps = used = 0
    while any(name.startswith("live") for name in engine._live):
        engine.step()
        steps, used = steps + 1, used + len(engine.scheduler.running)
    assert len(victims) <= count + 4, "one for each; with the last of them some come too early"
    assert used / steps > 15


@pytest.mark.parametrize("lines", [1, 4, 8])
@pytest.mark.parametrize(("length", "output", "most"), [(4000, 4, 256), (3, 300, 8)], ids=["prompts", "decodes"])
def test_a_batch_leaves_a_part_of_every_step_to_others(lines: int, length: int, output: int, most: int) -> None:
    """Long prompts in chunks, or as many sequences that decode as a step has positions: who comes then has a token soon."""
    backend = FakeBackend(num_blocks=3000, block_size=16, max_model_len=5000)
    backend._look = lambda *_: None  # type: ignore[method-assign]  # takes the square of the length
    engine = Engine(backend, EngineConfig(max_num_seqs=64, max_num_batched_tokens=most, speculation="off"))
    for i in range(lines if length > 100 else 2 * lines):
        add(engine, f"line {i}", [(i + k * 7) % 49 + 1 for k in range(length)], LATER, output)
    for _ in range(8):
        engine.step()
    add(engine, "live", [1, 2, 3], 0, 5)
    steps = next(n for n in range(1, 2000) if any(made.request_id == "live" for made in engine.step()))
    assert steps <= 4
