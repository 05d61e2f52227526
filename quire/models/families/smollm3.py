"""SmolLM3: Llama in which some layers have no positions (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec

KINDS = ("full_attention", "sliding_attention")


def _read(config: Config) -> TransformerSpec:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    rotates = config.values.get("no_rope_layers")  # by its name the contrary: 1 is a layer that rotates
    if rotates is None:
        every = config.integer("no_rope_layer_interval", 4, high=MAX_LAYERS)
        rotates = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(rotates, list) or len(rotates) < layers or any(each not in (0, 1) for each in rotates):
        config.refuse(f"'no_rope_layers' must list 0 or 1 for each of the {layers} layers")
    window = config.integer("sliding_window", 0, low=0, high=MAX_POSITIONS) if config.flag("use_sliding_window", False) else 0
    types = config.values.get("layer_types")
    if types is None:
        types = ["sliding_attention" if window and not rotates[i] else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in KINDS for kind in types):
        config.refuse(f"'layer_types' must list full_attention or sliding_attention for each of the {layers} layers")
    bias = config.flag("attention_bias", False)
    spec = read_decoder(
        config,
        "SmolLM3ForCausalLM",
        kv_heads=4,
        max_positions=32768,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types),
        theta=2000000.0,
    )
    tied = config.flag("tie_word_embeddings", True)
    ropes = tuple(spec.rope if each else None for each in rotates[:layers])
    return replace(spec, ropes=ropes if None in ropes else (), tied=tied)


FAMILIES = (Family("SmolLM3ForCausalLM", "smollm3", _read, decoder_sources, ("model.",), BUFFERS),)
