"""Text that looks like a special token where it must not be one: in what people write.

A chat template spells special tokens out, and the tokenizer finds them in the whole prompt. A message that says ``<|im_end|>`` would
end itself there, and could go on as another role. So such text is broken up before it is rendered: a sign that means nothing
stands behind its first character. Where the sign is found in a prompt, what is still whole is the template's own. The prompt is then
encoded once more by a tokenizer that knows no special tokens, with another sign in the place of each that is the template's: one call, so
that every token is the one that it would be if the broken text had never been special.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

import tokenizers

from quire.errors import InvalidRequestError

_PRIVATE = range(0xE000, 0xF900)
"""Characters that no text means anything by, and that have no upper case."""


def _sign(length: int) -> str:
    return "".join(chr(secrets.choice(_PRIVATE)) for _ in range(length))


class SpecialText:
    """The special tokens of one tokenizer. Safe to use from several threads."""

    __slots__ = ("_break", "_escaped", "_pattern", "_plain", "_stand_in", "_texts", "_tokenizer")

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # One character can't be broken up; no tokenizer of a chat model has such a token.
        spellings = sorted((text for text in self._texts.values() if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        # Whoever guesses the first one has written text with a hole; the other one must not be guessed.
        self._break, self._stand_in = _sign(2), _sign(6)
        self._escaped = "".join(f"\\u{ord(char):04x}" for char in self._break)
        self._plain: tokenizers.Tokenizer | None = None

    def within(self, value: Any) -> bool:
        """Whether there is any in a JSON value."""
        if isinstance(value, str):
            return self._pattern is not None and self._pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(self.within(key) or self.within(item) for key, item in value.items())
        return isinstance(value, list) and any(map(self.within, value))

    def break_up(self, value: Any) -> Any:
        """A JSON value in whose strings none is left."""
        if isinstance(value, str):
            while self._pattern is not None and self._pattern.search(value):  # again for those that overlap
                value = self._pattern.sub(lambda match: match[0][0] + self._break + match[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {self.break_up(key): self.break_up(item) for key, item in value.items()}
        return [self.break_up(item) for item in value] if isinstance(value, list) else value

    def mend(self, text: str) -> str:
        """What was broken up, as it was written."""
        return text.replace(self._break, "").replace(self._escaped, "")

    def encode(self, text: str, add_special_tokens: bool) -> list[int] | None:
        """The tokens of a rendered prompt; None where nothing in it is broken up.

        Raises InvalidRequestError where the tokenizer's own pieces spell a special token (some unigram vocabularies do).
        """
        if self._break not in text and self._escaped not in text:
            return None
        if self._plain is None:
            plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
            plain.encode_special_tokens = True  # as ordinary text
            plain.add_tokens([tokenizers.AddedToken(self._stand_in, special=False, normalized=False)])
            self._plain = plain
        # A batch, since ``encode`` lets no other thread of Python run meanwhile.
        (whole,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        parts, special, at = [], [], 0
        for token_id, (start, end) in zip(whole.ids, whole.offsets, strict=True):
            if (spelling := self._texts.get(token_id)) is not None and spelling in text[start:end]:  # and not an unknown character
                parts += [text[at:start], self._stand_in]
                special.append(token_id)
                at = end
        prompt = self.mend("".join([*parts, text[at:]]))
        (made,) = self._plain.encode_batch([prompt], add_special_tokens=add_special_tokens)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        found = {i for i, added in zip(made.ids, made.special_tokens_mask, strict=True) if not added and i in self._texts}
        for token_id in sorted(found):
            if self._texts[token_id] != unknown and self._texts[token_id] in prompt:
                raise InvalidRequestError(
                    f"a message holds {self._texts[token_id]!r}, which this model's tokenizer can't read as text: leave it out",
                    param="messages",
                )
        stand_in, own = self._plain.token_to_id(self._stand_in), iter(special)
        return [next(own) if i == stand_in else i for i in made.ids]
