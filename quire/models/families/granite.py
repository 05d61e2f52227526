"""Granite 3: Llama with factors on the embedding, the attention's products, the residuals and the logits; also with experts.

The residuals' factor r needs no arithmetic of its own: all that reads the stream of h = m e + r (a + b + ...) is a norm, which takes
h / r = (m / r) e + a + b + ... for the same, with eps / r^2 in place of eps.
"""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import Config, Family, Source, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, decoder_sources, read_decoder, with_experts
from quire.models.spec import TransformerSpec

_LEAST = 1e-6
"""Of what is divided by."""


def _read(config: Config) -> TransformerSpec:
    return _granite(config, "GraniteForCausalLM", config.flag("mlp_bias", False))


def _read_experts(config: Config) -> TransformerSpec:
    return with_experts(_granite(config, "GraniteMoeForCausalLM", False), config, count=8, per_token=2)


def _granite(config: Config, name: str, mlp_bias: bool) -> TransformerSpec:
    bias = config.flag("attention_bias", False)
    spec = read_decoder(config, name, max_positions=2048, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)
    residual = config.number("residual_multiplier", 1.0, low=_LEAST, high=1e3)
    return replace(
        spec,
        norm_eps=spec.norm_eps / residual**2,
        embed_scale=config.number("embedding_multiplier", 1.0, high=1e6) / residual,
        logit_scale=1 / config.number("logits_scaling", 1.0, low=_LEAST, high=1e6),
        attention_scale=config.number("attention_multiplier", 1.0, high=1e3),
    )


def _expert_sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = renamed(spec, TOP, LAYER | {"router": "block_sparse_moe.router.layer"}, "layers")
    f, count = spec.intermediate_size, spec.num_experts
    for i in range(spec.num_layers):
        at = f"layers.{i}.block_sparse_moe"
        for j in range(count):
            expert = f"layers.{i}.experts.{j}"
            for part, rows in (("gate", (0, f)), ("up", (f, 2 * f))):
                sources[f"{expert}.{part}.weight"] = Source(f"{at}.input_linear.weight", rows=rows, rows_total=2 * f, expert=(j, count))
            sources[f"{expert}.down.weight"] = Source(f"{at}.output_linear.weight", expert=(j, count))
    return sources


FAMILIES = (
    Family("GraniteForCausalLM", "granite", _read, decoder_sources, ("model.",), BUFFERS),
    Family("GraniteMoeForCausalLM", "granitemoe", _read_experts, _expert_sources, ("model.",), BUFFERS),
)
