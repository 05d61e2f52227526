"""GLM-4: Llama with biases on q, k and v, gate and up fused, and a rotation of the first half of each head in its original order.

The models of 2025 (``Glm4ForCausalLM``) have RMS norms behind attention and feed-forward as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from quire.models.families.base import Config, Family, Source, interleaved, renamed
from quire.models.families.llama import BUFFERS, LAYER, TOP, read_decoder
from quire.models.spec import TransformerSpec

_LAYER = LAYER | {"attn_out_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"}


def _read(config: Config, *, architecture: str, norms_behind: bool) -> TransformerSpec:
    bias = config.flag("attention_bias", True)
    spec = read_decoder(config, architecture, kv_heads=2, head_dim=128, max_positions=131072, qkv_bias=bias, partial=0.5, eps=1.5625e-7)
    return replace(spec, norms_behind=norms_behind)


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = renamed(spec, TOP, _LAYER, "layers")
    f = spec.intermediate_size
    for i in range(spec.num_layers):
        for part, rows in (("gate", (0, f)), ("up", (f, 2 * f))):
            sources[f"layers.{i}.{part}.weight"] = Source(f"layers.{i}.mlp.gate_up_proj.weight", rows=rows, rows_total=2 * f)
    return interleaved(spec, sources)


FAMILIES = tuple(
    Family(name, model_type, partial(_read, architecture=name, norms_behind=behind), _sources, ("model.",), BUFFERS)
    for name, model_type, behind in (("GlmForCausalLM", "glm", False), ("Glm4ForCausalLM", "glm4", True))
)
