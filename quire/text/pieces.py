"""What one token contributes to the text, in bytes, under the decoder that tokenizer.json declares.

Every decoder that decoder-only models use works token by token, but for the first token of a text (sentencepiece marks
a word with a leading space, and the first word's space is dropped). So a text is the concatenation of its tokens' bytes,
read as UTF-8, and decoding can be incremental and exact at the same time. Decoders for which this does not hold are
refused when the model is loaded.

Read as UTF-8, one byte at a time can be wrong in two ways, and each decoder has its own convention:

* ByteLevel: one U+FFFD for each maximal invalid part (Unicode 15, section 3.9; the same as Rust's and Python's).
* ByteFallback: one U+FFFD for each byte, as sentencepiece. The tokenizers library goes further and replaces the valid
  characters next to an invalid byte too; that would make every character depend on an unbounded number of tokens after
  it, and destroys text that the model has written correctly. Where all bytes are valid, all three agree.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire.errors import ModelLoadError

PER_BYTE_ERRORS = "quire.replace_each_byte"
"""Error handler for the codecs module: one U+FFFD for each undecodable byte."""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(PER_BYTE_ERRORS, _replace_each_byte)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Piece = Callable[[str], bytes]
"""Text of a token in the vocabulary → the bytes that it contributes."""


@dataclass(slots=True, frozen=True)
class PieceRules:
    """How the tokens of a vocabulary become bytes, and the bytes a text."""

    middle: Piece
    """Anywhere but at the start of a text."""
    head: Piece
    """For the first token of a text."""
    errors: str = "replace"
    """Error handler for bytes that are not UTF-8."""
    strip: str = ""
    """Character of which up to ``strip_count`` are dropped at the start of the text."""
    strip_count: int = 0


def byte_level_alphabet() -> dict[str, int]:
    """The 256 printable characters that stand for bytes in byte-level BPE vocabularies (GPT-2's ``bytes_to_unicode``)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def _byte_level() -> Piece:
    alphabet = byte_level_alphabet()

    def piece(token: str) -> bytes:
        try:
            return bytes([alphabet[c] for c in token])
        except KeyError:  # an added token is stored as its plain text
            return token.encode()

    return piece


def _plain(replacements: tuple[tuple[str, str], ...], byte_tokens: bool) -> Piece:
    def piece(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    return piece


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]


def _pipeline(steps: list[dict[str, Any]]) -> PieceRules | None:
    """Rules for Replace*, ByteFallback?, Fuse?, Strip? in this order (Llama, Mistral, Gemma and relatives), else None."""
    replacements: list[tuple[str, str]] = []
    byte_tokens, stage = False, 0
    strip, strip_count = "", 0
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and stage == 0 and isinstance(step["pattern"].get("String"), str):
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback" and stage == 0:
            byte_tokens, stage = True, 1
        elif kind == "Fuse" and stage <= 1:
            stage = 2
        elif kind == "Strip" and stage == 2 and step["stop"] == 0:
            strip, strip_count, stage = step["content"], step["start"], 3
        else:
            return None
    piece = _plain(tuple(replacements), byte_tokens)
    return PieceRules(piece, piece, PER_BYTE_ERRORS if byte_tokens else "replace", strip, strip_count)


def piece_rules(state: bytes | str | None) -> PieceRules:
    """Rules for the decoder section of a tokenizer.json (None: it has none). Raises ModelLoadError for other kinds."""
    if state is None:  # the library puts a space between tokens
        plain = _plain((), False)
        return PieceRules(lambda token: b" " + plain(token), plain)
    steps = _flatten(json.loads(state))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        piece = _byte_level()
        return PieceRules(piece, piece)
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        middle = _plain(((mark, " "),), False)
        return PieceRules(middle, middle if steps[0]["prepend_scheme"] == "never" else _plain(((mark, ""),), False))
    if rules := _pipeline(steps):
        return rules
    raise ModelLoadError(
        f"tokenizer.json has a decoder that is not supported: {' + '.join(kinds)}; supported are ByteLevel, Metaspace, and "
        "Replace + ByteFallback + Fuse + Strip or a part of these in this order"
    )
