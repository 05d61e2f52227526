"""How the text of a chat's answer is read: what is reasoning, what is a call of a tool, what is said."""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import InvalidRequestError
from quire.outputs import Choice
from quire.sampling_params import SamplingParams
from quire.server.context import Context
from quire.server.prompts import Prompt
from quire.server.tools import Tools
from quire.text.tools import Message, ToolParser, parse_message, parser_for
from quire.text.tools.formats import FORMATS, THINK, THINK_MARKERS


@dataclass(slots=True, frozen=True)
class Reading:
    tools: Tools | None
    format: str | None
    reasoning: bool
    in_reasoning: bool
    """The prompt has begun the reasoning already."""
    hidden: tuple[str, ...]
    """Markers that are special tokens: the parser sees them, and nobody else."""
    shown: frozenset[int]
    """Their ids."""

    def parser(self, key: str) -> ToolParser:
        """key: of the choice, unique. Ids of calls are derived from it."""
        return parser_for(
            self.format,
            () if self.tools is None else self.tools.names,
            key=key,
            parallel=self.tools is None or self.tools.parallel,
            reasoning=self.reasoning,
            in_reasoning=self.in_reasoning,
            hidden=self.hidden,
        )

    def message(self, choice: Choice, key: str) -> Message:
        """What a whole choice says. Its finish_reason is set too."""
        parser = self.parser(key)
        message = parse_message(parser, choice.text)
        if choice.finish_reason is not None:
            choice.finish_reason = reason_of(choice.finish_reason, parser)
        return message


def reason_of(finish_reason: str, parser: ToolParser) -> str:
    """``tool_calls``, where there is a call and it was not cut off."""
    return "tool_calls" if parser.done or (parser.called and finish_reason == "stop") else finish_reason


def reading_for(context: Context, tools: Tools | None, params: SamplingParams, prompt: Prompt) -> Reading | None:
    """None where the text is the message as it is."""
    reasoning = context.reasoning and not (tools is not None and tools.must)
    if tools is None and not reasoning:
        return None
    format = None if tools is None else context.tool_format
    markers = (*(FORMATS[format].markers if format else ()), *(THINK_MARKERS if reasoning else ()))
    hidden = {}
    if params.skip_special_tokens:
        ids = {marker: context.tokenizer.token_id(marker) for marker in markers}
        hidden = {marker: i for marker, i in ids.items() if i is not None and i in context.tokenizer.special_ids}
    in_reasoning = reasoning and (prompt.text or "").rstrip().endswith(THINK)
    return Reading(tools, format, reasoning, in_reasoning, tuple(hidden), frozenset(hidden.values()))


def check_format(context: Context) -> None:
    """Raises InvalidRequestError where calls of tools can't be read."""
    if context.tool_format is None:
        wanted = context.config.tool_parser
        raise InvalidRequestError(
            "this server was started with --tool-parser none: leave out tools"
            if wanted == "none"
            else "this model's chat template has none of the known formats of tool calls, so they could not be told from text: leave out "
            f"tools, or serve with --tool-parser and one of {', '.join(FORMATS)}, if the model knows it",
            param="tools",
        )
