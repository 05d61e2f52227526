"""Granite 3: Llama with factors on the embedding, the attention's products, the residuals and the logits.

The residuals' factor r needs no arithmetic of its own: all that reads the stream of h = m e + r (a + b + ...) is a norm, which takes
h / r = (m / r) e + a + b + ... for the same, with eps / r^2 in place of eps.
"""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import Config, Family
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder
from quire.models.spec import TransformerSpec

_LEAST = 1e-6
"""Of what is divided by."""


def _read(config: Config) -> TransformerSpec:
    bias = config.flag("attention_bias", False)
    spec = read_decoder(
        config, "GraniteForCausalLM", max_positions=2048, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False)
    )
    residual = config.number("residual_multiplier", 1.0, low=_LEAST, high=1e3)
    return replace(
        spec,
        norm_eps=spec.norm_eps / residual**2,
        embed_scale=config.number("embedding_multiplier", 1.0, high=1e6) / residual,
        logit_scale=1 / config.number("logits_scaling", 1.0, low=_LEAST, high=1e6),
        attention_scale=config.number("attention_multiplier", 1.0, high=1e3),
    )


FAMILIES = (Family("GraniteForCausalLM", "granite", _read, decoder_sources, ("model.",), BUFFERS),)
