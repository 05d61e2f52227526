"""A decoder-only transformer on the CPU kernels. The forward pass is one loop over layers; variants are fields of the spec.

Weights are packed at load, q, k, v and gate, up side by side, since they share an input. A step works in buffers that are
made once for the most positions that a step may compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cpu import _native as native
from quire.backends.cpu.rows import Batch
from quire.models.spec import TransformerSpec

F32 = npt.NDArray[np.float32]
Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(slots=True)
class Linear:
    """out = x · Wᵀ + b, W packed in the order in which the kernel reads it."""

    packed: native.PackedLinear
    bias: F32 | None

    def __call__(self, x: F32, out: F32, *, accumulate: bool = False) -> None:
        """x [T, in], out [T, out], float32; ``accumulate`` adds to out (the residual)."""
        native.linear(self.packed, x, out, self.bias, accumulate)


@dataclass(slots=True)
class Norm:
    weight: F32
    bias: F32 | None
    eps: float
    rms: bool

    def __call__(self, x: F32, out: F32) -> None:
        """x, out [T, hidden] (or [T, heads, head_dim]: each head by itself)."""
        if self.rms:
            native.rms_norm(x, self.weight, self.eps, out)
        else:
            native.layer_norm(x, self.weight, self.bias, self.eps, out)


@dataclass(slots=True)
class Layer:
    attn_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp_norm: Norm
    up: Linear
    """gate and up side by side where gated."""
    down: Linear
    window: int
    key_cache: npt.NDArray[Any]
    """[num_blocks, kv_heads, head_dim, block_size]"""
    value_cache: npt.NDArray[Any]
    """[num_blocks, kv_heads, block_size, head_dim]"""


class Decoder:
    """The model's weights, its KV pool, and the forward pass.

    tensors: canonical names (see TransformerSpec). kv_dtype: float16 or float32. weight_dtype: None keeps each tensor's.
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
        weight_dtype: str | None = None,
    ) -> None:
        self.spec = spec
        self._tensors = tensors
        self._weight_dtype = weight_dtype
        d = spec.head_dim
        self.embed = self._matrix("embed.weight")
        self.positions = self._matrix("positions.weight") if spec.rope is None else None
        if spec.embedding_size != spec.hidden_size:
            self.embed_in, self.embed_out = self._linear("embed_in"), self._linear("embed_out")
        if spec.rope is not None:
            # Angles in float32, as the models were trained with.
            frequencies = np.array(spec.rope.inverse_frequencies(), np.float32)
            angles = np.arange(max_model_len, dtype=np.float32)[:, None] * frequencies
            self.cos, self.sin = np.cos(angles), np.sin(angles)
        shape = (num_blocks, spec.num_kv_heads)
        self.layers = []
        for i in range(spec.num_layers):
            at = f"layers.{i}"
            layer = Layer(
                attn_norm=self._norm(f"{at}.attn_norm"),
                qkv=self._linear(f"{at}.q", f"{at}.k", f"{at}.v"),
                q_norm=self._head_norm(f"{at}.q_norm"),
                k_norm=self._head_norm(f"{at}.k_norm"),
                o=self._linear(f"{at}.o"),
                mlp_norm=self._norm(f"{at}.mlp_norm"),
                up=self._linear(f"{at}.gate", f"{at}.up") if spec.gated else self._linear(f"{at}.up"),
                down=self._linear(f"{at}.down"),
                window=spec.window(i),
                key_cache=_aligned((*shape, d, block_size), kv_dtype),
                value_cache=_aligned((*shape, block_size, d), kv_dtype),
            )
            self.layers.append(layer)
        self.final_norm = self._norm("final_norm") if spec.final_norm else None
        self.lm_head = self._linear("embed" if spec.tied else "lm_head")
        for linear, then in pairwise(self._linears()):
            linear.packed.set_then(then.packed)

        def buffer(rows: int, width: int) -> F32:
            # An odd number of cache lines from row to row: a power of two would put all rows into the same few lines of L1.
            stride = 16 * (-(-width // 16) | 1)
            return _aligned((rows, stride), "float32")[:, :width]

        q, kv = spec.num_heads * d, spec.num_kv_heads * d
        self._x = buffer(max_tokens, spec.hidden_size)
        self._normed = buffer(max_tokens, spec.hidden_size)
        self._qkv = buffer(max_tokens, q + 2 * kv)
        self._attended = buffer(max_tokens, q)
        self._up = buffer(max_tokens, spec.intermediate_size * (2 if spec.gated else 1))
        self._activated = buffer(max_tokens, spec.intermediate_size)
        self._embedded = buffer(max_tokens, spec.embedding_size) if spec.embedding_size != spec.hidden_size else self._x
        self._last = buffer(max_rows, spec.hidden_size)
        self._logits = np.zeros((max_rows, spec.vocab_size), np.float32)

    def forward(self, batch: Batch) -> F32:
        """Compute the batch's positions: write their KV, attend. Returns logits [samples, vocab], valid until the next call."""
        x = self._embed(batch)
        for layer in self.layers:
            if self.spec.norm_first:
                layer.attn_norm(x, self._normed[: len(x)])
                self._attention(layer, self._normed[: len(x)], x, batch)
                layer.mlp_norm(x, self._normed[: len(x)])
                self._feed_forward(layer, self._normed[: len(x)], x)
            else:
                self._attention(layer, x, x, batch)
                layer.attn_norm(x, x)
                self._feed_forward(layer, x, x)
                layer.mlp_norm(x, x)
        return self._head(x, batch.logit_rows)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination), in every layer."""
        ids = np.array(pairs, np.int32)
        for layer in self.layers:
            native.copy_blocks(layer.key_cache, ids)
            native.copy_blocks(layer.value_cache, ids)

    def poison_blocks(self, blocks: list[int]) -> None:
        """Fill blocks with NaN: what reads them before they are written shows."""
        ids = np.array(blocks, np.int32)
        for layer in self.layers:
            native.fill_blocks(layer.key_cache, ids, np.nan)
            native.fill_blocks(layer.value_cache, ids, np.nan)

    def weight_bytes(self) -> int:
        """Bytes of all packed linears, lm_head included: what a step reads."""
        return sum(linear.packed.nbytes for linear in self._linears())

    def _linears(self) -> list[Linear]:
        """Those of all layers and lm_head, in the order in which a step reads them."""
        return [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.up, layer.down)] + [self.lm_head]

    def _embed(self, batch: Batch) -> F32:
        count = len(batch.ids)
        x, embedded = self._x[:count], self._embedded[:count]
        native.embed(batch.ids, self.embed, embedded)
        if self.spec.embedding_size != self.spec.hidden_size:
            self.embed_in(embedded, x)
        if self.positions is not None:
            native.add_rows(batch.positions + np.int32(self.spec.position_offset), self.positions, x)
        return x

    def _attention(self, layer: Layer, x: F32, residual: F32, batch: Batch) -> None:
        """residual += o(attention(x))"""
        spec, count = self.spec, len(x)
        qkv, attended = self._qkv[:count], self._attended[:count]
        layer.qkv(x, qkv)
        heads = qkv.reshape(count, -1, spec.head_dim)
        queries = heads[:, : spec.num_heads]
        keys = heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]
        values = heads[:, spec.num_heads + spec.num_kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            layer.q_norm(queries, queries)
            layer.k_norm(keys, keys)
        if spec.rope is not None:
            native.rotary(heads[:, : spec.num_heads + spec.num_kv_heads], batch.positions, self.cos, self.sin)
        where = (batch.block_tables, batch.rows, batch.query_start, batch.start)
        if (part := batch.written) is None:
            native.write_kv(keys, values, layer.key_cache, layer.value_cache, *where)
        elif len(part.tokens):
            cache = (layer.key_cache, layer.value_cache, batch.block_tables, part.rows, part.query_start, part.start)
            native.write_kv(keys[part.tokens], values[part.tokens], *cache)
        native.paged_attention(queries, layer.key_cache, layer.value_cache, attended, *where, spec.scale, layer.window)
        layer.o(attended, residual, accumulate=True)

    def _feed_forward(self, layer: Layer, x: F32, residual: F32) -> None:
        """residual += down(activation(up(x)))"""
        count = len(x)
        up, activated = self._up[:count], self._activated[:count]
        layer.up(x, up)
        native.activation(up, activated, self.spec.activation, self.spec.gated)
        layer.down(activated, residual, accumulate=True)

    def _head(self, x: F32, rows: npt.NDArray[np.int32]) -> F32:
        if len(rows) == 0:  # chunks of prompts only
            return self._logits[:0]
        last = np.take(x, rows, axis=0, out=self._last[: len(rows)], mode="clip")  # mode: else numpy makes a copy more
        if self.final_norm is not None:
            self.final_norm(last, last)
        if self.spec.embedding_size != self.spec.hidden_size:
            projected = np.empty((len(rows), self.spec.embedding_size), np.float32)
            self.embed_out(last, projected)
            last = projected
        logits = self._logits[: len(rows)]
        self.lm_head(last, logits)
        return logits

    def _matrix(self, name: str) -> npt.NDArray[Any]:
        """A weight as the kernels take it: in the width asked for, a bfloat16 as its bits."""
        tensor = self._tensors[name]
        if self._weight_dtype is not None and tensor.dtype.name != self._weight_dtype:
            tensor = tensor.astype(self._weight_dtype)
        return tensor.view(np.uint16) if tensor.dtype.name == "bfloat16" else tensor

    def _vector(self, name: str) -> F32:
        return np.ascontiguousarray(self._tensors[name], np.float32)

    def _linear(self, *names: str) -> Linear:
        """One packed linear of the weights of ``names``, side by side."""
        biases = [self._vector(f"{name}.bias") for name in names if f"{name}.bias" in self._tensors]
        weights = [self._matrix(f"{name}.weight") for name in names]
        if len({weight.dtype for weight in weights}) > 1:  # a checkpoint of mixed widths: the widest holds them all
            weights = [np.asarray(self._tensors[f"{name}.weight"], np.float32) for name in names]
        packed = native.pack_linear(weights)
        return Linear(packed, np.concatenate(biases) if biases else None)

    def _norm(self, name: str) -> Norm:
        bias = self._vector(f"{name}.bias") if self.spec.norm_bias else None
        return Norm(self._vector(f"{name}.weight"), bias, self.spec.norm_eps, self.spec.norm == "rms")

    def _head_norm(self, name: str) -> Norm | None:
        return Norm(self._vector(f"{name}.weight"), None, self.spec.norm_eps, True) if self.spec.head_norm else None


def _aligned(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Zeros that start on a cache line, so that a block of 8 fills whole lines. numpy's start 16 bytes beside one: attention
    then reads an extra line for every stretch, and most of its loads cross two."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
