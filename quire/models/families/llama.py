"""Llama 2, 3, 3.1, 3.2, and what its relatives (Mistral, Qwen) share with it: RMS norms, rotary positions, gated SiLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log

from quire.models.families.base import MAX_ALL_EXPERTS, MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS, Config, Family, Source, renamed
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
    "router": "mlp.gate",
    "experts": "mlp.experts",
    "experts.gate": "gate_proj",
    "experts.up": "up_proj",
    "experts.down": "down_proj",
    "correction": "mlp.gate",
    "shared.gate": "mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_experts.down_proj",
}
BUFFERS = r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

_MAGNITUDES = ("mscale", "mscale_all_dim")
_ROPE_KEYS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings", "attention_factor", *_MAGNITUDES),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}


def read_rope(
    config: Config, head_dim: int, *, theta: float = 10000.0, partial: float | None = None, longrope: bool = False, scales: bool = False
) -> RopeSpec:
    """Rotary parameters as transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``) write them.

    theta, partial: where config.json does not say; None: an architecture that rotates all dimensions of a head. longrope: one that
    may have this type. scales: one that may scale queries beyond the original context, with yarn.
    """
    old, new = config.values.get("rope_scaling"), config.values.get("rope_parameters")
    if old and new and old != new:
        config.refuse("'rope_scaling' and 'rope_parameters' contradict each other; keep one of them")
    values = new or old or {}
    if not isinstance(values, dict):
        config.refuse(f"'rope_parameters' must be an object, got {values!r}")
    rope = Config(values, f"{config.where}, {'rope_parameters' if new else 'rope_scaling'}")
    kind = values.get("rope_type", values.get("type")) or "default"
    scaling = "none" if kind == "default" else "longrope" if kind == "su" else kind
    known = ("default", "linear", "llama3", "yarn", *(("longrope",) if longrope else ()))
    if scaling not in ("none", *known):
        config.refuse(f"rope type {kind!r} is not supported; supported: {', '.join(known)}")
    if partial is None:
        config.unsupported(partial_rotary_factor=1.0)
        rope.unsupported(partial_rotary_factor=1.0)
        rotary_dim = head_dim
    else:
        outside = config.number("partial_rotary_factor", partial, high=1.0)
        rotary_dim = int(head_dim * rope.number("partial_rotary_factor", outside, high=1.0))
    if rotary_dim % 2 or not rotary_dim:
        config.refuse(f"rotary positions need an even head size, got {rotary_dim}")
    if scaling not in ("yarn", "longrope"):
        rope.unsupported(attention_factor=1.0)
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor", *_ROPE_KEYS[scaling]}
    if scales and scaling == "yarn":
        read |= {"llama_4_scaling_beta", "max_position_embeddings"}
    if unread := sorted(name for name, value in values.items() if value is not None and name not in read):
        # Such a field belongs to a variant that we don't compute; some of them hide behind the type "default" (mrope_section).
        rope.refuse(f"{unread[0]!r} is not supported with rope type {kind!r}")
    theta = rope.number("rope_theta", config.number("rope_theta", theta, low=1.0), low=1.0)
    if scaling == "none":
        return RopeSpec(theta, rotary_dim)
    if scaling == "longrope":
        return _longrope(config, rope, theta, rotary_dim)
    factor = rope.number("factor", high=1e6)
    if scaling == "linear":
        return RopeSpec(theta, rotary_dim, "linear", factor)
    _agree(config, rope)
    if scaling == "yarn":
        found = _yarn(config, rope, theta, rotary_dim, factor)
        return replace(found, query_beta=rope.number("llama_4_scaling_beta", 0.0, high=1e3)) if scales else found
    low, high = rope.number("low_freq_factor", high=1e6), rope.number("high_freq_factor", high=1e6)
    if low >= high:
        rope.refuse(f"'low_freq_factor' {low:g} must be below 'high_freq_factor' {high:g}")
    return RopeSpec(theta, rotary_dim, "llama3", factor, low, high, rope.integer("original_max_position_embeddings", high=MAX_POSITIONS))


def _agree(config: Config, rope: Config) -> None:
    inside, beside = (each.values.get("original_max_position_embeddings") for each in (rope, config))
    if None not in (inside, beside) and inside != beside:
        config.refuse("'original_max_position_embeddings' beside and within the rope parameters contradict each other; keep one of them")


def _yarn(config: Config, rope: Config, theta: float, rotary_dim: int, factor: float) -> RopeSpec:
    fast, slow = rope.number("beta_fast", 32.0, high=1e6), rope.number("beta_slow", 1.0, high=1e6)
    if slow >= fast or theta == 1.0:
        rope.refuse(f"'beta_slow' {slow:g} must be below 'beta_fast' {fast:g}, and 'rope_theta' {theta:g} above 1")
    original = rope.integer(
        "original_max_position_embeddings", config.integer("max_position_embeddings", high=MAX_POSITIONS), high=MAX_POSITIONS
    )
    given = [rope.values[name] for name in _MAGNITUDES if rope.values.get(name) is not None]
    if len(given) == 1:
        rope.refuse(f"'mscale' and 'mscale_all_dim' are supported together only, got {given[0]!r} for one of them")
    whole, heads = (rope.number(name, 1.0, high=1e3) for name in _MAGNITUDES)
    usual = _yarn_magnitude(factor, whole) / (_yarn_magnitude(factor, heads) if given else 1.0)
    magnitude = rope.number("attention_factor", usual, high=1e3)
    return RopeSpec(
        theta, rotary_dim, "yarn", factor, original_max_positions=original, beta_fast=fast, beta_slow=slow,
        truncate=rope.flag("truncate", True), magnitude=magnitude,
    )  # fmt: skip


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * log(factor) + 1


def _longrope(config: Config, rope: Config, theta: float, rotary_dim: int) -> RopeSpec:
    """LongRoPE (arXiv 2402.13753) as transformers computes it: magnitudes by how much longer than the original the context is."""
    _agree(config, rope)
    name = "original_max_position_embeddings"
    original = (rope if rope.values.get(name) is not None else config).integer(name, low=2, high=MAX_POSITIONS)
    factor = rope.number("factor", config.integer("max_position_embeddings", original, high=MAX_POSITIONS) / original, high=1e6)
    magnitude = 1.0 if factor <= 1 else (1 + log(factor) / log(original)) ** 0.5
    factors = []
    for name in ("short_factor", "long_factor"):
        value = rope.values.get(name)
        if not isinstance(value, list) or len(value) != rotary_dim // 2:
            rope.refuse(f"{name!r} must list {rotary_dim // 2} numbers, one for each frequency")
        factors.append(tuple(Config({name: each}, rope.where).number(name, high=1e6) for each in value))
    magnitude = rope.number("attention_factor", magnitude, high=1e3)
    return RopeSpec(theta, rotary_dim, "longrope", original_max_positions=original, short_factors=factors[0], long_factors=factors[1],
                    magnitude=magnitude)  # fmt: skip


def read_decoder(
    config: Config,
    architecture: str,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_positions: int | None = None,
    inner: str = "intermediate_size",
    head_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    windows: tuple[int, ...] = (),
    theta: float = 10000.0,
    partial: float | None = None,
    longrope: bool = False,
    scales: bool = False,
    eps: float = 1e-6,
) -> TransformerSpec:
    """The fields that Llama and its relatives share. kv_heads, head_dim, max_positions, eps: where config.json does not say. inner: the
    field that says intermediate_size. theta, partial, longrope, scales: see read_rope."""
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
    rope = read_rope(config, head_dim, theta=theta, partial=partial, longrope=longrope, scales=scales)
    positions = config.integer("max_position_embeddings", max_positions, high=MAX_POSITIONS)
    if rope.scaling == "yarn":  # Qwen's files name the original context; the stretched one is what they are made for
        positions = max(positions, min(MAX_POSITIONS, round(rope.factor * rope.original_max_positions)))
    windows = tuple(0 if w >= positions else w for w in windows)  # a window as long as the context hides nothing
    return TransformerSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer(inner),
        max_positions=positions,
        norm="rms",
        norm_eps=config.number("rms_norm_eps", eps, high=1.0),
        head_norm=head_norm,
        activation=config.activation("hidden_act", "silu"),
        gated=True,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        rope=rope,
        windows=windows if any(windows) else (),
        tied=config.flag("tie_word_embeddings", False),
        dtype=config.dtype(),
    )


def read_layer_types(config: Config, layers: int) -> list[str] | None:
    """``full_attention`` or ``sliding_attention`` of each layer; None where config.json does not say."""
    types = config.values.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers:
        config.refuse(f"'layer_types' must list one type for each of the {layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            config.refuse(f"layer type {kind!r} is not supported; supported: full_attention, sliding_attention")
    return types


def with_experts(
    spec: TransformerSpec,
    config: Config,
    *,
    count: int | None,
    per_token: int | None,
    sum_to_one: bool = True,
    named: tuple[str, ...] = ("num_experts", "num_local_experts"),
    taken_named: str = "num_experts_per_tok",
    dense: Sequence[bool] = (),
) -> TransformerSpec:
    """A mixture of experts. count, per_token: where config.json does not say. named: fields that may say how many there are; taken_named:
    the one that says how many of them a position takes. dense: of each layer, whether it has a feed-forward of ``intermediate_size``
    instead."""
    name = next((each for each in named if each in config.values), named[-1])
    experts = config.integer(name, count, high=MAX_EXPERTS)
    taken = config.integer(taken_named, per_token, high=MAX_EXPERTS)
    if taken > experts:
        config.refuse(f"{taken_named!r} {taken} is more than the {experts} experts that there are")
    if spec.num_layers * experts > MAX_ALL_EXPERTS:
        config.refuse(f"{spec.num_layers} layers of {experts} experts are more than {MAX_ALL_EXPERTS:,} experts, which is not supported")
    if all(dense) and dense:
        config.refuse(f"none of the {spec.num_layers} layers has experts, which is not supported")
    inner = config.integer("intermediate_size") if any(dense) else 0
    sizes = tuple(inner if plain else 0 for plain in dense) if any(dense) else ()
    return replace(spec, num_experts=experts, experts_per_token=taken, experts_sum_to_one=sum_to_one, dense_sizes=sizes)


def decoder_sources(spec: TransformerSpec) -> dict[str, Source]:
    return renamed(spec, TOP, LAYER, "layers")


def _read(config: Config) -> TransformerSpec:
    config.unsupported(sliding_window=None)
    bias = config.flag("attention_bias", False)
    return read_decoder(config, "LlamaForCausalLM", max_positions=2048, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False))


FAMILIES = (Family("LlamaForCausalLM", "llama", _read, decoder_sources, ("model.",), BUFFERS),)
