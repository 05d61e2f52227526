"""The kernels over the shapes that matter, as calls that can be timed: what ``quire bench kernels`` runs.

A case is lazy where it needs memory: generators make the arrays of one group of cases, yield the cases, and let go of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.machine import last_level_cache
from quire.backends.memory import available_bytes

Array = npt.NDArray[Any]
Call = Callable[[], None]

BLOCK = 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
MOST_LOGIT_ROWS = 128
"""Rows of logits are those that sample: no step has 512."""
BATCHES, CONTEXTS, PREFILLS = (1, 8, 32), (128, 512, 2048, 8192), (512, 2048)
MOST_DECODES = 64
SAMPLED = (1, 8, 32, 64)
GROUP_SIZE = 128
"""Of quantized weights, where nothing else is asked for: it divides the inputs of all linears here."""


@dataclass(slots=True, frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    head_norm: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → (rows of weights, inputs); those that share an input are one."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate+up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }


MODELS = {
    "llama-160m": Shape(768, 12, 4, 64, 2048, 32_000),
    "llama-0.5b": Shape(1024, 16, 8, 128, 3072, 32_000),
    "Llama-3.2-1B": Shape(2048, 32, 8, 64, 8192, 128_256),
    "Qwen3-0.6B": Shape(1024, 16, 8, 128, 3072, 151_936, head_norm=True),
}
FOUR_BITS = ("int4", "int4+offsets", "mxfp4")
"""The second: as the layers of a GGUF file in Q4_K, or of most AWQ checkpoints, are kept; the third, in groups of 32: as the experts of
gpt-oss are."""
QUANTIZED = ("int8", *FOUR_BITS)
DTYPES = ("float32", "float16", "bfloat16", *QUANTIZED)
KERNELS = ("linear", "attention", "norm", "rotary", "write_kv", "sampling")


@dataclass(slots=True, frozen=True)
class Selection:
    """What to run; rows None: those that are usual for each kernel."""

    models: Sequence[str] = tuple(MODELS)
    dtypes: Sequence[str] = DTYPES
    kernels: Sequence[str] = KERNELS
    rows: Sequence[int] | None = None
    group_size: int = GROUP_SIZE

    def shapes(self) -> dict[str, Shape]:
        return {name: MODELS[name] for name in self.models}

    def some(self, usual: Iterable[int], most: int | None = None) -> list[int]:
        return [rows for rows in (usual if self.rows is None else self.rows) if most is None or rows <= most]


@dataclass(slots=True)
class Case:
    kernel: str
    name: str
    model: str
    dtype: str
    """Of the weights, or of the KV cache; float32 elsewhere."""
    rows: int
    bytes: int
    """That must be moved: weights or KV, each read once; elsewhere what is read and written."""
    operations: int
    """Two for a multiply-add; 0 where moving bytes is all there is to compare with."""
    arithmetic: str
    """float32 or int8"""
    cached: bool
    """The data is in a cache where it fits, as it is in a step, which has just written it."""
    calls: list[Call]
    """To be made in turn: where not ``cached``, each on other memory, so that nothing is found in a cache."""


Skip = Callable[[str], None]
"""Told what is left out, and why."""


def cases(selection: Selection, skip: Skip) -> Iterator[Case]:
    """All selected cases, in the order of KERNELS."""
    makers: dict[str, Callable[[Selection, Skip], Iterator[Case]]] = {
        "linear": _linear, "attention": _attention, "norm": _norm, "rotary": _rotary, "write_kv": _write_kv, "sampling": _sampling,
    }  # fmt: skip
    for kernel in KERNELS:
        if kernel in selection.kernels:
            yield from makers[kernel](selection, skip)


def _linear(selection: Selection, skip: Skip) -> Iterator[Case]:
    for dtype in selection.dtypes:
        quantize = dtype in QUANTIZED
        if quantize and not _packs(dtype, selection.group_size):
            skip(f"linear {dtype}: this build's kernels have no {dtype} weights")
            continue
        for model, shape in selection.shapes().items():
            for name, (n, k) in shape.linears().items():
                rows = selection.some(ROWS, None if name != "lm_head" or selection.rows else MOST_LOGIT_ROWS)
                need = n * k * (2 if quantize else _width(dtype))
                if not _fits(2 * need):
                    skip(f"linear {model} {name} {dtype}: its weights need {need / 1e9:.1f} GB, too much of the memory that is free")
                    continue
                gated = name == "gate+up"
                sets = _weight_sets(n, k, dtype, selection.group_size, gated)
                for count in rows:
                    x, out = _random((count, k)), np.empty((count, sets[0].n), np.float32)
                    act = "silu" if gated else None
                    calls: list[Call] = [partial(native.linear, packed, x, out, activation=act) for packed in sets]
                    arithmetic = native.arithmetic("int8" if quantize else dtype)
                    yield Case(
                        "linear", f"{name} {n}x{k}", model, dtype, count, sets[0].nbytes, 2 * count * n * k, arithmetic, False, calls
                    )


def _weight_sets(n: int, k: int, dtype: str, group_size: int, gated: bool) -> list[native.PackedLinear]:
    """The same shape so often that all of them are far more than the last cache holds."""
    # Overlapping rows of one long line: random enough, and made at once.
    line = _as(_random((n + k,)) * np.float32(0.02), "float32" if dtype in QUANTIZED else dtype)
    weights = np.lib.stride_tricks.sliding_window_view(line, k)[:n]
    sets: list[native.PackedLinear] = []
    while not sets or sum(packed.nbytes for packed in sets) < 4 * last_level_cache():
        sets.append(_pack(weights, dtype, group_size, gated))
    return sets


def _pack(weights: Array, dtype: str, group_size: int, gated: bool = False) -> native.PackedLinear:
    pack: Any = native.pack_linear
    parts = np.split(weights, 2) if gated else [weights]
    if dtype == "int4+offsets":
        return native.pack_blocks([_blocks(part, group_size, 0.01, 0.001) for part in parts], f"int4:{group_size}+offsets", gated)
    if dtype == "mxfp4":
        return native.pack_blocks([_blocks(part, 32, 2**-8) for part in parts], dtype, gated)
    kind = {"quantize": dtype, "group_size": group_size} if dtype in QUANTIZED else {}
    packed: native.PackedLinear = pack(parts, gated=gated, **kind)
    return packed


def _blocks(weights: Array, group_size: int, *factors: float) -> Array:
    """Rows of blocks of that shape, as native.pack_blocks takes them: a scale, maybe an offset, and any numbers."""
    first = np.array(factors, np.float32).view(np.uint8)
    shape = (len(weights), weights.shape[1] // group_size, len(first) + group_size // 2)
    blocks = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    blocks[..., : len(first)] = first
    return blocks.reshape(len(weights), -1)


def _packs(dtype: str, group_size: int) -> bool:
    try:
        _pack(np.zeros((64, 256), np.float32), dtype, group_size)
    except (TypeError, AttributeError):
        return False
    return True


def _attention(selection: Selection, skip: Skip) -> Iterator[Case]:
    batches = selection.some(BATCHES, MOST_DECODES)
    prefills = [n for n in PREFILLS if selection.rows is None or n in selection.rows]
    sizes = [(batch, context) for batch in batches for context in CONTEXTS]
    for dtype in _kv_dtypes(selection, "attention", skip):
        seen = set()
        for model, shape in selection.shapes().items():
            heads = (shape.heads, shape.kv_heads, shape.head_dim)
            if heads in seen:  # another model's attention is the same
                continue
            seen.add(heads)
            room = (available_bytes() or 4 << 30) // 3
            per_block = _kv_bytes(shape, dtype, BLOCK)
            todo = [(batch, context) for batch, context in sizes if batch * context // BLOCK * per_block <= room]
            if len(todo) < len(sizes):
                skip(
                    f"attention {model} {dtype}: {len(sizes) - len(todo)} of {len(sizes)} need more than a third of the memory that is free"
                )
            most = max([batch * context for batch, context in todo] + prefills, default=0) // BLOCK
            if most == 0:
                continue
            pool = Pool(shape, dtype, max(most, -(-4 * last_level_cache() // per_block)))
            for batch, context in todo:
                operations = 4 * shape.heads * shape.head_dim * batch * context
                size = batch * context // BLOCK * per_block
                calls = pool.attention([1] * batch, context)
                yield Case("attention", f"decode at {context:,}", model, dtype, batch, size, operations, "float32", False, calls)
            for count in prefills:
                operations = 2 * shape.heads * shape.head_dim * count * (count + 1)
                size = count // BLOCK * per_block
                yield Case("attention", "prefill", model, dtype, count, size, operations, "float32", False, pool.attention([count], count))


class Pool:
    """One layer's KV cache, full of something, whose blocks lie in random order."""

    def __init__(self, shape: Shape, dtype: str, blocks: int) -> None:
        self.shape, self.blocks = shape, blocks
        stored = "uint16" if dtype == "bfloat16" else dtype
        self.keys = _aligned((blocks, shape.kv_heads, shape.head_dim, BLOCK), stored)
        self.values = _aligned((blocks, shape.kv_heads, BLOCK, shape.head_dim), stored)
        for cache in (self.keys, self.values):
            numbers = _random(cache.shape[1:])
            cache[:] = np.rint(numbers * 30).astype(np.int8) if dtype == "int8" else _as(numbers, dtype)
        self.scales: tuple[Array, ...] = ()
        if dtype == "int8":
            self.scales = tuple(np.full((blocks, shape.kv_heads, BLOCK), 1 / 30, np.float16) for _ in range(2))
        self.order = np.random.default_rng(0).permutation(blocks).astype(np.int32)

    def batches(self, sequences: int, tokens: int) -> list[Array]:
        """Block tables of batches that share no block, as many as the pool holds (at most 4,096)."""
        each = -(-tokens // BLOCK)
        count = min(4096, self.blocks // (sequences * each))
        return list(self.order[: count * sequences * each].reshape(count, sequences, each))

    def attention(self, counts: Sequence[int], context: int) -> list[Call]:
        """Calls in which each sequence computes its last ``counts`` positions of ``context``."""
        shape, tokens = self.shape, sum(counts)
        queries = _random((tokens, shape.heads, shape.head_dim))
        out = np.empty((tokens, shape.heads * shape.head_dim), np.float32)
        where = _where(counts, context)
        attend: Any = native.paged_attention
        last = (shape.head_dim**-0.5, 0, *self.scales)
        return [partial(attend, queries, self.keys, self.values, out, t, *where, *last) for t in self.batches(len(counts), context)]

    def write(self, rows: int) -> list[Call]:
        """Calls that write one position of each of ``rows`` sequences, or a prompt where they are many."""
        counts = [1] * rows if rows <= MOST_DECODES else [rows]
        keys, values = (_random((rows, self.shape.kv_heads, self.shape.head_dim)) for _ in range(2))
        where, write = _where(counts, max(counts)), native.write_kv
        extra: Any = self.scales
        return [partial(write, keys, values, self.keys, self.values, t, *where, *extra) for t in self.batches(len(counts), max(counts))]


def _where(counts: Sequence[int], context: int) -> tuple[Array, Array, Array]:
    """rows, query_start and start of a step in which each sequence computes its last positions of ``context``."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return np.arange(len(counts), dtype=np.int32), starts, np.array([context - count for count in counts], np.int32)


def _kv_dtypes(selection: Selection, kernel: str, skip: Skip) -> Iterator[str]:
    for dtype in selection.dtypes:
        if dtype in FOUR_BITS:
            continue  # a width of weights only
        try:
            Pool(Shape(64, 1, 1, 64, 64, 64), dtype, 1).attention([1], 1)[0]()
        except TypeError:
            skip(f"{kernel} {dtype}: this build's kernels have no {dtype} KV cache")
            continue
        yield dtype


def _write_kv(selection: Selection, skip: Skip) -> Iterator[Case]:
    for dtype in _kv_dtypes(selection, "write_kv", skip):
        for model, shape in _distinct(selection, lambda s: (s.kv_heads, s.head_dim)):
            rows = selection.some(ROWS)
            far = -(-4 * last_level_cache() // _kv_bytes(shape, dtype, BLOCK))
            pool = Pool(shape, dtype, max(far, *rows))
            for count in rows:
                size = count * (8 * shape.kv_heads * shape.head_dim + _kv_bytes(shape, dtype, 1))
                name = f"{shape.kv_heads} heads of {shape.head_dim}"
                yield Case("write_kv", name, model, dtype, count, size, 0, "float32", False, pool.write(count))


def _norm(selection: Selection, skip: Skip) -> Iterator[Case]:
    shapes: list[tuple[str, tuple[int, ...]]] = [(model, (shape.hidden,)) for model, shape in _distinct(selection, lambda s: s.hidden)]
    shapes += [(model, (s.heads, s.head_dim)) for model, s in selection.shapes().items() if s.head_norm]
    for model, inner in shapes:
        for rows in _float_rows(selection):
            x, out = _random((rows, *inner)), np.empty((rows, *inner), np.float32)
            call = partial(native.rms_norm, x, np.ones(inner[-1], np.float32), 1e-5, out)
            name = "RMS " + " x ".join(map(str, inner))
            yield Case("norm", name, model, "float32", rows, 8 * x.size, 4 * x.size, "float32", True, [call])


def _rotary(selection: Selection, skip: Skip) -> Iterator[Case]:
    for model, shape in _distinct(selection, lambda s: (s.heads, s.kv_heads, s.head_dim)):
        angles = _random((2048, shape.head_dim // 2))
        heads = shape.heads + shape.kv_heads
        for rows in _float_rows(selection):
            x = _random((rows, heads, shape.head_dim))
            call = partial(native.rotary, x, np.arange(rows, dtype=np.int32) % 2048, np.cos(angles), np.sin(angles))
            name = f"{heads} heads of {shape.head_dim}"
            yield Case("rotary", name, model, "float32", rows, 8 * x.size, 3 * x.size, "float32", True, [call])


def _sampling(selection: Selection, skip: Skip) -> Iterator[Case]:
    if "float32" not in selection.dtypes:
        return
    for model, shape in _distinct(selection, lambda s: s.vocab):
        for rows in selection.some(SAMPLED):
            logits = 2 * _random((rows, shape.vocab))
            for name, temperature, top_p in (("greedy", 0.0, None), ("top_p 0.9", 1.0, 0.9)):
                call = partial(
                    native.sample, logits, np.empty(rows, np.int32), np.empty(rows, np.int32),
                    temperature=np.full(rows, temperature, np.float32), seed=np.arange(rows, dtype=np.uint64),
                    position=np.arange(rows, dtype=np.int64), top_p=None if top_p is None else np.full(rows, top_p, np.float32),
                )  # fmt: skip
                yield Case("sampling", f"{name} of {shape.vocab:,}", model, "float32", rows, logits.nbytes, 0, "float32", True, [call])


def _float_rows(selection: Selection) -> list[int]:
    return selection.some(ROWS) if "float32" in selection.dtypes else []


def _distinct(selection: Selection, key: Callable[[Shape], Any]) -> Iterator[tuple[str, Shape]]:
    """The models, without those that are the same to this kernel as one before."""
    seen = set()
    for model, shape in selection.shapes().items():
        if key(shape) not in seen:
            seen.add(key(shape))
            yield model, shape


def _kv_bytes(shape: Shape, dtype: str, tokens: int) -> int:
    """Bytes of keys and values of so many positions in one layer, an int8's scales (float16) among them."""
    return 2 * tokens * shape.kv_heads * (shape.head_dim * _width(dtype) + (2 if dtype == "int8" else 0))


def _width(dtype: str) -> int:
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype, 1)


def _fits(size: int) -> bool:
    available = available_bytes()
    return available is None or size <= available


def _random(shape: tuple[int, ...]) -> Array:
    """Normal numbers; a long array repeats itself, which no kernel can tell."""
    size = math.prod(shape)
    numbers = np.random.default_rng(0).standard_normal(min(size, 1 << 18), np.float32)
    return np.resize(numbers, shape)


def _as(numbers: Array, dtype: str) -> Array:
    """In the width as the kernels take it: a bfloat16 (truncated: only the speed matters) as its bits."""
    return (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.astype(dtype)


def _aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """On a cache line, as the decoder's caches are."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
