"""A decoder-only transformer on the CPU kernels. The forward pass is one loop over layers; variants are fields of the spec.

Weights are packed at load, q, k, v side by side and gate, up interleaved, since they share an input. A step works in buffers that are
made once for the most positions that a step may compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.packer import Packer
from quire.backends.cpu.replay import Replay
from quire.backends.memory import KVLayout, one_group
from quire.backends.rows import Batch, Part
from quire.models.spec import RopeSpec, TransformerSpec

MAX_SCORED_ROWS = 64
"""Positions of prompts whose logits are there at the same time: a prompt of thousands by a large vocabulary would take gigabytes."""

F32 = npt.NDArray[np.float32]
Tensors = Mapping[str, npt.NDArray[Any]]


class Sum(Protocol):
    """What a residual takes: of x, into out or added to it."""

    def __call__(self, x: F32, out: F32, *, accumulate: bool = False) -> None: ...


@dataclass(slots=True)
class Linear:
    """out = act(x · Wᵀ + b), W packed in the order in which the kernel reads it; where gated, act(x · Gᵀ + b) * (x · Uᵀ + c)."""

    parts: list[native.PackedLinear]
    """One, or several with some of the outputs each, where not all are stored in the same way."""
    bias: F32 | None
    activation: str | None = None

    def __call__(self, x: F32, out: F32, *, accumulate: bool = False) -> None:
        """x [T, in], out [T, out], float32; ``accumulate`` adds to out (the residual)."""
        if len(self.parts) == 1:
            native.linear(self.parts[0], x, out, self.bias, accumulate, self.activation)
            return
        start = 0
        for part in self.parts:
            columns = slice(start, start := start + part.n)
            native.linear(part, x, out[:, columns], None if self.bias is None else self.bias[columns], accumulate, self.activation)


@dataclass(slots=True)
class Norm:
    weight: F32
    bias: F32 | None
    eps: float
    rms: bool

    def __call__(self, x: F32, out: F32, *, accumulate: bool = False) -> None:
        """x, out [T, hidden] (or [T, heads, head_dim]: each head by itself); ``accumulate`` adds to out (RMS norms only)."""
        if self.rms:
            native.rms_norm(x, self.weight, self.eps, out, accumulate)
        else:
            native.layer_norm(x, self.weight, self.bias, self.eps, out)


@dataclass(slots=True)
class FeedForward:
    """down(up(x))"""

    up: Linear
    """With the activation; gate and up where gated."""
    down: Linear

    def widen(self, x: F32, memory: F32) -> F32:
        """up(x) [T, inner], in the first columns of ``memory``."""
        inner = memory[: len(x), : self.down.parts[0].k]
        self.up(x, inner)
        return inner


@dataclass(slots=True)
class Experts:
    """As many feed-forwards as the router has outputs, of which each position takes a few, and how they are weighed."""

    router: Linear
    experts: native.Experts
    activation: str
    shared: FeedForward | None
    """What every position takes beside them."""

    def __call__(self, scores: F32, rows: F32, inner: F32, memory: F32, x: F32, out: F32, *, accumulate: bool = False) -> None:
        """x, out [T, hidden], maybe the same. The rest is memory to work in: see native.experts, and FeedForward."""
        shared = None if self.shared is None else self.shared.widen(x, memory)
        self.router(x, scores)
        native.experts(self.experts, x, scores, out, rows, inner, accumulate, self.activation)
        if self.shared is not None and shared is not None:
            self.shared.down(shared, out, accumulate=True)


@dataclass(slots=True)
class Turns:
    """How a layer rotates, in float32."""

    cos: F32
    """[max_model_len, rotary_dim / 2], as ``sin``"""
    sin: F32
    query_scales: F32 | None
    """[max_model_len]"""

    def __call__(self, queries: F32, keys: F32, both: F32, positions: npt.NDArray[np.int32]) -> None:
        """In place. both: queries and keys, [T, heads, head_dim] each."""
        if self.query_scales is None:
            native.rotary(both, positions, self.cos, self.sin)
        else:
            native.rotary(queries, positions, self.cos, self.sin, self.query_scales)
            native.rotary(keys, positions, self.cos, self.sin)


@dataclass(slots=True)
class LayerKV:
    """Keys and values of one layer, or of one layer of each group: blocks belong to one of them each."""

    keys: npt.NDArray[Any]
    """[num_blocks, kv_heads, head_dim, block_size]"""
    values: npt.NDArray[Any]
    """[num_blocks, kv_heads, block_size, head_dim]"""
    key_scales: npt.NDArray[np.float16] | None
    """[num_blocks, kv_heads, block_size] where KV is int8"""
    value_scales: npt.NDArray[np.float16] | None

    def pools(self) -> list[npt.NDArray[Any]]:
        """All arrays that hold something for each block."""
        return [pool for pool in (self.keys, self.values, self.key_scales, self.value_scales) if pool is not None]


@dataclass(slots=True)
class Layer:
    attn_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    sinks: F32 | None
    """[heads]"""
    o: Linear
    mlp_norm: Norm
    mlp: FeedForward | Experts
    attn_out_norm: Norm | None
    """Of what attention, and the feed-forward, adds to the residual."""
    mlp_out_norm: Norm | None
    window: int
    rope: Turns | None
    """None where the layer does not rotate."""
    group: int
    """Of layers: whose block tables it goes by."""
    kv: LayerKV


class Decoder:
    """The model's weights, its KV pool, and the forward pass.

    tensors: canonical names (see TransformerSpec). kv_dtype: float32, float16, bfloat16 or int8. layout: which layers share blocks; None:
    all. packer: makes the linears; None keeps each tensor's width.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        tensors: Tensors,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: str,
        max_tokens: int,
        max_rows: int,
        max_model_len: int,
        layout: KVLayout | None = None,
        packer: Packer | None = None,
    ) -> None:
        self.spec = spec
        self._tensors = tensors
        self._packer, self._shapes = packer or Packer(), spec.tensor_shapes()
        d = spec.head_dim
        self.embed = self._packer.matrix(tensors["embed.weight"])
        self.positions = self._packer.matrix(tensors["positions.weight"]) if spec.rope is None else None
        if spec.embedding_size != spec.hidden_size:
            self.embed_in, self.embed_out = self._linear("embed_in"), self._linear("embed_out")
        layer_ropes = [spec.layer_rope(i) for i in range(spec.num_layers)]
        tables = {rope: _turns(rope, max_model_len) for rope in set(layer_ropes) if rope is not None}
        layout = layout or one_group(spec)
        shape = (num_blocks, spec.num_kv_heads)
        self.kv = [
            LayerKV(
                keys=aligned((*shape, d, block_size), kv_dtype),
                values=aligned((*shape, block_size, d), kv_dtype),
                key_scales=aligned((*shape, block_size), "float16") if kv_dtype == "int8" else None,
                value_scales=aligned((*shape, block_size), "float16") if kv_dtype == "int8" else None,
            )
            for _ in range(layout.slots)
        ]
        self.layers = []
        for i, (group, slot) in enumerate(layout.places):
            at = f"layers.{i}"
            layer = Layer(
                attn_norm=self._norm(f"{at}.attn_norm"),
                qkv=self._linear(f"{at}.q", f"{at}.k", f"{at}.v"),
                q_norm=self._head_norm(f"{at}.q_norm"),
                k_norm=self._head_norm(f"{at}.k_norm"),
                sinks=self._vector(f"{at}.sinks.weight") if spec.attention_sinks else None,
                o=self._linear(f"{at}.o"),
                mlp_norm=self._norm(f"{at}.mlp_norm"),
                mlp=self._experts(at) if spec.has_experts(i) else self._feed_forward_of(at),
                attn_out_norm=self._norm(f"{at}.attn_out_norm") if spec.norms_behind else None,
                mlp_out_norm=self._norm(f"{at}.mlp_out_norm") if spec.norms_behind else None,
                window=spec.window(i),
                rope=None if (rope := layer_ropes[i]) is None else tables[rope],
                group=group,
                kv=self.kv[slot],
            )
            self.layers.append(layer)
        self.final_norm = self._norm("final_norm", spec.logit_scale) if spec.final_norm else None
        self.lm_head = self._linear("embed" if spec.tied else "lm_head")
        self._tensors, self._packer = {}, Packer()  # they may hold what weights were made from
        for packed, then in pairwise(self._packed()):
            if isinstance(then, native.PackedLinear):
                packed.set_then(then)

        def buffer(rows: int, width: int) -> F32:
            # An odd number of cache lines from row to row: a power of two would put all rows into the same few lines of L1.
            stride = 16 * (-(-width // 16) | 1)
            return aligned((rows, stride), "float32")[:, :width]

        q, kv = spec.num_heads * d, spec.num_kv_heads * d
        self._x = buffer(max_tokens, spec.hidden_size)
        self._normed = buffer(max_tokens, spec.hidden_size)
        self._qkv = buffer(max_tokens, q + 2 * kv)
        self._attended = buffer(max_tokens, q)
        self._up = buffer(max_tokens, spec.plain_size)
        if spec.num_experts:
            taken = spec.experts_per_token
            self._scores = buffer(max_tokens, spec.num_experts)
            self._rows = buffer(max_tokens * taken, spec.hidden_size)
            self._inner = buffer(max_tokens * taken, spec.intermediate_size)
        self._embedded = buffer(max_tokens, spec.embedding_size) if spec.embedding_size != spec.hidden_size else self._x
        self._last = buffer(max_tokens, spec.hidden_size)
        self._projected = buffer(max_tokens, spec.embedding_size) if spec.embedding_size != spec.hidden_size else self._last
        self._places = np.zeros(max_tokens, np.int32)
        self._logits = np.zeros((max(max_rows, MAX_SCORED_ROWS), spec.vocab_size), np.float32)
        self._replay = Replay(self._forward)

    def forward(self, batch: Batch) -> F32:
        """Compute the batch's positions: write their KV, attend. Returns logits [samples, vocab], valid until the next call."""
        self._place(batch)
        return self._replay(batch)

    def hidden(self, batch: Batch) -> F32:
        """``forward`` up to lm_head: what that reads, [asked positions, embedding_size]. Valid until the next call of either."""
        self._place(batch)
        return self._hidden(batch)

    def logits(self, hidden: F32) -> F32:
        """Of up to MAX_SCORED_ROWS rows of hidden states, or as many as are sampled in a step; valid until the next call."""
        logits = self._logits[: len(hidden)]
        self.lm_head(hidden, logits)
        if self.spec.logit_softcap:
            native.softcap(logits, self.spec.logit_softcap)
        return logits

    def _place(self, batch: Batch) -> None:
        if self.positions is not None:
            np.add(batch.positions, self.spec.position_offset, out=self._places[: len(batch.positions)])

    def _forward(self, batch: Batch) -> F32:
        return self.logits(self._hidden(batch))

    def _hidden(self, batch: Batch) -> F32:
        x = self._embed(batch)
        last = self.layers[-1]
        for layer in self.layers:
            # What the last layer does beyond keys and values is for the positions that are asked for.
            asked = batch.asked if layer is last else None
            match self.spec.norm_place:
                case "before":
                    layer.attn_norm(x, self._normed[: len(x)])
                    x = self._attention(layer, self._normed[: len(x)], x, layer.attn_out_norm, batch, asked)
                    layer.mlp_norm(x, self._normed[: len(x)])
                    self._feed_forward(layer, self._normed[: len(x)], x, layer.mlp_out_norm)
                case "after":
                    x = self._attention(layer, x, x, None, batch, asked)
                    layer.attn_norm(x, x)
                    self._feed_forward(layer, x, x, None)
                    layer.mlp_norm(x, x)
                case "behind":
                    x = self._attention(layer, x, x, layer.attn_norm, batch, asked)
                    self._feed_forward(layer, x, x, layer.mlp_norm)
        if self.final_norm is not None:
            self.final_norm(x, x)
        if self.spec.embedding_size != self.spec.hidden_size:
            projected = self._projected[: len(x)]
            self.embed_out(x, projected)
            x = projected
        return x

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), in every layer."""
        ids = np.array(pairs, np.int32)
        for kv in self.kv:
            for pool in kv.pools():
                native.copy_blocks(pool, ids)

    def poison_blocks(self, blocks: list[int]) -> None:
        """Fill blocks with NaN (int8: their scales): what reads them before they are written shows."""
        ids = np.array(blocks, np.int32)
        for kv in self.kv:
            for pool in kv.pools():
                if pool.dtype != np.int8:
                    native.fill_blocks(pool, ids, np.nan)

    def weight_bytes(self) -> int:
        """Bytes of all packed linears, lm_head included: what a step reads."""
        outside = [self.embed_in, self.embed_out] if self.spec.embedding_size != self.spec.hidden_size else []
        return sum(part.nbytes for part in self._packed()) + sum(part.nbytes for linear in outside for part in linear.parts)

    def expert_bytes(self) -> int:
        """Of which experts: a step reads those that its positions take."""
        return sum(layer.mlp.experts.nbytes for layer in self.layers if isinstance(layer.mlp, Experts))

    def head_bytes(self) -> int:
        """Of which lm_head: what a step without a row of logits does not read."""
        return sum(part.nbytes for part in self.lm_head.parts)

    def _packed(self) -> list[native.PackedLinear | native.Experts]:
        """The weights of all layers and lm_head, in the order in which a step reads them."""
        found: list[native.PackedLinear | native.Experts] = []
        for layer in self.layers:
            found += [*layer.qkv.parts, *layer.o.parts]
            mlp = layer.mlp
            plain = mlp.shared if isinstance(mlp, Experts) else mlp
            found += plain.up.parts if plain is not None else []
            found += [*mlp.router.parts, mlp.experts] if isinstance(mlp, Experts) else []
            found += plain.down.parts if plain is not None else []
        return found + self.lm_head.parts

    def _embed(self, batch: Batch) -> F32:
        count = len(batch.ids)
        x, embedded = self._x[:count], self._embedded[:count]
        native.embed(batch.ids, self.embed, embedded, self.spec.embed_scale)
        if self.spec.embedding_size != self.spec.hidden_size:
            self.embed_in(embedded, x)
        if self.positions is not None:
            native.add_rows(self._places[:count], self.positions, x)
        return x

    def _attention(self, layer: Layer, x: F32, residual: F32, norm: Norm | None, batch: Batch, asked: Part | None) -> F32:
        """residual += norm(o(attention(x))); of the positions ``asked`` for, where not all are. Returns residual."""
        spec, count = self.spec, len(x)
        qkv = self._qkv[:count]
        layer.qkv(x, qkv)
        heads = qkv.reshape(count, -1, spec.head_dim)
        queries = heads[:, : spec.num_heads]
        keys = heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]
        values = heads[:, spec.num_heads + spec.num_kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            of_queries, of_keys = queries, keys
            if spec.heads_as_one:
                width, key_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
                of_queries, of_keys = qkv[:, :width], qkv[:, width : width + key_width]
            layer.q_norm(of_queries, of_queries)
            layer.k_norm(of_keys, of_keys)
        if layer.rope is not None:
            layer.rope(queries, keys, heads[:, : spec.num_heads + spec.num_kv_heads], batch.positions)
        tables, kv = batch.block_tables[layer.group], layer.kv
        where = (tables, batch.rows, batch.query_start, batch.start)
        cache, scales = (kv.keys, kv.values), (kv.key_scales, kv.value_scales)
        if (part := batch.written) is None:
            native.write_kv(keys, values, *cache, *where, *scales)
        elif len(part.tokens):
            there = (tables, part.rows, part.query_start, part.start)
            native.write_kv(keys[part.tokens], values[part.tokens], *cache, *there, *scales)
        if asked is not None:
            queries = queries[asked.tokens]
            residual = np.take(residual, asked.tokens, axis=0, out=self._last[: len(queries)], mode="clip")  # mode: else one copy more
            where = (tables, asked.rows, asked.query_start, asked.start)
        attended = self._attended[: len(queries)]
        native.paged_attention(queries, *cache, attended, *where, spec.scale, layer.window, *scales, layer.sinks, spec.attention_softcap)
        self._add(layer.o, attended, norm, residual)
        return residual

    def _feed_forward(self, layer: Layer, x: F32, residual: F32, norm: Norm | None) -> None:
        """residual += norm(mlp(x))"""
        mlp = layer.mlp
        if isinstance(mlp, FeedForward):
            self._add(mlp.down, mlp.widen(x, self._up), norm, residual)
            return
        taken = len(x) * self.spec.experts_per_token
        memory = self._scores[: len(x)], self._rows[:taken], self._inner[:taken], self._up
        self._add(partial(mlp, *memory), x, norm, residual)

    def _add(self, linear: Sum, x: F32, norm: Norm | None, residual: F32) -> None:
        """residual += norm(linear(x)). What was normed to begin with has been read by then: its buffer is used again."""
        if norm is None:
            linear(x, residual, accumulate=True)
            return
        behind = self._normed[: len(x)]
        linear(x, behind)
        norm(behind, residual, accumulate=True)

    def _vector(self, name: str) -> F32:
        return np.ascontiguousarray(self._tensors[name], np.float32)

    def _feed_forward_of(self, at: str) -> FeedForward:
        up = self._linear(*self._ups(at), gated=self.spec.gated, activation=self.spec.activation)
        return FeedForward(up, self._linear(f"{at}.down"))

    def _experts(self, at: str) -> Experts:
        spec = self.spec
        router = Linear([self._packer.floats(self._tensors, self._shapes_of(f"{at}.router"))], self._bias(f"{at}.router"))
        each = [f"{at}.experts.{j}" for j in range(spec.num_experts)]
        ups, downs = [self._shapes_of(*self._ups(one)) for one in each], [self._shapes_of(f"{one}.down") for one in each]
        up = self._packer.experts(self._tensors, ups, gated=spec.gated)
        down = self._packer.experts(self._tensors, downs)
        biases = [[self._bias(*self._ups(one)) for one in each], [self._bias(f"{one}.down") for one in each]] if spec.mlp_bias else []
        up_bias, down_bias = map(np.array, biases) if biases else (None, None)
        correction = self._vector(f"{at}.correction.bias") if spec.expert_correction else None
        experts = native.Experts(
            up, down, spec.experts_per_token, spec.experts_sum_to_one, up_bias, down_bias, correction, spec.expert_shares == "sigmoid",
            spec.experts_scale,
        )  # fmt: skip
        shared = self._feed_forward_of(f"{at}.shared") if spec.shared_size else None
        return Experts(router, experts, spec.activation, shared)

    def _ups(self, at: str) -> tuple[str, ...]:
        return (f"{at}.gate", f"{at}.up") if self.spec.gated else (f"{at}.up",)

    def _shapes_of(self, *names: str) -> dict[str, tuple[int, ...]]:
        return {name: self._shapes[f"{name}.weight"] for name in names}

    def _linear(self, *names: str, gated: bool = False, activation: str | None = None) -> Linear:
        """One linear of the weights of ``names``, side by side, or gate and up."""
        parts = self._packer.linear(self._tensors, self._shapes_of(*names), gated=gated)
        return Linear(parts, self._bias(*names), activation)

    def _bias(self, *names: str) -> F32 | None:
        """Of linears side by side; None where they have none."""
        biases = [self._vector(f"{name}.bias") for name in names if f"{name}.bias" in self._tensors]
        return np.concatenate(biases) if biases else None

    def _norm(self, name: str, scale: float = 1.0) -> Norm:
        bias = np.float32(scale) * self._vector(f"{name}.bias") if self.spec.norm_bias else None
        weight = np.float32(scale) * (self._vector(f"{name}.weight") + np.float32(self.spec.norm_offset))
        return Norm(weight, bias, self.spec.norm_eps, self.spec.norm == "rms")

    def _head_norm(self, name: str) -> Norm | None:
        weight = self._vector(f"{name}.weight") + np.float32(self.spec.norm_offset) if self.spec.head_norm else None
        return None if weight is None else Norm(weight, None, self.spec.norm_eps, True)


def _turns(rope: RopeSpec, positions: int) -> Turns:
    """Of each position. Angles in float32, as the models were trained with."""
    frequencies = np.array(rope.inverse_frequencies(positions), np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    magnitude, scales = np.float32(rope.magnitude), rope.query_scales(positions)
    return Turns(magnitude * np.cos(angles), magnitude * np.sin(angles), None if scales is None else np.array(scales, np.float32))


def aligned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Zeros that start on a cache line, so that a block of 8 fills whole lines. numpy's start 16 bytes beside one: attention
    then reads an extra line for every stretch, and most of its loads cross two."""
    dtype = "uint16" if dtype == "bfloat16" else dtype  # numpy has no bfloat16: its bits
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
