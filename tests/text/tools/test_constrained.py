"""Grammars of calls, followed by a model that chooses at random: what they allow is what the parsers read."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from quire.grammar.program import compile_structured
from quire.grammar.vocabulary import Vocabulary
from quire.structured import Structured
from quire.text.tokenizer import Tokenizer
from quire.text.tools import Message, parse_message, parser_for
from quire.text.tools.constrained import CallGrammar
from quire.text.tools.formats import FORMATS
from sample_tokenizers import sample
from server.scripted import chat_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", 'a "b" {c}', "</tool_call>", "</think>"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTIONS = [{"name": "get_weather", "parameters": SCHEMA}, {"name": "now.utc-0", "parameters": {"additionalProperties": False}}]


@pytest.fixture(scope="module")
def marked() -> Vocabulary:
    """Markers are tokens."""
    tokenizer = chat_tokenizer("harmony")
    end = tokenizer.token_id("<|return|>")
    assert end is not None
    return Vocabulary(tokenizer, tokenizer.vocab_size, [end])


@pytest.fixture(scope="module")
def unmarked() -> Vocabulary:
    """Markers are spelt."""
    tokenizer = Tokenizer(sample("llama"))
    return Vocabulary(tokenizer, tokenizer.vocab_size, [2])


def walk(vocabulary: Vocabulary, lark: str, rng: random.Random, most: int = 400) -> str | None:
    """A random text that the grammar allows; None where it did not come to an end."""
    matcher = compile_structured(Structured.grammar(lark), vocabulary)
    pieces: list[bytes] = []
    while len(pieces) < most and not matcher.is_stopped():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(vocabulary.size) if mask >> token & 1]
        ends = [token for token in allowed if token in vocabulary.eos_ids]
        closing = [token for token in allowed if vocabulary.tokens[token] == b"</think>"]
        if ends and rng.random() < 0.5:
            break
        token = closing[0] if closing and rng.random() < 0.2 else rng.choice([t for t in allowed if t not in ends] or ends)
        assert matcher.try_consume_tokens([token]) == 1
        pieces.append(b"" if token in vocabulary.eos_ids else vocabulary.tokens[token])
    return b"".join(pieces).decode() if matcher.is_accepting() else None


def check(message: Message, parallel: bool) -> None:
    assert message.text == ""
    assert message.calls
    assert parallel or len(message.calls) == 1
    for call in message.calls:
        parameters = next(f["parameters"] for f in FUNCTIONS if f["name"] == call.name)
        jsonschema.validate(json.loads(call.arguments), {"type": "object"} | dict(parameters))  # type: ignore[arg-type, call-overload]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", ["marked", "unmarked"])
def test_what_is_allowed_is_read(request: pytest.FixtureRequest, tokens: str, name: str, parallel: bool) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(tokens)
    added = {text: i for i, text in vocabulary.tokenizer.added_tokens.items()}
    lark = CallGrammar(name, FUNCTIONS, added, parallel).lark()
    names = [str(function["name"]) for function in FUNCTIONS]
    seen, several, count = set(), False, 0
    for seed in range(12):
        text = walk(vocabulary, lark, random.Random(seed))
        if text is not None:
            message = parse_message(parser_for(name, names), text)
            check(message, parallel)
            count += 1
            several |= len(message.calls) > 1
            seen |= {call.name for call in message.calls}
    assert count >= 8
    assert seen == set(names)
    assert several == parallel


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("tokens", ["marked", "unmarked"])
def test_a_model_that_thinks_may_do_so_first(request: pytest.FixtureRequest, tokens: str, opened: bool) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(tokens)
    added = {text: i for i, text in vocabulary.tokenizer.added_tokens.items()}
    lark = CallGrammar("hermes", FUNCTIONS, added, False, reasoning=True, in_reasoning=opened).lark()
    matcher = compile_structured(Structured.grammar(lark), vocabulary)
    text = ("" if opened else "<think>") + 'Hm.\nx <b> </think>\n\n<tool_call>\n{"name": "now.utc-0", "arguments": {}}\n</tool_call>'
    ids = vocabulary.cut(text)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()
    matcher = compile_structured(Structured.grammar(lark), vocabulary)
    ids = vocabulary.cut(text.rpartition("\n\n")[2])
    assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == (not opened), "or not"


@pytest.mark.parametrize("tokens", ["marked", "unmarked"])
def test_a_frame_is_written_around_calls_and_answers(request: pytest.FixtureRequest, tokens: str) -> None:
    vocabulary: Vocabulary = request.getfixturevalue(tokens)
    added = {text: i for i, text in vocabulary.tokenizer.added_tokens.items()}
    thought = "<|channel|>analysis<|message|>Hm.\nx <b> <|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.now.utc-0 <|constrain|>json<|message|>{}"
    answer = "<|channel|>final<|message|>yes"

    def allows(text: str, functions: Any = FUNCTIONS, **options: Any) -> bool:
        lark = CallGrammar("harmony", functions, added, False, **options).lark()
        matcher = compile_structured(Structured.grammar(lark), vocabulary)
        ids = vocabulary.cut(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    for before in ("", thought, thought * 2):
        assert allows(before + call, reasoning=True)
        assert allows(before + call) == (not before)
        assert allows("<|end|><|start|>assistant" + before + call, reasoning=True, in_message=True)
        for functions in ([], FUNCTIONS):
            assert allows(before + answer, functions, reasoning=True, answer='"yes"')
            assert not allows(before + answer + "!", functions, reasoning=True, answer='"yes"')
            assert allows(before + call, functions, reasoning=True, answer='"yes"') == bool(functions)
        assert not allows(before + answer, reasoning=True)
    assert not allows("yes", [], answer='"yes"')
    assert not allows(call + "<|end|><|start|>assistant" + call, reasoning=True)


def test_keywords_that_cannot_be_enforced(marked: Vocabulary) -> None:
    """A tool's schema may have any; one that is strict may not."""
    parameters = {"properties": {"a": {"type": "integer", "multipleOf": 7, "not": {"const": 7}}}}
    for strict in (False, True):
        grammar = CallGrammar("hermes", [{"name": "f", "parameters": parameters, "strict": strict}], {}, False)
        if strict:
            with pytest.raises(Exception, match="not"):
                compile_structured(Structured.grammar(grammar.lark(), source="tools"), marked)
        else:
            compile_structured(Structured.grammar(grammar.lark()), marked)
