"""Grammars of calls: for requests that insist on one, and for those that have a form for the answer, which is the alternative, or all
that there is where an answer has a frame. All looks as the model itself would write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.structured import lean
from quire.text.tools.formats import ANALYSIS, ASSISTANT, CHANNEL, CONSTRAIN, END, END_THINK, FORMATS, MESSAGE, START, THINK

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space within arguments, as chat templates write it."""


@dataclass(slots=True, frozen=True)
class CallGrammar:
    """format: one of FORMATS. tokens: text → id of the tokens that stand for themselves in a text, markers among them."""

    format: str
    functions: Sequence[Mapping[str, Any]]
    """Those that may be called, as objects of the API: ``name``, ``parameters`` (a JSON schema), ``strict``. None: an answer."""
    tokens: Mapping[str, int]
    parallel: bool
    reasoning: bool = False
    """It may think first, and does, where the prompt has begun that (``in_reasoning``)."""
    in_reasoning: bool = False
    in_message: bool = False
    """The prompt is in the middle of an answer, of a format that has a frame: it goes on, or other messages follow."""
    answer: str | None = None
    """What may stand in place of calls: the right side of a rule."""

    def lark(self) -> str:
        """In llguidance's dialect of Lark."""
        first, between, last, rule = self._form()
        calls = f"{first} call ({between} call)* {last}" if self.parallel else f"{first} call {last}"
        names = " | ".join(f"f{i}" for i in range(len(self.functions)))
        what = "calls" if self.answer is None else "(calls | answer)" if self.functions else "answer"
        lines = [f"start: {self._thinking()} {what}"]
        if self.functions:
            lines += [f"calls: {calls}", f"call: {rule.format(names=f'({names})')}"]
        for i, function in enumerate(self.functions):
            lines += [f"f{i}: {self._function(i, function['name'])}", f"a{i}: %json {_schema(function)}"]
        if self._framed and self.answer is not None:
            lines += [f"answer: {self._header('final')} form", f"form: {self.answer}"]
        elif self.answer is not None:
            lines.append(f"answer: {self.answer}")
        if self.reasoning:
            lines += self._thought()
        return "\n".join(lines) + "\n"

    def _form(self) -> tuple[str, str, str, str]:
        """What stands before the first call, between two, after the last; a call around its function."""
        if self._framed:
            return "", self._next(), "", "{names}"
        if self.format == "hermes":
            opens, closes = self._marker("<tool_call>"), self._marker("</tool_call>")
            return "", _text("\n"), "", f'{opens} "\\n" {{names}} "\\n" {closes}'
        if self.format == "llama3":
            return "", _text("; "), "", "{names}"
        if self._newer_mistral:
            return "", "", "", f"{self._marker('[TOOL_CALLS]')} {{names}}"
        return f'{self._marker("[TOOL_CALLS]")} " "? "["', _text(", "), '"]"', "{names}"

    @property
    def _framed(self) -> bool:
        return bool(FORMATS[self.format].start)

    def _header(self, channel: str, more: str = "") -> str:
        """Of a message."""
        return f"{self._marker(CHANNEL)} {_text(channel)} {more} {self._marker(MESSAGE)}"

    def _begin(self) -> str:
        """A message, up to its header."""
        return f"{self._marker(START)} {_text(ASSISTANT.removeprefix(START))}"

    def _next(self) -> str:
        return f"{self._marker(END)} {self._begin()}"

    @property
    def _newer_mistral(self) -> bool:
        return self.format == "mistral" and "[ARGS]" in self.tokens

    def _function(self, number: int, name: str) -> str:
        if self._framed:
            kind = f"{self._marker(CONSTRAIN)} {_text('json')}"
            return f"{self._header(f'commentary to=functions.{name} ', kind)} a{number}"
        if self._newer_mistral:
            return f"{_text(name)} {self._marker('[ARGS]')} a{number}"
        key = "parameters" if self.format == "llama3" else "arguments"
        before = f'{{"name": "{name}", "{key}": '  # a name has no characters that need escapes
        return f'{_text(before)} a{number} "}}"'

    def _thinking(self) -> str:
        if self._framed:
            return (self._next() if self.in_message else "") + (" thought*" if self.reasoning else "")
        if not self.reasoning:
            return ""
        return "thought SPACE" if self.in_reasoning else f"({self._marker(THINK)} thought SPACE)?"

    def _thought(self) -> list[str]:
        if self._framed:
            return [f"thought: {self._header(ANALYSIS)} thinking {self._begin()}", self._up_to(END, "thinking")]
        return [r"SPACE: /\s{0,4}/", self._up_to(END_THINK, "thought")]

    def _up_to(self, marker: str, rule: str) -> str:
        """A rule for any text and a marker."""
        if marker in self.tokens:
            return f"{rule}: /(.|\\n)*/ {self._marker(marker)}"
        return f"{rule}[suffix={_text(marker)}]: /(.|\\n)*/"

    def _marker(self, text: str) -> str:
        token = self.tokens.get(text)
        return _text(text) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(function: Mapping[str, Any]) -> str:
    """The arguments. Keywords that can't be enforced are left to chance, but for a function that is ``strict``."""
    guidance = SPACING | {"lenient": not function.get("strict"), "coerce_one_of": True}
    return json.dumps({"type": "object"} | lean(function.get("parameters") or {}) | {"x-guidance": guidance})
