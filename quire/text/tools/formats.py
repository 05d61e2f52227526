"""The formats in which models write calls, each a grammar over a Scan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from quire.text.tools.scan import Reading, Scan

THINK_MARKERS = THINK, END_THINK = "<think>", "</think>"

_NAME = re.compile(r"[A-Za-z0-9_.-]*")


def reasoning(scan: Scan, opened: bool) -> Reading[None]:
    """``<think>...</think>`` at the start of the text; ``opened``: the prompt ends in ``<think>``."""
    scan.hold()
    yield from scan.space()
    if (yield from scan.sees(THINK)):
        scan.take(len(THINK))
    elif not opened:
        scan.release()
        return
    scan.drop()
    yield from scan.space()
    scan.think(True)
    if (yield from scan.prose((END_THINK,))):
        scan.take(len(END_THINK))
        scan.think(False)
        yield from scan.space()


def plain(scan: Scan) -> Reading[None]:
    """No calls."""
    yield from scan.prose(())


def hermes(scan: Scan) -> Reading[None]:
    """Hermes, Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once for each call."""
    opens, closes = "<tool_call>", "</tool_call>"
    scan.stops = (closes, opens)
    inside = False
    while marker := (yield from scan.prose((opens, closes))):
        if marker == closes:
            text = scan.take(len(closes))
            if not inside:
                scan.emit(text)
            inside = False
            continue
        scan.hold()
        scan.take(len(opens))
        inside = False
        while (yield from scan.space()) == "{" and (yield from scan.call()):
            if scan.done:
                return
            inside = True
            scan.hold()
        if inside and (yield from scan.sees(closes)):
            scan.take(len(closes))
            scan.drop()
            inside = False
        else:
            scan.release()


def llama3(scan: Scan) -> Reading[None]:
    """Llama 3: ``{"name": ..., "parameters": {...}}`` where a line begins, or after ``<|python_tag|>``; several after ``;``."""
    tag = "<|python_tag|>"
    scan.stops = (tag,)
    while marker := (yield from scan.prose((tag, "{"))):
        if marker == "{" and not scan.starts_line:
            scan.emit(scan.take(1))
            continue
        scan.hold()
        if marker == tag:
            scan.take(len(tag))
        char = yield from scan.space()
        while char == "{" and (yield from scan.call()):
            if scan.done:
                return
            scan.hold()
            char = yield from scan.space()
            if char and char in ";,":
                scan.take(1)
                char = yield from scan.space()
        scan.release()


def mistral(scan: Scan) -> Reading[None]:
    """Mistral: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` once for each call."""
    opens = "[TOOL_CALLS]"
    scan.stops = (opens,)
    while (yield from scan.prose((opens,))):
        scan.hold()
        scan.take(len(opens))
        char = yield from scan.space()
        if char == "[":
            scan.take(1)
            char = yield from scan.space()
            made = False
            while char == "{" and (yield from scan.call()):
                if scan.done:
                    return
                made = True
                scan.hold()
                char = yield from scan.space()
                if char != ",":
                    break
                scan.take(1)
                char = yield from scan.space()
            is_call = made and char == "]"
            if is_call:
                scan.take(1)
                scan.drop()
        else:
            is_call = yield from (scan.call() if char == "{" else _named(scan))
        if scan.done:
            return
        if not is_call:
            scan.release()


def _named(scan: Scan) -> Reading[bool]:
    name = yield from scan.run(_NAME)
    if name not in scan.functions:
        return False
    for marker in ("[CALL_ID]", "[ARGS]"):
        if (yield from scan.sees(marker)):
            scan.take(len(marker))
            if marker == "[CALL_ID]":
                yield from scan.run(_NAME)
    if (yield from scan.space()) != "{":
        return False
    yield from _arguments(scan, name)
    return True


def _arguments(scan: Scan, name: str) -> Reading[None]:
    scan.open_call(name)
    scan.open = not (yield from scan.value(scan.argue))
    scan.close_call()


HARMONY = START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN = (
    "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip
ASSISTANT = START + "assistant"
ANALYSIS = "analysis"

_CHANNELS = (ANALYSIS, "commentary", "final", "")
_RECIPIENTS = ("assistant", "user", "")
_BUILT_IN = ("python", "browser", "container")
"""Tools that gpt-oss was trained with: what it writes to them is part of its reasoning, and nobody runs it here."""


def harmony(scan: Scan) -> Reading[None]:
    """gpt-oss: everything is in messages, ``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``,
    of which the prompt has begun the first; ``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`` is a
    call, also with the recipient before the channel. A header that is none, or names what is not there, is text."""
    scan.stops = HARMONY
    while True:
        scan.hold()
        if (yield from scan.sees(START)):
            if (yield from scan.sees(ASSISTANT)):
                scan.take(len(ASSISTANT))
                scan.drop()
                scan.hold()
            else:
                scan.take(len(START))
            scan.think(False)
        header = yield from _header(scan)
        if header is None:
            scan.release()
        elif (name := _addressed(scan, header[1])) is not None:
            called = yield from _call(scan, name)
            if scan.done:
                return
            scan.think(False)
            if not called:
                scan.release()
        elif header[0] in _CHANNELS and header[1] in _RECIPIENTS:
            scan.drop()
            scan.think(header[0] == ANALYSIS)
        else:
            scan.think(header[0] == ANALYSIS or header[1].partition(".")[0] in _BUILT_IN)
            scan.release()
        while (marker := (yield from scan.prose((START, CHANNEL, END, CALL, RETURN)))) not in (START, CHANNEL):
            if not marker:
                return
            scan.hold()
            scan.take(len(marker))
            if not (yield from scan.space()) or (yield from scan.sees(START)) or (yield from scan.sees(CHANNEL)):
                scan.drop()
            else:
                scan.release()


def _header(scan: Scan) -> Reading[tuple[str, str] | None]:
    """A message's channel and recipient, up to where its text begins; None where there is something else."""
    channel, recipient, typed = "", "", False
    while True:
        yield from scan.space()
        found = ""
        for marker in (MESSAGE, CHANNEL, CONSTRAIN, "to="):
            if (yield from scan.sees(marker)):
                found = scan.take(len(marker))
                break
        if found == MESSAGE:
            return channel, recipient
        if not found and (typed or not channel):
            return None
        word = yield from scan.run(_NAME)
        if found == CHANNEL:
            channel = word
        elif found == "to=":
            recipient = word
        elif word:
            typed = True
        elif not found:
            return None


def _addressed(scan: Scan, recipient: str) -> str | None:
    """The function that a recipient is."""
    names = (recipient.removeprefix("functions."), recipient)
    return next((name for name in names if name in scan.functions), None)


def _call(scan: Scan, name: str) -> Reading[bool]:
    """False: it has something else than arguments."""
    char = yield from scan.space()
    if char == "{":
        yield from _arguments(scan, name)
    elif not char or (yield from scan.at_stop()):
        scan.open_call(name)
        scan.argue("{}")
        scan.open = False
        scan.close_call()
    else:
        return False
    return True


@dataclass(slots=True, frozen=True)
class Format:
    grammar: Callable[[Scan], Reading[None]]
    markers: tuple[str, ...]
    """Tokens that must be seen, where they are special ones."""
    id_form: str = "call_"
    """What ids of calls begin with; empty: they are 9 letters and digits, on which Mistral's templates insist."""
    start: str = ""
    """What a message begins with, where answers and reasoning are messages too."""


FORMATS = {
    "hermes": Format(hermes, ("<tool_call>", "</tool_call>")),
    "llama3": Format(llama3, ("<|python_tag|>",)),
    "mistral": Format(mistral, ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), ""),
    "harmony": Format(harmony, HARMONY, start=START),
}
PLAIN = Format(plain, ())


def detect(template: str) -> str | None:
    """The format that a chat template asks its model for; None where it is none of these."""
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else "hermes"  # relatives whose calls are not JSON
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if all(marker in template for marker in (START, CHANNEL, MESSAGE)):
        return "harmony"
    if "<|start_header_id|>" in template and "tools" in template and '"parameters": ' in template:
        return "llama3"
    return None


def begun(name: str, prompt: str) -> str:
    """The message of the model that a prompt has begun, as far as it goes, of a format that has answers in messages; else nothing."""
    start = FORMATS[name].start
    at = prompt.rfind(start) if start else -1
    return prompt[at:] if at >= 0 else ""


def takes_one_call(template: str) -> bool:
    """Whether the template refuses a message with several calls, as those of Llama 3 do, or looks at the first only, as that of gpt-oss
    does: they are not to be made then."""
    return "only supports single tool-calls" in template or "assume max 1 tool call per message" in template
