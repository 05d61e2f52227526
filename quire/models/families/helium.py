"""Helium: Llama with the original order of rotary dimensions."""

from __future__ import annotations

from quire.models.families.base import Config, Family, Source, interleaved
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    spec = read_decoder(
        config, "HeliumForCausalLM", kv_heads=20, head_dim=128, max_positions=4096, qkv_bias=bias, mlp_bias=mlp_bias, theta=100000.0,
        eps=1e-8,
    )  # fmt: skip
    if spec.num_heads * spec.head_dim != spec.hidden_size:  # transformers' o_proj is square
        config.refuse(f"{spec.num_heads} attention heads of {spec.head_dim} do not make up the 'hidden_size' {spec.hidden_size}")
    return spec


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    return interleaved(spec, decoder_sources(spec))


FAMILIES = (Family("HeliumForCausalLM", "helium", _read, _sources, ("model.",), BUFFERS),)
