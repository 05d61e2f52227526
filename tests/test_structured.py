"""Structured, as it is validated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quire.errors import InvalidRequestError
from quire.sampling_params import SamplingParams
from quire.structured import MAX_CHARS, MAX_CHOICES, Structured


def test_a_schema_is_an_object_or_its_text() -> None:
    assert Structured.json({"type": "string"}) == Structured.json('{"type":   "string"}')
    assert Structured.json(True).value == "{}"
    assert json.loads(Structured.json_object().value) == {"type": "object"}


WRONG: list[tuple[Any, str]] = [
    (lambda: Structured("xml", "a"), "kind"),
    (lambda: Structured.regex(""), "not empty"),
    (lambda: Structured.regex("a" * (MAX_CHARS["regex"] + 1)), "at most"),
    (lambda: Structured.regex("\ud800"), "Unicode"),
    (lambda: Structured.json("{"), "not JSON"),
    (lambda: Structured.json("[1]"), "an object"),
    (lambda: Structured.json(False), "allows nothing"),
    (lambda: Structured.json({"a": float("nan")}), "not JSON"),
    (lambda: Structured.json({"a": {1, 2}}), "not JSON"),
    (lambda: Structured.json("[" * 100_000), "nested too deeply"),
    (lambda: Structured.json({"a": "x" * MAX_CHARS["json"]}), "at most"),
    (lambda: Structured.json({}, whitespace="x" * 300), "whitespace"),
    (lambda: Structured("regex", "a", " "), "whitespace"),
    (lambda: Structured.choice([]), "not empty"),
    (lambda: Structured.choice("abc"), "list"),
    (lambda: Structured.choice(["a", ""]), "not empty"),
    (lambda: Structured.choice(["a"] * (MAX_CHOICES + 1)), "at most"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        make()
    assert caught.value.param == "structured"
    assert len(caught.value.message) < 300


def test_remarks_are_left_out_and_names_are_none() -> None:
    """Properties may be called as keywords are."""
    names = ("title", "description", "format", "default", "const", "enum", "examples", "properties")
    schema = {
        "title": "T",
        "type": "object",
        "properties": {name: {"type": "string", "format": "password", "title": name} for name in names},
    }
    kept = json.loads(Structured.json(schema).value)
    assert kept == {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    value = {"title": "x", "format": "binary"}
    assert json.loads(Structured.json({"const": value, "examples": [value]}).value) == {"const": value, "examples": [value]}


def test_errors_name_where_it_came_from() -> None:
    with pytest.raises(InvalidRequestError, match="guided_json: ") as caught:
        Structured.json("{", source="guided_json")
    assert caught.value.param == "guided_json"


def test_not_with_a_beam_search() -> None:
    for params in ({"structured": Structured.regex("a")}, {"bad_words": ["a"]}, {"allowed_token_ids": [1]}):
        with pytest.raises(InvalidRequestError, match="beam search"):
            SamplingParams(beam_width=2, **params)  # type: ignore[arg-type]


def test_lists_are_taken_as_tuples() -> None:
    params = SamplingParams(bad_words=["a"], allowed_token_ids=[3])
    assert (params.bad_words, params.allowed_token_ids, params.constrained) == (("a",), (3,), True)
    assert not SamplingParams().constrained
