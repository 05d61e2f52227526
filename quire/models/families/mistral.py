"""Mistral 7B, NeMo and their relatives: Llama with a sliding window in every layer, or in none. Mixtral, with experts."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, decoder_sources, read_decoder, with_experts
from quire.models.spec import TransformerSpec

_MIXTRAL = LAYER | {
    "router": "block_sparse_moe.gate",
    "experts": "block_sparse_moe.experts",
    "experts.gate": "w1",
    "experts.up": "w3",
    "experts.down": "w2",
}


def _windows(config: Config, default: int) -> tuple[int, ...]:
    """default: of a file without the field, which is what the transformers class has; null is full attention."""
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = config.integer("sliding_window", 0 if "sliding_window" in config.values else default, low=0, high=MAX_POSITIONS)
    return (window,) * layers


def _read(config: Config) -> TransformerSpec:
    windows = _windows(config, 4096)
    layers, window = len(windows), windows[0]
    kind = "sliding_attention" if window else "full_attention"
    if (types := config.values.get("layer_types")) is not None and types != [kind] * layers:
        config.refuse("'layer_types' that differ between layers or contradict 'sliding_window' are not supported for MistralForCausalLM")
    return read_decoder(config, "MistralForCausalLM", kv_heads=8, max_positions=131072, windows=windows)


def _read_mixtral(config: Config) -> TransformerSpec:
    config.unsupported(router_jitter_noise=0.0)
    spec = read_decoder(config, "MixtralForCausalLM", kv_heads=8, max_positions=131072, theta=1e6, windows=_windows(config, 0))
    return with_experts(spec, config, count=8, per_token=2)


def _mixtral_sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, _MIXTRAL, "layers")


FAMILIES = (
    Family("MistralForCausalLM", "mistral", _read, decoder_sources, ("model.",), BUFFERS),
    Family("MixtralForCausalLM", "mixtral", _read_mixtral, _mixtral_sources, ("model.",), BUFFERS),
)
