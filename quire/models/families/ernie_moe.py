"""ERNIE 4.5 with experts (Baidu, "ERNIE 4.5 Technical Report", 2025): Llama's layers, rotated as by the original rotary code.

A position's experts are weighed by the softmax of all scores, and chosen by it with a correction added; a feed-forward is taken by all
positions beside them, and the first layers have one alone.
"""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, Config, Family, Source, interleaved
from quire.models.families.llama import BUFFERS, decoder_sources, read_decoder, with_experts
from quire.models.spec import TransformerSpec


def _read(config: Config) -> TransformerSpec:
    config.unsupported(use_bias=False)
    config.number("moe_norm_min", 1e-12, high=1e-6)  # of what shares are divided by: a guard against 0
    config = replace(config, values={**config.values, "tie_word_embeddings": config.flag("tie_word_embeddings", True)})
    spec = read_decoder(
        config, "Ernie4_5_MoeForCausalLM", kv_heads=4, max_positions=131072, inner="moe_intermediate_size", theta=500000.0, eps=1e-5
    )  # fmt: skip
    start = config.integer("moe_layer_start_index", 1, low=0, high=MAX_LAYERS)
    end = config.integer("moe_layer_end_index", -1, low=-1, high=MAX_LAYERS)
    step = config.integer("moe_layer_interval", 1, high=MAX_LAYERS)
    last = spec.num_layers - 1 if end == -1 else end
    dense = [not (start <= i <= last and (i + 1) % step == 0) for i in range(spec.num_layers)]
    spec = with_experts(spec, config, count=64, per_token=6, named=("moe_num_experts",), taken_named="moe_k", dense=dense)
    return replace(
        spec,
        expert_correction=True,
        shared_size=spec.intermediate_size * config.integer("moe_num_shared_experts", 2, low=0, high=1024),
    )


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = interleaved(spec, decoder_sources(spec))
    for i in filter(spec.has_experts, range(spec.num_layers)):  # a list of lists, of which there is one
        sources[f"layers.{i}.correction.bias"] = Source(f"layers.{i}.mlp.moe_statics.e_score_correction_bias", expert=(0, 1))
    return sources


FAMILIES = (Family("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", _read, _sources, ("model.",), rf"{BUFFERS}|mtp_.*"),)
