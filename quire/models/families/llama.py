"""Llama 2, 3, 3.1, 3.2, and what its relatives (Mistral, Qwen) share with it: RMS norms, rotary positions, gated SiLU."""

from __future__ import annotations

from quire.models.families.base import MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
from quire.models.spec import RopeSpec, TransformerSpec

TOP = {"embed": "embed_tokens", "final_norm": "norm", "lm_head": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
BUFFERS = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

_ROPE_KEYS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config: Config, head_dim: int) -> RopeSpec:
    """Rotary parameters as transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) write them."""
    if head_dim % 2:
        config.refuse(f"rotary positions need an even head size, got {head_dim}")
    config.unsupported(partial_rotary_factor=1.0)
    old, new = config.values.get("rope_scaling"), config.values.get("rope_parameters")
    if old and new and old != new:
        config.refuse("'rope_scaling' and 'rope_parameters' contradict each other; keep one of them")
    values = new or old or {}
    if not isinstance(values, dict):
        config.refuse(f"'rope_parameters' must be an object, got {values!r}")
    rope = Config(values, f"{config.where}, {'rope_parameters' if new else 'rope_scaling'}")
    kind = values.get("rope_type", values.get("type")) or "default"
    scaling = "none" if kind == "default" else kind
    if scaling not in ("none", "linear", "llama3"):
        config.refuse(f"rope type {kind!r} is not supported; supported: default, linear, llama3")
    rope.unsupported(partial_rotary_factor=1.0, attention_factor=1.0)
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor", *_ROPE_KEYS[scaling]}
    if unread := sorted(name for name, value in values.items() if value is not None and name not in read):
        # Such a field belongs to a variant that we don't compute; some of them hide behind the type "default" (mrope_section).
        rope.refuse(f"{unread[0]!r} is not supported with rope type {kind!r}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0, low=1.0), low=1.0)
    if scaling == "none":
        return RopeSpec(theta, head_dim)
    factor = rope.number("factor", high=1e6)
    if scaling == "linear":
        return RopeSpec(theta, head_dim, "linear", factor)
    top = config.values.get("original_max_position_embeddings")
    if top is not None and top != values.get("original_max_position_embeddings", top):
        config.refuse("'original_max_position_embeddings' beside and within the rope parameters contradict each other; keep one of them")
    low, high = rope.number("low_freq_factor", high=1e6), rope.number("high_freq_factor", high=1e6)
    if low >= high:
        rope.refuse(f"'low_freq_factor' {low:g} must be below 'high_freq_factor' {high:g}")
    return RopeSpec(theta, head_dim, "llama3", factor, low, high, rope.integer("original_max_position_embeddings", high=MAX_POSITIONS))


def read_decoder(
    config: Config,
    architecture: str,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_positions: int | None = None,
    head_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    windows: tuple[int, ...] = (),
) -> TransformerSpec:
    """The fields that Llama and its relatives share. kv_heads, head_dim, max_positions: where config.json does not say."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    if "num_key_value_heads" in config.values:
        kv_heads = config.integer("num_key_value_heads", heads)  # null means one per query head, in every relative
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        config.refuse(f"{heads} attention heads can't be divided among {kv_heads} key-value heads")
    if config.values.get("head_dim") is not None:
        head_dim = config.integer("head_dim", high=4096)
    elif head_dim is None:
        if hidden % heads:
            config.refuse(f"'hidden_size' {hidden} is not a multiple of 'num_attention_heads' {heads}, and there is no 'head_dim'")
        head_dim = hidden // heads
    positions = config.integer("max_position_embeddings", max_positions, high=MAX_POSITIONS)
    windows = tuple(0 if w >= positions else w for w in windows)  # a window as long as the context hides nothing
    return TransformerSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        max_positions=positions,
        norm="rms",
        norm_eps=config.number("rms_norm_eps", 1e-6, high=1.0),
        head_norm=head_norm,
        activation=config.activation("hidden_act", "silu"),
        gated=True,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        rope=read_rope(config, head_dim),
        windows=windows if any(windows) else (),
        tied=config.flag("tie_word_embeddings", False),
        dtype=config.dtype(),
    )


def decoder_sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, LAYER, "layers")


def _read(config: Config) -> TransformerSpec:
    config.unsupported(sliding_window=None)
    bias = config.flag("attention_bias", False)
    return read_decoder(config, "LlamaForCausalLM", max_positions=2048, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False))


FAMILIES = (Family("LlamaForCausalLM", "llama", _read, decoder_sources, ("model.",), BUFFERS),)
