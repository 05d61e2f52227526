"""Qwen2, Qwen2.5 (biases on q, k and v) and Qwen3 (RMS norms on query and key heads; also with experts, in all layers or in some)."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder, read_layer_types, with_experts
from quire.models.spec import TransformerSpec


def _windows(config: Config) -> tuple[int, ...]:
    """Window of each layer: ``layer_types`` where present, else the layers from ``max_window_layers`` on."""
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = 0
    if config.flag("use_sliding_window", False):
        absent = "sliding_window" not in config.values
        window = 4096 if absent else config.integer("sliding_window", 0, high=MAX_POSITIONS)
    types = read_layer_types(config, layers)
    if types is None:
        first = config.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= first else 0 for i in range(layers))
    if "sliding_attention" in types and not window:
        config.refuse("'layer_types' names sliding_attention, but 'use_sliding_window' or 'sliding_window' turns it off")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _read_qwen2(config: Config) -> TransformerSpec:
    config.unsupported(dual_chunk_attention_config=None)
    return read_decoder(config, "Qwen2ForCausalLM", kv_heads=32, max_positions=32768, qkv_bias=True, windows=_windows(config))


def _read_qwen3(config: Config) -> TransformerSpec:
    config.unsupported(dual_chunk_attention_config=None)
    return _qwen3(config, "Qwen3ForCausalLM", 32, 128, "intermediate_size", _windows(config))


def _read_qwen3_moe(config: Config) -> TransformerSpec:
    config.unsupported(dual_chunk_attention_config=None)
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = config.integer("sliding_window", 0, high=MAX_POSITIONS) if config.flag("use_sliding_window", False) else 0
    spec = _qwen3(config, "Qwen3MoeForCausalLM", 4, None, "moe_intermediate_size", (window,) * layers)
    sum_to_one = config.flag("norm_topk_prob", False)
    return with_experts(spec, config, count=128, per_token=8, sum_to_one=sum_to_one, dense=_dense(config, layers))


def _dense(config: Config, layers: int) -> list[bool]:
    """Whether a layer has one feed-forward: all but each ``decoder_sparse_step``-th, and those that are listed."""
    step = config.integer("decoder_sparse_step", 1, high=MAX_LAYERS)
    listed = config.values.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(type(i) is not int for i in listed):
        config.refuse(f"'mlp_only_layers' must list numbers of layers, got {listed!r:.80}")
    named = set(listed)
    return [i in named or (i + 1) % step != 0 for i in range(layers)]


def _qwen3(config: Config, name: str, kv_heads: int, head_dim: int | None, inner: str, windows: tuple[int, ...]) -> TransformerSpec:
    bias = config.flag("attention_bias", False)
    return read_decoder(
        config, name, kv_heads=kv_heads, head_dim=head_dim, max_positions=32768, inner=inner, head_norm=True, qkv_bias=bias, o_bias=bias,
        windows=windows,
    )  # fmt: skip


FAMILIES = (
    Family("Qwen2ForCausalLM", "qwen2", _read_qwen2, decoder_sources, ("model.",), BUFFERS),
    Family("Qwen3ForCausalLM", "qwen3", _read_qwen3, decoder_sources, ("model.",), BUFFERS),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", _read_qwen3_moe, decoder_sources, ("model.",), BUFFERS),
)
