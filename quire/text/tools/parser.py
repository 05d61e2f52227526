"""The parser for a message, by the name of its format."""

from __future__ import annotations

from collections.abc import Iterable

from quire.text.tools.delta import Message, MessageDelta, ToolParser


class _Plain:
    """No calls, no reasoning: text is text."""

    done = False

    def push(self, text: str) -> MessageDelta:
        return MessageDelta(text)

    def finish(self) -> MessageDelta:
        return MessageDelta()


def parser_for(
    name: str | None,
    functions: Iterable[str] = (),
    *,
    key: str = "",
    parallel: bool = True,
    reasoning: bool = False,
    in_reasoning: bool = False,
    hidden: Iterable[str] = (),
) -> ToolParser:
    """A parser for the text of one sequence.

    name: the format of calls (``hermes``, ``llama3``, ``mistral``); None: there are no calls. functions: names that may be called.
    key: ids of calls are derived from it and the call's index. parallel: more than one call may be made. reasoning: the text may begin
    with ``<think>``...``</think>``; in_reasoning: the prompt has opened it already. hidden: markers that are special tokens, of which
    nothing is shown even where there is no call.
    """
    return _Plain()


def parse_message(parser: ToolParser, text: str) -> Message:
    """The whole text at once."""
    message = Message()
    message.add(parser.push(text))
    message.add(parser.finish())
    return message
