"""GGUF's names for what the families know: metadata → config.json's fields, tensor names → canonical names.

What converters write: conversion/*.py and gguf-py/gguf/constants.py of llama.cpp. Llama, Granite and SmolLM3 have the rows of their q
and k in the order of the original rotary code, in which the two dimensions that are turned together are neighbours; ERNIE and GLM-4 have
them so in their checkpoints, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from quire.gguf import Gguf
from quire.models.families.base import Source, interleaved, renamed
from quire.models.families.rotations import GLOBAL, LOCAL
from quire.models.spec import RopeSpec, TransformerSpec

_TOP: Final = {"embed": "token_embd", "positions": "position_embd", "final_norm": "output_norm", "lm_head": "output"}
_LAYER: Final = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp",
    "sinks": "attn_sinks", "attn_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm",
    "experts": "", "experts.gate": "ffn_gate_exps", "experts.up": "ffn_up_exps", "experts.down": "ffn_down_exps",
    "correction": "exp_probs_b", "shared.gate": "ffn_gate_shexp", "shared.up": "ffn_up_shexp", "shared.down": "ffn_down_shexp",
}  # fmt: skip
FACTORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the configuration: what each frequency of a rotation is divided by."""

Factors = Mapping[str, tuple[float, ...]]
"""Those of FACTORS that a file has."""


@dataclass(slots=True, frozen=True)
class Architecture:
    """What a value of ``general.architecture`` stands for."""

    name: str
    """The class name in a config.json."""
    fields: Mapping[str, Any]
    """config.json's fields → GGUF's for them, without the architecture's name, or what they always are, which is no text."""
    interleaved: bool = False
    """Whether the rows of q and k are in the order of the original rotary code."""
    fused_gate: bool = False
    """Whether gate and up are one tensor, in this order."""
    attn_norm: str = "attn_norm"
    mlp_norm: str = "ffn_norm"
    """The norms of attention and feed-forward."""
    gating: int = 1
    """How scores of experts become shares (LLAMA_EXPERT_GATING_FUNC_TYPE of llama.cpp): 1 by a softmax, 2 each by its sigmoid."""


_OPTIONAL: Final = {"num_key_value_heads", "head_dim", "rope_theta", "sliding_window", "n_inner"}
_SHARED: Final = {
    "hidden_size": ".embedding_length",
    "num_hidden_layers": ".block_count",
    "intermediate_size": ".feed_forward_length",
    "num_attention_heads": ".attention.head_count",
    "num_key_value_heads": ".attention.head_count_kv",
    "head_dim": ".attention.key_length",
    "max_position_embeddings": ".context_length",
    "rope_theta": ".rope.freq_base",
}
_RMS: Final = _SHARED | {"rms_norm_eps": ".attention.layer_norm_rms_epsilon"}
_SCALES: Final = {
    "embedding_multiplier": ".embedding_scale",
    "residual_multiplier": ".residual_scale",
    "attention_multiplier": ".attention.scale",
    "logits_scaling": ".logit_scale",
}
_EXPERTS: Final = {"num_experts": ".expert_count", "num_experts_per_tok": ".expert_used_count"}
_MIXED: Final = _RMS | {
    "moe_intermediate_size": ".expert_feed_forward_length",
    "n_routed_experts": ".expert_count",
    "num_experts_per_tok": ".expert_used_count",
    "n_shared_experts": ".expert_shared_count",
    "first_k_dense_replace": ".leading_dense_block_count",
    "norm_topk_prob": ".expert_weights_norm",
    "routed_scaling_factor": ".expert_weights_scale",
}
_ERNIE: Final = _RMS | {
    "moe_intermediate_size": ".expert_feed_forward_length",
    "moe_num_experts": ".expert_count",
    "moe_k": ".expert_used_count",
    "moe_num_shared_experts": ".expert_shared_count",
    "moe_layer_start_index": ".leading_dense_block_count",
    "moe_layer_interval": ".interleave_moe_layer_step",
}
_GPT2: Final = {
    "n_embd": ".embedding_length", "n_layer": ".block_count", "n_head": ".attention.head_count", "n_inner": ".feed_forward_length",
    "n_positions": ".context_length", "layer_norm_epsilon": ".attention.layer_norm_epsilon",
}  # fmt: skip

ARCHITECTURES: Final = {
    "llama": Architecture("LlamaForCausalLM", _RMS, interleaved=True),
    "mistral3": Architecture("Ministral3ForCausalLM", _RMS, interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM", _RMS),
    "qwen3": Architecture("Qwen3ForCausalLM", _RMS),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        _RMS | _EXPERTS | {"moe_intermediate_size": ".expert_feed_forward_length", "norm_topk_prob": True},
    ),
    "granite": Architecture("GraniteForCausalLM", _RMS | _SCALES, interleaved=True),
    "granitemoe": Architecture("GraniteMoeForCausalLM", _RMS | _SCALES | _EXPERTS, interleaved=True),
    "gpt-oss": Architecture(
        "GptOssForCausalLM", _RMS | _EXPERTS | {"sliding_window": ".attention.sliding_window"}, mlp_norm="post_attention_norm"
    ),
    "glm4moe": Architecture("Glm4MoeForCausalLM", _MIXED, mlp_norm="post_attention_norm", gating=2),
    "dots1": Architecture("Dots1ForCausalLM", _MIXED | {"sliding_window": None}, gating=2),
    "ernie4_5-moe": Architecture("Ernie4_5_MoeForCausalLM", _ERNIE, interleaved=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", _RMS, interleaved=True),
    "olmo2": Architecture("Olmo2ForCausalLM", _RMS, attn_norm="post_attention_norm", mlp_norm="post_ffw_norm"),
    "olmoe": Architecture("OlmoeForCausalLM", _RMS | _EXPERTS | {"norm_topk_prob": False}),
    "exaone4": Architecture(
        "Exaone4ForCausalLM",
        _RMS | {"sliding_window": ".attention.sliding_window"},
        attn_norm="post_attention_norm",
        mlp_norm="post_ffw_norm",
    ),
    "gemma": Architecture("GemmaForCausalLM", _RMS),
    "gemma2": Architecture("Gemma2ForCausalLM", _RMS | {"sliding_window": ".attention.sliding_window"}),
    "gemma3": Architecture("Gemma3ForCausalLM", _RMS | {"sliding_window": ".attention.sliding_window"}),
    "phi3": Architecture("Phi3ForCausalLM", _RMS | {"sliding_window": ".attention.sliding_window"}, fused_gate=True),
    "starcoder2": Architecture("Starcoder2ForCausalLM", _SHARED | {"norm_epsilon": ".attention.layer_norm_epsilon"}),
    "stablelm": Architecture("StableLmForCausalLM", _SHARED | {"layer_norm_eps": ".attention.layer_norm_epsilon"}),
    "gpt2": Architecture("GPT2LMHeadModel", _GPT2),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", _RMS, interleaved=True),
    "chatglm": Architecture("GlmForCausalLM", _RMS, interleaved=True, fused_gate=True),
    "glm4": Architecture("Glm4ForCausalLM", _RMS, interleaved=True, fused_gate=True),
    "seed_oss": Architecture("SeedOssForCausalLM", _RMS, mlp_norm="post_attention_norm"),
}  # fmt: skip
"""``general.architecture`` → what it is here."""

_MIXTRAL: Final = Architecture("MixtralForCausalLM", _RMS | _EXPERTS, interleaved=True)
"""Which files call ``llama`` as well."""
_OLMO3: Final = replace(ARCHITECTURES["olmo2"], name="Olmo3ForCausalLM", fields=_RMS | {"sliding_window": ".attention.sliding_window"})
"""Which files call ``olmo2`` as well."""

_BIASES: Final = {
    "attention_bias": "attn_q", "use_qkv_bias": "attn_q", "use_bias": "attn_q", "attention_out_bias": "attn_output", "mlp_bias": "ffn_up",
}  # fmt: skip
"""config.json's fields → where there is a bias if they are true."""
_PARTIAL: Final = ("Phi3ForCausalLM", "StableLmForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM")
"""What may rotate a part of each head."""
_SAMPLING: Final = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}


def architecture_of(model: Gguf) -> Architecture:
    """Raises ModelLoadError for one that is not supported."""
    name = model.architecture
    if name not in ARCHITECTURES:
        kind = model.fields.get("general.type", "model")
        what = f"the architecture {name!r:.40}" if kind == "model" else f"not a language model but of the type {kind!r:.40}"
        model.refuse(f"has {what}; supported: {', '.join(sorted(ARCHITECTURES))}")
    if name == "llama" and model.fields.get("llama.expert_count"):
        return _MIXTRAL
    return _OLMO3 if name == "olmo2" and model.fields.get("olmo2.attention.sliding_window") else ARCHITECTURES[name]


def config_of(model: Gguf, factors: Factors) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json and generation_config.json would say. Raises ModelLoadError."""
    kind, prefix = architecture_of(model), model.architecture
    embed = model.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        model.refuse("has no token_embd.weight: it holds a tokenizer, or another part of a model, but not its weights")
    if (experts := model.fields.get(f"{prefix}.expert_count")) and ".expert_count" not in kind.fields.values():
        model.refuse(f"is a mixture of {experts} experts, which is not supported for {prefix}")
    for field, *only in (("shared_count", 0), ("gating_func", kind.gating), ("weights_scale", 1.0), ("group_count", 0, 1)):
        found = model.fields.get(f"{prefix}.expert_{field}", only[0])
        if f".expert_{field}" not in kind.fields.values() and found not in only:
            model.refuse(f"has {prefix}.expert_{field} {found!r:.40}, which is not supported")
    if model.fields.get(f"{prefix}.attention.causal") is False:
        model.refuse("sees what comes after a token, too: it makes vectors of texts, and can't generate any")
    values: dict[str, Any] = {"architectures": [kind.name], "vocab_size": embed.shape[0]}
    for name, field in kind.fields.items():
        if not isinstance(field, str):
            values[name] = field
        elif (value := model.fields.get(prefix + field)) is not None:
            values[name] = _one(model, prefix + field, value)
        elif name not in _OPTIONAL and name not in _SCALES:
            model.refuse(f"has no field {prefix}{field}")
    values["tie_word_embeddings"] = "output.weight" not in model.tensors
    for name, tensor in _BIASES.items():
        values[name] = any(f"blk.0.{each}.bias" in model.tensors for each in (tensor, "attn_qkv" if tensor == "attn_q" else tensor))
    if kind.name != "GPT2LMHeadModel":
        _rotation(model, kind, values, factors)
    if kind.name in ("Phi3ForCausalLM", "Starcoder2ForCausalLM"):
        values["sliding_window"] = values.get("sliding_window") or None
    if kind.name == "Gemma2ForCausalLM":
        _gemma2(model, values)
    if kind.name == "Gemma3ForCausalLM":
        _gemma3(model, values)
    if kind.name in ("Olmo3ForCausalLM", "Exaone4ForCausalLM"):
        _windows(model, values)
    if kind.name == "GraniteForCausalLM" and "attention_multiplier" not in values and (head_dim := _head_dim(values)):
        values["attention_multiplier"] = head_dim**-0.5
    if kind.name == "Glm4MoeForCausalLM":
        values["use_qk_norm"] = "blk.0.attn_q_norm.weight" in model.tensors
        if type(values["num_hidden_layers"]) is int:
            values["num_hidden_layers"] -= guessing_layers(model)
    if kind.name == "StableLmForCausalLM":
        values["qk_layernorm"] = "blk.0.attn_q_norm.weight" in model.tensors
        values["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in model.tensors
    return values, _generation(model)


def guessing_layers(model: Gguf) -> int:
    """Of all layers the last ones, that guess further tokens."""
    found = model.fields.get(f"{model.architecture}.nextn_predict_layers", 0)
    if type(found) is not int or not 0 <= found <= 1:
        model.refuse(f"has {found!r:.40} layers that guess further tokens, where 0 or 1 are supported")
    return found


def _one(model: Gguf, field: str, value: Any) -> Any:
    """A value that may be there for each layer, where all are the same."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        model.refuse(f"has layers that differ in {field} ({value!s:.60}), which is not supported")
    return value[0]


def _gemma2(model: Gguf, values: dict[str, Any]) -> None:
    """What llama.cpp knows of Gemma 2 without being told: that every other layer has a window, and the scale of 27B's products."""
    values.setdefault("sliding_window", 4096)
    values["query_pre_attn_scalar"] = _scalar(values, 46)
    for name, absent in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        values[name] = model.fields.get(f"gemma2.{name}", absent)


def _scalar(values: Mapping[str, Any], largest: int) -> int:
    """What the scale of products is made of: the width of heads, or, in the largest model, which has so many layers, of its share."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values["num_hidden_layers"] == largest and type(hidden) is int and type(heads) is int and heads > 0:
        return hidden // heads
    return _head_dim(values)


def _gemma3(model: Gguf, values: dict[str, Any]) -> None:
    """What llama.cpp knows of Gemma 3 without being told: which layers have a window, how those rotate, and the scale of 27B's products."""
    pattern = model.fields.get("gemma3.attention.sliding_window_pattern", 6)
    if not values.get("sliding_window"):
        values["sliding_window_pattern"], values["sliding_window"] = 1, None
    elif isinstance(pattern, list):
        values["layer_types"] = [LOCAL if each else GLOBAL for each in pattern]
    else:
        values["sliding_window_pattern"] = pattern
    values["query_pre_attn_scalar"] = _scalar(values, 62)
    values["rope_local_base_freq"] = model.fields.get("gemma3.rope.freq_base_swa")
    values["final_logit_softcapping"] = model.fields.get("gemma3.final_logit_softcapping")


def _windows(model: Gguf, values: dict[str, Any]) -> None:
    """Which layers have a window: a list, or, as in the config.json of these models, three of four."""
    pattern = model.fields.get(f"{model.architecture}.attention.sliding_window_pattern")
    values["sliding_window"] = values.get("sliding_window") or None
    if isinstance(pattern, list):
        values["layer_types"] = [LOCAL if each else GLOBAL for each in pattern]


def _head_dim(values: Mapping[str, Any]) -> int:
    """0 where the fields that say it are wrong; who reads them refuses that."""
    given, hidden, heads = (values.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if type(given) is int:
        return max(0, given)
    return hidden // heads if type(hidden) is int and type(heads) is int and heads > 0 else 0


def _rotation(model: Gguf, kind: Architecture, values: dict[str, Any], factors: Factors) -> None:
    prefix, fields = model.architecture, model.fields
    if (width := fields.get(f"{prefix}.attention.value_length")) is not None and width != values.get("head_dim", width):
        model.refuse(f"has keys of {values['head_dim']} and values of {width} dimensions, which is not supported")
    head_dim = values["head_dim"] = _head_dim(values)  # whatever an architecture has where config.json does not say
    rotated = fields.get(f"{prefix}.rope.dimension_count", head_dim)
    if (sections := fields.get(f"{prefix}.rope.dimension_sections")) not in (None, [0] * 4):
        model.refuse(f"rotates by positions in a picture ({prefix}.rope.dimension_sections {sections!s:.60}), which is not supported")
    if kind.name in _PARTIAL and type(rotated) is int and head_dim:
        values["partial_rotary_factor"] = rotated / head_dim
    elif head_dim and rotated != head_dim:
        model.refuse(f"rotates {rotated} of {head_dim} dimensions of a head, which is not supported for {prefix}")
    factor = fields.get(f"{prefix}.rope.scaling.factor", fields.get(f"{prefix}.rope.scale_linear", 1.0))  # the latter in old files
    scaling = fields.get(f"{prefix}.rope.scaling.type", "none" if factor == 1.0 else "linear")
    original = fields.get(f"{prefix}.rope.scaling.original_context_length")
    if "rope_factors_long.weight" in factors:
        values["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": list(factors["rope_factors_long.weight"]),
            "short_factor": list(factors.get("rope_factors_short.weight", ())),
            "original_max_position_embeddings": original,
            "attention_factor": fields.get(f"{prefix}.rope.scaling.attn_factor"),
        }
    elif fields.get(f"{prefix}.rope.scaling.attn_factor", 1.0) != 1.0:
        model.refuse(f"has {prefix}.rope.scaling.attn_factor without the factors that it goes with, which is not supported")
    elif scaling in ("linear", "yarn"):
        given = {"rope_type": scaling, "factor": factor}
        if scaling == "yarn":
            given["original_max_position_embeddings"] = original
            given["truncate"] = kind.name != "GptOssForCausalLM"  # no field says so
            if kind.name == "Ministral3ForCausalLM":
                _ministral3(model, given)
            for name in ("beta_fast", "beta_slow", "attn_factor"):
                given["attention_factor" if name == "attn_factor" else name] = fields.get(f"{prefix}.rope.scaling.yarn_{name}")
        values["rope_scaling"] = given
    elif scaling != "none":
        model.refuse(f"has the rope type {scaling!r:.40}, which is not supported; supported: linear, yarn, longrope with its factors")


def _ministral3(model: Gguf, rope: dict[str, Any]) -> None:
    """Rotations have no magnitude where both of YaRN's are the same, of which llama.cpp has one; queries are scaled, or are not."""
    if heads := model.fields.get("mistral3.rope.scaling.yarn_log_multiplier"):
        rope["mscale"], rope["mscale_all_dim"] = 1.0, heads
    rope["llama_4_scaling_beta"] = model.fields.get("mistral3.attention.temperature_scale")


def as_converted(spec: TransformerSpec, factors: Factors, model: Gguf) -> TransformerSpec:
    """With what a file has done already, and the factors of Llama 3's rotation, which it has instead of what they are made from."""
    if spec.norm_offset:  # it has been added already
        spec = replace(spec, norm_offset=0.0)
    given = factors.get("rope_freqs.weight")
    if given is None or spec.rope is None:
        return spec
    if len(given) != spec.rope.rotary_dim // 2 or spec.rope.scaling != "none":
        model.refuse(f"has {len(given)} factors in rope_freqs.weight, and {spec.rope.rotary_dim // 2} frequencies to take them")
    if set(spec.ropes) - {None, spec.rope}:
        model.refuse("has factors in rope_freqs.weight, and layers that rotate in several ways, which is not supported")
    rope = RopeSpec(spec.rope.theta, spec.rope.rotary_dim, "longrope", short_factors=given, long_factors=given)
    return replace(spec, rope=rope, ropes=tuple(each and rope for each in spec.ropes))


def sources_of(model: Gguf, spec: TransformerSpec) -> dict[str, Source]:
    """Canonical name → source, as Family.sources."""
    kind = architecture_of(model)
    sources = renamed(spec, _TOP, _LAYER | {"attn_norm": kind.attn_norm, "mlp_norm": kind.mlp_norm}, "blk")
    q, kv, f = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    parts = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    for i in range(spec.num_layers):
        if f"layers.{i}.correction.bias" in sources:  # [experts], or [1, experts], as it was in the checkpoint
            source = sources[f"layers.{i}.correction.bias"]
            if (tensor := model.tensors.get(source.name)) is not None and len(tensor.shape) > 1:
                sources[f"layers.{i}.correction.bias"] = replace(source, expert=(0, 1))
        for j in range(spec.num_experts if spec.has_experts(i) else 0):
            for part in ("gate", "up", "down"):
                stacked = f"blk.{i}.{_LAYER[f'experts.{part}']}"
                for parameter in ("weight", "bias") if spec.mlp_bias else ("weight",):
                    name = f"layers.{i}.experts.{j}.{part}.{parameter}"
                    sources[name] = Source(f"{stacked}.{parameter}", expert=(j, spec.num_experts))
        for parameter in ("weight", "bias"):
            fused = f"blk.{i}.attn_qkv.{parameter}"
            for part, rows in parts.items():
                name = f"layers.{i}.{part}.{parameter}"
                if name in sources and fused in model.tensors:
                    sources[name] = Source(fused, rows=rows, rows_total=q + 2 * kv)
        if kind.fused_gate:
            for part, rows in (("gate", (0, f)), ("up", (f, 2 * f))):
                sources[f"layers.{i}.{part}.weight"] = Source(f"blk.{i}.ffn_up.weight", rows=rows, rows_total=2 * f)
    return interleaved(spec, sources) if kind.interleaved else sources


def _generation(model: Gguf) -> dict[str, Any]:
    """As in generation_config.json: the tokens that end a text, and what the model's authors recommend."""
    found: dict[str, Any] = {"eos_token_id": model.ends(), "bos_token_id": model.special_token("bos")}
    for name, field in _SAMPLING.items():
        if (value := model.fields.get(f"general.sampling.{field}")) is not None:
            found[name] = value
    return found
