"""StableLM 2 and StableLM 3B: Llama with layer norms, and a rotation of a quarter of each head."""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    config.unsupported(use_parallel_residual=False, qk_layernorm=False)  # StableLM 2 12B has both
    bias = config.flag("use_qkv_bias", False)
    spec = read_decoder(config, "StableLmForCausalLM", kv_heads=32, max_positions=4096, qkv_bias=bias, partial=0.25)
    return replace(spec, norm="layer", norm_eps=config.number("layer_norm_eps", 1e-5, high=1.0), norm_bias=True)


FAMILIES = (Family("StableLmForCausalLM", "stablelm", _read, decoder_sources, ("model.",), BUFFERS),)
