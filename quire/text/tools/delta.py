"""What a model's text means in a chat: the answer, the reasoning before it, calls of tools; in pieces, as they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class CallDelta:
    """A piece of a call."""

    index: int
    """Which call of the message, from 0."""
    id: str | None
    """In the first piece of a call, as ``name``; None in the others."""
    name: str | None
    arguments: str
    """A piece of the arguments' JSON text, as the model wrote it: all pieces of a call joined are the text of an object."""


@dataclass(slots=True)
class Prose:
    """A piece of the answer's text, or of the reasoning."""

    reasoning: bool
    pieces: list[str]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(slots=True)
class MessageDelta:
    """What a piece of text adds to a message, in its order."""

    parts: list[Prose | CallDelta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Prose) and not part.reasoning)

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Prose) and part.reasoning)

    @property
    def calls(self) -> list[CallDelta]:
        return [part for part in self.parts if isinstance(part, CallDelta)]

    def add(self, more: MessageDelta) -> None:
        self.parts += more.parts


@dataclass(slots=True)
class Call:
    """A whole call."""

    id: str
    name: str
    arguments: str
    """JSON text."""


@dataclass(slots=True)
class Message:
    """A whole message: the sum of its deltas."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: MessageDelta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        for call in delta.calls:
            if call.id is not None and call.name is not None:
                self.calls.append(Call(call.id, call.name, ""))
            self.calls[call.index].arguments += call.arguments


class ToolParser(Protocol):
    """Reads one sequence's text as it comes.

    All deltas together are what the whole text means, however it is cut into pieces. Markup of calls is never emitted as text, but
    where it turns out not to be a call: then it is text, as it was. Only what may become markup is held back.
    """

    @property
    def done(self) -> bool:
        """Nothing more is wanted: the one call that was asked for is complete. What is pushed from here on is dropped."""
        ...

    @property
    def called(self) -> bool:
        """There was a call."""
        ...

    @property
    def open(self) -> bool:
        """The last call's arguments have no end yet."""
        ...

    def push(self, text: str) -> MessageDelta:
        """What ``text`` adds."""
        ...

    def finish(self) -> MessageDelta:
        """The text has ended: what was held back."""
        ...
