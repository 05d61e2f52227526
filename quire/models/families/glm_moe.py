"""Mixtures of experts that are routed as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): GLM-4.5 and 4.6 (arXiv 2508.06471), and
dots.llm1 (arXiv 2506.05767).

A position's experts are weighed by the sigmoids of their scores, and chosen by these with a correction added; some feed-forwards are taken
by all positions (here one, as wide as they are together), and the first layers have one alone. Choices within groups of experts are not
supported. Checkpoints of GLM have layers that guess further tokens behind the others, which are not served.
"""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder, read_layer_types, with_experts
from quire.models.spec import TransformerSpec


def _read_glm4(config: Config) -> TransformerSpec:
    spec = read_decoder(
        config, "Glm4MoeForCausalLM", max_positions=131072, inner="moe_intermediate_size", head_norm=config.flag("use_qk_norm", False),
        qkv_bias=config.flag("attention_bias", False), partial=0.5, eps=1e-5,
    )  # fmt: skip
    return _routed(spec, config, count=128, per_token=8, shared=1, first=1, sum_to_one=True)


def _read_dots1(config: Config) -> TransformerSpec:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    window = config.integer("sliding_window", 0 if "sliding_window" in config.values else 4096, low=0, high=MAX_POSITIONS)
    types = read_layer_types(config, layers)
    if types is None:
        first = config.integer("max_window_layers", 62, low=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    bias = config.flag("attention_bias", False)
    spec = read_decoder(
        config, "Dots1ForCausalLM", max_positions=2048, inner="moe_intermediate_size", head_norm=True, qkv_bias=bias, o_bias=bias,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types),
    )  # fmt: skip
    return _routed(spec, config, count=None, per_token=None, shared=None, first=0, sum_to_one=False)


def _routed(
    spec: TransformerSpec, config: Config, *, count: int | None, per_token: int | None, shared: int | None, first: int, sum_to_one: bool
) -> TransformerSpec:  # fmt: skip
    """count, per_token, shared (how many every position takes), first (layers without experts), sum_to_one: where config.json does not
    say."""
    config.unsupported(n_group=1, topk_group=1, topk_method="noaux_tc", moe_layer_freq=1)
    if (kind := config.values.get("scoring_func")) not in (None, "sigmoid", "noaux_tc"):
        config.refuse(f"scoring_func {kind!r:.40} is not supported (only 'sigmoid')")
    first = config.integer("first_k_dense_replace", first, low=0, high=MAX_LAYERS)
    spec = with_experts(
        spec, config, count=count, per_token=per_token, sum_to_one=config.flag("norm_topk_prob", sum_to_one),
        named=("n_routed_experts", "num_local_experts", "num_experts"), dense=[i < first for i in range(spec.num_layers)],
    )  # fmt: skip
    return replace(
        spec,
        expert_shares="sigmoid",
        expert_correction=True,
        experts_scale=config.number("routed_scaling_factor", 1.0, high=1e6),
        shared_size=spec.intermediate_size * config.integer("n_shared_experts", shared, high=1024),
    )


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = decoder_sources(spec)
    for i in filter(spec.has_experts, range(spec.num_layers)):
        sources[f"layers.{i}.correction.bias"] = Source(f"layers.{i}.mlp.gate.e_score_correction_bias")
    return sources


FAMILIES = (
    Family("Glm4MoeForCausalLM", "glm4_moe", _read_glm4, _sources, ("model.",), BUFFERS, guesses="eh_proj.weight"),
    Family("Dots1ForCausalLM", "dots1", _read_dots1, _sources, ("model.",), BUFFERS),
)
