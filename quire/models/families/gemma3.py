"""Gemma 3: Llama with RMS norms behind attention and feed-forward as well, norms of heads, and five layers with a window for each without.

What looks at a window rotates by frequencies of its own. Checkpoints hold the weights of norms less 1. Of a model that sees images
(``Gemma3ForConditionalGeneration``) the part that reads and writes text is served.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.models.families.base import IMAGES, MAX_LAYERS, MAX_POSITIONS, TEXT_PREFIXES, Config, Family, Source, renamed, text_part
from quire.models.families.gemma import BEHIND, read_limit
from quire.models.families.llama import BUFFERS, TOP, read_decoder, read_rope
from quire.models.families.rotations import GLOBAL, LOCAL, read_rotations
from quire.models.spec import TransformerSpec

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}  # fmt: skip
"""transformers' own: the files of 4B and more say little about the text model."""


def _read_text(config: Config) -> TransformerSpec:
    given = {name: value for name, value in config.values.items() if value is not None}
    config = Config(_DEFAULTS | given, config.where)
    config.unsupported(attn_logit_softcapping=None, use_bidirectional_attention=False)
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    every = config.integer("sliding_window_pattern", high=MAX_LAYERS)
    types = config.values.get("layer_types", [GLOBAL if (i + 1) % every == 0 else LOCAL for i in range(layers)])
    if not isinstance(types, list) or len(types) != layers or any(kind not in (LOCAL, GLOBAL) for kind in types):
        config.refuse(f"'layer_types' must list {GLOBAL} or {LOCAL} for each of the {layers} layers")
    window = config.integer("sliding_window", high=MAX_POSITIONS)
    without = {name: value for name, value in config.values.items() if name != "hidden_act"}  # it is hidden_activation that counts
    everything, near = read_rotations(Config(without, config.where), "rope_local_base_freq")
    bias = config.flag("attention_bias", False)
    spec = read_decoder(
        everything, "Gemma3ForCausalLM", head_norm=True, qkv_bias=bias, o_bias=bias,
        windows=tuple(window if kind == LOCAL else 0 for kind in types),
    )  # fmt: skip
    local = read_rope(near, spec.head_dim)
    return replace(
        spec,
        norm_offset=1.0,
        norms_behind=True,
        activation=config.activation("hidden_activation", ""),
        ropes=tuple(local if kind == LOCAL else spec.rope for kind in types),
        embed_scale=spec.hidden_size**0.5,
        attention_scale=config.number("query_pre_attn_scalar", high=1e6) ** -0.5,
        logit_softcap=read_limit(config, "final_logit_softcapping", 0.0),
    )


def _read_part(config: Config) -> TransformerSpec:
    return _read_text(text_part(config))


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, BEHIND, "layers")


FAMILIES = (
    Family("Gemma3ForCausalLM", "gemma3_text", _read_text, _sources, ("model.",), BUFFERS),
    Family("Gemma3ForConditionalGeneration", "gemma3", _read_part, _sources, TEXT_PREFIXES, f"{BUFFERS}|{IMAGES}"),
)
