"""Phi-3, Phi-3.5 and Phi-4 (mini too): Llama with q, k, v and gate, up fused, LongRoPE, and a rotation of a part of each head."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    config.unsupported(attention_bias=False, mlp_bias=False)
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = config.integer("sliding_window", 0, low=0, high=MAX_POSITIONS)
    return read_decoder(config, "Phi3ForCausalLM", max_positions=4096, windows=(window,) * layers, partial=1.0, longrope=True)


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = decoder_sources(spec)
    q, kv, f = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    parts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv), "gate": (0, f), "up": (f, 2 * f)}
    for i in range(spec.num_layers):
        for name, rows in parts.items():
            fused, total = ("mlp.gate_up_proj", 2 * f) if name in ("gate", "up") else ("self_attn.qkv_proj", q + 2 * kv)
            sources[f"layers.{i}.{name}.weight"] = Source(f"layers.{i}.{fused}.weight", rows=rows, rows_total=total)
    return sources


FAMILIES = (Family("Phi3ForCausalLM", "phi3", _read, _sources, ("model.",), BUFFERS),)
