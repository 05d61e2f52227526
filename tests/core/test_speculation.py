"""Drafts: outputs are those without, what was wrong leaves no trace, nobody gives way for a guess, and bad guessing ends."""

from __future__ import annotations

import random
from typing import Any

import pytest

from core.fake_backend import FakeBackend, ScriptedDrafter, expected_output
from quire.config import EngineConfig
from quire.core.engine import Engine
from quire.core.plan import StepPlan, StepResult, accepted
from quire.core.sequence import Request
from quire.core.speculation import MAX_IDLE, DraftCost, Drafter
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams


class Always:
    """A source of chance that always says: as long as possible, and all of it right (or ``right`` of it)."""

    def __init__(self, right: int = 99) -> None:
        self._right = right

    def randint(self, low: int, high: int) -> int:
        return high

    def choice(self, options: list[int]) -> int:
        return min(self._right, options[-1])


def make(backend: FakeBackend | None = None, **options: Any) -> Engine:
    return Engine(backend or FakeBackend(64, 4, 64), EngineConfig(**{"max_num_seqs": 12, "admission": "watermark", **options}))


def add(engine: Engine, request: Request, right: int = 99) -> None:
    """Queue ``request``; of each of its drafts the first ``right`` tokens are right."""
    engine.add(request)
    for seq in engine.scheduler.waiting:
        if seq.request is request:
            rng: Any = Always(right)
            seq.drafter = ScriptedDrafter(seq.tokens, seq.seed, rng)


def ask(name: str, prompt: list[int], seed: int = 0, eos: tuple[int, ...] = (), **params: Any) -> Request:
    return Request(name, prompt, SamplingParams(**params), seed, eos)


def guess(drafter: Drafter, tokens: list[int], most: int = 7, least_chance: float = 0.4) -> list[int]:
    """What Speculation gets of ``drafter``, whose tokens are ``tokens``."""
    return drafter.draft(most, least_chance) if len(tokens) >= drafter.look_at and drafter.look() else []


def drain(engine: Engine) -> dict[str, list[SequenceOutput]]:
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize(
    ("draft", "sampled", "count"),
    [
        ([], [5], 1),
        ([], [-1], 1),
        ([5, 6], [5, 6, 7], 3),
        ([5, 6], [5, 9, 7], 2),
        ([5, 6], [9, 6, 7], 1),
        ([5, 6], [5, -1, 7], 1),
        ([5, 6], [-1, 6, 7], 1),
    ],
)
def test_accepted(draft: list[int], sampled: list[int], count: int) -> None:
    assert accepted(draft, sampled) == count


def test_a_right_draft_brings_all_of_its_tokens_and_the_next_in_one_step() -> None:
    engine = make()
    prompt = [1, 2, 3, 4, 5]
    add(engine, ask("a", prompt, 3, max_tokens=30, logprobs=0))
    outputs = drain(engine)["a"]
    assert tokens(outputs) == expected_output(prompt, 3, 30)
    assert [len(output.token_ids) for output in outputs] == [1, 8, 8, 8, 5]
    assert [len(output.logprobs or ()) for output in outputs] == [1, 8, 8, 8, 5]
    stats = engine.stats()
    assert (stats.steps, stats.tokens_sampled) == (5, 30)
    assert (stats.tokens_drafted, stats.tokens_accepted) == (7 + 7 + 7 + 4, 7 + 7 + 7 + 4)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_a_wrong_draft_leaves_no_trace(block_size: int) -> None:
    engine = make(FakeBackend(64, block_size, 64))
    add(engine, ask("a", [1, 2, 3], max_tokens=20), right=2)
    got: list[int] = []
    while engine.has_work:
        for output in engine.step():
            got += output.token_ids
        engine.check()
        for seq in engine.scheduler.running:
            assert len(seq.block_table) == -(-seq.num_computed // block_size)
            assert seq.num_computed == len(seq.tokens) - 1
    assert got == expected_output([1, 2, 3], 0, 20)
    assert engine.stats().tokens_accepted == 2 * 6
    # All of it is found again, and none of what was wrong.
    engine.add(ask("b", [1, 2, 3, *got, 7], max_tokens=1))
    (output,) = drain(engine)["b"]
    assert output.cached_tokens == 3 + 20 - 1


@pytest.mark.parametrize("at", range(1, 12))
def test_stops_inside_an_accepted_run_cut_exactly_there(at: int) -> None:
    path = expected_output([1, 2, 3], 0, 12)
    first = path.index(path[at]) + 1

    def run(eos: tuple[int, ...] = (), **params: Any) -> SequenceOutput:
        engine = make()
        add(engine, ask("a", [1, 2, 3], eos=eos, **{"max_tokens": 12, **params}))
        outputs = drain(engine)["a"]
        last = outputs[-1]
        assert engine.stats().tokens_sampled == len(tokens(outputs))
        last.token_ids = tokens(outputs)
        assert engine.stats().kv.used_blocks == 0
        return last

    ended = run((path[at],))
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", None, path[:first])
    ended = run(stop_token_ids=[path[at]])
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", path[at], path[:first])
    ended = run((path[at],), ignore_eos=True)
    assert (ended.finish_reason, ended.token_ids) == ("length", path)
    ended = run((path[at],), min_tokens=min(first + 1, 12))
    assert ended.token_ids[: first + 1] == path[: first + 1]
    ended = run(max_tokens=at)
    assert (ended.finish_reason, ended.token_ids) == ("length", path[:at])


def test_the_context_is_never_exceeded() -> None:
    engine = make(FakeBackend(12, 4, 17))
    add(engine, ask("a", [1, 2, 3], max_tokens=None))
    outputs = drain(engine)["a"]
    assert outputs[-1].finish_reason == "length"
    assert tokens(outputs) == expected_output([1, 2, 3], 0, 14)


@pytest.mark.parametrize("right", [0, 1, 99])
def test_a_step_is_filled_up_to_so_many_positions_in_equal_parts(right: int) -> None:
    engine = make(speculation_positions=8)
    for i in range(4):
        add(engine, ask(str(i), [1 + i, 2, 3], i, max_tokens=12), right)
    engine.step()
    backend: Any = engine.backend
    outputs = drain(engine)
    assert [[len(work.draft) for work in plan.work] for plan in backend.plans[1:2]] == [[1, 1, 1, 1]]
    assert all(plan.num_tokens <= 8 or not any(work.draft for work in plan.work) for plan in backend.plans)
    for i in range(4):
        assert tokens(outputs[str(i)]) == expected_output([1 + i, 2, 3], i, 12)[1:]


def test_full_steps_and_prompts_get_no_drafts() -> None:
    engine = make(speculation_positions=8)
    for i in range(8):
        add(engine, ask(str(i), [1 + i, 2, 3], max_tokens=10))
    backend: Any = engine.backend
    drain(engine)
    assert engine.stats().tokens_drafted == 0
    engine = make(max_num_batched_tokens=8)
    add(engine, ask("a", [1, 2], max_tokens=4))
    engine.step()
    engine.add(ask("long", list(range(40)), max_tokens=1))
    backend = engine.backend
    while engine.scheduler.waiting or any(seq.num_computed < seq.num_prompt for seq in engine.scheduler.running):
        engine.step()
        assert backend.plans[-1].num_tokens <= 8
    assert engine.stats().tokens_drafted == 0


def test_beams_and_first_tokens_are_not_guessed() -> None:
    engine = make()
    for i, params in enumerate(({"beam_width": 3}, {"max_tokens": 1}, {"n": 3, "max_tokens": 2})):
        add(engine, ask(str(i), [1, 2, 3 + i], **{"max_tokens": 8, **params}))
        drain(engine)
    assert engine.stats().tokens_drafted == 0


def test_nothing_is_guessed_when_it_is_switched_off() -> None:
    engine = make(speculation="off")
    add(engine, ask("a", [1, 2, 3], max_tokens=20))
    assert tokens(drain(engine)["a"]) == expected_output([1, 2, 3], 0, 20)
    assert engine.stats().tokens_drafted == 0


@pytest.mark.parametrize("right", [0, 3, 99])
def test_nobody_gives_way_for_a_guess(right: int) -> None:
    """In a pool that just holds both sequences, drafts cause no preemption."""
    for admission in ("watermark", "no-evict", "past-future"):
        engine = make(FakeBackend(16, 4, 32), admission=admission, speculation_positions=32)
        for i in range(2):
            add(engine, ask(str(i), [1 + i, 2, 3], i, max_tokens=29), right)
        outputs = drain(engine)
        assert engine.stats().preemptions == 0
        assert (engine.stats().tokens_accepted > 0) == (right > 0)
        for i in range(2):
            assert tokens(outputs[str(i)]) == expected_output([1 + i, 2, 3], i, 29)


def test_where_nothing_is_ever_evicted_drafts_need_room_for_everybody() -> None:
    """Two sequences of which one ends before the other needs its memory: no-evict lets both in, since they grow alike."""
    engine = make(FakeBackend(12, 4, 48), admission="no-evict")
    add(engine, ask("long", [1, 2, 3], max_tokens=44))
    add(engine, ask("short", [4, 5, 6], 1, max_tokens=5), right=0)
    engine.step()
    engine.step()
    assert engine.stats().running == 2
    assert engine.stats().tokens_drafted == 0
    outputs = drain(engine)
    assert engine.stats().preemptions == 0
    assert engine.stats().tokens_accepted > 0, "alone again, it is guessed"
    assert tokens(outputs["long"])[-1] == expected_output([1, 2, 3], 0, 44)[-1]


class FailsAfter(FakeBackend):
    """Logits after ``length`` tokens are damaged."""

    length = 0

    def execute(self, plan: StepPlan) -> StepResult:
        lengths = {row: len(held.tokens) for row, held in self.rows.items()}
        lengths |= {start.row: len(start.tokens) for start in plan.starts}
        result = super().execute(plan)
        at = 0
        for work in plan.work:
            if work.sample:
                failing = self.length - lengths[work.row]
                if 0 <= failing <= len(work.draft):
                    result.tokens[at + failing] = -1
                    result.errors[work.row] = "logits are not finite"
                    keep = lengths[work.row] + accepted(work.draft, result.tokens[at : at + 1 + len(work.draft)])
                    del self.rows[work.row].tokens[keep:]
                at += 1 + len(work.draft)
        return result


@pytest.mark.parametrize("length", range(3, 15))
def test_a_failure_comes_after_the_tokens_before_it(length: int) -> None:
    backend = FailsAfter(64, 4, 64)
    backend.length = length
    engine = make(backend)
    add(engine, ask("a", [1, 2, 3], max_tokens=20))
    outputs = drain(engine)["a"]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("error", "logits are not finite")
    assert tokens(outputs) == expected_output([1, 2, 3], 0, length - 3)


def test_a_failure_behind_a_wrong_guess_is_none() -> None:
    backend = FailsAfter(64, 4, 64)
    backend.length = 10
    engine = make(backend)
    add(engine, ask("a", [1, 2, 3], max_tokens=6), right=1)
    assert tokens(drain(engine)["a"]) == expected_output([1, 2, 3], 0, 6)


def test_drafts_get_longer_while_they_are_right() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    known = [*text, 1, 2]
    drafter = Drafter(known)
    lengths = []
    for _ in range(12):
        draft = guess(drafter, known)
        truth = [text[(len(known) + i) % 10] for i in range(len(draft) + 1)]
        assert draft == truth[:-1]
        lengths.append(len(draft))
        known += truth
        drafter.learn(len(draft), len(draft))
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (1, 7)


def test_drafting_that_is_always_wrong_nearly_ends_and_begins_again() -> None:
    rng = random.Random(0)
    known = [0, 1, 2, 3]
    drafter = Drafter(known)
    tries = []
    for _ in range(1000):  # the same three tokens, and then a new one
        known += [1, 2, 3]
        draft = guess(drafter, known)
        if draft:
            tries.append(len(draft))
        known.append(rng.randrange(10, 1 << 20))
        if draft:
            drafter.learn(len(draft), 0)
    assert sum(tries) < 0.05 * 1000
    # The text repeats itself after all.
    known += known[-200:]
    drafted = 0
    for token in known[-200:]:
        draft = guess(drafter, known)
        if draft:
            right = draft[0] == token
            drafter.learn(len(draft), int(right))
            drafted += right
        known.append(token)
    assert drafted > 20


def test_a_draft_must_be_likelier_where_more_sequences_share_the_step() -> None:
    known = [1, 2, 3, 4, 5, 6, 1, 2]
    assert guess(Drafter(known), known) == [3]
    assert guess(Drafter(known), known, least_chance=0.6) == []
    assert guess(Drafter(known), known, 0, 0.1) == []


def test_guesses_have_to_promise_more_than_their_steps_cost() -> None:
    cost = DraftCost()
    assert cost.pays(1, 1, 0.4)
    for _ in range(20):
        cost.learn(1, 0, 1.0)
        cost.learn(1, 2, 1.9)
    assert not cost.pays(1, 1, 0.6)
    assert cost.pays(1, 5, 2.0)
    assert not cost.pays(4, 4, 2.0)  # of four tokens that would have come anyway
    cost.learn(2, 1, 50.0)  # how long two rows take without drafts is not known
    for _ in range(20):
        cost.learn(1, 2, 1.1)
    assert cost.pays(1, 1, 0.4)


def test_a_cost_that_was_learned_at_a_bad_moment_is_forgotten() -> None:
    cost = DraftCost()
    cost.learn(1, 0, 1.0)
    for _ in range(20):
        cost.learn(1, 1, 9.0)
    assert not cost.pays(1, 7, 2.0)
    assert any(cost.pays(1, 7, 2.0) for _ in range(1000))


@pytest.mark.parametrize(("seconds", "many"), [(0.1, True), (1.0, False)])
def test_drafts_that_cost_more_than_they_bring_end(seconds: float, many: bool) -> None:
    class Timed(FakeBackend):
        now = 0.0

        def execute(self, plan: StepPlan) -> StepResult:
            self.now += 1.0 + seconds * any(work.draft for work in plan.work)
            return super().execute(plan)

    class Halfhearted(ScriptedDrafter):
        def look(self) -> bool:
            return len(self._tokens) % 3 == 0

        def expected(self, count: int) -> float:
            return 0.5

        def draft(self, most: int, least_chance: float) -> list[int]:
            return super().draft(min(most, 1), least_chance)

    backend = Timed(64, 4, 64)
    engine = Engine(backend, EngineConfig(max_num_seqs=12, admission="watermark"), clock=lambda: backend.now)
    engine.add(ask("a", [1, 2, 3], max_tokens=50))
    seq = engine.scheduler.waiting[0]
    rng: Any = Always()
    seq.drafter = Halfhearted(seq.tokens, seq.seed, rng)
    outputs = drain(engine)
    assert tokens(outputs["a"]) == expected_output([1, 2, 3], 0, 50)
    drafted = sum(bool(work.draft) for plan in backend.plans for work in plan.work)
    assert drafted > 8 if many else drafted <= 4, drafted


def test_where_nothing_is_found_it_is_looked_for_less_often_and_found_all_the_same() -> None:
    known = list(range(1000))
    drafter, looks = Drafter(known), 0
    for token in range(1000, 1400):
        if len(known) >= drafter.look_at:
            looks += 1
            assert not drafter.look()
        known.append(token)
    assert looks < 150
    known += known[20:25]
    drafted = []
    for token in known[25:40]:
        drafted += guess(drafter, known, 1)
        known.append(token)
    assert len(drafted) >= 10


class Unlucky(Drafter):
    """Finds nothing; notes when it was asked, and when it wanted to be."""

    def __init__(self, tokens: list[int], asked: list[tuple[int, int]]) -> None:
        super().__init__(tokens)
        self._asked = asked

    def look(self) -> bool:
        self._asked.append((len(self._tokens), self.look_at))
        self.skip()
        return False


def test_steps_in_which_nobody_looks_are_passed_by_and_no_look_is_missed() -> None:
    engine = make(FakeBackend(128, 4, 256), max_num_seqs=2, prefix_caching=False)
    asked: dict[str, list[tuple[int, int]]] = {"a": [], "b": [], "c": []}
    for name, count in (("a", 200), ("b", 90), ("c", 100)):  # c takes b's place while a goes on
        engine.add(ask(name, [1, 2, ord(name) - 96], max_tokens=count))
        seq = engine.scheduler.waiting[-1]
        seq.drafter = Unlucky(seq.tokens, asked[name])
    drain(engine)
    for name, (first, *others) in asked.items():
        assert first[0] <= 4 + MAX_IDLE, f"{name}: a new sequence is looked at soon"
        assert len(others) > 10
        assert all(at == wanted for at, wanted in others), name
