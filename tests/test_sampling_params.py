"""SamplingParams refuses what makes no sense, naming the parameter, the value and what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", None),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 0.0),
        ("top_p", 2),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("seed", 1 << 64),
        ("seed", 1.0),
        ("logprobs", -1),
        ("logprobs", 21),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 1025),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [True]),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name.removesuffix("s") in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", ["temperature", "max_tokens", "seed", "n"])
def test_numbers_that_python_does_not_spell_out_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be .* got a number of more than 4,300 digits"):
        SamplingParams(**{name: 10**5000})


def test_the_message_has_the_number_and_the_remedy() -> None:
    with pytest.raises(InvalidRequestError, match=r"top_p must be above 0, got 0: use temperature=0 for greedy"):
        SamplingParams(top_p=0)
    with pytest.raises(InvalidRequestError, match=r"max_tokens must be from 0 to \d+, got -1"):
        SamplingParams(max_tokens=-1)


def test_accepted_and_normalised() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[1, 2], logit_bias={3: -100}, temperature=0, top_k=-1, max_tokens=None, seed=-5)
    assert params.stop_strings == ("END",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {3: -100.0}
    assert SamplingParams(stop=None).stop_strings == ()
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3), st.binary(max_size=3)
)


@given(name=st.sampled_from([name for name in SamplingParams.__dataclass_fields__ if name != "stop_strings"]), value=JUNK)
def test_any_value_is_taken_or_refused_with_a_message(name: str, value: Any) -> None:
    try:
        params = SamplingParams(**{name: value})
    except InvalidRequestError:
        return
    for field in ("temperature", "top_p", "min_p", "repetition_penalty"):
        assert math.isfinite(getattr(params, field))
