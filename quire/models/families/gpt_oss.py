"""gpt-oss (arXiv 2508.10925): experts with biases and a clamped activation, attention sinks, a window in every other layer.

A layer's experts are two tensors, [experts, in, out], in which gates and the columns that they gate take turns; in the published
checkpoints those of 4 bits are stored the other way round (weights/mxfp4.py, which names them as if they were not).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, read_decoder, read_layer_types, with_experts
from quire.models.spec import TransformerSpec

_ROPE: Final[dict[str, Any]] = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip
"""Where config.json does not say."""


def _read(config: Config) -> TransformerSpec:
    config.unsupported(swiglu_limit=7.0, swiglu_alpha=1.702, hidden_act="silu")
    if not config.values.get("rope_scaling") and not config.values.get("rope_parameters"):
        config = replace(config, values={**config.values, "rope_parameters": _ROPE})
    bias = config.flag("attention_bias", True)
    spec = read_decoder(
        config, "GptOssForCausalLM", kv_heads=8, head_dim=64, max_positions=131072, qkv_bias=bias, o_bias=bias, mlp_bias=True,
        windows=_windows(config), theta=150000.0, eps=1e-5,
    )  # fmt: skip
    spec = replace(spec, attention_sinks=True, activation="swiglu_oai")
    return with_experts(spec, config, count=128, per_token=4)


def _windows(config: Config) -> tuple[int, ...]:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = config.integer("sliding_window", 128, high=MAX_POSITIONS)
    types = read_layer_types(config, layers)
    if types is None:
        return tuple(0 if i % 2 else window for i in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = renamed(spec, TOP, LAYER | {"router": "mlp.router", "sinks": "self_attn.sinks"}, "layers")
    f, count = spec.intermediate_size, spec.num_experts
    parts = (("gate", "gate_up_proj", (0, 2 * f, 2)), ("up", "gate_up_proj", (1, 2 * f, 2)), ("down", "down_proj", None))
    for i in range(spec.num_layers):
        sources[f"layers.{i}.sinks.weight"] = Source(f"layers.{i}.self_attn.sinks")
        at = f"layers.{i}.mlp.experts"
        for j in range(count):
            for part, fused, rows in parts:
                name, total = f"layers.{i}.experts.{j}.{part}", 2 * f if rows else 0
                sources[f"{name}.weight"] = Source(f"{at}.{fused}", True, rows, total, (j, count))
                sources[f"{name}.bias"] = Source(f"{at}.{fused}_bias", False, rows, total, (j, count))
    return sources


FAMILIES = (Family("GptOssForCausalLM", "gpt_oss", _read, _sources, ("model.",), BUFFERS),)
