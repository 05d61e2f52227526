"""Small configurations of every family as transformers 4 writes them, and model folders made of random weights, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quire.models.families import find_family, spec_from_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 200, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 1024,
         "max_window_layers": 3}  # fmt: skip
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
           "sliding_window": None, "intermediate_size": 192}  # fmt: skip
QWEN3_MOE = {**QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3,
             "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
QWEN3_MIXED = {**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
GLM4_MOE: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 200, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1000000, "rope_scaling": None, "partial_rotary_factor": 0.5,
    "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "eos_token_id": [2, 3],
}  # fmt: skip
DOTS1 = {**LLAMA, "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "moe_intermediate_size": 64, "n_routed_experts": 8,
         "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc", "moe_layer_freq": 1, "sliding_window": None,
         "max_window_layers": 62}  # fmt: skip
ERNIE_MOE: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "vocab_size": 1000, "hidden_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 4096,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000, "rope_scaling": None, "use_bias": False, "moe_num_experts": 8,
    "moe_k": 3, "moe_num_shared_experts": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    "moe_layer_interval": 1, "moe_use_aux_free": True, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
GRANITE = {**LLAMA, "architectures": ["GraniteForCausalLM"], "model_type": "granite", "embedding_multiplier": 12.0, "logits_scaling": 8.0,
           "residual_multiplier": 0.22, "attention_multiplier": 0.015625}  # fmt: skip
GRANITE_MOE = {**GRANITE, "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "num_local_experts": 6,
               "num_experts_per_tok": 2, "intermediate_size": 192}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 131072,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 150000, "sliding_window": 128, "num_local_experts": 5,
    "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True, "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096}, "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
GPT_OSS_SHORT = GPT_OSS | {"sliding_window": 8, "max_position_embeddings": 512, "rope_scaling": GPT_OSS["rope_scaling"] | {
    "factor": 4.0, "original_max_position_embeddings": 128}}  # fmt: skip
PHI3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 262144,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}}  # fmt: skip
SMOLLM3 = {**LLAMA, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0],
           "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 4, "use_sliding_window": False, "sliding_window": None,
           "tie_word_embeddings": True}  # fmt: skip
GEMMA = {**LLAMA, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": 32, "hidden_act": "gelu",
         "hidden_activation": None, "tie_word_embeddings": True}  # fmt: skip
GEMMA2 = {
    **GEMMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 1024,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 200, "max_position_embeddings": 4096,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None,
    "rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
    "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "torch_dtype": "bfloat16",
    "bos_token_id": 2, "eos_token_id": [1, 106],
}  # fmt: skip
GEMMA3_VISION: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16", "eos_token_id": [1, 106],
    "text_config": {"hidden_size": 96, "intermediate_size": 200, "model_type": "gemma3_text", "num_hidden_layers": 7, "vocab_size": 1000,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    "vision_config": {"hidden_size": 40, "model_type": "siglip_vision_model"},
}  # fmt: skip
OLMO2 = {**LLAMA, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "num_key_value_heads": 6}
OLMO3 = {**OLMO2, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": 1024, "rope_scaling": {**YARN,
         "attention_factor": 1.2}, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}  # fmt: skip
OLMOE = {**OLMO2, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3,
         "norm_topk_prob": False, "clip_qkv": None, "intermediate_size": 64}  # fmt: skip
EXAONE4 = {**LLAMA, "architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "head_dim": 32, "sliding_window": 1024,
           "sliding_window_pattern": "LLLG", "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}  # fmt: skip
STARCODER2 = {**LLAMA, "architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh",
              "use_bias": True, "norm_epsilon": 1e-5, "sliding_window": 4096, "tie_word_embeddings": True}  # fmt: skip
STABLELM = {**LLAMA, "architectures": ["StableLmForCausalLM"], "model_type": "stablelm", "layer_norm_eps": 1e-5, "use_qkv_bias": True,
            "partial_rotary_factor": 0.25, "rope_theta": 10000, "use_parallel_residual": False, "qk_layernorm": False}  # fmt: skip
ERNIE = {**LLAMA, "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "head_dim": 32, "use_bias": False,
         "tie_word_embeddings": True}  # fmt: skip
GLM = {**LLAMA, "architectures": ["GlmForCausalLM"], "model_type": "glm", "head_dim": 32, "attention_bias": True, "rms_norm_eps": 1.5625e-7,
       "partial_rotary_factor": 0.5, "rope_theta": 10000.0}  # fmt: skip
GLM4 = {**GLM, "architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}
SEED_OSS = {**LLAMA, "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "head_dim": 32, "attention_bias": True,
            "attention_out_bias": False, "rope_theta": 10000000.0, "rope_scaling": {"rope_type": "default"}}  # fmt: skip
HELIUM = {**LLAMA, "architectures": ["HeliumForCausalLM"], "model_type": "helium", "head_dim": 16, "rms_norm_eps": 1e-8,
          "rope_theta": 100000.0}  # fmt: skip
MINISTRAL = {**LLAMA, "architectures": ["MinistralForCausalLM"], "model_type": "ministral", "head_dim": 32, "sliding_window": 1024,
             "layer_types": ["full_attention", *["sliding_attention"] * 3]}  # fmt: skip
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 1000, "n_embd": 96, "n_head": 6, "n_layer": 4,
    "n_positions": 512, "n_ctx": 512, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None,
    "bos_token_id": 999, "eos_token_id": 999,
}  # fmt: skip
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 1000, "hidden_size": 96, "num_attention_heads": 6,
    "num_hidden_layers": 4, "ffn_dim": 200, "max_position_embeddings": 512, "word_embed_proj_dim": 96, "do_layer_norm_before": True,
    "activation_function": "relu", "torch_dtype": "float16", "bos_token_id": 2, "eos_token_id": 2, "_remove_final_layer_norm": False,
}  # fmt: skip

STORED = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float64): "F64"}
Tensors = dict[str, np.ndarray]


def write_safetensors(
    file: Path, tensors: Tensors, change: Callable[[dict[str, Any]], None] | None = None, cut: int = 0, pad: int = 0
) -> None:
    """Our own writer, so that broken files can be made. change: edits the header; cut: bytes removed at the end; pad: bytes added."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        header[name] = {"dtype": STORED[array.dtype], "shape": list(array.shape), "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    if change:
        change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = len(text).to_bytes(8, "little") + text + data + bytes(pad)
    file.write_bytes(body[: len(body) - cut])


def checkpoint(config: dict[str, Any], dtype: Any = np.float32, prefix: bool = True) -> Tensors:
    """Random tensors under the names that a checkpoint has; a fused tensor once."""
    spec, family = spec_from_config(config), find_family(config)
    rng, shapes, tensors = np.random.default_rng(0), spec.tensor_shapes(), {}
    for name, source in family.sources(spec).items():
        full = source.name if not prefix or source.name.startswith("lm_head") else family.prefixes[0] + source.name
        if full not in tensors:
            tensors[full] = rng.standard_normal(source.stored_shape(shapes[name])).astype(dtype)
    return tensors


def write_model(folder: Path, config: dict[str, Any], tensors: Tensors | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", checkpoint(config) if tensors is None else tensors)
    return folder
