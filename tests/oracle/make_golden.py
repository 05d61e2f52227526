"""Write tests/fixtures/golden: tiny models of every family with the logits and greedy tokens that transformers computes.

    PYTHONPATH=tests .venv/bin/python tests/oracle/make_golden.py      (after make test-oracle, which installs what it needs)

They let ``make test`` check the backend against transformers without installing it. Each folder holds a model and
``golden.npz``: ``prompt`` [P], ``tokens`` [64] (greedy, end-of-text ignored), ``logits`` [P + 64, vocab] float32 of prompt and
tokens. Weights are stored in the dtype of the case; the logits are computed in float32 from the stored values.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from oracle.models import LLAMA3, MINISTRAL3, YARN, Case, build, decisive_prompt, heads, logits, longrope, save

OUT = Path(__file__).parents[1] / "fixtures" / "golden"
_SMALL = {"hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 256}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

GOLDEN = [
    (Case("llama-llama3", "llama", heads(3, 1, rope_parameters=LLAMA3, **_SMALL)), torch.float32),
    (Case("llama-biases-linear", "llama", heads(2, 2, attention_bias=True, mlp_bias=True, rope_parameters=_LINEAR, head_dim=10, **_SMALL)),
     torch.float16),
    (Case("mistral-window", "mistral", heads(6, 2, sliding_window=11, **_SMALL)), torch.bfloat16),
    (Case("ministral3", "ministral3", heads(4, 2, head_dim=12, rope_parameters=MINISTRAL3, **_SMALL)), torch.bfloat16),
    (Case("qwen2-windows", "qwen2", heads(3, 3, use_sliding_window=True, sliding_window=9, max_window_layers=1, **_SMALL)), torch.bfloat16),
    (Case("qwen3-tied", "qwen3", heads(4, 2, head_dim=16, tie_word_embeddings=True, **_SMALL)), torch.float32),
    (Case("mixtral", "mixtral", heads(3, 1, num_local_experts=4, **_SMALL)), torch.float16),
    (Case("qwen3-moe", "qwen3_moe", heads(2, 1, head_dim=12, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16,
          norm_topk_prob=True, **_SMALL)), torch.bfloat16),
    (Case("granitemoe", "granitemoe", heads(3, 3, num_local_experts=5, num_experts_per_tok=2, embedding_multiplier=6.0,
          residual_multiplier=0.3, logits_scaling=4.0, attention_multiplier=0.3, tie_word_embeddings=True, **_SMALL)), torch.float32),
    (Case("gpt-oss", "gpt_oss", heads(4, 1, head_dim=8, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=3,
          sliding_window=9, rope_parameters={**YARN, "truncate": False}, **_SMALL)), torch.bfloat16),
    (Case("gemma", "gemma", heads(4, 1, head_dim=16, **_SMALL)), torch.bfloat16),
    (Case("gemma2", "gemma2", heads(4, 2, head_dim=12, num_hidden_layers=4, query_pre_attn_scalar=12, sliding_window=9,
          attn_logit_softcapping=3.0, final_logit_softcapping=5.0, **_SMALL)), torch.bfloat16),
    (Case("glm4-moe", "glm4_moe", heads(2, 1, head_dim=12, num_hidden_layers=3, n_routed_experts=6, num_experts_per_tok=2,
          moe_intermediate_size=16, use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.5, **_SMALL)), torch.bfloat16),
    (Case("dots1", "dots1", heads(3, 3, n_routed_experts=5, num_experts_per_tok=3, n_shared_experts=1, moe_intermediate_size=16,
          norm_topk_prob=True, routed_scaling_factor=2.5, num_hidden_layers=2, **_SMALL)), torch.float16),
    (Case("ernie4-5-moe", "ernie4_5_moe", heads(6, 2, num_hidden_layers=3, moe_num_experts=5, moe_k=3, moe_intermediate_size=8, **_SMALL)),
     torch.float32),
    (Case("gemma3", "gemma3", heads(3, 1, head_dim=12, num_hidden_layers=6, query_pre_attn_scalar=12, sliding_window=9, **_SMALL)),
     torch.bfloat16),
    (Case("granite", "granite", heads(3, 1, embedding_multiplier=6.0, residual_multiplier=0.3, logits_scaling=4.0,
          attention_multiplier=0.3, tie_word_embeddings=True, **_SMALL)), torch.float16),
    (Case("phi3-long-partial", "phi3", heads(3, 1, partial_rotary_factor=0.5, sliding_window=200, **longrope(2, 32), **_SMALL)),
     torch.float16),
    (Case("smollm3", "smollm3", heads(2, 1, no_rope_layers=[1, 0], tie_word_embeddings=True, **_SMALL)), torch.bfloat16),
    (Case("olmo2", "olmo2", heads(2, 2, tie_word_embeddings=True, **_SMALL)), torch.float16),
    (Case("olmo3", "olmo3", heads(3, 1, num_hidden_layers=4, sliding_window=9, rope_parameters={"full_attention": YARN,
          "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}, **_SMALL)), torch.bfloat16),
    (Case("olmoe", "olmoe", heads(3, 3, num_experts=5, num_experts_per_tok=2, **_SMALL)), torch.float16),
    (Case("exaone4", "exaone4", heads(2, 1, head_dim=16, num_hidden_layers=4, sliding_window=9, tie_word_embeddings=True,
          rope_parameters=LLAMA3, **_SMALL)), torch.bfloat16),
    (Case("starcoder2", "starcoder2", heads(4, 2, hidden_size=32, sliding_window=13, intermediate_size=40, max_position_embeddings=256)),
     torch.bfloat16),
    (Case("stablelm", "stablelm", heads(3, 3, use_qkv_bias=True, partial_rotary_factor=0.5, **_SMALL)), torch.float16),
    (Case("gpt2", "gpt2", {"n_head": 3, "n_embd": 24}), torch.float32),
    (Case("opt", "opt", {"num_attention_heads": 2, "hidden_size": 24, "ffn_dim": 40}), torch.float16),
    (Case("opt-post-norm", "opt", {"num_attention_heads": 3, "hidden_size": 24, "ffn_dim": 40, "do_layer_norm_before": False,
          "word_embed_proj_dim": 10}), torch.float32),
    (Case("ernie", "ernie4_5", heads(3, 1, head_dim=12, use_bias=True, **_SMALL)), torch.bfloat16),
    (Case("glm", "glm", heads(3, 3, head_dim=8, rms_norm_eps=1e-5, **_SMALL)), torch.float16),
    (Case("glm4", "glm4", heads(4, 2, head_dim=16, **_SMALL)), torch.float32),
    (Case("seed-oss", "seed_oss", heads(4, 1, head_dim=10, **_SMALL)), torch.bfloat16),
    (Case("helium", "helium", heads(3, 3, head_dim=8, **_SMALL)), torch.bfloat16),
    (Case("ministral-types", "ministral", heads(4, 2, head_dim=8, sliding_window=9, layer_types=["full_attention", "sliding_attention"],
          **_SMALL)), torch.float16),
    (Case("gemma", "gemma", heads(4, 2, head_dim=16, **_SMALL)), torch.bfloat16),
]  # fmt: skip


def write(case: Case, dtype: torch.dtype) -> None:
    folder = OUT / case.name
    save(build(case).to(dtype), folder)
    # Loaded again and not cast back: .to(dtype) has rounded the rotary frequencies too.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt, tokens = decisive_prompt(model, 41, 64)
    np.savez_compressed(
        folder / "golden.npz",
        prompt=np.array(prompt, np.int32),
        tokens=np.array(tokens, np.int32),
        logits=logits(model, prompt + tokens).numpy(),
    )


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    for case, dtype in GOLDEN:
        write(case, dtype)
        size = sum(file.stat().st_size for file in (OUT / case.name).iterdir())
        print(f"{case.name:24} {size / 1024:6.1f} KiB")


if __name__ == "__main__":
    main()
