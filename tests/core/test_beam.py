"""Beam search over a made-up language model: a table of log-probabilities drawn from the tokens so far."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.fake_backend import FakeBackend, candidates
from quire.config import EngineConfig
from quire.core.beam import BeamSearch, EarlyStopping, Hypothesis, Move
from quire.core.engine import Engine
from quire.core.sequence import Request
from quire.sampling_params import SamplingParams

Row = list[tuple[int, float]]
Model = Callable[[tuple[int, ...]], Row]
EARLY: list[EarlyStopping] = [False, True, "never"]


def table(vocabulary: int, seed: int) -> Model:
    """tokens so far → (token, log-probability) of the whole vocabulary, most likely first."""

    @cache
    def row(tokens: tuple[int, ...]) -> Row:
        generator = random.Random(f"{seed} {tokens}")
        logits = [generator.gauss(0.0, 1.5) for _ in range(vocabulary)]
        norm = math.log(sum(map(math.exp, logits)))
        return sorted(((token, logit - norm) for token, logit in enumerate(logits)), key=lambda entry: -entry[1])

    return row


def run(search: BeamSearch, model: Model) -> tuple[list[Hypothesis], int]:
    """The hypotheses, and the number of steps taken."""
    live: list[tuple[int, ...]] = [()]
    steps = 0
    while live:
        assert search.num_live == len(live) <= search.width
        moves = search.advance([model(tokens)[: search.num_candidates] for tokens in live])
        live = [(*live[m.parent], m.token) for m in moves]
        assert len(set(live)) == len(live)
        steps += 1
        assert all(len(tokens) == steps < search.max_tokens for tokens in live)
    assert search.num_live == 0
    return search.hypotheses(), steps


def every_sequence(model: Model, vocabulary: int, ends: set[int], max_tokens: int) -> dict[tuple[int, ...], float]:
    """All that can be generated → sum of log-probabilities."""
    sums: dict[tuple[int, ...], float] = {}
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(vocabulary), repeat=length):
            if ends.isdisjoint(tokens[:-1]) and (tokens[-1] in ends or length == max_tokens):
                sums[tokens] = sum(dict(model(tokens[:i]))[token] for i, token in enumerate(tokens))
    return sums


@pytest.mark.parametrize("penalty", [-0.5, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("ends", [(), (1,), (0, 3)], ids=str)
def test_wide_search_is_exhaustive(ends: tuple[int, ...], early: EarlyStopping, penalty: float) -> None:
    """More beams than sequences exist: all of them come back, in the order of their scores; and fewer than were asked for."""
    for seed in range(3):
        model = table(4, seed)
        search = BeamSearch(300, 4, ends, length_penalty=penalty, early_stopping=early, num_return=300)
        found, _ = run(search, model)
        sums = every_sequence(model, 4, set(ends), 4)
        expected = sorted(sums, key=lambda tokens: sums[tokens] / len(tokens) ** penalty, reverse=True)
        assert [tuple(h.token_ids) for h in found] == expected
        for hypothesis in found:
            tokens = tuple(hypothesis.token_ids)
            assert hypothesis.logprobs == [dict(model(tokens[:i]))[token] for i, token in enumerate(tokens)]
            assert hypothesis.cumulative_logprob == pytest.approx(sums[tokens])
            assert hypothesis.score == pytest.approx(sums[tokens] / len(tokens) ** penalty)
            assert hypothesis.finish_reason == ("stop" if tokens[-1] in ends else "length")


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("early", EARLY)
def test_width_one_is_greedy(early: EarlyStopping, penalty: float) -> None:
    reasons = set()
    for seed in range(30):
        model = table(8, seed)
        greedy: list[int] = []
        while len(greedy) < 6 and (not greedy or greedy[-1] not in (2, 5)):
            greedy.append(model(tuple(greedy))[0][0])
        (found,), steps = run(BeamSearch(1, 6, (2, 5), length_penalty=penalty, early_stopping=early), model)
        assert (found.token_ids, steps) == (greedy, len(greedy))
        reasons.add(found.finish_reason)
    assert reasons == {"stop", "length"}


# 0 ends. It is likely at once; after two other tokens nearly everything is certain, so that long sequences score well.
LADDER: dict[tuple[int, ...], Row] = {
    (): [(0, math.log(0.5)), (1, math.log(0.3)), (2, math.log(0.2))],
    (1,): [(0, math.log(0.6)), (1, math.log(0.3)), (2, math.log(0.1))],
    (2,): [(1, math.log(0.6)), (2, math.log(0.3)), (0, math.log(0.1))],
    (1, 1): [(1, math.log(0.98)), (2, math.log(0.01)), (0, math.log(0.01))],
    (2, 1): [(1, math.log(0.98)), (2, math.log(0.01)), (0, math.log(0.01))],
    (1, 1, 1): [(0, math.log(0.99)), (1, math.log(0.006)), (2, math.log(0.004))],
    (2, 1, 1): [(0, math.log(0.99)), (1, math.log(0.006)), (2, math.log(0.004))],
}


@pytest.mark.parametrize(
    ("early", "penalty", "steps", "expected"),
    [
        (True, 1.0, 2, [(0,), (1, 0)]),  # two hypotheses: done
        (False, 0.0, 2, [(0,), (1, 0)]),  # a sum only falls
        ("never", 0.0, 2, [(0,), (1, 0)]),
        # False stops too: log(0.2 * 0.6) / 2 < log(0.5). "never" sees that 0.12 may be worth log(0.12) / 4 > log(0.5).
        (False, 1.0, 2, [(0,), (1, 0)]),
        ("never", 1.0, 4, [(2, 1, 1, 0), (1, 1, 1, 0)]),
    ],
)
def test_early_stopping(early: EarlyStopping, penalty: float, steps: int, expected: list[tuple[int, ...]]) -> None:
    def model(tokens: tuple[int, ...]) -> Row:
        return LADDER[tokens]

    found, taken = run(BeamSearch(2, 4, (0,), early_stopping=early, length_penalty=penalty, num_return=2), model)
    assert (taken, [tuple(h.token_ids) for h in found]) == (steps, expected)


@pytest.mark.parametrize("early", [False, "never"])
def test_goes_on_while_the_worst_hypothesis_may_fall(early: EarlyStopping) -> None:
    """A negative penalty makes length costly: the live beam counts at its present length, against the worst hypothesis."""
    search = BeamSearch(2, 9, (0,), early_stopping=early, length_penalty=-1.0, num_return=2)
    search.advance([[(0, -1.0), (1, -1.1), (2, -1.2)]])
    moves = search.advance([[(3, -0.1), (0, -1.0), (4, -5.0)], [(3, -5.0), (4, -5.5), (5, -6.0)]])
    assert [h.score for h in search.hypotheses()] == pytest.approx([-1.0, -4.2])
    assert moves == [Move(0, 3), Move(0, 4)]  # the best is worth -1.2 * 2 now, -1.2 * 9 at the limit


@pytest.mark.parametrize("early", [False, "never"])
def test_an_equal_beam_is_no_better(early: EarlyStopping) -> None:
    search = BeamSearch(2, 9, (0,), early_stopping=early, length_penalty=0.0, num_return=2)
    search.advance([[(0, -1.0), (1, -1.5), (2, -2.0)]])
    assert search.advance([[(0, -0.5), (3, -0.5), (4, -5.0)], [(3, -5.0), (4, -5.5), (5, -6.0)]]) == []
    assert [h.score for h in search.hypotheses()] == [-1.0, -2.0]


def test_end_token_outside_the_best_candidates_is_no_hypothesis() -> None:
    """Only the ``width`` best candidates of a step can end; a stop token further down neither ends nor lives on."""
    search = BeamSearch(2, 9, (0,), num_return=2)
    assert search.num_candidates == 3
    assert search.advance([[(1, -0.5), (2, -1.5), (0, -1.6)]]) == [Move(0, 1), Move(0, 2)]
    assert search.hypotheses() == []
    assert search.advance([[(0, -0.1), (3, -3.0), (4, -4.0)], [(5, -0.2), (6, -3.0), (0, -9.0)]]) == [Move(1, 5), Move(0, 3)]
    (found,) = search.hypotheses()
    assert (found.token_ids, found.logprobs, found.finish_reason, found.stop_reason) == ([1, 0], [-0.5, -0.1], "stop", None)
    assert (found.cumulative_logprob, found.score) == (-0.6, -0.3)


def test_stop_reason() -> None:
    search = BeamSearch(3, 2, (0,), stop_token_ids=(7, 0), num_return=3)
    assert search.num_candidates == 5
    assert search.advance([[(7, -1.0), (1, -1.1), (2, -1.2), (3, -1.3), (4, -1.4)]]) == [Move(0, 1), Move(0, 2), Move(0, 3)]
    assert search.advance([[(0, -0.1), (5, -0.2)], [(0, -9.0)], [(0, -9.0)]]) == []
    found = search.hypotheses()
    assert [(h.token_ids, h.finish_reason, h.stop_reason) for h in found] == [
        ([1, 0], "stop", 0),
        ([1, 5], "length", None),
        ([7], "stop", 7),
    ]


def test_ties() -> None:
    """The better beam first, then the order of the caller; among hypotheses the older."""
    search = BeamSearch(2, 3, (), num_return=2, length_penalty=0.0)
    assert search.advance([[(4, -1.0), (5, -1.0), (6, -1.0)]]) == [Move(0, 4), Move(0, 5)]
    assert search.advance([[(3, -1.0), (2, -1.0)], [(1, -1.0), (0, -1.0)]]) == [Move(0, 3), Move(0, 2)]
    search = BeamSearch(2, 2, (0,), num_return=2, length_penalty=0.0)
    search.advance([[(0, -1.0), (1, -1.0), (2, -1.0)]])
    assert search.advance([[(5, 0.0)], [(6, 0.0)]]) == []
    assert [h.token_ids for h in search.hypotheses()] == [[0], [1, 5]]


def test_impossible_tokens_are_not_chosen() -> None:
    """A masked row leaves fewer beams; with none left the search ends."""
    search = BeamSearch(3, 9, (0,), num_return=3)
    assert search.advance([[(1, -0.1), (2, -math.inf), (3, math.nan)]]) == [Move(0, 1)]
    assert search.advance([[(2, -0.1), (4, -0.2), (0, -math.inf)]]) == [Move(0, 2), Move(0, 4)]
    assert search.advance([[(0, -0.1)], [(0, -0.1), (5, -math.inf)]]) == []
    assert [h.token_ids for h in search.hypotheses()] == [[1, 2, 0], [1, 4, 0]]


def test_long_search() -> None:
    """A step costs the same at every length, and a long chain is given back without recursion."""
    length = 100_000
    search = BeamSearch(2, length, (0,), num_return=2)
    beams = 1
    while moves := search.advance([[(1, -0.25), (2, -3.0), (0, -9.0)]] * beams):
        beams = len(moves)
    best, second = search.hypotheses()
    assert best.token_ids == [1] * length
    assert best.finish_reason == second.finish_reason == "length"
    del search  # frees the chain


def test_misuse() -> None:
    with pytest.raises(AssertionError):
        BeamSearch(2, 4, num_return=3)
    search = BeamSearch(2, 2)
    with pytest.raises(AssertionError):
        search.advance([[(1, -1.0)], [(1, -1.0)]])
    search.advance([[(1, -1.0)]])
    search.advance([[(1, -1.0)]])
    with pytest.raises(AssertionError):
        search.advance([])


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 12),
    width=st.integers(1, 9),
    max_tokens=st.integers(1, 9),
    ends=st.sets(st.integers(0, 11), max_size=3),
    early=st.sampled_from(EARLY),
    penalty=st.floats(-3.0, 3.0),
    data=st.data(),
)
def test_properties(
    seed: int, vocabulary: int, width: int, max_tokens: int, ends: set[int], early: EarlyStopping, penalty: float, data: st.DataObject
) -> None:
    model = table(vocabulary, seed)
    num_return = data.draw(st.integers(1, width))

    def search(early: EarlyStopping = early, num_return: int = num_return) -> BeamSearch:
        return BeamSearch(width, max_tokens, sorted(ends), length_penalty=penalty, early_stopping=early, num_return=num_return)

    found, steps = run(search(), model)
    if vocabulary >= search().num_candidates:
        assert len(found) == num_return
    assert 1 <= len(found) <= num_return
    assert len({tuple(h.token_ids) for h in found}) == len(found)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for hypothesis in found:
        tokens = tuple(hypothesis.token_ids)
        assert 1 <= len(tokens) <= steps <= max_tokens
        assert ends.isdisjoint(tokens[:-1])
        assert (hypothesis.finish_reason == "stop") == (tokens[-1] in ends)
        assert hypothesis.finish_reason == "stop" or len(tokens) == max_tokens
        assert hypothesis.logprobs == [dict(model(tokens[:i]))[token] for i, token in enumerate(tokens)]
        assert hypothesis.cumulative_logprob == pytest.approx(sum(hypothesis.logprobs))
        assert hypothesis.score == pytest.approx(hypothesis.cumulative_logprob / len(tokens) ** penalty)
    # Fewer returned are the first of more; a hastier search takes no more steps.
    assert run(search(num_return=width), model)[0][:num_return] == found
    assert run(search(early=True), model)[1] <= run(search(early=False), model)[1] <= run(search(early="never"), model)[1]

    # What a beam names beyond num_candidates changes nothing.
    wide = search()
    live: list[tuple[int, ...]] = [()]
    while live:
        live = [(*live[m.parent], m.token) for m in wide.advance([model(tokens) for tokens in live])]
    assert wide.hypotheses() == found


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_banned_end_that_would_be_ignored_takes_no_candidate_away(width: int) -> None:
    """min_tokens bans end-of-text, here the best continuation, also where ignore_eos lets the search go on with it."""
    for first in range(40):
        prompt = [first, first // 3 + 1]
        (end,) = (candidates(prompt, 1, 50)[0][0],)
        engine = Engine(FakeBackend(num_blocks=32), EngineConfig(max_num_seqs=4, max_num_batched_tokens=16))
        params = SamplingParams(max_tokens=4, n=1, beam_width=width, ignore_eos=True, min_tokens=2)
        engine.add(Request("a", prompt, params, 0, (end,)))
        made = []
        while engine.has_work:
            made += engine.step()
        search = BeamSearch(width, 4, (), num_return=1)
        beams = [prompt]
        while moves := search.advance(
            [[c for c in candidates(beam, 50, 50) if len(beam) >= len(prompt) + 2 or c[0] != end] for beam in beams]
        ):
            beams = [[*beams[move.parent], move.token] for move in moves]
        assert [output.token_ids for output in made] == [found.token_ids for found in search.hypotheses()], prompt
