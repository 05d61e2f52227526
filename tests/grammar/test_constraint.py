"""One sequence under a constraint: the mask is what each token by itself says, forced tokens are what the mask leaves, and a
constraint that is made anew with the same tokens goes on as the old one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import EngineError, InvalidRequestError
from quire.grammar.constraint import Constraint
from quire.grammar.constraints import Constraints
from quire.grammar.program import compile_structured
from quire.grammar.vocabulary import Vocabulary
from quire.sampling_params import SamplingParams
from quire.structured import Structured
from quire.text.tokenizer import Tokenizer
from sample_tokenizers import KINDS, sample
from server.harness import EMBEDDED

REGEXES = ["[a-z]{3,9}(, [a-z]+)*", "(yes|no|perhaps)", "the [a-z]* of (quick|slow) things", "[0-9]{1,3}(\\.[0-9]+)?", "ö+|(th)*e"]
SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"the": {"type": "string", "maxLength": 9}, "on": {"type": "boolean"}}, "required": ["the", "on"]},
    {"type": "array", "items": {"enum": ["one", "two", 3]}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"const": "here it is"}, {"type": "integer"}]},
]
FORMS = (
    [Structured.regex(r) for r in REGEXES] + [Structured.json(s) for s in SCHEMAS] + [Structured.json(s, whitespace="") for s in SCHEMAS]
)
FORMS += [Structured.choice(["one", "one of them", "another"]), Structured.grammar('start: "(" start ")" | "a" start | "b"')]


SPELLS_ALL = ["embedded", "byte_level", "llama", "gemma"]
"""Kinds of vocabularies that have every byte; others can't follow every form."""


@cache
def constraints(kind: str) -> Constraints:
    if kind == "embedded":
        tokenizer = Tokenizer.load(EMBEDDED)
        return Constraints(lambda: tokenizer, tokenizer.vocab_size, (0,))
    tokenizer = Tokenizer(sample(kind))
    ends = [token for text in ("<|end|>", "</s>", "[END]") if (token := tokenizer.token_id(text)) is not None]
    return Constraints(lambda: tokenizer, tokenizer.vocab_size + 3, ends)  # a model may have more rows than tokens


@cache
def pieces(kind: str) -> list[bytes]:
    return constraints(kind)._loaded().tokens


def allowed(constraint: Constraint) -> list[int]:
    mask = constraint.mask
    assert mask is not None
    return [i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1]


def walk(kind: str, params: SamplingParams, rng: random.Random, most: int = 60) -> tuple[Constraint, list[int]]:
    """A random output, as the sampler might choose it."""
    constraint, made = constraints(kind).open(params, ()), list[int]()
    ends = constraints(kind)._loaded().eos_ids
    while not constraint.complete and len(made) < most:
        token = rng.choice(allowed(constraint))
        if token in ends:
            break
        made.append(token)
        constraint.advance([token])
    return constraint, made


@pytest.mark.parametrize("kind", SPELLS_ALL)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.value[:20])
def test_a_walk_gives_what_was_asked_for(kind: str, form: Structured) -> None:
    done = 0
    for seed in range(3):
        constraint, made = walk(kind, SamplingParams(structured=form), random.Random(seed))
        text = b"".join(pieces(kind)[token] for token in made)
        if not (constraint.complete or constraints(kind)._loaded().masks.going_on(constraint.mask or b"") != constraint.mask):
            continue  # it could not end where it was cut off
        done += 1
        if form.kind == "regex":
            assert re.fullmatch(form.value, text.decode())
        elif form.kind == "choice":
            assert text.decode() in json.loads(form.value)
        elif form.kind == "json":
            import jsonschema

            jsonschema.validate(json.loads(text), json.loads(form.value))
    assert done or form.kind == "grammar" or "*" in form.value


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPELLS_ALL), st.sampled_from(FORMS), st.integers(0, 1 << 30))
def test_a_mask_is_what_each_token_says(kind: str, form: Structured, seed: int) -> None:
    rng = random.Random(seed)
    constraint, made = walk(kind, SamplingParams(structured=form), rng, rng.randrange(12))
    if constraint.complete:
        return
    matcher = compile_structured(form, constraints(kind)._loaded())
    assert matcher.consume_tokens(made)
    mask, vocabulary = allowed(constraint), constraints(kind)._loaded()
    if constraint.forced:
        assert mask == [constraint.forced[0]]
        assert matcher.validate_tokens(constraint.forced) == len(constraint.forced)
        return
    tried = range(vocabulary.size) if kind != "embedded" else rng.sample(range(vocabulary.size), 500) + mask[:200]
    for token in tried:
        if token in vocabulary.eos_ids:
            assert (token in mask) == matcher.is_accepting()
        else:
            assert (token in mask) == (matcher.validate_tokens([token]) == 1), (token, vocabulary.tokens[token])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPELLS_ALL), st.sampled_from(FORMS), st.integers(0, 1 << 30), st.booleans())
def test_made_anew_it_goes_on_the_same(kind: str, form: Structured, seed: int, ignore_eos: bool) -> None:
    params = SamplingParams(structured=form, ignore_eos=ignore_eos)
    constraint, made = constraints(kind).open(params, ()), list[int]()
    rng = random.Random(seed)
    for _ in range(20):
        again = constraints(kind).open(params, made)
        assert (again.complete, again.forced) == (constraint.complete, constraint.forced)
        if constraint.complete:
            return
        assert again.mask == constraint.mask
        # All that is forced at once, as the engine does it where no log-probabilities are asked for, or one by one.
        new = list(constraint.forced) if constraint.forced and rng.random() < 0.5 else [rng.choice(allowed(constraint))]
        if new[0] in constraints(kind)._loaded().eos_ids:
            return
        made += new
        constraint.advance(new)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMS), st.integers(0, 1 << 30), st.booleans())
def test_what_is_foreseen_is_what_comes(form: Structured, seed: int, banned: bool) -> None:
    rng = random.Random(seed)
    params = SamplingParams(structured=form, bad_words=["xyzzy", "two on"] if banned else [])
    _, made = walk("embedded", params, rng, 12)
    constraint = constraints("embedded").open(params, ())
    before = (constraint.mask, list(constraint.forced))
    tokens = [*made, 77, 78]
    masks = constraint.foresee(tokens)
    assert (constraint.mask, constraint.forced) == before
    for i, mask in enumerate(masks):
        assert constraint.mask == mask
        if i + 1 < len(masks):
            constraint.advance([tokens[i]])
    assert len(masks) >= len(made)


@pytest.mark.parametrize("kind", list(KINDS))
def test_forced_texts_are_spelt_exactly(kind: str) -> None:
    vocabulary = constraints(kind)._loaded()
    for text in ("one", "two words", " a b", "the ö", '{"a": "drei"}', "\n\n  x", "T" * 50):
        ids = vocabulary.cut(text)
        if kind != "words":  # it can't spell most of them
            spelt = b"".join(vocabulary.tokens[token] for token in ids)
            missing = [piece for piece in text if not any(piece.encode() in token for token in vocabulary.tokens)]
            assert spelt == text.encode() or missing


def test_a_model_that_knows_no_end() -> None:
    tokenizer = Tokenizer(sample("byte_level"))
    for size in (tokenizer.vocab_size, tokenizer.vocab_size + -tokenizer.vocab_size % 32):
        made = Constraints(lambda: tokenizer, size, ())
        constraint = made.open(SamplingParams(structured=Structured.regex("[ab]{1,2}")), ())
        a = tokenizer.encode("a", False)[0]
        constraint.advance([a])
        assert max(allowed(constraint)) < tokenizer.vocab_size, "it can go on, but not end"
        constraint.advance([a])
        assert constraint.complete


def test_choices_of_any_characters() -> None:
    texts = ["\x7f", "\x00\x1f", '"\\/', "\u2028\ufeff", "é🙂"]
    tokenizer = Tokenizer.load(EMBEDDED)
    for text in texts:
        constraint = constraints("embedded").open(SamplingParams(structured=Structured.choice([text, "other"])), ())
        assert set(tokenizer.encode(text, False)[:1]) <= set(allowed(constraint)), text


def test_a_form_that_another_thread_pushes_out() -> None:
    """Between its being found and its being taken."""
    made = constraints("embedded")
    first = Structured.regex("[ab]{70}")
    made.prepare(first)
    taken = made._program

    def push_out(structured: Structured) -> Any:
        program = taken(structured)
        made._programs.clear()
        return program

    made._program = push_out  # type: ignore[method-assign]
    assert allowed(made.open(SamplingParams(structured=first), ()))


def test_the_end_is_not_taken_for_a_choice_where_it_is_ignored() -> None:
    form = Structured.regex("[ab]{1,2}")
    a = Tokenizer.load(EMBEDDED).encode("a", False)[0]
    for ignore_eos in (False, True):
        constraint = constraints("embedded").open(SamplingParams(structured=form, ignore_eos=ignore_eos), [a])
        assert (0 in allowed(constraint)) == (not ignore_eos)


def test_bad_words() -> None:
    tokenizer = Tokenizer.load(EMBEDDED)
    several = "return xyz"
    assert len(tokenizer.encode(several, False)) > 2
    params = SamplingParams(bad_words=["import", several])
    constraint = constraints("embedded").open(params, ())
    single = tokenizer.token_id("import")
    spaced = tokenizer.encode(" import", False)
    ids = tokenizer.encode(several, False)
    assert single is not None
    assert single not in allowed(constraint)
    assert len(spaced) > 1 or spaced[0] not in allowed(constraint)
    assert ids[-1] in allowed(constraint)
    constraint.advance([5, *ids[:-1]])
    assert ids[-1] not in allowed(constraint)
    again = constraints("embedded").open(params, [5, *ids[:-1]])
    assert again.mask == constraint.mask
    constraint.advance([6])
    assert ids[-1] in allowed(constraint)


def test_allowed_tokens_and_a_form_together() -> None:
    tokenizer = Tokenizer.load(EMBEDDED)
    digits = [tokenizer.encode(digit, False)[0] for digit in "123"]
    params = SamplingParams(structured=Structured.regex("[0-9]{2}"), allowed_token_ids=digits)
    constraint, made = walk("embedded", params, random.Random(1))
    assert constraint.complete
    assert set(made) <= set(digits)


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    with pytest.raises(EngineError, match="can't be followed any further"):
        constraints("embedded").open(SamplingParams(structured=Structured.regex("a+")), [77])


def test_special_tokens_in_a_grammar() -> None:
    """<name> is the token; its spelling in a text is not."""
    kind = "byte_level"
    tokenizer = Tokenizer(sample(kind))
    form = Structured.grammar('start: <think> %json {"type": "integer"} <|end|> "x"')
    constraint = constraints(kind).open(SamplingParams(structured=form), ())
    assert constraint.forced[0] == tokenizer.token_id("<think>")
    other = constraints(kind).open(SamplingParams(structured=Structured.regex("<think>|<[a-z]+>x")), ())
    assert tokenizer.token_id("<think>") not in allowed(other)


WRONG = [
    (Structured.regex("(a"), "unclosed group"),
    (Structured.regex("(?:)"), "only the empty text"),
    (Structured.json({"not": {}}), "keywords of JSON schemas are not supported"),
    (Structured.json({"type": "foo"}), "Invalid type"),
    (Structured.json({"$ref": "#"}), "allows no text"),
    (Structured.json({"$ref": "http://example.com/"}), "does not fetch"),
    (Structured.grammar("start: start"), "allows no text"),
    (Structured.grammar("start: missing"), "missing"),
    (Structured.grammar("root ::= missing"), "missing"),
    (Structured.grammar('start: <no_such_token> "a"'), "no_such_token"),
    (Structured.regex("(" * 5000 + "a" + ")" * 5000), "nest"),
]


@pytest.mark.parametrize(("form", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_does_not_compile_says_why(form: Structured, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        compile_structured(form, constraints("embedded")._loaded())
    assert caught.value.param == "structured"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_tokenizer_makes_a_vocabulary(kind: str) -> None:
    vocabulary = constraints(kind)._loaded()
    assert isinstance(vocabulary, Vocabulary)
    assert vocabulary.ll.vocab_size == len(vocabulary.tokens)


def test_a_vocabulary_that_can_not_spell_it() -> None:
    with pytest.raises(InvalidRequestError, match="none that the model has tokens for"):
        constraints("words").prepare(Structured.json_object())


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (r'root ::= "\u00e9ab"', ["éab"]),
        (r'root ::= "\u0041BCD" "\U0001F642"', ["ABCD🙂"]),
        (r'root ::= [\u0430-\u0433] "\\u0041"', ["а\\u0041", "г\\u0041"]),
        (r'root ::= "\u0022\u005c" [\u005d\u002d]', ['"\\]', '"\\-']),
        ('root ::= start "b"\nstart ::= "a"', ["ab"]),
    ],
)
def test_grammars_of_llama_cpp(grammar: str, texts: list[str]) -> None:
    vocabulary = constraints("byte_level")._loaded()
    for text in texts:
        matcher = compile_structured(Structured.grammar(grammar), vocabulary)
        for byte in text.encode():
            assert matcher.consume_token(pieces("byte_level").index(bytes([byte]))), text
        assert matcher.is_accepting()


ENDLESS = """
from grammar.test_constraint import SamplingParams, Structured, constraints
from quire.grammar import watch
constraint = constraints("byte_level").open(SamplingParams(structured=Structured.grammar('start: /[0-9]{3}/ A B\\nA: /a+/\\nB: /a+b/')), ())
watch.CALL_S = 0.5
watch.limit_calls()
for byte in b"123a":
    print(byte, flush=True)
    constraint.advance([constraints("byte_level")._loaded().tokens.index(bytes([byte]))])
"""


def test_a_call_that_never_ends_ends_its_process() -> None:
    """A takes every "a", and none is left for B: the library looks for a way on for ever."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-P", "-c", ENDLESS], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGPROF, done.stderr
    assert done.stdout.startswith(b"49\n50\n51\n"), "it begins well"
