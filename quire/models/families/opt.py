"""OPT: layer norms, learned positions that start at row 2, ReLU; the 350m model is post-norm with a narrower embedding."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, Config, Family, Source, renamed
from quire.models.spec import TransformerSpec

TOP = {
    "embed": "embed_tokens",
    "positions": "embed_positions",
    "embed_in": "project_in",
    "embed_out": "project_out",
    "final_norm": "final_layer_norm",
    "lm_head": "lm_head",
}
LAYER = {
    "attn_norm": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "up": "fc1",
    "down": "fc2",
}


def _read(config: Config) -> TransformerSpec:
    config.unsupported(layer_norm_elementwise_affine=True)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        config.refuse(f"'hidden_size' {hidden} is not a multiple of 'num_attention_heads' {heads}")
    embed = config.integer("word_embed_proj_dim", hidden)
    norm_first = config.flag("do_layer_norm_before", True)
    bias = config.flag("enable_bias", True)
    return TransformerSpec(
        architecture="OPTForCausalLM",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=config.integer("ffn_dim"),
        max_positions=config.integer("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,
        norm_place="before" if norm_first else "after",
        # _remove_final_layer_norm: checkpoints converted before transformers 4.20.
        final_norm=norm_first and not config.flag("_remove_final_layer_norm", False),
        norm_bias=True,
        activation=config.activation("activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        position_offset=2,
        tied=config.flag("tie_word_embeddings", True),
        embed_size=embed if embed != hidden else 0,
        dtype=config.dtype(),
    )


def _sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, LAYER, "layers")


FAMILIES = (Family("OPTForCausalLM", "opt", _read, _sources, ("model.decoder.", "decoder.")),)
