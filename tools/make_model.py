"""Write a model with random weights, in Hugging Face format and of a realistic size: for benchmarks and load tests.

    .venv/bin/python tools/make_model.py --shape llama-160m --out DIR [--dtype float32] [--seed 0]

The folder is complete (config, generation config, tokenizer, chat template, weights): Quire, transformers and other engines
load it. The same arguments give the same bytes. Weights are written tensor by tensor, so little memory is needed. What
the model says is noise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from quire.models.families import find_family, spec_from_config

VOCAB = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "llama-160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
                   "head_dim": 64, "intermediate_size": 2048},
    "llama-0.5b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
                   "head_dim": 128, "intermediate_size": 3072},
    "moe-1.3b": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 24,
                 "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 512,
                 "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 8, "norm_topk_prob": True},
    "gemma3-1b": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26,
                  "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 6912, "vocab_size": 262_144,
                  "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 512,
                  "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 32_768},
    "gpt-oss-20b": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "vocab_size": 201_088,
                    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0, "attention_bias": True,
                    "tie_word_embeddings": False, "max_position_embeddings": 131_072, "rope_theta": 150_000.0,
                    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                                     "original_max_position_embeddings": 4096},
                    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
                        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}},
}  # fmt: skip
"""What config.json has that Llama's with tied embeddings and the tokenizer's vocabulary would not."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MXFP4_POWER = 120  # times what the floats of 4 bits are on average, near INIT_SCALE
INIT_SCALE = 0.02
CHUNK = 1 << 22  # elements drawn at a time


def make_config(shape: str, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": INIT_SCALE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": dtype,
        "use_cache": True,
        **SHAPES[shape],
    }


def make_merges() -> Iterator[tuple[str, str]]:
    """Byte-pair merges, best first: letters paired by their frequency in English, then triples, then words' beginnings.

    A space is "Ġ" in the byte-level alphabet. English comes out at a little over two characters a token, about half
    of what a trained vocabulary reaches.
    """
    letters = "etaoinshrdlcumwfgypbvkjxqz"

    def by_rank(length: int) -> list[str]:
        ranked = sorted(product(range(26), repeat=length), key=lambda ids: (math.prod(i + 1 for i in ids), ids))
        return ["".join(letters[i] for i in ids) for ids in ranked]

    pairs, triples = by_rank(2), by_rank(3)
    spaces = [("Ġ" * n, "Ġ" * n) for n in (1, 2, 4, 8)]
    digits = [(a, b) for a in "0123456789" for b in "0123456789"]
    words = [("Ġ", w) for w in (*pairs, *letters)]
    merges = [*spaces, *digits, *((p[0], p[1]) for p in pairs), *((t[:2], t[2]) for t in triples)]
    room = VOCAB - len(SPECIAL) - 256 - len(merges) - len(words)
    # A beginning of three letters must be merged before the shorter one takes its place.
    yield from (*merges, *(("Ġ", t) for t in triples[:room]), *words)


def write_tokenizer(out: Path) -> None:
    """tokenizer.json (byte-level BPE, every text round-trips, every id decodes) and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = list(make_merges())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *(a + b for a, b in merges)])}
    assert len(vocab) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "additional_special_tokens": SPECIAL[1:],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", config)


def write_weights(out: Path, config: dict[str, Any], dtype: str, seed: int) -> int:
    """model.safetensors: norms 1, the rest normal with INIT_SCALE, each tensor drawn from its own stream; any floats of 4 bits in MXFP4.
    Returns parameters."""
    spec, tensors = spec_from_config(config), stored_tensors(config)
    width = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * (1 if is_packed(name) else width)
        header[name] = {"dtype": "U8" if is_packed(name) else STORED[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned, so that they can be mapped
    partial = out / "model.safetensors.partial"
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (name, shape) in enumerate(tensors.items()):
            draw = np.random.Generator(np.random.Philox(key=[seed, index]))
            left = math.prod(shape)
            while left:
                count = min(left, CHUNK)
                if is_packed(name):
                    drawn = draw.bytes(count) if name.endswith("_blocks") else bytes([MXFP4_POWER]) * count
                elif "norm" in name:
                    drawn = as_dtype(np.ones(count, np.float32), dtype).tobytes()
                else:
                    drawn = as_dtype(draw.standard_normal(count, np.float32) * np.float32(INIT_SCALE), dtype).tobytes()
                file.write(drawn)
                left -= count
    partial.replace(out / "model.safetensors")
    return spec.num_parameters()


def stored_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of all that the checkpoint has; a fused tensor once."""
    spec, family = spec_from_config(config), find_family(config)
    shapes, found = spec.tensor_shapes(), {}
    for canonical, source in family.sources(spec).items():
        name, shape = source.name, source.stored_shape(shapes[canonical])
        if not name.startswith("lm_head"):
            name = family.prefixes[0] + name
        if "quantization_config" in config and len(shape) == 3:
            experts, inputs, outputs = shape
            found[f"{name}_blocks"] = (experts, outputs, inputs // 32, 16)
            found[f"{name}_scales"] = (experts, outputs, inputs // 32)
        else:
            found[name] = shape
    return found


def is_packed(name: str) -> bool:
    return name.endswith(("_blocks", "_scales"))


def as_dtype(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16)
    return values.astype(dtype)


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def make_model(shape: str, out: Path, dtype: str = "float32", seed: int = 0) -> int:
    """Write the whole folder. Returns the number of parameters."""
    out.mkdir(parents=True, exist_ok=True)
    config = make_config(shape, dtype)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"eos_token_id": [0, 2], "do_sample": False})
    write_tokenizer(out)
    return write_weights(out, config, dtype, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--dtype", default="float32", choices=sorted(STORED))
    parser.add_argument("--seed", default=0, type=int)
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    try:
        parameters = make_model(arguments.shape, arguments.out, arguments.dtype, arguments.seed)
    except OSError as e:
        parser.exit(1, f"can't write {arguments.out}: {e.strerror}\n")
    print(f"{arguments.out}: {arguments.shape}, {parameters / 1e6:.1f} million parameters, {arguments.dtype}")


if __name__ == "__main__":
    main()
