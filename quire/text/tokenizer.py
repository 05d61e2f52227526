"""Tokenizer: text to token ids and back, from the files of a model folder. Never truncates, never pads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from quire.errors import InvalidRequestError, ModelLoadError
from quire.text.pieces import PieceRules, piece_rules

if TYPE_CHECKING:
    from quire.text.chat import ChatTemplates

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    ``decode`` gives what the tokenizers library gives, but for invalid byte-fallback sequences (see ``pieces``).
    """

    __slots__ = ("_chat", "_pieces", "_special_ids", "_tokenizer", "_unskipped_heads", "eos_token_ids", "rules", "special_tokens")

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, special_tokens: Mapping[str, str] | None = None,
                 chat_templates: str | Mapping[str, str] | None = None) -> None:  # fmt: skip
        """special_tokens: ``bos_token``, ``eos_token`` ... → text. chat_templates: one template, or name → template.

        Raises ModelLoadError where the tokenizer's decoder is not supported.
        """
