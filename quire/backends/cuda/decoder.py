"""A decoder-only transformer in PyTorch. The forward pass is one loop over layers; variants are fields of the spec.

What stays on the device is here: weights, KV pool, tables. What a step computes is a Step of device tensors, so that a step can be
captured in a CUDA graph and run again on other contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.backends.cuda.cache import KVPool, LayerKV
from quire.backends.cuda.group import Group
from quire.backends.cuda.tiles import DecodeTiles
from quire.backends.cuda.turns import Turns, turns
from quire.backends.cuda.weights import Choice, Experts, FeedForward, Linear, Loader
from quire.backends.memory import KVLayout
from quire.models.spec import TransformerSpec


@dataclass(slots=True)
class Step:
    """The positions that one step computes: first those of the sequences with one position, then those of the others."""

    tokens: Tensor
    """[rows, len] int32 tokens of all rows."""
    rows: Tensor
    """[T] int32 the row of each position."""
    positions: Tensor
    """[T] int32"""
    slots: Sequence[Tensor]
    """Of each group of layers, [T] int32: block * block_size + offset; -1 where the KV is in the blocks already."""
    tables: Sequence[Tensor]
    """Of each group, [rows, blocks] int32 block tables of all rows."""
    num_decoding: int
    """D: sequences with one position."""
    decode_rows: Tensor
    """[D] int32"""
    decode_lengths: Tensor
    """[D] int32 keys that each sees."""
    decode_tiles: Mapping[int, DecodeTiles]
    """Of each window that layers have."""
    prefill_rows: Tensor | None = None
    """[P] int32 rows of the other sequences; None where there are none."""
    prefill_start: Tensor | None = None
    """[P + 1] int32 first position of each, counted behind the decoding ones."""
    prefill_lengths: Tensor | None = None
    """[P] int32 keys that the last position of each sees."""
    prefill_tiles: Mapping[int, Tensor] = field(default_factory=dict)
    """Of each window, [N, 2] int32, see tiles.prefill_tiles."""
    asked: Tensor | None = None
    """[A] int32 positions whose hidden states are wanted; None for all."""

    def wanted(self, x: Tensor) -> Tensor:
        """Of x [T, ...] the positions asked for: beyond its keys and values, the last layer computes no other."""
        return x if self.asked is None else x.index_select(0, self.asked)


@dataclass(slots=True)
class Norm:
    weight: Tensor
    bias: Tensor | None
    eps: float
    ops: Any

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of x [T, hidden], or of residual + x, which residual becomes."""
        if self.bias is None:
            normed: Tensor = self.ops.rms_norm(x, self.weight, self.eps, residual)
        else:
            normed = self.ops.layer_norm(x, self.weight, self.bias, self.eps, residual)
        return normed


NO_KV = LayerKV(torch.empty(0), torch.empty(0), None, None)


@dataclass(slots=True)
class Layer:
    attn_norm: Norm
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Norm
    mlp: FeedForward | Experts
    attn_out_norm: Norm | None
    """Of what attention, and the feed-forward, adds to the residual."""
    mlp_out_norm: Norm | None
    sinks: Tensor | None
    """[heads] float32, see ``decode`` of the operations."""
    window: int
    rope: Turns | None
    """None where the layer does not rotate."""
    group: int
    """Of layers: whose block tables it goes by."""
    kv: LayerKV


class Decoder:
    """The model's weights, its KV pool, and the forward pass.

    group: the devices that share the model, each with a part; None where it is on one.
    """

    def __init__(
        self,
        spec: TransformerSpec,
        loader: Loader,
        ops: Any,
        device: torch.device,
        max_model_len: int,
        group: Group | None = None,
    ) -> None:
        self.spec, self._ops, self._group = spec, ops, group
        self.embed = loader.tensor("embed.weight")
        self.dtype = self.embed.dtype
        self.positions = loader.tensor("positions.weight") if spec.rope is None else None
        layer_ropes = [spec.layer_rope(i) for i in range(spec.num_layers)]
        tables = {rope: turns(rope, max_model_len, device) for rope in set(layer_ropes) if rope is not None}
        self._embed_in = self._embed_out = None
        if spec.embedding_size != spec.hidden_size:
            self._embed_in, self._embed_out = loader.linear("embed_in"), loader.linear("embed_out")

        def norm(name: str, scale: float = 1.0) -> Norm:
            bias = loader.tensor(f"{name}.bias") * scale if spec.norm_bias else None
            return Norm(norm_weight(name) * scale, bias, spec.norm_eps, ops)

        def norm_weight(name: str) -> Tensor:
            weight = loader.tensor(f"{name}.weight")
            return weight.float() + spec.norm_offset if spec.norm_offset else weight

        def head_norm(name: str) -> Tensor | None:
            return norm_weight(name) if spec.head_norm else None

        def norm_behind(name: str) -> Norm | None:
            return norm(name) if spec.norms_behind else None

        def sinks(name: str) -> Tensor | None:
            return loader.tensor(f"{name}.weight").float() if spec.attention_sinks else None

        def ups(place: str) -> tuple[str, ...]:
            return (f"{place}.gate", f"{place}.up") if spec.gated else (f"{place}.up",)

        def feed_forward(at: str) -> FeedForward:
            return FeedForward(loader.linear(*ups(at)), loader.linear(f"{at}.down"), spec.gated, spec.activation)

        def experts(at: str) -> Experts:
            places = [f"{at}.experts.{j}" for j in range(spec.num_experts)]
            up, down = loader.stacked([ups(place) for place in places]), loader.stacked([(f"{place}.down",) for place in places])
            # Shares are compared after small corrections: scores are not rounded to 16 bits before.
            wide = spec.expert_correction or spec.expert_shares == "sigmoid"
            router = loader.linear(f"{at}.router", exact=True, wide=wide)
            correction = loader.tensor(f"{at}.correction.bias", wide=True) if spec.expert_correction else None
            choice = Choice(
                spec.experts_per_token, spec.experts_sum_to_one, spec.expert_shares == "sigmoid", correction, spec.experts_scale
            )  # fmt: skip
            return Experts(router, choice, *up, *down, spec.activation, feed_forward(f"{at}.shared") if spec.shared_size else None)

        def mlp(layer: int) -> FeedForward | Experts:
            return experts(f"layers.{layer}") if spec.has_experts(layer) else feed_forward(f"layers.{layer}")

        self.layers = []
        for i in range(spec.num_layers):
            at = f"layers.{i}"
            self.layers.append(Layer(
                norm(f"{at}.attn_norm"), loader.linear(f"{at}.q", f"{at}.k", f"{at}.v"), head_norm(f"{at}.q_norm"),
                head_norm(f"{at}.k_norm"), loader.linear(f"{at}.o"), norm(f"{at}.mlp_norm"), mlp(i),
                norm_behind(f"{at}.attn_out_norm"), norm_behind(f"{at}.mlp_out_norm"),
                sinks(f"{at}.sinks"), spec.window(i), None if (rope := layer_ropes[i]) is None else tables[rope], 0, NO_KV,
            ))  # fmt: skip
        self.final_norm = norm("final_norm", spec.logit_scale) if spec.final_norm else None
        own = loader.has("lm_head.weight")
        self.lm_head = loader.linear("lm_head") if own else loader.linear("embed", share=self.embed)

    def use(self, pool: KVPool, layout: KVLayout) -> None:
        """Keys and values are in ``pool`` from now on."""
        for layer, (group, slot) in zip(self.layers, layout.places, strict=True):
            layer.group, layer.kv = group, pool.layer(slot)

    def forget_pool(self) -> None:
        """Its memory can be given back."""
        for layer in self.layers:
            layer.kv = NO_KV

    def forward(self, step: Step) -> Tensor:
        """Compute the step's positions: write their KV, attend. Returns logits [asked, vocab]."""
        return self.logits(self.hidden(step))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Of some rows of hidden states, [rows, vocab]; in ``out`` where that is given."""
        if self._group is None:
            logits = self.lm_head(hidden, out)
        else:
            logits = self._group.gather(self.lm_head(hidden), self.spec.vocab_size)
            logits = logits if out is None else out.copy_(logits)
        if self.spec.logit_softcap:
            self._ops.softcap(logits, self.spec.logit_softcap)
        return logits

    def hidden(self, step: Step) -> Tensor:
        """``forward`` up to lm_head: what that reads, [asked, embedding_size]."""
        x = self._embedded(step)
        x = {"before": self._pre_norm, "after": self._post_norm, "behind": self._norms_behind}[self.spec.norm_place](x, step)
        if self._embed_out is not None:
            x = self._embed_out(x)
        return x

    def weight_bytes(self) -> int:
        """Bytes of all linears, lm_head included: what a step reads."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.o)]
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]
        linears += [mixture.router for mixture in mixtures]
        linears += [linear for linear in (self._embed_in, self._embed_out, self.lm_head) if linear is not None]
        shared = sum(mixture.shared.nbytes for mixture in mixtures if mixture.shared is not None)
        return sum(linear.nbytes for linear in linears) + sum(layer.mlp.nbytes for layer in self.layers) + shared

    def expert_bytes(self) -> int:
        """Of which experts: a step reads those that its positions take."""
        return sum(layer.mlp.nbytes for layer in self.layers if isinstance(layer.mlp, Experts))

    def _embedded(self, step: Step) -> Tensor:
        x = self._ops.embed(step.tokens, step.rows, step.positions, self.embed)
        if self.spec.embed_scale != 1.0:
            x = x * self.spec.embed_scale
        if self._embed_in is not None:
            x = self._embed_in(x)
        if self.positions is not None:
            x = x + self.positions.index_select(0, step.positions + self.spec.position_offset)
        return x

    def _pre_norm(self, residual: Tensor, step: Step) -> Tensor:
        x = self.layers[0].attn_norm(residual)
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            x = self._attention(layer, x, step)
            if following is None:
                x, residual = step.wanted(x), step.wanted(residual)
                if not len(x):
                    return residual
            x = self._summed(layer.o(x))
            x = layer.mlp_norm(x if layer.attn_out_norm is None else layer.attn_out_norm(x), residual)
            x = self._summed(layer.mlp(x))
            if layer.mlp_out_norm is not None:
                x = layer.mlp_out_norm(x)
            if following is not None:
                x = following.attn_norm(x, residual)
        return residual.add_(x) if self.final_norm is None else self.final_norm(x, residual)

    def _post_norm(self, x: Tensor, step: Step) -> Tensor:
        for layer in self.layers:
            residual, x = x, self._attention(layer, x, step)
            if layer is self.layers[-1]:
                x, residual = step.wanted(x), step.wanted(residual)
                if not len(x):
                    return residual
            x = layer.attn_norm(self._summed(layer.o(x)), residual)
            x = layer.mlp_norm(self._summed(layer.mlp(x)), x)
        return x if self.final_norm is None else self.final_norm(x)

    def _norms_behind(self, x: Tensor, step: Step) -> Tensor:
        for layer in self.layers:
            attended = self._attention(layer, x, step)
            if layer is self.layers[-1]:
                attended, x = step.wanted(attended), step.wanted(x)
                if not len(x):
                    return x
            x = x + layer.attn_norm(self._summed(layer.o(attended)))
            x = x + layer.mlp_norm(self._summed(layer.mlp(x)))
        return x if self.final_norm is None else self.final_norm(x)

    def _attention(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """[T, heads * head_dim]"""
        spec, count, ops = self.spec, len(x), self._ops
        qkv = layer.qkv(x)
        head_norms = layer.q_norm, layer.k_norm
        if spec.heads_as_one and layer.q_norm is not None and layer.k_norm is not None:
            self._norm_heads(qkv, layer.q_norm, layer.k_norm)
            head_norms = None, None
        tables, slots = step.tables[layer.group], step.slots[layer.group]
        ops.write_kv(qkv, layer.kv, step.positions, slots, spec.num_heads, layer.rope, *head_norms, spec.norm_eps)
        queries = qkv.view(count, -1, spec.head_dim)[:, : spec.num_heads]
        out = torch.empty((count, spec.num_heads, spec.head_dim), dtype=x.dtype, device=x.device)
        decoding = step.num_decoding
        if decoding:
            ops.decode(
                queries[:decoding], layer.kv, tables, step.decode_rows, step.decode_lengths, step.decode_tiles[layer.window],
                spec.scale, layer.window, out[:decoding], layer.sinks, spec.attention_softcap,
            )  # fmt: skip
        if step.prefill_rows is not None:
            ops.prefill(
                queries[decoding:], layer.kv, tables, step.prefill_rows, step.prefill_start, step.prefill_lengths,
                step.prefill_tiles[layer.window], spec.scale, layer.window, out[decoding:], layer.sinks, spec.attention_softcap,
            )  # fmt: skip
        return out.view(count, -1)

    def _norm_heads(self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor) -> None:
        """All query heads as one vector, and all key heads, in place; those of all devices, each of which has as many."""
        queries, keys = len(q_norm), len(k_norm)
        eps, parts = self.spec.norm_eps, ((qkv[:, :queries], q_norm), (qkv[:, queries : queries + keys], k_norm))
        if self._group is None:
            for x, weight in parts:
                self._ops.rms_norm(x, weight, eps, out=x)
            return
        means = torch.stack([x.float().square().mean(1) for x, _ in parts])
        self._group.reduce(means)
        for (x, weight), mean in zip(parts, means / self._group.size, strict=True):
            x.copy_(x.float() * torch.rsqrt(mean + eps)[:, None] * weight.float())

    def _summed(self, x: Tensor) -> Tensor:
        if self._group is not None:
            self._group.reduce(x)
        return x
