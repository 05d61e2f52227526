"""The whole of a decoder in numpy float64: slow, obvious, and independent of every backend.

It reads what a backend reads, a TransformerSpec and canonical tensors, and computes whole sequences without a cache. Where
it agrees with transformers (tests/oracle), spec, family and loader are right; where a backend agrees with it, the backend is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.models.spec import RopeSpec, TransformerSpec

Array = npt.NDArray[np.float64]


class ReferenceModel:
    """tensors: canonical name → array of any float dtype; all arithmetic is float64. rounds: what linears read is rounded to bfloat16."""

    def __init__(self, spec: TransformerSpec, tensors: Mapping[str, npt.NDArray[Any]], rounds: bool = False) -> None:
        self.spec, self.rounds = spec, rounds
        self.tensors = {name: np.asarray(array, dtype=np.float64) for name, array in tensors.items()}

    def logits(self, tokens: Sequence[int]) -> Array:
        """[len(tokens), vocab]: row p scores the token at position p + 1."""
        spec, t = self.spec, self.tensors
        x = t["embed.weight"][list(tokens)] * spec.embed_scale
        if "embed_in.weight" in t:
            x = self._linear("embed_in", x)
        if spec.rope is None:
            x = x + t["positions.weight"][spec.position_offset :][: len(tokens)]
        for i in range(spec.num_layers):
            at = f"layers.{i}"
            if spec.norm_place == "before":
                x = x + self._behind(f"{at}.attn_out_norm", self._attention(i, self._norm(f"{at}.attn_norm", x)))
                x = x + self._behind(f"{at}.mlp_out_norm", self._mlp(i, self._norm(f"{at}.mlp_norm", x)))
            elif spec.norm_place == "after":
                x = self._norm(f"{at}.attn_norm", x + self._attention(i, x))
                x = self._norm(f"{at}.mlp_norm", x + self._mlp(i, x))
            else:
                x = x + self._norm(f"{at}.attn_norm", self._attention(i, x))
                x = x + self._norm(f"{at}.mlp_norm", self._mlp(i, x))
        if spec.final_norm:
            x = self._norm("final_norm", x) * spec.logit_scale
        if "embed_out.weight" in t:
            x = self._linear("embed_out", x)
        return limit(spec.logit_softcap, self._linear("embed" if spec.tied else "lm_head", x))

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """``count`` tokens after the prompt, the lowest id among equals; end-of-text is a token like any other."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _linear(self, name: str, x: Array) -> Array:
        if self.rounds:
            x = x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
        y = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def _behind(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if self.spec.norms_behind else x

    def _norm(self, name: str, x: Array) -> Array:
        weight, eps = self.tensors[f"{name}.weight"] + self.spec.norm_offset, self.spec.norm_eps
        if self.spec.norm == "rms" or name.endswith(("q_norm", "k_norm")):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight + self.tensors.get(f"{name}.bias", 0.0)

    def _attention(self, layer: int, x: Array) -> Array:
        spec, at, n = self.spec, f"layers.{layer}", len(x)
        q, k = self._linear(f"{at}.q", x), self._linear(f"{at}.k", x)
        if spec.heads_as_one:
            q, k = self._norm(f"{at}.q_norm", q), self._norm(f"{at}.k_norm", k)
        q, k = q.reshape(n, spec.num_heads, spec.head_dim), k.reshape(n, spec.num_kv_heads, spec.head_dim)
        v = self._linear(f"{at}.v", x).reshape(n, spec.num_kv_heads, spec.head_dim)
        if spec.head_norm and not spec.heads_as_one:
            q, k = self._norm(f"{at}.q_norm", q), self._norm(f"{at}.k_norm", k)
        if (rope := spec.layer_rope(layer)) is not None:
            q, k = rotate(rope, q), rotate(rope, k)
            q *= np.array(rope.query_scales(n) or [1.0] * n)[:, None, None]
        group = spec.num_heads // spec.num_kv_heads
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        scores = limit(spec.attention_softcap, np.einsum("qhd,khd->hqk", q, k) * spec.scale)
        position = np.arange(n)
        distance = position[:, None] - position[None, :]
        hidden = distance < 0
        if window := spec.window(layer):
            hidden |= distance >= window
        scores[:, hidden] = -np.inf
        most = scores.max(-1, keepdims=True)
        if spec.attention_sinks:
            sinks = self.tensors[f"{at}.sinks.weight"][:, None, None]
            most = np.maximum(most, sinks)
        weights = np.exp(scores - most)
        weights /= weights.sum(-1, keepdims=True) + (np.exp(sinks - most) if spec.attention_sinks else 0.0)
        return self._linear(f"{at}.o", np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1))

    def _mlp(self, layer: int, x: Array) -> Array:
        at = f"layers.{layer}"
        if not self.spec.has_experts(layer):
            return self._feed_forward(at, x)
        beside = self._feed_forward(f"{at}.shared", x) if self.spec.shared_size else 0.0
        return self._experts(at, x) + beside

    def _experts(self, at: str, x: Array) -> Array:
        spec, out = self.spec, np.zeros_like(x)
        scores = self._linear(f"{at}.router", x)
        if spec.expert_shares == "sigmoid":
            shares = 1.0 / (1.0 + np.exp(-scores))
        else:
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
        by = shares + self.tensors[f"{at}.correction.bias"] if spec.expert_correction else scores
        for row in range(len(x)):
            chosen = np.argsort(-by[row], kind="stable")[: spec.experts_per_token]
            total = shares[row, chosen].sum() if spec.experts_sum_to_one else 1.0
            for j in chosen:
                out[row] += spec.experts_scale * shares[row, j] / total * self._feed_forward(f"{at}.experts.{j}", x[row])
        return out

    def _feed_forward(self, at: str, x: Array) -> Array:
        up = self._linear(f"{at}.up", x)
        gate = self._linear(f"{at}.gate", x) if self.spec.gated else up
        if self.spec.activation == "swiglu_oai":
            gate = np.minimum(gate, 7.0)
            y = gate / (1.0 + np.exp(-1.702 * gate)) * (np.clip(up, -7.0, 7.0) + 1.0)
        else:
            y = activate(self.spec.activation, gate) * (up if self.spec.gated else 1.0)
        return self._linear(f"{at}.down", y)


def rotate(rope: RopeSpec, x: Array) -> Array:
    """x [tokens, heads, head_dim], token p at position p; dimensions i and i + rotary_dim / 2 turn together."""
    half = rope.rotary_dim // 2
    angles = np.arange(len(x))[:, None] * np.array(rope.inverse_frequencies(len(x)))
    cos, sin = rope.magnitude * np.cos(angles)[:, None], rope.magnitude * np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def limit(cap: float, x: Array) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def activate(name: str, x: Array) -> Array:
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "silu":
        return x / (1.0 + np.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
    assert name == "gelu_tanh"
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest difference, relative to the largest expected logit of its row. Infinite where something is not finite."""
    error = np.abs(found.astype(np.float64) - expected).max(-1) / np.abs(expected).max(-1)
    return float(error.max()) if np.isfinite(error).all() else float("inf")
