"""ERNIE 4.5, the dense ones: Llama with the original order of rotary dimensions, and a head's size of its own."""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import Config, Family, Source, interleaved
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    bias = config.flag("use_bias", False)
    spec = read_decoder(
        config,
        "Ernie4_5ForCausalLM",
        kv_heads=2,
        head_dim=None if "head_dim" in config.values else 128,
        max_positions=131072,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        theta=500000.0,
        eps=1e-5,
    )
    return replace(spec, tied=config.flag("tie_word_embeddings", True))


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    return interleaved(spec, decoder_sources(spec))


FAMILIES = (Family("Ernie4_5ForCausalLM", "ernie4_5", _read, _sources, ("model.",), BUFFERS),)
