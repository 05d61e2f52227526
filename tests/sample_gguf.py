"""GGUF files for tests, written with the gguf library: of any fields and tensors, or of the embedded model, as llama.cpp converts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quire.models.weights import load_model, resolve_model

TINY = {
    "block_count": 2, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
    "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5000.0, "rope.dimension_count": 16,
}  # fmt: skip
TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>", *map(chr, range(ord("a"), ord("z") + 1)), "ab", "Ġa"]


def tokenizer_fields(tokens: list[str] = TOKENS) -> dict[str, Any]:
    """Byte-level BPE with one merge."""
    types = [3 if token.startswith("<") else 1 for token in tokens]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2}  # fmt: skip


def tiny_fields(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """Of a model with two layers; a change to None leaves a field out. Underlined names stand for ones with dots."""
    fields: dict[str, Any] = {
        "general.architecture": arch,
        **{f"{arch}.{name}": value for name, value in TINY.items()},
        **tokenizer_fields(),
    }
    for name, value in changes.items():
        fields[name.replace("__", ".")] = value
    return {name: value for name, value in fields.items() if value is not None}


def tiny_tensors(vocab: int = len(TOKENS), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    h, f, q, kv = 64, 96, 64, 32
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, h), "output_norm.weight": (h,), "output.weight": (vocab, h)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in {
            "attn_norm": (h,), "ffn_norm": (h,), "attn_q": (q, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, q),
            "ffn_gate": (f, h), "ffn_up": (f, h), "ffn_down": (h, f)}.items()}  # fmt: skip
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


MIXED = {"attn_v": "Q8_0", "ffn_down": "Q4_1", "token_embd": "Q8_0", "output": "Q8_0"}
"""In a file of the kind ``mixed``, which is Q4_K else: as Q4_K_M is, whose 6 bits the library can't write, for widths of 32."""


def quantize(array: np.ndarray, kind: str) -> np.ndarray:
    """Rows of blocks, in bytes. The library has no Q4_K: here is a plain one, with the least and the greatest number of a group exact but
    for the 6 bits that scale and minimum have."""
    if kind != "Q4_K":
        return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])
    groups = array.reshape(-1, 8, 32)
    least = np.maximum(-groups.min(-1), 0)
    scale = (groups.max(-1) + least) / 15
    factors = [(np.maximum(each.max(-1, keepdims=True), 1e-9) / 63).astype(np.float16) for each in (scale, least)]
    six = [np.rint(each / factor.astype(np.float32)).astype(np.uint8) for each, factor in zip((scale, least), factors, strict=True)]
    step, under = (number * factor.astype(np.float32) for number, factor in zip(six, factors, strict=True))
    numbers = np.clip(np.rint((groups + under[..., None]) / np.maximum(step, 1e-12)[..., None]), 0, 15).astype(np.uint8)
    (low, high), (low_min, high_min) = ((each[:, :4], each[:, 4:]) for each in six)
    packed = np.concatenate([low | high >> 4 << 6, low_min | high_min >> 4 << 6, (high & 15) | (high_min & 15) << 4], axis=-1)
    pairs = numbers.reshape(-1, 4, 2, 32)
    halves = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    blocks = np.concatenate([*(factor.view(np.uint8) for factor in factors), packed, halves], axis=-1)
    return blocks.reshape(len(array), -1)


def write_gguf(
    path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32", other: dict[str, str] | None = None, **parts: Any
) -> Path:
    """kind: of what has two dimensions or three; other: of some of it, maybe blocks already. parts: further arguments of the writer."""
    writer = gguf.GGUFWriter(path, fields.get("general.architecture", "none"), **parts)
    for name, value in fields.items():
        if name == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, array in tensors.items():
        part = name.split(".")[-2]
        each = MIXED.get(part, "Q4_K") if kind == "mixed" else (other or {}).get(part, kind)
        if array.ndim > 1 and each != "F32" and not name.endswith(".bias"):
            blocks = array if array.dtype == np.uint8 else quantize(array, each)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[each])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_NAMES = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output", "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k",
          "v": "attn_v", "o": "attn_output", "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}  # fmt: skip


def embedded_gguf(path: Path, kind: str = "F32", **fields: Any) -> Path:
    """The model that ships with the package. Its tokenizer cuts words in a way of its own, which no GGUF file can say: Llama 3's stands
    in, so prompts have to be tokens where results are compared."""
    model = load_model(resolve_model("embedded"))
    spec, tensors = model.spec, {}
    for name, array in model.tensors.items():
        *layer, part, parameter = name.split(".")
        if part in ("q", "k"):
            heads = spec.num_heads if part == "q" else spec.num_kv_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"blk.{layer[1]}." if layer else ""
        tensors[f"{prefix}{_NAMES[part]}.{parameter}"] = np.ascontiguousarray(array, np.float32)
    made: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": spec.num_layers, "llama.context_length": spec.max_positions,
        "llama.embedding_length": spec.hidden_size, "llama.feed_forward_length": spec.intermediate_size,
        "llama.attention.head_count": spec.num_heads, "llama.attention.head_count_kv": spec.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": spec.norm_eps, "llama.rope.freq_base": spec.rope.theta,
        "llama.rope.dimension_count": spec.rope.rotary_dim,
    }  # fmt: skip
    return write_gguf(path, made | _embedded_tokenizer() | fields, tensors, kind)


def _embedded_tokenizer() -> dict[str, Any]:
    import json

    folder = resolve_model("embedded")
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    special = {token["content"] for token in made["added_tokens"] if token["special"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens], "tokenizer.ggml.merges": merges,
    }  # fmt: skip
    for role, name in (("bos_token", "bos"), ("eos_token", "eos")):
        if isinstance(token := config.get(role), str):
            fields[f"tokenizer.ggml.{name}_token_id"] = vocabulary[token]
    if isinstance(template := config.get("chat_template"), str):
        fields["tokenizer.chat_template"] = template
    return fields
