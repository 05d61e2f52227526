"""Log-probabilities of the raw logits: of a token, its rank, and those of the likeliest ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def report(logits: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, vocab] (not changed), tokens [N] int32 → (logprob [N] float32, rank [N] int32, top_ids [N, width] int32, top_logprobs
    [N, width] float32).

    The rank is 1 more than the number of tokens with a greater logit. The likeliest come first, and the lower id of two that are equally
    likely; beyond the vocabulary there are -1 and minus infinity. So it is everywhere in a row whose token is -1, or that ``sample`` would
    refuse. A token has the greatest log-probability only if it has the greatest logit: where rounding would make two equal, the less
    likely one gets the next smaller float.
    """
    z = logits.float()
    top = z.amax(dim=1)
    fine = (tokens >= 0) & (z < math.inf).all(dim=1) & (top > -math.inf)
    z = torch.where(fine[:, None], z, 0.0)
    top = torch.where(fine, top, 0.0)[:, None]
    log_sum = top.double() + (z.double() - top).exp().cumsum(dim=1)[:, -1:].log()
    most = (top - log_sum).float()

    def logprob(values: Tensor) -> Tensor:
        rounded = (values - log_sum).float()
        return torch.where((values < top) & (rounded == most), torch.nextafter(most, torch.full_like(most, -math.inf)), rounded)

    own = z.gather(1, tokens.clamp(min=0).long()[:, None])
    rank = 1 + (z > own).sum(dim=1)
    shape = len(z), width
    top_ids = torch.full(shape, -1, dtype=torch.int32, device=z.device)
    top_logprobs = torch.full(shape, -math.inf, device=z.device)
    if width:
        values, order = z.sort(dim=1, descending=True, stable=True)
        count = min(width, z.shape[1])
        top_ids[:, :count] = torch.where(fine[:, None], order[:, :count], -1)
        top_logprobs[:, :count] = torch.where(fine[:, None], logprob(values[:, :count]), -math.inf)
    return torch.where(fine, logprob(own)[:, 0], -math.inf), torch.where(fine, rank, -1).int(), top_ids, top_logprobs
