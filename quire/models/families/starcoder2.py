"""StarCoder2: rotary positions and grouped queries, layer norms, a feed-forward without a gate, biases everywhere."""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = config.integer("sliding_window", 0, low=0, high=MAX_POSITIONS)
    bias = config.flag("use_bias", True)
    spec = read_decoder(
        config,
        "Starcoder2ForCausalLM",
        kv_heads=2,
        max_positions=4096,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        windows=(window,) * layers,
    )
    return replace(
        spec,
        norm="layer",
        norm_eps=config.number("norm_epsilon", 1e-5, high=1.0),
        norm_bias=True,
        gated=False,
        activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
        tied=config.flag("tie_word_embeddings", True),
    )


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, LAYER | {"up": "mlp.c_fc", "down": "mlp.c_proj"}, "layers")


FAMILIES = (Family("Starcoder2ForCausalLM", "starcoder2", _read, _sources, ("model.",), BUFFERS),)
