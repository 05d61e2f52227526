"""Parts of the sampler's kernels: how a row is scanned, and how the likeliest of its tokens are found without sorting it.

A row is cut into chunks of CHUNK tokens, one program each, and those into runs of RUN tokens. The scan keeps the greatest logit of each
run. A bound that all wanted tokens reach is looked for among these maxima; then only the runs that reach it are read, by one program
a row, until the edge is found: the greatest key such that as many tokens as wanted, or as much mass, have that key or a greater one.

Keys are the bits of a logit as a whole number that is ordered like it. Mass is summed in whole numbers, of 2^-42 of the likeliest
token's weight each, so that a sum does not depend on the order in which it was made: room for 2^21 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.backends.cuda.kernels.launching import Kernel
from quire.backends.cuda.kernels.programmatic import start_next, wait

RUN = tl.constexpr(32)
CHUNK_RUNS = tl.constexpr(128)
CHUNK = tl.constexpr(RUN.value * CHUNK_RUNS.value)
TILE_RUNS = tl.constexpr(64)
"""Runs that a program searches at a time."""
TILE = tl.constexpr(RUN.value * TILE_RUNS.value)
MAX_REGISTERS = 144
"""Of a thread that searches. The assembler then finds 128 enough, for two rows on a multiprocessor at once; unasked it spills one."""
UNIT = tl.constexpr(2.0**42)
NO_KEY = tl.constexpr(-(2**31))
"""Less than the key of minus infinity."""
LOWEST_KEY = tl.constexpr(-(2**31) + 0x7FFFFF)
"""That of minus infinity."""
ALL_TOKENS = tl.constexpr(2**21)
"""More than a row has."""
_LOG2E = tl.constexpr(1.4426950216293335)
_LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
_LN2 = tl.constexpr(0.6931471805599453)
_LEAST_TEMPERATURE = tl.constexpr(1e-37)


@triton.jit
def reciprocal(temperature):
    """Of a temperature, or of the least one whose reciprocal is finite: below that only the likeliest token has a weight anyway."""
    return tl.div_rn(1.0, tl.maximum(temperature, _LEAST_TEMPERATURE))


@triton.jit
def weight(z, top, inverse):
    """exp((z - top) * inverse) for z <= top, finite top. The product with log2(e) is taken to twice float32's width, since exp2 makes of
    an error in it a relative one in the weight."""
    x = tl.maximum((z - top) * inverse, -200.0)  # weighs nothing; minus infinity would become NaN below
    high = x * _LOG2E
    rest = tl.fma(x, _LOG2E, -high) + x * _LOG2E_REST
    w = tl.exp2(high)
    return w + w * (rest * _LN2)


@triton.jit
def key_of(z):
    """int32, ordered like z. Zeros of both signs are equal."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """float32 with that key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def uniform(seed, position):
    """float64 in [0, 1): Philox 4x32-10 of the key ``seed`` and the counter ``position`` (int64, the bits of unsigned numbers)."""
    low = tl.full((), 0xFFFFFFFF, tl.uint64)
    s, p = seed.to(tl.uint64, bitcast=True), position.to(tl.uint64, bitcast=True)
    key0, key1 = s & low, s >> 32
    c0, c1 = p & low, p >> 32
    c2, c3 = tl.full((), 0, tl.uint64), tl.full((), 0, tl.uint64)
    for _ in tl.static_range(10):
        p0 = c0 * tl.full((), 0xD2511F53, tl.uint64)
        p1 = c2 * tl.full((), 0xCD9E8D57, tl.uint64)
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ key0, p1 & low, (p0 >> 32) ^ c3 ^ key1, p0 & low
        key0 = (key0 + tl.full((), 0x9E3779B9, tl.uint64)) & low
        key1 = (key1 + tl.full((), 0xBB67AE85, tl.uint64)) & low
    return ((c0 << 21) | (c1 >> 11)).to(tl.int64).to(tl.float64) * 2.0**-53


@Kernel
@triton.jit
def scan(logits, stride, temperature, maxima, tops, masses, vocab, chunks, PDL: tl.constexpr):
    """Grid (rows, chunks). The greatest logit of each run, and of the chunk: infinite where one is NaN or infinite. And the weights'
    sum, relative to the chunk's greatest. temperature: None for 1."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start_next(PDL)
    wait(PDL)
    run = tl.arange(0, CHUNK_RUNS)
    token = chunk * CHUNK + run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    z = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    z = tl.where(z < float("inf"), z, float("inf"))
    most = tl.max(z, 1)
    tl.store(maxima + (row * chunks + chunk) * CHUNK_RUNS + run, most)
    top = tl.max(most, 0)
    tl.store(tops + row * chunks + chunk, top)
    inverse = 1.0 if temperature is None else reciprocal(tl.load(temperature + row))
    shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    w = weight(z, shift, inverse)
    tl.store(masses + row * chunks + chunk, tl.sum(tl.sum(w, 1).to(tl.float64), 0))


@triton.jit
def row_of_chunks(tops, masses, row, chunks, inverse, CHUNKS: tl.constexpr):
    """What the scan found, of all chunks: (top, status as of ``sample``, [CHUNKS] tops, [CHUNKS] masses relative to the top)."""
    c = tl.arange(0, CHUNKS)
    chunk_tops = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    chunk_masses = tl.load(masses + row * chunks + c, mask=c < chunks, other=0.0)
    top = tl.max(chunk_tops, 0)
    status = tl.where(top == float("inf"), 1, tl.where(top == float("-inf"), 2, 0))
    scale = weight(chunk_tops, tl.where(status == 0, top, 0.0), inverse)
    return top, status, chunk_tops, tl.where(c < chunks, chunk_masses * scale.to(tl.float64), 0.0)


@triton.jit
def load_tile(z, listed, first, count, vocab, LISTED: tl.constexpr):
    """(tokens, their logits, which there are), each [TILE_RUNS, RUN]: the runs ``first``... of ``count``, or of those that are listed."""
    at = first + tl.arange(0, TILE_RUNS)
    inside = at < count
    run = tl.load(listed + at, mask=inside, other=0) if LISTED else at
    token = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    inside = inside[:, None] & (token < vocab)
    return token, tl.load(z + token, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def keys_and_units(value, inside, top, inverse, floor):
    """(keys, mass in units) of a tile; NO_KEY where there is no token, or one that weighs less than ``floor``."""
    w = weight(value, top, inverse)
    return tl.where(inside & (w >= floor), key_of(value), NO_KEY), (w * UNIT).to(tl.int64)


@triton.jit
def sums_at_least(z, listed, count, vocab, top, inverse, floor, t1, t2, t3, LISTED: tl.constexpr):
    """Tokens, and their mass, from each of three ascending keys upwards: (n1, n2, n3, mass1, mass2, mass3), int64. One pass over the
    runs."""
    none, one = tl.full((), 0, tl.int64), tl.full((), 1, tl.int64)
    two, three = one + (one << 21), one + (one << 21) + (one << 42)
    numbers = tl.full((TILE_RUNS, RUN), 0, tl.int64)  # three of 21 bits each
    m1, m2, m3 = numbers, numbers, numbers
    for first in range(0, count, TILE_RUNS):
        _, value, inside = load_tile(z, listed, first, count, vocab, LISTED)
        key, units = keys_and_units(value, inside, top, inverse, floor)
        numbers += tl.where(key >= t3, three, tl.where(key >= t2, two, tl.where(key >= t1, one, none)))
        m1 += tl.where(key >= t1, units, 0)
        m2 += tl.where(key >= t2, units, 0)
        m3 += tl.where(key >= t3, units, 0)
    n = tl.sum(numbers)
    return n & 0x1FFFFF, (n >> 21) & 0x1FFFFF, n >> 42, tl.sum(m1), tl.sum(m2), tl.sum(m3)


@triton.jit
def thresholds(low, high):
    """Three ascending keys in (low, high], int64. Quarters, where few powers of two are between the two logits. Elsewhere thirds of the
    logits, since many are around 0, which is halfway between all powers of two; and half, so that an end comes whatever they are."""
    quarter = (high - low + 3) // 4
    t1, t2, t3 = low + quarter, low + 2 * quarter, low + 3 * quarter
    if high - low > 2**26:
        a, b = tl.maximum(logit_of(low), -1e38), tl.minimum(logit_of(high), 1e38)
        u = key_of(a * 0.6666667 + b * 0.3333333).to(tl.int64)
        v = key_of(a * 0.3333333 + b * 0.6666667).to(tl.int64)
        t1, t3 = tl.minimum(u, t2), tl.maximum(v, t2)
        t2 = tl.maximum(u, tl.minimum(v, t2))
    return tl.minimum(tl.maximum(t1, low + 1), high), tl.minimum(tl.maximum(t2, low + 1), high), tl.minimum(tl.maximum(t3, low + 1), high)


@triton.jit
def search(z, listed, count, vocab, top, inverse, floor, by_count, want, low, high, n_low, m_low, n_high, m_high, enough,
           LISTED: tl.constexpr):  # fmt: skip
    """Narrow [low, high) around the greatest key from which upwards there are ``want`` tokens (by_count), or units of mass.

    At ``low`` there are that many and at ``high`` there are not; n and m are the tokens and the units from there upwards. Ends when one
    key, or one token, is between them; with ``enough``, when at most one in so many of the tokens from ``low`` upwards is. All int64.
    → (low, high, n_low, m_low, n_high, m_high)
    """
    # Numbers of 16 bits have keys that far apart.
    element: tl.constexpr = z.dtype.element_ty
    apart: tl.constexpr = 1 << 16 if element == tl.bfloat16 else 1 << 13 if element == tl.float16 else 1
    while (high - low > apart) & ((n_low - n_high - 1) * enough > n_low):
        t1, t2, t3 = thresholds(low, high)
        n1, n2, n3, m1, m2, m3 = sums_at_least(
            z, listed, count, vocab, top, inverse, floor, t1.to(tl.int32), t2.to(tl.int32), t3.to(tl.int32), LISTED
        )
        has1 = tl.where(by_count, n1, m1) >= want
        has2 = tl.where(by_count, n2, m2) >= want
        has3 = tl.where(by_count, n3, m3) >= want
        # The least of the three that does not have enough, or else `high`; the greatest that has, or else `low`.
        n_high = tl.where(has1, tl.where(has2, tl.where(has3, n_high, n3), n2), n1)
        m_high = tl.where(has1, tl.where(has2, tl.where(has3, m_high, m3), m2), m1)
        high = tl.where(has1, tl.where(has2, tl.where(has3, high, t3), t2), t1)
        n_low = tl.where(has3, n3, tl.where(has2, n2, tl.where(has1, n1, n_low)))
        m_low = tl.where(has3, m3, tl.where(has2, m2, tl.where(has1, m1, m_low)))
        low = tl.where(has3, t3, tl.where(has2, t2, tl.where(has1, t1, low)))
    return low, high, n_low, m_low, n_high, m_high


@triton.jit
def kept_of_tile(value, inside, top, inverse, floor, low, high, ties, ties_before):
    """Which tokens of a tile, in ascending order and flat [TILE], are kept, their mass in units, and the ties up to the tile's end."""
    key, units = keys_and_units(value, inside, top, inverse, floor)
    key, units = tl.reshape(key, (TILE,)), tl.reshape(units, (TILE,))
    tied = (key >= low) & (key < high)
    rank = ties_before + tl.cumsum(tied.to(tl.int32), 0)
    kept = (key >= high) | (tied & (rank <= ties))
    return kept, units, ties_before + tl.sum(tied.to(tl.int32), 0)
