"""Qwen2, Qwen2.5 (biases on q, k and v) and Qwen3 (RMS norms on query and key heads). Dense models only."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _windows(config: Config) -> tuple[int, ...]:
    """Window of each layer: ``layer_types`` where present, else the layers from ``max_window_layers`` on."""
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = 0
    if config.flag("use_sliding_window", False):
        absent = "sliding_window" not in config.values
        window = 4096 if absent else config.integer("sliding_window", 0, high=MAX_POSITIONS)
    types = config.values.get("layer_types")
    if types is None:
        first = config.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= first else 0 for i in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        config.refuse(f"'layer_types' must list one type for each of the {layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            config.refuse(f"layer type {kind!r} is not supported; supported: full_attention, sliding_attention")
        if kind == "sliding_attention" and not window:
            config.refuse("'layer_types' names sliding_attention, but 'use_sliding_window' or 'sliding_window' turns it off")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _read_qwen2(config: Config) -> TransformerSpec:
    config.unsupported(dual_chunk_attention_config=None)
    return read_decoder(config, "Qwen2ForCausalLM", kv_heads=32, max_positions=32768, qkv_bias=True, windows=_windows(config))


def _read_qwen3(config: Config) -> TransformerSpec:
    config.unsupported(dual_chunk_attention_config=None)
    bias = config.flag("attention_bias", False)
    return read_decoder(
        config,
        "Qwen3ForCausalLM",
        kv_heads=32,
        head_dim=128,
        max_positions=32768,
        head_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=_windows(config),
    )


FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", _read_qwen2, decoder_sources, ("model.",), BUFFERS),
    Family("Qwen3ForCausalLM", "qwen3", _read_qwen3, decoder_sources, ("model.",), BUFFERS),
)
