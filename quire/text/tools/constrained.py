"""Grammars of calls: for requests that insist on one, and for those that have a form for the answer, which is the alternative. Calls look
as the model itself would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.structured import lean
from quire.text.tools.formats import END_THINK, THINK

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space within arguments, as chat templates write it."""


@dataclass(slots=True, frozen=True)
class CallGrammar:
    """format: one of FORMATS. tokens: text → id of the tokens that stand for themselves in a text, markers among them."""

    format: str
    functions: Sequence[Mapping[str, Any]]
    """Those that may be called, as objects of the API: ``name``, ``parameters`` (a JSON schema), ``strict``."""
    tokens: Mapping[str, int]
    parallel: bool
    reasoning: bool = False
    """It may think first, and does, where the prompt has begun that (``in_reasoning``)."""
    in_reasoning: bool = False
    answer: str | None = None
    """What may stand in place of calls: the right side of a rule."""

    def lark(self) -> str:
        """In llguidance's dialect of Lark."""
        first, between, last, rule = self._form()
        calls = f"{first} call ({between} call)* {last}" if self.parallel else f"{first} call {last}"
        names = " | ".join(f"f{i}" for i in range(len(self.functions)))
        what = "calls" if self.answer is None else "(calls | answer)"
        lines = [f"start: {self._thinking()} {what}", f"calls: {calls}", f"call: {rule.format(names=f'({names})')}"]
        for i, function in enumerate(self.functions):
            lines += [f"f{i}: {self._function(i, function['name'])}", f"a{i}: %json {_schema(function)}"]
        if self.answer is not None:
            lines.append(f"answer: {self.answer}")
        if self.reasoning:
            lines += self._thought()
        return "\n".join(lines) + "\n"

    def _form(self) -> tuple[str, str, str, str]:
        """What stands before the first call, between two, after the last; a call around its function."""
        if self.format == "hermes":
            opens, closes = self._marker("<tool_call>"), self._marker("</tool_call>")
            return "", _text("\n"), "", f'{opens} "\\n" {{names}} "\\n" {closes}'
        if self.format == "llama3":
            return "", _text("; "), "", "{names}"
        if self._newer_mistral:
            return "", "", "", f"{self._marker('[TOOL_CALLS]')} {{names}}"
        return f'{self._marker("[TOOL_CALLS]")} " "? "["', _text(", "), '"]"', "{names}"

    @property
    def _newer_mistral(self) -> bool:
        return self.format == "mistral" and "[ARGS]" in self.tokens

    def _function(self, number: int, name: str) -> str:
        if self._newer_mistral:
            return f"{_text(name)} {self._marker('[ARGS]')} a{number}"
        key = "parameters" if self.format == "llama3" else "arguments"
        before = f'{{"name": "{name}", "{key}": '  # a name has no characters that need escapes
        return f'{_text(before)} a{number} "}}"'

    def _thinking(self) -> str:
        if not self.reasoning:
            return ""
        return "thought SPACE" if self.in_reasoning else f"({self._marker(THINK)} thought SPACE)?"

    def _thought(self) -> list[str]:
        space, ends = r"SPACE: /\s{0,4}/", self.tokens.get(END_THINK)
        if ends is None:
            return [space, f"thought[suffix={_text(END_THINK)}]: /(.|\\n)*/"]
        return [space, f"thought: /(.|\\n)*/ <[{ends}]>"]

    def _marker(self, text: str) -> str:
        token = self.tokens.get(text)
        return _text(text) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(function: Mapping[str, Any]) -> str:
    """The arguments. Keywords that can't be enforced are left to chance, but for a function that is ``strict``."""
    guidance = SPACING | {"lenient": not function.get("strict"), "coerce_one_of": True}
    return json.dumps({"type": "object"} | lean(function.get("parameters") or {}) | {"x-guidance": guidance})
