"""GPT-2: layer norms, learned positions, tanh GELU, and linears stored as [in, out] with q, k and v fused."""

from __future__ import annotations

from dataclasses import replace

from quire.models.families.base import MAX_LAYERS, Config, Family, Source, renamed
from quire.models.spec import TransformerSpec

TOP = {"embed": "wte", "positions": "wpe", "final_norm": "ln_f", "lm_head": "lm_head"}
LAYER = {
    "attn_norm": "ln_1",
    "q": "attn.c_attn",
    "k": "attn.c_attn",
    "v": "attn.c_attn",
    "o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def _read(config: Config) -> TransformerSpec:
    config.unsupported(scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False)
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    if hidden % heads:
        config.refuse(f"'n_embd' {hidden} is not a multiple of 'n_head' {heads}")
    return TransformerSpec(
        architecture="GPT2LMHeadModel",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("n_layer", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.integer("n_inner", 4 * hidden),
        max_positions=config.integer("n_positions", 1024),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5, high=1.0),
        norm_bias=True,
        activation=config.activation("activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied=config.flag("tie_word_embeddings", True),
        attention_scale=0.0 if config.flag("scale_attn_weights", True) else 1.0,
        dtype=config.dtype(),
    )


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    sources = renamed(spec, TOP, LAYER, "h")
    h = spec.hidden_size
    for i in range(spec.num_layers):
        for name in ("q", "k", "v", "o", "up", "down"):
            weight = f"layers.{i}.{name}.weight"
            sources[weight] = replace(sources[weight], transpose=True)
        for n, name in enumerate("qkv"):
            for parameter in ("weight", "bias"):
                part = f"layers.{i}.{name}.{parameter}"
                sources[part] = replace(sources[part], rows=(n * h, (n + 1) * h), rows_total=3 * h)
    return sources


# The causal mask, kept as a buffer by old versions of transformers.
FAMILIES = (Family("GPT2LMHeadModel", "gpt2", _read, _sources, ("transformer.",), r"h\.\d+\.attn\.(bias|masked_bias)"),)
