"""From a form to something that follows it: llguidance's matcher, with its limits."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from quire.structured import Structured

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits
    from llguidance._lib import JsonCompileOptions

    from quire.grammar.vocabulary import Vocabulary

WHITESPACE = r" ?|\n{1,2}[ \t]{0,20}"
"""What may stand between the parts of JSON where nobody says otherwise: enough for every common layout, and never endless."""
MAX_LEXER_STATES = 20_000
"""About 2 kB each."""
MAX_GRAMMAR_SIZE = 200_000
REHEARSAL = 8
"""Tokens."""
_LARK = re.compile(r"(?m)^\s*(%llguidance\b|start\s*:(?!:=))")
_QUOTED = re.compile(r" \d+ \| .*")
_GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")
_GBNF_PART = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|[\w-]+', re.DOTALL)
"""A string, a class, a comment, a name."""
_GBNF_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)", re.DOTALL)


def compile_structured(structured: Structured, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher at the start. Raises InvalidRequestError where the form is wrong, too large, or allows nothing."""
    from llguidance import LLMatcher

    try:
        matcher = LLMatcher(vocabulary.ll, _source(structured), log_level=0, limits=limits())
    except (ValueError, RecursionError) as e:
        raise structured.error(_reason(str(e))) from None
    masks = vocabulary.masks
    matcher.compute_ff_tokens()
    mask = matcher.compute_bitmask()[: masks.num_bytes]
    if matcher.is_error():  # some errors show only with the first mask
        raise structured.error(_reason(matcher.get_error()))
    if matcher.is_stopped() or masks.going_on(mask) is None:
        what = "only the empty text" if matcher.is_accepting() else "no text that the model has tokens for"
        raise structured.error(f"it allows {what}, so there is nothing to generate")
    return matcher


def rehearse(structured: Structured, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
    """Go some tokens along, ``matcher`` with it: a form that is too much for the limits mostly shows it at once. Raises
    InvalidRequestError."""
    for _ in range(REHEARSAL):
        forced = matcher.compute_ff_tokens()
        mask = int.from_bytes(vocabulary.masks.going_on(matcher.compute_bitmask()[: vocabulary.masks.num_bytes]) or b"", "little")
        if matcher.is_error():
            raise structured.error(_reason(matcher.get_error()))
        if matcher.is_stopped() or not mask:
            return
        matcher.consume_token(forced[0] if forced else (mask & -mask).bit_length() - 1)


def limits() -> LLParserLimits:
    """What a form may cost: bounds on memory and on the work for one token. A mask takes some 0.1 s where they end it."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, max_grammar_size=MAX_GRAMMAR_SIZE, verbose_errors=False)


def _source(structured: Structured) -> str:
    """In llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher

    if structured.kind == "json":
        return LLMatcher.grammar_from_json_schema(structured.value, overrides=_options(structured))
    if structured.kind == "regex":
        return LLMatcher.grammar_from_regex(structured.value)
    if structured.kind == "choice":  # one token of the grammar: far cheaper than as many alternatives
        choices = dict.fromkeys(json.loads(structured.value))
        # Strings of Lark have no room for the character 127, which those of JSON have.
        texts = " | ".join(json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in choices)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    if not _LARK.search(structured.value) and _GBNF.search(structured.value):
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            return LLMatcher.grammar_from_lark(gbnf_to_lark(_prepared(structured.value)))
        except Exception as e:  # of its own, and plain ones
            raise ValueError(f"the GBNF grammar can't be read: {e}") from None
    return LLMatcher.grammar_from_lark(structured.value)


def _options(structured: Structured) -> JsonCompileOptions:
    """llguidance's options for a schema: what may stand between the parts of JSON; oneOf is enforced as anyOf is, which is the same
    where no text fits two alternatives, as in unions with a discriminator."""
    space = WHITESPACE if structured.whitespace is None else structured.whitespace
    options: JsonCompileOptions = {"whitespace_pattern": space} if space else {"whitespace_flexible": False}
    return {**options, "coerce_one_of": True}


def rule_of(structured: Structured) -> str:
    """A form as the right side of a rule of Lark. Raises InvalidRequestError."""
    if structured.kind == "json":
        try:
            return f"%json {json.dumps(json.loads(structured.value) | {'x-guidance': _options(structured)})}"
        except RecursionError:
            raise structured.error("the JSON schema is nested too deeply") from None
    try:
        source = _source(structured)
        lark = json.loads(source)["grammars"][0]["lark_grammar"] if structured.kind == "regex" else source
    except (ValueError, RecursionError) as e:
        raise structured.error(_reason(str(e))) from None
    return f"%lark {{\n{lark}\n}}"


def _prepared(gbnf: str) -> str:
    """For llguidance's conversion, which calls the rule ``root`` ``start``, and drops the zeros that a character's number begins with."""
    name = "start-"
    while name in gbnf:
        name += "0"
    gbnf = _GBNF_PART.sub(lambda part: name if part[0] == "start" else part[0], gbnf)
    return _GBNF_ESCAPE.sub(_character, gbnf)


def _character(escape: re.Match[str]) -> str:
    """By itself where it is none of ASCII's."""
    digits = escape[1] or escape[2]
    code = int(digits, 16) if digits else -1
    if code < 0 or code > 0x10FFFF or 0xD800 <= code < 0xE000:
        return escape[0]
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def _reason(error: str) -> str:
    """llguidance's message without the grammar, of which it may quote any amount."""
    text = _QUOTED.sub("", " ".join(error.replace("<non-verbose/>", "").split()))
    _, found, rest = text.rpartition("error: ")  # of a regular expression that does not parse
    text = rest if found else text
    if text.startswith("NoExtension"):
        return "it allows no text, or none that the model has tokens for"
    text = text.replace("Unimplemented keys: ", "these keywords of JSON schemas are not supported: ")
    return text if len(text) <= 300 else text[:300] + "…"


def reason(matcher: LLMatcher) -> str:
    """Why a matcher went wrong, as a part of a sentence."""
    return _reason(matcher.get_error())
