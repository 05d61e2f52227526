"""Structured: the form that an output must have. Plain data, validated here; what it means is quire.grammar's business.

Sizes are bounded here. What a form costs to compile and to follow can't be told from its size: quire.grammar bounds that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.errors import InvalidRequestError

MAX_CHARS = {"json": 128 << 10, "regex": 16 << 10, "choice": 128 << 10, "grammar": 128 << 10}
"""Of a form's text, by its kind."""
MAX_CHOICES = 10_000
MAX_WHITESPACE_CHARS = 256
REMARKS = ("title", "description", "$comment", "$schema")
"""Keywords of JSON schemas that only readers need."""
STRING_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Values of ``format`` that are enforced. Others are remarks (JSON Schema 2020-12, Validation, section 7)."""
VALUES = ("const", "enum", "default", "examples")
"""What these keywords hold is no schema."""
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""These hold schemas by names, which may be any."""
_NAMES = {"json": "the JSON schema", "regex": "the regular expression", "choice": "the list of choices", "grammar": "the grammar"}


@dataclass(slots=True, frozen=True)
class Structured:
    """What all of an output must be. Raises InvalidRequestError; ``param`` is ``source``."""

    kind: str
    """``json``, ``regex``, ``choice`` or ``grammar``."""
    value: str
    """json: the text of a JSON schema. regex: what all of the output matches. choice: a JSON list of texts, of which the output is
    one. grammar: llguidance's dialect of Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), or llama.cpp's GBNF."""
    whitespace: str | None = None
    """json: a regular expression for what may stand between the parts of the JSON text; "" for nothing. None: what common JSON
    has, bounded, so that a model can't go on with blanks for ever."""
    source: str = "structured"
    """The field of a request that it came from, which errors name."""

    def __post_init__(self) -> None:
        if self.kind not in MAX_CHARS:
            raise self.error(f"kind must be one of {', '.join(MAX_CHARS)}, got {self.kind!r:.60}")
        if not isinstance(self.value, str) or not self.value:
            raise self.error(f"{_NAMES[self.kind]} must be a text that is not empty, got {self.value!r:.60}")
        if (size := len(self.value)) > (most := MAX_CHARS[self.kind]):
            raise self.error(f"{_NAMES[self.kind]} has {size:,} characters; at most {most:,} are allowed")
        try:
            self.value.encode()
        except UnicodeEncodeError as e:
            raise self.error(f"{_NAMES[self.kind]} is not valid Unicode: character {e.start:,} is a lone surrogate") from None
        if self.whitespace is not None:
            if self.kind != "json":
                raise self.error("whitespace is for JSON schemas: leave it out")
            if not isinstance(self.whitespace, str) or len(self.whitespace) > MAX_WHITESPACE_CHARS:
                raise self.error(f"the whitespace pattern must be a text of at most {MAX_WHITESPACE_CHARS} characters")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str, *, whitespace: str | None = None, source: str = "structured") -> Structured:
        """JSON that is valid against ``schema``: an object, or its text."""
        if isinstance(schema, str):
            schema = _parsed(schema, source)
        if isinstance(schema, bool):
            if not schema:
                raise InvalidRequestError(f"{source}: the schema false allows nothing", param=source)
            schema = {}
        if not isinstance(schema, Mapping):
            raise InvalidRequestError(f"{source}: a JSON schema is an object, got {schema!r:.60}", param=source)
        try:
            text = json.dumps(lean(schema), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except RecursionError:
            raise _too_deep(source) from None
        except (TypeError, ValueError) as e:
            raise InvalidRequestError(f"{source}: the JSON schema is not JSON: {e}", param=source) from None
        return cls("json", text, whitespace, source)

    @classmethod
    def json_object(cls, *, whitespace: str | None = None, source: str = "structured") -> Structured:
        """Any JSON object."""
        return cls.json({"type": "object"}, whitespace=whitespace, source=source)

    @classmethod
    def regex(cls, pattern: str, *, source: str = "structured") -> Structured:
        """A text of which all matches ``pattern``."""
        return cls("regex", pattern, None, source)

    @classmethod
    def choice(cls, choices: Sequence[str], *, source: str = "structured") -> Structured:
        """One of ``choices``."""
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
            raise InvalidRequestError(f"{source} must be a list of texts that is not empty, got {choices!r:.60}", param=source)
        if len(choices) > MAX_CHOICES:
            raise InvalidRequestError(f"{source} has {len(choices):,} choices; at most {MAX_CHOICES:,} are allowed", param=source)
        for text in choices:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(f"{source} must hold texts that are not empty, got {text!r:.60}", param=source)
        return cls("choice", json.dumps(list(choices), ensure_ascii=False), None, source)

    @classmethod
    def grammar(cls, text: str, *, source: str = "structured") -> Structured:
        """What a Lark or GBNF grammar derives from its ``start`` or ``root``."""
        return cls("grammar", text, None, source)

    def error(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.source}: {what}", param=self.source)


def lean(schema: Any) -> Any:
    """A JSON schema without remarks, which are most of it."""
    if isinstance(schema, list):
        return [lean(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, Mapping):
            made[key] = {name: lean(each) for name, each in value.items()}
        elif not _is_remark(key, value):
            made[key] = value if key in VALUES else lean(value)
    return made


def _is_remark(key: str, value: Any) -> bool:
    return isinstance(value, str) and (key in REMARKS or (key == "format" and value not in STRING_FORMATS))


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as e:
        raise InvalidRequestError(f"{source}: the JSON schema is not JSON: {e}", param=source) from None


def _too_deep(source: str) -> InvalidRequestError:
    return InvalidRequestError(f"{source}: the JSON schema is nested too deeply", param=source)
