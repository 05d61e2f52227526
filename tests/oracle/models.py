"""Small random models of every family, as transformers builds and saves them.

The weights are drawn strongly, norms and biases included, so that a wrong axis, a forgotten bias or a window that is one
token too long shows in the logits instead of hiding below rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

VOCAB = 97
TOLERANCE = 1e-4
"""Of logits, relative to the largest of the row."""
MARGIN = 2e-3
"""Wanted of greedy decisions, see ``greedy``."""


@dataclass(frozen=True)
class Case:
    """One configuration: fields of the family's config class."""

    name: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)


_CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "dots1": (Dots1Config, Dots1ForCausalLM),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "exaone4": (Exaone4Config, Exaone4ForCausalLM),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM),
    "stablelm": (StableLmConfig, StableLmForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "opt": (OPTConfig, OPTForCausalLM),
    "ernie4_5": (Ernie4_5Config, Ernie4_5ForCausalLM),
    "glm": (GlmConfig, GlmForCausalLM),
    "glm4": (Glm4Config, Glm4ForCausalLM),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM),
    "helium": (HeliumConfig, HeliumForCausalLM),
    "ministral": (MinistralConfig, MinistralForCausalLM),
}
_SHARED = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 56, "max_position_embeddings": 256}
_ROUTED = {**_SHARED, "num_hidden_layers": 3, "n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
_BASE: dict[str, dict[str, Any]] = {
    "llama": _SHARED,
    "mistral": _SHARED,
    "ministral3": {**_SHARED, "head_dim": 16},
    "qwen2": _SHARED,
    "qwen3": _SHARED,
    "mixtral": {**_SHARED, "num_local_experts": 5},
    "qwen3_moe": {**_SHARED, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    "granitemoe": {**_SHARED, "num_local_experts": 6, "num_experts_per_tok": 4},
    "gpt_oss": {**_SHARED, "head_dim": 16, "sliding_window": 9, "num_local_experts": 5, "num_experts_per_tok": 2},
    "gemma": {**_SHARED, "head_dim": 16},
    "gemma2": {
        **_SHARED,
        "head_dim": 16,
        "sliding_window": 9,
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "glm4_moe": _ROUTED,
    "dots1": {**_ROUTED, "n_shared_experts": 2, "first_k_dense_replace": 1, "sliding_window": None},
    "ernie4_5_moe": {**_SHARED, "num_hidden_layers": 3, "moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 20},
    "gemma3": {**_SHARED, "head_dim": 16, "sliding_window": 9, "num_hidden_layers": 3, "query_pre_attn_scalar": 20},
    "granite": _SHARED,
    "phi3": _SHARED,
    "smollm3": _SHARED,
    "olmo2": _SHARED,
    "olmo3": {**_SHARED, "num_hidden_layers": 5, "sliding_window": 9},
    "olmoe": {**_SHARED, "num_experts": 6, "num_experts_per_tok": 3},
    "exaone4": {**_SHARED, "num_hidden_layers": 5, "sliding_window": 9},
    "starcoder2": _SHARED,
    "stablelm": _SHARED,
    "gpt2": {"n_layer": 2, "n_embd": 48, "n_positions": 256},
    "opt": {"num_hidden_layers": 2, "hidden_size": 48, "ffn_dim": 56, "max_position_embeddings": 256},
    "ernie4_5": {**_SHARED, "head_dim": 16},
    "glm": {**_SHARED, "head_dim": 16},
    "glm4": {**_SHARED, "head_dim": 16},
    "seed_oss": {**_SHARED, "head_dim": 16},
    "helium": _SHARED,
    "ministral": {**_SHARED, "head_dim": 16},
}


def heads(q: int, kv: int, **fields: Any) -> dict[str, Any]:
    return {"num_attention_heads": q, "num_key_value_heads": kv, **fields}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 64}
MINISTRAL3 = {**YARN, "type": "yarn", "original_max_position_embeddings": 16, "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0,
              "llama_4_scaling_beta": 0.5}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_THREE = {"num_hidden_layers": 3}


def longrope(count: int, original: int, **fields: Any) -> dict[str, Any]:
    """Factors for ``count`` frequencies."""
    short, long = ([1.0 + step * i for i in range(count)] for step in (0.1, 0.5))
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": original}, "original_max_position_embeddings": original, **fields}  # fmt: skip


CASES = [
    Case("llama-mha-3-heads", "llama", heads(3, 3)),
    Case("llama-gqa-tied-eps", "llama", heads(6, 2, tie_word_embeddings=True, rms_norm_eps=0.1)),
    Case("llama-5-heads-mqa", "llama", heads(5, 1, hidden_size=40)),
    Case("llama-head-dim-biases", "llama", heads(4, 2, head_dim=20, attention_bias=True, mlp_bias=True)),
    Case("llama-rope-llama3", "llama", heads(3, 1, rope_parameters=LLAMA3)),
    Case("llama-rope-linear", "llama", heads(4, 4, rope_parameters=_LINEAR)),
    Case("llama-rope-yarn", "llama", heads(3, 1, rope_parameters=YARN)),
    Case("qwen3-rope-yarn-betas", "qwen3", heads(3, 3, head_dim=32, rope_parameters={**YARN, "beta_fast": 8.0, "beta_slow": 2.0,
         "attention_factor": 1.5})),
    Case("llama-gelu", "llama", heads(2, 2, hidden_act="gelu")),
    Case("mistral-window", "mistral", heads(6, 3, sliding_window=7)),
    Case("mixtral", "mixtral", heads(6, 2)),
    Case("mixtral-window-one-of-three", "mixtral", heads(3, 1, sliding_window=9, num_local_experts=3, num_experts_per_tok=1)),
    Case("qwen3-moe", "qwen3_moe", heads(4, 2, head_dim=16, norm_topk_prob=True)),
    Case("qwen3-moe-sum-of-all", "qwen3_moe", heads(3, 3, norm_topk_prob=False, tie_word_embeddings=True, attention_bias=True)),
    Case("qwen3-moe-all-taken", "qwen3_moe", heads(2, 1, num_experts=4, num_experts_per_tok=4)),
    Case("qwen3-moe-mixed", "qwen3_moe", heads(3, 1, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])),
    Case("glm4-moe", "glm4_moe", heads(3, 1, head_dim=16, use_qk_norm=True, attention_bias=True, routed_scaling_factor=2.5)),
    Case("glm4-moe-not-to-one-tied", "glm4_moe", heads(4, 2, norm_topk_prob=False, first_k_dense_replace=2, n_shared_experts=2,
         tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
         head_dim=24)),
    Case("glm4-moe-no-dense", "glm4_moe", heads(2, 2, first_k_dense_replace=0, num_experts_per_tok=7)),
    Case("dots1", "dots1", heads(3, 3, norm_topk_prob=True, routed_scaling_factor=2.5, attention_bias=True)),
    Case("dots1-windows", "dots1", heads(4, 2, sliding_window=9, max_window_layers=1, norm_topk_prob=False, head_dim=16)),
    Case("ernie4-5-moe", "ernie4_5_moe", heads(6, 2)),
    Case("ernie4-5-moe-untied-interval", "ernie4_5_moe", heads(3, 3, num_hidden_layers=5, moe_layer_start_index=1, moe_layer_end_index=3,
         moe_layer_interval=2, moe_num_shared_experts=0, tie_word_embeddings=False)),
    Case("granitemoe", "granitemoe", heads(3, 1, embedding_multiplier=6.0, residual_multiplier=0.3, logits_scaling=4.0,
         attention_multiplier=0.3)),
    Case("gpt-oss", "gpt_oss", heads(6, 2, rope_parameters={**YARN, "truncate": False}, **_THREE)),
    Case("gpt-oss-types-tied", "gpt_oss", heads(4, 1, num_local_experts=3, num_experts_per_tok=3, tie_word_embeddings=True,
         attention_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
         layer_types=["full_attention", "sliding_attention"])),
    Case("gemma", "gemma", heads(4, 1)),
    Case("gemma-untied-biases", "gemma", heads(3, 3, attention_bias=True, tie_word_embeddings=False)),
    Case("gemma2", "gemma2", heads(4, 2)),
    Case("gemma2-types-one-limit", "gemma2", heads(3, 1, head_dim=20, attention_bias=True, tie_word_embeddings=False,
         final_logit_softcapping=None, layer_types=["full_attention", "sliding_attention", "sliding_attention"])),
    Case("gemma3-pattern", "gemma3", heads(4, 2, num_hidden_layers=7)),
    Case("gemma3-types-scaled", "gemma3", heads(3, 1, head_dim=20, attention_bias=True, tie_word_embeddings=False,
         final_logit_softcapping=20.0,
         layer_types=["full_attention", "sliding_attention", "sliding_attention"], rope_parameters={"full_attention":
         {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}})),
    Case("gemma3-window-of-the-context", "gemma3", heads(2, 2, sliding_window=256)),
    Case("ministral3", "ministral3", heads(6, 2, rope_parameters=MINISTRAL3)),
    Case("ministral3-tied-mscales", "ministral3", heads(3, 3, tie_word_embeddings=True,
         rope_parameters={**MINISTRAL3, "mscale": 0.7, "mscale_all_dim": 1.5, "llama_4_scaling_beta": 0.1})),
    Case("mistral-full-head-dim", "mistral", heads(3, 1, sliding_window=None, head_dim=24)),
    Case("qwen2-tied", "qwen2", heads(6, 2, tie_word_embeddings=True)),
    Case("qwen2-some-windows", "qwen2", heads(3, 3, use_sliding_window=True, sliding_window=9, max_window_layers=1, **_THREE)),
    Case("qwen2-layer-types", "qwen2", heads(4, 1, use_sliding_window=True, sliding_window=5, **_THREE,
         layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    Case("qwen3-head-dim", "qwen3", heads(5, 5, head_dim=16, hidden_size=40)),
    Case("qwen3-gqa-biases-tied", "qwen3", heads(6, 3, head_dim=32, attention_bias=True, tie_word_embeddings=True)),
    Case("granite-factors", "granite", heads(6, 2, tie_word_embeddings=True, embedding_multiplier=12.0, residual_multiplier=0.22,
         logits_scaling=8.0, attention_multiplier=0.2, rms_norm_eps=0.01)),
    Case("granite-biases-untied", "granite", heads(3, 3, attention_bias=True, mlp_bias=True, residual_multiplier=1.7, logits_scaling=0.3,
         attention_multiplier=0.25)),
    Case("phi3-window", "phi3", heads(6, 2, sliding_window=9)),
    Case("phi3-long", "phi3", heads(3, 3, **longrope(8, 8))),
    Case("phi3-short-partial-tied", "phi3", heads(4, 2, tie_word_embeddings=True, hidden_size=64, partial_rotary_factor=0.75,
         **longrope(6, 256, max_position_embeddings=256))),
    Case("smollm3-interval", "smollm3", heads(6, 3, no_rope_layer_interval=2, tie_word_embeddings=True)),
    Case("smollm3-layers-windows", "smollm3", heads(3, 1, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=7,
         attention_bias=True, mlp_bias=True, tie_word_embeddings=False, **_THREE)),
    Case("olmo2", "olmo2", heads(6, 2)),
    Case("olmo2-biases-tied", "olmo2", heads(3, 3, attention_bias=True, tie_word_embeddings=True, rms_norm_eps=0.1)),
    Case("olmo3", "olmo3", heads(6, 3)),
    Case("olmo3-types-yarn", "olmo3", heads(3, 1, layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
         rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}})),
    Case("olmoe", "olmoe", heads(4, 2)),
    Case("olmoe-sum-to-one", "olmoe", heads(3, 3, norm_topk_prob=True, attention_bias=True, tie_word_embeddings=True)),
    Case("exaone4-hybrid", "exaone4", heads(6, 2, tie_word_embeddings=True)),
    Case("exaone4-all-rotate", "exaone4", heads(4, 1, head_dim=20, sliding_window=None, rope_parameters=LLAMA3,
         layer_types=["full_attention"] * 5)),
    Case("starcoder2-window", "starcoder2", heads(6, 2, sliding_window=11)),
    Case("starcoder2-no-biases-untied", "starcoder2", heads(3, 3, use_bias=False, tie_word_embeddings=False, hidden_act="gelu")),
    Case("stablelm-quarter", "stablelm", heads(3, 3)),
    Case("stablelm-biases-half", "stablelm", heads(6, 2, use_qkv_bias=True, partial_rotary_factor=0.5)),
    Case("gpt2-3-heads", "gpt2", {"n_head": 3}),
    Case("gpt2-inner-untied-unscaled", "gpt2", {"n_head": 4, "n_inner": 72, "tie_word_embeddings": False, "scale_attn_weights": False,
         "activation_function": "gelu"}),
    Case("opt-pre-norm", "opt", {"num_attention_heads": 3}),
    Case("opt-post-norm-projected", "opt", {"num_attention_heads": 4, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    Case("opt-no-bias-untied-gelu", "opt", {"num_attention_heads": 6, "enable_bias": False, "tie_word_embeddings": False,
         "activation_function": "gelu"}),
    Case("opt-no-final-norm", "opt", {"num_attention_heads": 2, "_remove_final_layer_norm": True}),
    Case("ernie-tied", "ernie4_5", heads(6, 2)),
    Case("ernie-biases-linear-untied", "ernie4_5", heads(3, 3, head_dim=20, use_bias=True, tie_word_embeddings=False, rms_norm_eps=0.01,
         rope_parameters=_LINEAR)),
    Case("ernie-head-dim-of-hidden", "ernie4_5", heads(4, 1, head_dim=None)),
    Case("glm-half", "glm", heads(6, 2)),
    Case("glm-quarter-no-biases-tied", "glm", heads(3, 1, head_dim=24, attention_bias=False, tie_word_embeddings=True,
         partial_rotary_factor=0.25)),
    Case("glm-whole", "glm", heads(2, 2, rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0})),
    Case("glm4-half", "glm4", heads(4, 2)),
    Case("glm4-yarn-no-biases-tied", "glm4", heads(3, 3, head_dim=32, attention_bias=False, tie_word_embeddings=True,
         rope_parameters={**YARN, "partial_rotary_factor": 0.5})),
    Case("seed-oss", "seed_oss", heads(6, 2)),
    Case("seed-oss-other-biases-tied", "seed_oss", heads(3, 1, head_dim=20, attention_bias=False, attention_out_bias=True, mlp_bias=True,
         tie_word_embeddings=True)),
    Case("helium", "helium", heads(6, 3, head_dim=8)),
    Case("helium-biases-tied", "helium", heads(3, 3, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    Case("ministral-types", "ministral", heads(4, 2, sliding_window=7, layer_types=["sliding_attention", "full_attention"])),
    Case("ministral-windows-tied", "ministral", heads(3, 1, sliding_window=9, tie_word_embeddings=True)),
]  # fmt: skip


def build(case: Case) -> PreTrainedModel:
    """The model in float32, evaluation mode, eager attention. The same case always gives the same weights."""
    config_class, model_class = _CLASSES[case.kind]
    fields = {"vocab_size": VOCAB, **_BASE[case.kind], **case.fields}
    config = config_class(**fields, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0, attn_implementation="eager")
    model: PreTrainedModel = model_class(config).eval()
    generator = torch.Generator().manual_seed(sum(case.name.encode()))
    # A strong tied embedding would make the model repeat its input, and hide the layers.
    embedding = 0.25 if config.tie_word_embeddings else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_((0.1 if "correction" in name else 0.3) * noise)
            elif name.endswith("sinks"):
                parameter.copy_(1.5 * noise)
            elif parameter.ndim == 1:  # a norm
                parameter.copy_(1.0 + 0.3 * noise)
            elif "embed_positions" in name or "wpe" in name:
                parameter.copy_(noise)
            elif any(part in name for part in ("embed_tokens", "wte", "lm_head")):
                parameter.copy_(embedding * noise)
            else:
                fan_in = parameter.shape[0] if case.kind == "gpt2" else parameter.shape[-1]
                limited = case.kind == "gpt_oss" and "gate_up" in name  # some of what they give is beyond the limit
                parameter.copy_((6.0 if limited else 1.5) * noise / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 1, [2, 3]
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids, special ones left out."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(4, VOCAB, (length,), generator=generator).tolist()


def logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab], float32, the whole sequence at once."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def states(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), embedding size], float32: the hidden states that lm_head reads, ``last_hidden_state`` of the model without it."""
    with torch.no_grad():
        return model.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def greedy(model: PreTrainedModel, tokens: list[int], count: int) -> tuple[list[int], float]:
    """``count`` greedy tokens, computed without a cache, end-of-text ignored; and the closest decision among them.

    That margin is the difference between the best and the second logit, relative to the largest: where it is above the
    tolerance on logits, the tokens must be equal.
    """
    tokens, start, margin = list(tokens), len(tokens), float("inf")
    for _ in range(count):
        row = logits(model, tokens)[-1]
        best = row.topk(2).values
        margin = min(margin, float((best[0] - best[1]) / row.abs().max()))
        tokens.append(int(row.argmax()))
    return tokens[start:], margin


def decisive_prompt(model: PreTrainedModel, length: int, count: int) -> tuple[list[int], list[int]]:
    """A prompt and its ``count`` greedy tokens, none of which is a near tie."""
    best: tuple[float, list[int], list[int]] = (0.0, [], [])
    for seed in range(20):
        tokens = prompt(length, seed)
        chosen, margin = greedy(model, tokens, count)
        best = max(best, (margin, tokens, chosen))
        if margin > MARGIN:
            break
    assert best[0] > TOLERANCE, f"no prompt without near ties: {best[0]}"
    return best[1], best[2]
