"""What changes logits before the draw, in this order: restrict, ban, bias, penalize. All work in place on float32 logits [N, vocab].

A logit that is no number, or infinite, stays so whatever is forbidden: the sampler has to see it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def restrict(logits: Tensor, mask_words: Tensor, mask_index: Tensor) -> None:
    """Row i may have the tokens of mask ``mask_index[i]`` alone; -1: all.

    mask_words [masks, at least vocab / 32] int32, the bit of token t is bit t % 32 of word t // 32; mask_index [N] int32.
    """
    if not len(mask_words):
        return
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = (mask_words[mask_index.clamp(min=0).long()][:, ids // 32] >> (ids % 32)) & 1
    logits.masked_fill_((bits == 0) & (mask_index >= 0)[:, None] & (logits < math.inf), -math.inf)


def ban(logits: Tensor, start: Tensor, ids: Tensor) -> None:
    """Row i may not have ``ids[start[i] : start[i + 1]]``. start [N + 1] int32, ids [at least start[N]] int32."""
    row, valid = _owners(start, ids)
    banned = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    banned.index_put_((row, ids.clamp(min=0).long()), valid.int(), accumulate=True)
    logits.masked_fill_((banned > 0) & (logits < math.inf), -math.inf)


def bias(logits: Tensor, start: Tensor, ids: Tensor, values: Tensor) -> None:
    """``values`` (float32) are added to the logits of ``ids``, as in ``ban``. A row has a token once at most."""
    row, valid = _owners(start, ids)
    logits.index_put_((row, ids.clamp(min=0).long()), torch.where(valid, values, 0.0), accumulate=True)


def penalize(
    logits: Tensor, tokens: Tensor, rows: Tensor, num_prompt: Tensor, lengths: Tensor, repetition: Tensor, frequency: Tensor,
    presence: Tensor,
) -> None:  # fmt: skip
    """The tokens of row i are ``tokens[rows[i], : lengths[i]]``, the first ``num_prompt[i]`` of them its prompt.

    A positive logit of a token that is among them is divided by ``repetition``, another multiplied; then ``frequency`` is subtracted as
    often as the token is in the output, and ``presence`` if it is. tokens [rows, length] int32, the others [N], int32 and float32.
    """
    vocab = logits.shape[1]
    history = tokens[rows.long()].long()
    at = torch.arange(history.shape[1], device=logits.device)
    known = (history >= 0) & (history < vocab)
    prompt = (at < num_prompt[:, None]) & known
    output = (at >= num_prompt[:, None]) & (at < lengths[:, None]) & known
    history = torch.where(known, history, 0)
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, history, prompt.int())
    seen = counts > 0
    counts.zero_().scatter_add_(1, history, output.int())
    seen |= counts > 0
    repeated = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    changed = torch.where(seen, repeated, logits) - frequency[:, None] * counts
    logits.copy_(torch.where(seen, changed - presence[:, None] * (counts > 0), logits))


def _owners(start: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each of ``ids``, and whether it has one: what comes after the last row's is room."""
    at = torch.arange(len(ids), device=ids.device)
    row = torch.searchsorted(start.long(), at, right=True) - 1
    return row.clamp(0, len(start) - 2), (row >= 0) & (row < len(start) - 1)
