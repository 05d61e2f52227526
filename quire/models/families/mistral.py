"""Mistral 7B, NeMo and their relatives: Llama with a sliding window in every layer, or in none. Mixtral, with experts. Ministral 8B, with a
window in some layers. Ministral 3, whose queries are scaled beyond its original context. Of models that see images
(``Mistral3ForConditionalGeneration``) the part that reads and writes text is served.
"""

from __future__ import annotations

from quire.models.families.base import IMAGES, MAX_LAYERS, MAX_POSITIONS, TEXT_PREFIXES, Config, Family, Source, renamed, text_part
from quire.models.families.llama import BUFFERS, LAYER, TOP, decoder_sources, read_decoder, read_layer_types, with_experts
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


def _read_ministral(config: Config) -> TransformerSpec:
    windows = _windows(config, 4096)
    types = read_layer_types(config, len(windows))
    if types is not None:
        if "sliding_attention" in types and not windows[0]:
            config.refuse("'layer_types' names sliding_attention, but there is no 'sliding_window'")
        windows = tuple(window if kind == "sliding_attention" else 0 for window, kind in zip(windows, types, strict=True))
    return read_decoder(config, "MinistralForCausalLM", kv_heads=8, max_positions=131072, windows=windows)


def _read_mixtral(config: Config) -> TransformerSpec:
    config.unsupported(router_jitter_noise=0.0)
    spec = read_decoder(config, "MixtralForCausalLM", kv_heads=8, max_positions=131072, theta=1e6, windows=_windows(config, 0))
    return with_experts(spec, config, count=8, per_token=2)


def _read_ministral3(config: Config) -> TransformerSpec:
    windows = _windows(config, 0)
    return read_decoder(
        config, "Ministral3ForCausalLM", kv_heads=8, head_dim=128, max_positions=262144, windows=windows, scales=True, eps=1e-5
    )  # fmt: skip


def _read_mistral3(config: Config) -> TransformerSpec:
    text = text_part(config)
    readers = {"mistral": _read, "ministral3": _read_ministral3}
    kind = text.values.get("model_type", "mistral")
    if not isinstance(kind, str) or kind not in readers:
        text.refuse(f"model_type {kind!r:.40} is not supported; supported: {', '.join(readers)}")
    return readers[kind](text)


def _mixtral_sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, _MIXTRAL, "layers")


FAMILIES = (
    Family("MistralForCausalLM", "mistral", _read, decoder_sources, ("model.",), BUFFERS),
    Family("Ministral3ForCausalLM", "ministral3", _read_ministral3, decoder_sources, ("model.",), BUFFERS),
    Family("Mistral3ForConditionalGeneration", "mistral3", _read_mistral3, decoder_sources, TEXT_PREFIXES, f"{BUFFERS}|{IMAGES}"),
    Family("MinistralForCausalLM", "ministral", _read_ministral, decoder_sources, ("model.",), BUFFERS),
    Family("MixtralForCausalLM", "mixtral", _read_mixtral, _mixtral_sources, ("model.",), BUFFERS),
)
