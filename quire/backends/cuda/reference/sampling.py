"""The draw. The law is the CPU sampler's (backends/cpu/native/sampling.cpp), in its order: temperature; min_p and top_k; top_p; draw.
What it keeps is a prefix of the vocabulary ordered by (logit descending, id ascending)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire.backends.cuda.sampling_tensors import SamplingTensors

_LOW_WORD = 0xFFFFFFFF


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    """logits [N, vocab], not changed → [2, N] int32: tokens, status.

    Status 0: drawn; 1: a logit is NaN or infinite; 2: all are minus infinity, no token is allowed. The token is -1 where nothing is drawn.
    Tokens are in the order of ids where they are drawn: the first whose weights, summed up, pass a uniform number times their sum.
    """
    z = logits.float()
    damaged = ~(z < math.inf).all(dim=1)
    status = torch.where(damaged, 1, torch.where((z == -math.inf).all(dim=1), 2, 0)).int()
    z = torch.where((status == 0)[:, None], z, 0.0)
    greedy = params.temperature == 0
    top = z.amax(dim=1, keepdim=True)
    weights = torch.exp((z - top) / torch.where(greedy, 1.0, params.temperature)[:, None])
    if params.truncates:
        weights = torch.where(_kept(z, weights, params), weights, 0.0)
    # The last value of a sequential sum, and not a sum whose order may depend on the other rows.
    reached = weights.double().cumsum(dim=1)
    target = _uniform(params.seed, params.position.long())[:, None] * reached[:, -1:]
    ids = torch.arange(z.shape[1], device=z.device)
    last = torch.where(weights > 0, ids, 0).amax(dim=1)
    drawn = torch.minimum((reached <= target).sum(dim=1), last)
    likeliest = torch.where(z == top, ids, z.shape[1]).amin(dim=1)
    tokens = torch.where(greedy, likeliest, drawn)
    return torch.stack([torch.where(status == 0, tokens, -1).int(), status])


def _kept(z: Tensor, weights: Tensor, params: SamplingTensors) -> Tensor:
    """[N, vocab] bool: what top_k, min_p and top_p leave."""
    order = z.sort(dim=1, descending=True, stable=True).indices
    ranked = weights.gather(1, order)
    vocab = z.shape[1]
    k = torch.where((params.top_k > 0) & (params.top_k < vocab), params.top_k, vocab)
    kept = (torch.arange(vocab, device=z.device) < k[:, None]) & (ranked >= params.min_p[:, None])
    limited = torch.where(kept, ranked, 0.0).double()
    mass = limited.cumsum(dim=1)
    # The smallest set that holds the share: what comes before its last token falls short of it. It has the likeliest token in any case.
    short = mass - limited < params.top_p.double()[:, None] * mass[:, -1:]
    short[:, 0] = True
    kept &= short | (params.top_p >= 1)[:, None]
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _uniform(seed: Tensor, position: Tensor) -> Tensor:
    """[N] float64 in [0, 1): Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of the key ``seed`` and
    the counter ``position``; products wrap, as those of unsigned numbers do."""
    key = [seed & _LOW_WORD, (seed >> 32) & _LOW_WORD]
    zero = torch.zeros_like(position)
    c = [position & _LOW_WORD, (position >> 32) & _LOW_WORD, zero, zero]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high0, high1 = (p0 >> 32) & _LOW_WORD, (p1 >> 32) & _LOW_WORD
        c = [high1 ^ c[1] ^ key[0], p1 & _LOW_WORD, high0 ^ c[3] ^ key[1], p0 & _LOW_WORD]
        key = [(key[0] + 0x9E3779B9) & _LOW_WORD, (key[1] + 0xBB67AE85) & _LOW_WORD]
    return ((c[0] << 21) | (c[1] >> 11)).double() * 2.0**-53
