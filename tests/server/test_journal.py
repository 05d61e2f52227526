"""The journal by itself: what is sent to which engine, what an engine's death does to whom."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.sequence import Request
from quire.outputs import SequenceOutput
from quire.sampling_params import SamplingParams
from quire.server.engine.journal import FAIL_AT, SUSPECT_AT, Entry, Journal
from quire.structured import Structured

CRASHES = 2
"""So many of them make a suspect."""


def request(name: str, n: int = 1) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(n=n), 0)


def formed(name: str) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(structured=Structured.regex("a+")), 0)


def journal(*names: str) -> Journal:
    made = Journal()
    for name in names:
        made.add(request(name))
    return made


def names(entries: list[Entry]) -> list[str]:
    return [entry.request.request_id for entry in entries]


def output(name: str, *tokens: int, index: int = 0, reason: str | None = None) -> SequenceOutput:
    return SequenceOutput(name, index, list(tokens), None, reason)


def test_everything_is_sent_once_and_again_to_the_next_engine() -> None:
    made = journal("a", "b")
    assert names(made.due()) == ["a", "b"]
    assert made.due() == []
    made.add(request("c"))
    made.note(output("a", 7, 8))
    made.note(output("b", 9, reason="stop"))
    assert made.engine_died() == []
    again = made.due()
    assert [(e.request.request_id, e.resumed) for e in again] == [("a", [[7, 8]]), ("c", [])]


def test_single_tokens_are_noted_as_outputs_are() -> None:
    made, other = journal("a", "b"), journal("a", "b")
    for one in (made, other):
        one.due()
        one.note(output("b", 1, reason="stop"))
        for _ in range(CRASHES):
            one.engine_died()
            one.due()
    assert made.num_suspects == 1
    made.note(output("a", 7))
    other.note_tokens([("a", 0, 7), ("b", 0, 8), ("gone", 0, 9)])
    assert made.num_suspects == other.num_suspects == 0
    for one in (made, other):
        one.engine_died()
        assert [(e.request.request_id, e.resumed, e.deaths) for e in one.due()] == [("a", [[7]], 1)]


def test_sequences_that_have_ended_stay_ended() -> None:
    made = Journal()
    made.add(request("a", n=3))
    made.due()
    made.note(output("a", 5, index=1, reason="length"))
    made.note(output("a", 4, index=2))
    assert made.end("a", 0), "the engine has to be told"
    made.engine_died()
    assert not made.end("b"), "unknown: nothing to tell"
    (entry,) = made.due()
    assert entry.resumed == [None, None, [4]]
    assert made.end("a")
    assert len(made) == 0


def test_what_has_not_been_sent_need_not_be_aborted() -> None:
    made = journal("a", "b")
    assert not made.end("a")
    assert names(made.due()) == ["b"]


def test_a_suspect_runs_alone_until_it_makes_a_token() -> None:
    made = journal("a", "b", "c")
    for _ in range(CRASHES):
        made.due()
        made.note(output("b", 1))
        assert made.engine_died() == []
    assert made.num_suspects == 2
    assert names(made.due()) == ["a"]
    made.add(request("d"))
    assert made.due() == []
    made.note(output("a", 1))
    assert names(made.due()) == ["c"]
    assert made.end("c"), "its client has left"
    assert names(made.due()) == ["b", "d"]
    made.note(output("b", 2))
    made.engine_died()
    assert sorted(names(made.due())) == ["a", "b", "d"], "a was sent once more, and has made a token since it was suspected"


def test_it_fails_when_it_dies_alone_for_the_second_time_and_the_others_go_on() -> None:
    made = journal("poison", "a", "b")
    for _ in range(CRASHES):
        made.due()
        for name in ("a", "b"):
            made.note(output(name, 1))
        made.engine_died()
    assert names(made.due()) == ["poison"]
    assert made.engine_died() == [], "somebody may have killed the engine from outside"
    assert names(made.due()) == ["poison"]
    assert names(made.engine_died()) == ["poison"]
    assert names(made.due()) == ["a", "b"]
    assert made.num_suspects == 0


def test_in_company_it_may_have_been_anothers_fault() -> None:
    made = journal("a", "poison")
    for _ in range(CRASHES):
        made.due()
        made.engine_died()
    assert names(made.due()) == ["a"]
    made.note(output("a", 1))
    assert names(made.due()) == ["poison"], "a goes on meanwhile"
    assert made.engine_died() == []
    assert names(made.due()) == ["poison"]
    assert made.engine_died() == []
    assert names(made.due()) == ["poison"]
    assert names(made.engine_died()) == ["poison"]
    assert names(made.due()) == ["a"]


def test_kills_from_outside_make_suspects_late() -> None:
    made = journal("a", "beams")
    for _ in range(SUSPECT_AT - 1):
        made.due()
        assert made.engine_died("kill") == []
        assert made.num_suspects == 0
    made.due()
    made.note(output("a", 1))
    assert made.engine_died("kill") == []
    assert names(made.due()) == ["beams"], "whoever has nothing to show after six of them is tried"
    assert made.engine_died("kill") == []
    assert names(made.due()) == ["beams"]
    (failed,) = made.engine_died("kill")
    assert failed.deaths == SUSPECT_AT + 2, "alone it makes no difference what ended them"


def test_a_form_that_can_not_be_followed_is_nobody_elses_fault() -> None:
    made = journal("a", "b")
    made.add(formed("endless"))
    assert names(made.due()) == ["a", "b", "endless"]
    assert names(made.engine_died("form")) == ["endless"], "the only one that has a form fails at once"
    assert made.is_clear("a")
    assert names(made.due()) == ["a", "b"]


def test_of_several_forms_each_is_tried_alone() -> None:
    made = journal("a")
    for name in ("endless", "good"):
        made.add(formed(name))
    made.due()
    assert made.engine_died("form") == []
    assert names(made.due()) == ["endless"]
    assert names(made.engine_died("form")) == ["endless"]
    assert names(made.due()) == ["good"]
    made.note(output("good", 1))
    assert names(made.due()) == ["a"]


def test_a_queue_that_lives_through_many_deaths_loses_nobody() -> None:
    """Deaths that are nobody's fault: those that had no chance to make a token are tried alone, one after the other."""
    made = journal(*(f"r{i}" for i in range(50)))
    for _ in range(CRASHES):
        made.due()
        assert made.engine_died() == []
    tried = []
    while entries := made.due():
        tried += names(entries)
        for entry in entries:
            made.note(output(entry.request.request_id, 1))
    assert sorted(tried) == sorted(f"r{i}" for i in range(50))


actions = st.lists(st.one_of(
    st.tuples(st.just("add"), st.integers(1, 3)),
    st.tuples(st.just("token"), st.integers(0, 40)),
    st.tuples(st.just("finish"), st.integers(0, 40)),
    st.tuples(st.just("leave"), st.integers(0, 40)),
    st.tuples(st.just("die"), st.integers(0, 1)),
), max_size=60)  # fmt: skip


@given(actions)
@settings(max_examples=300, deadline=None)
def test_random_lives(script: list[tuple[str, int]]) -> None:
    """Against a model: every live request is at the engine, or waits behind a suspect; what is resumed is what was noted."""
    made = Journal()
    live: dict[str, list[list[int] | None]] = {}
    at_engine: dict[str, Any] = {}
    for step, (action, number) in enumerate(script):
        if action == "add":
            live[f"r{step}"] = [[] for _ in range(number)]
            made.add(request(f"r{step}", n=number))
        elif action == "die":
            for entry in made.engine_died("kill" if number else "crash"):
                assert entry.blame == FAIL_AT
                assert entry.deaths >= 4
                assert list(at_engine) == [entry.request.request_id]
                del live[entry.request.request_id]
            at_engine.clear()
        elif at_engine:
            name = sorted(at_engine)[number % len(at_engine)]
            open_ = [i for i, tokens in enumerate(live[name]) if tokens is not None]
            index = open_[number % len(open_)]
            if action == "leave":
                assert made.end(name)
                live[name] = [None for _ in live[name]]
            else:
                made.note(output(name, step, index=index, reason="stop" if action == "finish" else None))
                tokens = live[name][index]
                assert tokens is not None
                live[name][index] = None if action == "finish" else [*tokens, step]
            if all(tokens is None for tokens in live[name]):
                del live[name], at_engine[name]
        for entry in made.due():
            name = entry.request.request_id
            assert name not in at_engine
            assert entry.emitted == live[name]
            at_engine[name] = True
            assert entry.blame < FAIL_AT
        assert len(made) == len(live)
        assert at_engine.keys() <= live.keys()
        assert made.num_suspects or at_engine.keys() == live.keys()
