"""Tokens of rows: their embeddings, and those that were drawn."""

from __future__ import annotations

from torch import Tensor


def embed(tokens: Tensor, rows: Tensor, positions: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [vocab, H] of the tokens at ``positions`` [T] int32 of ``rows`` [T] int32 of the table tokens [R, length] int32:
    [T, H]."""
    return weight.index_select(0, tokens[rows, positions])


def put_tokens(tokens: Tensor, rows: Tensor, positions: Tensor, found: Tensor) -> None:
    """Put ``found`` [N] int32, 0 for -1, at ``positions`` [N] int32 of ``rows`` [N] int32 of the table tokens [R, length] int32."""
    tokens.index_put_((rows, positions), found.clamp(min=0))
