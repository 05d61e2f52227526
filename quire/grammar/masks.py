"""Sets of tokens as bits: bit t % 8 of byte t // 8, as many bytes as make whole words of 32 bits."""

from __future__ import annotations

from collections.abc import Sequence

ALL = 0xFF


class Masks:
    """Of a vocabulary of ``size`` tokens, of which ``eos_ids`` end a text."""

    def __init__(self, size: int, eos_ids: Sequence[int]) -> None:
        self.num_bytes = -(-size // 32) * 4
        self.can_end = bool(eos_ids)
        # Without one, the end has the id behind the last token (see Vocabulary), and maybe a bit in the last bytes.
        self.eos_ids = tuple(eos_ids) or (() if size % 32 == 0 else (size,))
        self.nothing = bytes(self.num_bytes)

    def of(self, tokens: Sequence[int]) -> bytes:
        mask = bytearray(self.num_bytes)
        for token in tokens:
            mask[token >> 3] |= 1 << (token & 7)
        return bytes(mask)

    def without(self, mask: bytes | None, tokens: Sequence[int]) -> bytes:
        """``mask``, or all tokens, but for ``tokens``."""
        left = bytearray([ALL]) * self.num_bytes if mask is None else bytearray(mask)
        for token in tokens:
            left[token >> 3] &= ALL ^ (1 << (token & 7))
        return bytes(left)

    def going_on(self, mask: bytes) -> bytes | None:
        """``mask`` without the ends of a text; None where nothing is left."""
        if any(mask[token >> 3] >> (token & 7) & 1 for token in self.eos_ids):
            mask = self.without(mask, self.eos_ids)
        return None if mask == self.nothing else mask

    @staticmethod
    def both(a: bytes, b: bytes) -> bytes:
        return (int.from_bytes(a, "little") & int.from_bytes(b, "little")).to_bytes(len(a), "little")
