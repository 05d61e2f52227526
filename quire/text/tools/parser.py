"""The parser for a message, by the name of its format."""

from __future__ import annotations

from collections.abc import Iterable

from quire.text.tools import formats
from quire.text.tools.delta import Message, MessageDelta, ToolParser
from quire.text.tools.scan import Reading, Scan


class _Parser:
    """Runs a grammar over the text as it comes."""

    __slots__ = ("_reader", "_scan")

    def __init__(self, scan: Scan, reader: Reading[None]) -> None:
        self._scan = scan
        self._reader: Reading[None] | None = reader

    @property
    def done(self) -> bool:
        return self._scan.done

    @property
    def called(self) -> bool:
        return self._scan.called

    @property
    def open(self) -> bool:
        return self._scan.open

    def push(self, text: str) -> MessageDelta:
        if self._reader is None:
            return MessageDelta()
        self._scan.feed(text)
        return self._read()

    def finish(self) -> MessageDelta:
        self._scan.ended = True
        return self._read()

    def _read(self) -> MessageDelta:
        if self._reader is not None:
            try:
                next(self._reader)
            except StopIteration:
                self._reader = None
        return self._scan.take_delta()


def parser_for(
    name: str | None,
    functions: Iterable[str] = (),
    *,
    key: str = "",
    parallel: bool = True,
    reasoning: bool = False,
    in_reasoning: bool = False,
    before: str = "",
    hidden: Iterable[str] = (),
) -> ToolParser:
    """A parser for the text of one sequence.

    name: the format of calls (``hermes``, ``llama3``, ``mistral``), or of everything (``harmony``); None: there are no calls. functions:
    names that may be called. key: ids of calls are derived from it and the call's index. parallel: more than one call may be made.
    reasoning: the text may begin with ``<think>``...``</think>``, or have it in messages of its own; in_reasoning: the prompt has opened it
    already. before: the beginning of the first message, which is in the prompt. hidden: markers that are special tokens, of which nothing
    is shown even where there is no call.
    """
    form = formats.PLAIN if name is None else formats.FORMATS[name]
    scan = Scan(functions, key, form.id_form, hidden, parallel)
    scan.reasoning = reasoning

    def read() -> Reading[None]:
        if reasoning and not form.start:
            yield from formats.reasoning(scan, in_reasoning)
        yield from form.grammar(scan)

    parser = _Parser(scan, read())
    if before:
        parser.push(before)
        scan.skip()
    return parser


def parse_message(parser: ToolParser, text: str) -> Message:
    """The whole text at once."""
    message = Message()
    message.add(parser.push(text))
    message.add(parser.finish())
    return message
