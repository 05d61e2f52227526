"""How the text of a chat's answer is read: what is reasoning, what is a call of a tool, what is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from quire.errors import InvalidRequestError
from quire.grammar.program import rule_of
from quire.outputs import Choice
from quire.sampling_params import SamplingParams
from quire.server.calls.prompts import Prompt
from quire.server.calls.tools import Tools
from quire.server.context import Context
from quire.structured import Structured
from quire.text.chat import text_of
from quire.text.tokenizer import Tokenizer
from quire.text.tools import Message, ToolParser, parse_message, parser_for
from quire.text.tools.constrained import CallGrammar
from quire.text.tools.formats import ANALYSIS, ASSISTANT, CHANNEL, END_THINK, FORMATS, HARMONY, MESSAGE, THINK, THINK_MARKERS, begun
from quire.text.tools.scan import SPACE


@dataclass(slots=True, frozen=True)
class Reading:
    tools: Tools | None
    format: str | None
    parallel: bool
    """Several calls may be made at once."""
    reasoning: bool
    in_reasoning: bool
    """The prompt has begun the reasoning already."""
    before: str
    """The beginning of the first message, which is in the prompt, where the format has a frame."""
    hidden: tuple[str, ...]
    """Markers that are special tokens: the parser sees them, and nobody else."""
    shown: frozenset[int]
    """Their ids."""
    think_ids: tuple[int | None, int | None]
    """Tokens that begin and end the reasoning; None where several make up the marker."""

    def parser(self, key: str) -> ToolParser:
        """key: of the choice, unique. Ids of calls are derived from it."""
        return parser_for(
            self.format,
            () if self.tools is None else self.tools.names,
            key=key,
            parallel=self.parallel,
            reasoning=self.reasoning,
            in_reasoning=self.in_reasoning,
            before=self.before,
            hidden=self.hidden,
        )

    @property
    def framed(self) -> bool:
        return self.format is not None and bool(FORMATS[self.format].start)

    def thought(self, tokenizer: Tokenizer) -> Thinking:
        if self.framed:
            analysis = Analysis(tokenizer)
            analysis.take(tokenizer.encode(self.before, False))
            return analysis
        return Thought(*self.think_ids, self.in_reasoning, lambda token: not tokenizer.token_text(token).strip(SPACE))

    def message(self, choice: Choice, key: str) -> Message:
        """What a whole choice says. Its finish_reason is set too."""
        parser = self.parser(key)
        message = parse_message(parser, choice.text)
        if choice.finish_reason is not None:
            choice.finish_reason = reason_of(choice.finish_reason, choice.stop_reason, parser)
        return message


END_TOKENS = 32
"""Of a prompt whose text is not there (it was cut), so many tell whether it ends in a reasoning that has begun."""


class Thinking(Protocol):
    def take(self, token_ids: Sequence[int]) -> int:
        """How many of the next tokens belong to a reasoning."""
        ...


class Thought:
    """Counts the tokens of a reasoning, between its markers; none where they are no tokens, or behind text: they are text there."""

    __slots__ = ("_begins", "_blank", "_ends", "_state")

    def __init__(self, begins: int | None, ends: int | None, opened: bool, blank: Callable[[int], bool]) -> None:
        self._begins, self._ends, self._blank = begins, ends, blank
        self._state: Literal["before", "in", "after"] = "after" if ends is None else "in" if opened else "before"

    def take(self, token_ids: Sequence[int]) -> int:
        """See Thinking."""
        count = 0
        for token in token_ids:
            if self._state == "after":
                break
            if token == self._begins:
                self._state = "in"
            elif token == self._ends or (self._state == "before" and not self._blank(token)):
                self._state = "after"
            else:
                count += self._state == "in"
        return count


class Analysis:
    """The same of messages in the channel analysis; none where markers are no tokens."""

    __slots__ = ("_header", "_in", "_markers", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._markers = {tokenizer.token_id(marker): marker for marker in HARMONY}
        self._header: list[int] | None = None
        """Tokens since the channel's marker; None outside of headers."""
        self._in = False

    def take(self, token_ids: Sequence[int]) -> int:
        """See Thinking."""
        count = 0
        for token in token_ids:
            marker = self._markers.get(token)
            if marker == CHANNEL:
                self._header, self._in = [], False
            elif marker == MESSAGE:
                channel = "" if self._header is None else self._tokenizer.decode(self._header).strip()
                self._header, self._in = None, channel == ANALYSIS
            elif self._header is not None:
                self._header.append(token)
            elif marker is not None:
                self._in = False
            else:
                count += self._in
        return count


def reason_of(finish_reason: str, stop_reason: int | str | None, parser: ToolParser) -> str:
    """``tool_calls``, where there is a call and it was not cut off: by the limit of tokens, or by a stop string within it."""
    cut = finish_reason != "stop" or (parser.open and isinstance(stop_reason, str))
    return "tool_calls" if parser.done or (parser.called and not cut) else finish_reason


def reading_for(
    context: Context, tools: Tools | None, params: SamplingParams, prompt: Prompt, continued: object = None
) -> Reading | None:  # fmt: skip
    """None where the text is the message as it is. continued: the content of the message that the answer goes on with."""
    frame, form = context.frame, params.structured
    # A form begins with the first token, but within a frame, or where calls are the alternative.
    reasoning = context.reasoning and (form is None or frame is not None or (tools is not None and form.kind == "json"))
    if tools is None and not reasoning and frame is None:
        return None
    format = frame or (None if tools is None else context.tool_format)
    markers = (*(FORMATS[format].markers if format else ()), *(THINK_MARKERS if reasoning and frame is None else ()))
    hidden = {}
    if params.skip_special_tokens:
        ids = {marker: context.tokenizer.token_id(marker) for marker in markers}
        hidden = {marker: i for marker, i in ids.items() if i is not None and i in context.tokenizer.special_ids}
    thought = text_of(continued)
    end = context.tokenizer.decode(prompt.token_ids[-END_TOKENS:], skip_special_tokens=False) if prompt.text is None else prompt.text
    in_reasoning = reasoning and (end.rstrip().endswith(THINK) or thought.rfind(THINK) > thought.rfind(END_THINK))
    before = "" if frame is None else begun(frame, end)
    begins, ends = (context.tokenizer.token_id(marker) if reasoning else None for marker in THINK_MARKERS)
    parallel = tools is None or (tools.parallel and context.parallel_calls)
    shown = frozenset(hidden.values())
    return Reading(tools, format, parallel, reasoning, in_reasoning, before, tuple(hidden), shown, (begins, ends))


def calls_or_form(context: Context, reading: Reading, params: SamplingParams) -> SamplingParams:
    """Parameters under which nothing but calls can be generated, after the reasoning, where they are insisted on; or else calls, or what
    has the form of the answer, if that is JSON or has a frame. Raises InvalidRequestError."""
    tools, form, answer = reading.tools, params.structured, None
    must = tools is not None and tools.must
    functions = tools.functions if tools is not None and (must or (form is not None and form.kind == "json")) else []
    in_message = reading.framed and reading.before != ASSISTANT
    if reading.format is None or not (must or (form is not None and (functions or reading.framed) and not in_message)):
        return params
    tokens = {text: i for i, text in context.tokenizer.added_tokens.items()}
    source = "tools"
    if form is not None and not must:
        source, answer = form.source, rule_of(form)
    grammar = CallGrammar(
        reading.format, functions, tokens, reading.parallel, reading.reasoning, reading.in_reasoning, in_message, answer
    )  # fmt: skip
    return replace(params, structured=Structured.grammar(grammar.lark(), source=source))


def check_format(context: Context) -> None:
    """Raises InvalidRequestError where calls of tools can't be read."""
    if context.tool_format is None:
        wanted = context.config.tool_parser
        raise InvalidRequestError(
            "this server was started with --tool-parser none: leave out tools"
            if wanted == "none"
            else f"{context.model!r} does not support tools: its chat template has none of the known formats of calls, so they could not "
            f"be told from text; leave out tools, or serve with --tool-parser and one of {', '.join(FORMATS)}, if the model knows it",
            param="tools",
        )
