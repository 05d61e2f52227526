"""Seed-OSS: Llama with biases on q, k and v, and a head's size of its own."""

from __future__ import annotations

from quire.models.families.base import Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    return read_decoder(
        config,
        "SeedOssForCausalLM",
        kv_heads=8,
        head_dim=None if "head_dim" in config.values else 128,
        max_positions=524288,
        qkv_bias=config.flag("attention_bias", True),
        o_bias=config.flag("attention_out_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )


FAMILIES = (Family("SeedOssForCausalLM", "seed_oss", _read, decoder_sources, ("model.",), BUFFERS),)
