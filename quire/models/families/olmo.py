"""OLMo 2 and 3 (arXiv 2501.00656, section 3.2): Llama with RMS norms of what attention and feed-forward give, in place of those of what
they take, and of all query heads together, and all key heads. In OLMo 3 three of four layers have a window. OLMoE (arXiv 2409.02060) has
Llama's own norms, those of the heads, and experts.
"""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, decoder_sources, read_decoder, read_layer_types, read_rope, with_experts
from quire.models.families.rotations import GLOBAL, LOCAL, read_rotations
from quire.models.spec import TransformerSpec

_LAYER = LAYER | {"attn_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}


def _read_olmo2(config: Config) -> TransformerSpec:
    return replace(_heads_as_one(config, "Olmo2ForCausalLM"), norm_place="behind")


def _read_olmo3(config: Config) -> TransformerSpec:
    layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    types = read_layer_types(config, layers) or [GLOBAL if (i + 1) % 4 == 0 else LOCAL for i in range(layers)]
    window = 0
    if LOCAL in types:
        window = config.integer("sliding_window", None if "sliding_window" in config.values else 4096, high=MAX_POSITIONS)
    everything, near = read_rotations(Config({"rope_theta": 500000.0} | dict(config.values), config.where), "rope_theta")
    spec = _heads_as_one(everything, "Olmo3ForCausalLM", windows=tuple(window if kind == LOCAL else 0 for kind in types))
    local = read_rope(near, spec.head_dim)
    ropes = tuple(local if kind == LOCAL else spec.rope for kind in types)
    return replace(spec, norm_place="behind", ropes=ropes if local != spec.rope else ())


def _read_olmoe(config: Config) -> TransformerSpec:
    config.unsupported(clip_qkv=None)
    spec = _heads_as_one(config, "OlmoeForCausalLM", max_positions=4096)
    return with_experts(spec, config, count=64, per_token=8, sum_to_one=config.flag("norm_topk_prob", False))


def _heads_as_one(config: Config, name: str, max_positions: int = 2048, windows: tuple[int, ...] = ()) -> TransformerSpec:
    bias = config.flag("attention_bias", False)
    spec = read_decoder(config, name, max_positions=max_positions, head_norm=True, qkv_bias=bias, o_bias=bias, windows=windows, eps=1e-5)
    return replace(spec, heads_as_one=True)


def sources_behind(spec: TransformerSpec) -> dict[str, Source]:
    """Of a model with norms behind attention and feed-forward."""
    return renamed(spec, TOP, _LAYER, "layers")


FAMILIES = (
    Family("Olmo2ForCausalLM", "olmo2", _read_olmo2, sources_behind, ("model.",), BUFFERS),
    Family("Olmo3ForCausalLM", "olmo3", _read_olmo3, sources_behind, ("model.",), BUFFERS),
    Family("OlmoeForCausalLM", "olmoe", _read_olmoe, decoder_sources, ("model.",), BUFFERS),
)
