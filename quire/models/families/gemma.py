"""Gemma 1 and 2 (arXiv 2403.08295, 2408.00118): Llama whose checkpoints hold the weights of norms less 1, with a factor on the embedding.

Gemma 2 has norms behind attention and feed-forward as well, a window in every other layer, and limits that scores and logits only approach.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, decoder_sources, read_decoder, read_layer_types
from quire.models.families.rotations import GLOBAL, LOCAL
from quire.models.spec import TransformerSpec

BEHIND = LAYER | {
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
"""Of a layer of Gemma 2 and 3."""


def _read_gemma(config: Config) -> TransformerSpec:
    config.unsupported(use_bidirectional_attention=False)
    activation = config.values.get("hidden_activation") or config.values.get("hidden_act") or "gelu"
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        config.refuse(f"hidden_activation {activation!r:.40} is not supported; supported: gelu_pytorch_tanh")
    return _gemma(config, "GemmaForCausalLM", "gelu_pytorch_tanh")  # which "gelu" means as well


def _read_gemma2(config: Config) -> TransformerSpec:
    config.unsupported(use_bidirectional_attention=False)
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    types = read_layer_types(config, layers) or [GLOBAL if i % 2 else LOCAL for i in range(layers)]
    absent = "sliding_window" not in config.values
    window = 4096 if absent else config.integer("sliding_window", 0, low=0, high=MAX_POSITIONS)
    spec = _gemma(
        config,
        "Gemma2ForCausalLM",
        config.values.get("hidden_activation") or "gelu_pytorch_tanh",
        windows=tuple(window if kind == LOCAL else 0 for kind in types),
    )
    return replace(
        spec,
        norms_behind=True,
        attention_scale=config.number("query_pre_attn_scalar", 256.0, high=1e6) ** -0.5,
        attention_softcap=read_limit(config, "attn_logit_softcapping", 50.0),
        logit_softcap=read_limit(config, "final_logit_softcapping", 30.0),
    )


def read_limit(config: Config, name: str, absent: float) -> float:
    """What scores or logits are limited by; 0: by nothing, which is what null says. absent: where config.json does not say."""
    value = config.values.get(name, absent or None)
    return 0.0 if value is None else config.number(name, absent, low=1e-3, high=1e6)


def _gemma(config: Config, name: str, activation: Any, windows: tuple[int, ...] = ()) -> TransformerSpec:
    """activation: what counts of the fields that name one."""
    bias = config.flag("attention_bias", False)
    values = {**config.values, "hidden_act": activation, "tie_word_embeddings": config.flag("tie_word_embeddings", True)}
    spec = read_decoder(
        Config(values, config.where), name, head_dim=256, max_positions=8192, qkv_bias=bias, o_bias=bias, windows=windows
    )  # fmt: skip
    return replace(spec, norm_offset=1.0, embed_scale=spec.hidden_size**0.5)


def _behind_sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, BEHIND, "layers")


FAMILIES = (
    Family("GemmaForCausalLM", "gemma", _read_gemma, decoder_sources, ("model.",), BUFFERS),
    Family("Gemma2ForCausalLM", "gemma2", _read_gemma2, _behind_sources, ("model.",), BUFFERS),
)
