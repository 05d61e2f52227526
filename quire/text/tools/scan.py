"""Scan: a cursor over text that is still coming, and the message that was made of it so far.

Grammars of formats are plain functions that read from it, top down, as if the whole text were there: they are generators, and yield
where they need more of it. What they decide depends on the text alone, and not on the pieces in which it comes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from quire.text.tools.delta import CallDelta, MessageDelta, Prose

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Yields where more text is needed; returns a T."""

SPACE = " \t\r\n"
ARGUMENTS = ("arguments", "parameters")
BESIDE = ("id", "type", "index")
"""Other keys that models put into a call; an object with any other key is none."""

_PLAIN = re.compile(r'[^"\\{}\[\]<]*')
_IN_STRING = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[^,}\]\s<]*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f]")
_SPACES = re.compile(rf"[{SPACE}]*")


class Scan:
    """What is read is either markup, which vanishes, or text or arguments, which are emitted, or is held until it is known which.

    White space next to markup belongs to it.
    """

    def __init__(self, functions: Iterable[str], key: str, id_form: str, hidden: Iterable[str], parallel: bool) -> None:
        """Parameters are those of ``parser_for``. id_form: ``call_`` or what else ids begin with; empty: 9 letters and digits."""
        self.functions = frozenset(functions)
        self.hidden = tuple(hidden)
        self.stops: tuple[str, ...] = ()
        """Markers that end a JSON value, outside of its strings: what can't be JSON any more is not waited for."""
        self.reasoning = True
        """Reasoning is told from the answer."""
        self.done = self.ended = self.open = False
        self._key, self._id_form, self._parallel = key, id_form, parallel
        self._text, self._at = "", 0
        self._held: list[str] | None = None
        """What was read and not decided on; None where everything that is read is markup."""
        self._spaces: list[str] = []
        """White space at the end of the text: markup, if markup follows."""
        self._fresh = True
        """Nothing but white space since the start, or since the last call."""
        self._made: list[Prose | CallDelta] = []
        self._thinking = False
        self._said: set[bool] = set()
        """True: there was reasoning. False: there was an answer's text."""
        self._count = 0
        self._arguments: list[str] = []

    # The text comes

    def feed(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def skip(self) -> None:
        """What was fed so far is no part of the message."""
        if self._held is None:
            self._text, self._at = "", 0
        self._spaces.clear()
        self._said.clear()
        self._made.clear()

    def take_delta(self) -> MessageDelta:
        """What was made since the last call."""
        if self.ended:
            self._end_spaces()
        self._end_arguments()
        delta, self._made = MessageDelta(self._made), []
        return delta

    def _end_spaces(self) -> None:
        if self._spaces and not self._thinking and not self._count:  # else it stands next to markup, or to nothing
            self._say(self._spaces)
        self._spaces.clear()

    @property
    def called(self) -> bool:
        return self._count > 0

    # Reading

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def sees(self, marker: str) -> Reading[bool]:
        """Whether ``marker`` comes next."""
        while not self.ended and len(self._text) - self._at < len(marker) and marker.startswith(self._text[self._at :]):
            yield
        return self._text.startswith(marker, self._at)

    def take(self, count: int) -> str:
        """Read characters that are there."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        if self._held is not None:
            self._held.append(taken)
        return taken

    def run(self, pattern: re.Pattern[str], give: Callable[[str], object] | None = None) -> Reading[str]:
        """All that comes next of what ``pattern``, a repetition of characters, allows; or ``give`` it as it comes."""
        parts: list[str] = []
        give = give or parts.append
        while (yield from self.peek()) and (match := pattern.match(self._text, self._at)) and match[0]:
            give(self.take(len(match[0])))
        return "".join(parts)

    def space(self) -> Reading[str]:
        """Read white space; the character that follows it."""
        yield from self.run(_SPACES)
        return (yield from self.peek())

    def prose(self, markers: Iterable[str]) -> Reading[str]:
        """Emit text up to the next of ``markers``, which is not read yet; "" at the end. Hidden markers are left out."""
        known = dict.fromkeys((*markers, *self.hidden))
        starts = re.compile("[" + re.escape("".join({marker[0] for marker in known})) + "]") if known else None
        while True:
            match = starts.search(self._text, self._at) if starts else None
            self.emit(self.take((match.start() if match else len(self._text)) - self._at))
            if match is None:
                if self.ended:
                    return ""
                yield
                continue
            found = None
            for marker in known:
                if (yield from self.sees(marker)):
                    found = marker
                    break
            if found is None:
                self.emit(self.take(1))
            elif found in markers:
                return found
            else:
                self.take(len(found))

    def string(self) -> Reading[str | None]:
        """A JSON string's value; None where none is next."""
        if (yield from self.peek()) != '"':
            return None
        raw: list[str] = []
        if not (yield from self._whole_string(raw.append)):
            return None
        try:
            value: str = json.loads("".join(raw), strict=False)
            value.encode()
        except ValueError:  # a wrong escape, or half of a surrogate pair
            return None
        return value

    def value(self, give: Callable[[str], object]) -> Reading[bool]:
        """Read a JSON value, as long as it may be, and ``give`` its text, as it is. Whether it has an end."""
        depth = 0
        while char := (yield from self.peek()):
            if char == '"':
                if not (yield from self._whole_string(give)):
                    return False
            elif char in "{[":
                if (yield from self.at_stop()):
                    return False
                depth += 1
                give(self.take(1))
            elif char in "}]":
                if not depth:
                    return False
                depth -= 1
                give(self.take(1))
            elif char in "<\\":
                if (yield from self.at_stop()):
                    return False
                give(self.take(1))
            elif depth:
                yield from self.run(_PLAIN, give)
            else:
                yield from self.run(_SCALAR, give)
            if not depth:
                return True
        return False

    def at_stop(self) -> Reading[bool]:
        """Whether one of ``stops`` comes next."""
        for marker in self.stops:
            if (yield from self.sees(marker)):
                return True
        return False

    def _whole_string(self, give: Callable[[str], object]) -> Reading[bool]:
        give(self.take(1))
        while char := (yield from self.peek()):
            if char == '"':
                give(self.take(1))
                return True
            if char == "\\":
                give(self.take(1))
                if (yield from self.peek()):
                    give(self.take(1))
            else:
                yield from self.run(_IN_STRING, lambda text: give(_CONTROL.sub(_escaped, text)))
        return False

    # What becomes of it

    def hold(self) -> None:
        """What is read from here on may be markup."""
        self._held = []

    def drop(self) -> None:
        """What was held is markup."""
        self._held = None
        self._spaces.clear()

    def release(self) -> None:
        """What was held is text, but for special tokens, which are never shown."""
        held, self._held = "".join(self._held or ()), None
        for marker in self.hidden:
            held = held.replace(marker, "")
        self.emit(held)

    def emit(self, text: str) -> None:
        if body := text.rstrip(SPACE):
            self._say((*self._spaces, body))
            self._spaces.clear()
            self._said.add(self._thinking)
            self._fresh = False
        if len(body) < len(text):
            self._spaces.append(text[len(body) :])

    def _say(self, pieces: Iterable[str]) -> None:
        self._end_arguments()
        last = self._made[-1] if self._made else None
        if isinstance(last, Prose) and last.reasoning == self._thinking:
            last.pieces += pieces
        else:
            self._made.append(Prose(self._thinking, list(pieces)))

    def think(self, thinking: bool) -> None:
        """What is emitted from here on is reasoning, or no more; it stands apart from what there was of its kind."""
        self._thinking, self._fresh = thinking and self.reasoning, True
        self._spaces = ["\n\n"] if self._thinking in self._said else []

    @property
    def starts_line(self) -> bool:
        """What comes next stands at the start of a line, or of everything, or after a call."""
        return self._fresh or any("\n" in spaces for spaces in self._spaces)

    def open_call(self, name: str) -> None:
        """What was held is the beginning of a call."""
        self.drop()
        self._end_arguments()
        digest = hashlib.blake2b(f"{self._key}/{self._count}".encode(), digest_size=12).hexdigest()
        call_id = self._id_form + digest if self._id_form else digest[:9]
        self._made.append(CallDelta(self._count, call_id, name, ""))
        self._count += 1
        self._fresh = self.open = True

    def close_call(self) -> None:
        self.done = not (self._parallel or self.ended)  # the end may have cut it off

    def argue(self, text: str) -> None:
        """More of the open call's arguments."""
        self._arguments.append(text)

    def _end_arguments(self) -> None:
        if text := "".join(self._arguments):
            last = self._made[-1] if self._made else None
            if not isinstance(last, CallDelta):
                last = CallDelta(self._count - 1, None, None, "")
                self._made.append(last)
            last.arguments += text
        self._arguments.clear()

    # Calls

    def call(self) -> Reading[bool]:
        """Read an object that has a function's name and its arguments. False: it is no call, and was read up to where that shows.

        A call has begun where both are known; what is wrong with its arguments from there on is their reader's matter.
        """
        name, arguments = None, ""
        self.take(1)
        char = yield from self.space()
        while char == '"':
            key = yield from self.string()
            if (yield from self.space()) != ":":
                break
            self.take(1)
            char = yield from self.space()
            if self._held is None or key in BESIDE:  # the call has begun, or it does not matter
                yield from self.value(_ignore)
            elif key == "name" and name is None:
                name = yield from self.string()
                if name not in self.functions:
                    return False
            elif key not in ARGUMENTS or arguments:
                return False
            elif char == "{" and name is not None:
                self.open_call(name)
                self.open = not (yield from self.value(self.argue))
            elif (got := (yield from self._arguments_text(char))) is None:
                return False
            else:
                arguments = got
            char = yield from self.space()
            if char != ",":
                break
            self.take(1)
            char = yield from self.space()
        if self._held is not None:
            if name is None or char != "}":
                return False
            self.take(1)
            self.open_call(name)
            self.argue(arguments or "{}")
            self.open = False
        elif char == "}":
            self.take(1)
        self.close_call()
        return True

    def _arguments_text(self, char: str) -> Reading[str | None]:
        """Arguments that come before the name, or as a string, or as null; None where they are something else."""
        if char == '"':
            text = yield from self.string()
            if text is None or not text.lstrip(SPACE).startswith("{"):
                return None
            return _STRING.sub(lambda string: _CONTROL.sub(_escaped, string[0]), text)
        parts: list[str] = []
        whole = yield from self.value(parts.append)
        text = "".join(parts)
        if not whole or not (text == "null" or text.startswith("{")):
            return None
        return "" if text == "null" else text


def _escaped(control: re.Match[str]) -> str:
    """As JSON has to have it, where a model breaks a line in the middle of a string."""
    return json.dumps(control[0])[1:-1]


def _ignore(_: str) -> None:
    pass
