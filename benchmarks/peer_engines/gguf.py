"""The model as llama.cpp reads it: a GGUF file of the same weights, in float32, bfloat16, float16, Q8_0 or Q4_0; experts that are MXFP4
stay so.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Written here, so that nothing needs to be installed, and so
that the widths are what they are called: llama-quantize keeps the output matrix in Q6_K when it makes Q4_0, which is slower.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.errors import ModelLoadError
from quire.models.spec import TransformerSpec
from quire.models.weights import Model, load_model

ALIGNMENT: Final = 32
GROUP: Final = 32
TYPES: Final = {"f32": (0, 0), "f16": (1, 1), "q4": (2, 2), "q8": (8, 7), "bf16": (30, 32)}
"""Width → GGML type of a tensor, and file type of a model whose matrices have it. Vectors are float32 in all of them."""
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
NAMES: Final = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output", "attn_norm": "attn_norm", "q": "attn_q",
                "k": "attn_k", "v": "attn_v", "o": "attn_output", "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up",
                "down": "ffn_down", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "router": "ffn_gate_inp",
                "sinks": "attn_sinks"}  # fmt: skip
ARCHITECTURES: Final = {"LlamaForCausalLM": "llama", "Qwen3MoeForCausalLM": "qwen3moe", "GptOssForCausalLM": "gpt-oss"}
_MXFP4: Final = 39
"""GGML type of experts that are stored so, whatever the width of the rest."""
_SCALING: Final = {"GptOssForCausalLM": "yarn"}
_BLOCKS: Final = {"q8": 34, "q4": 18, "mxfp4": 17}
CHUNK: Final = 1 << 22  # elements converted at a time


def write_gguf(model: Path, out: Path, width: str) -> None:
    """Write ``model`` (a folder) to ``out``. Raises ModelLoadError where this writer does not know the architecture."""
    opened = load_model(model)
    spec, tensors, shapes = opened.spec, opened.tensors, opened.spec.tensor_shapes()
    if spec.architecture not in ARCHITECTURES or spec.rope is None or spec.rope.scaling != _SCALING.get(spec.architecture, "none"):
        known = " and ".join(ARCHITECTURES)
        raise ModelLoadError(f"benchmarks/peer_engines/gguf.py writes plain {known} only, and {model} is {spec.architecture}")
    values = [*_hyperparameters(spec, TYPES[width][1], model.resolve().name), *_vocabulary(model, spec)]
    infos, offset = b"", 0
    stacks: dict[str, list[str]] = {}
    widths = {name: _width(name, shape, "mxfp4" if _packed_experts(opened, name) else width) for name, shape in shapes.items()}
    for name in shapes:
        stacks.setdefault(_name(name, spec), []).append(name)
    for name, members in stacks.items():
        each = widths[members[0]]
        shape = (*((len(members),) if "_exps" in name else ()), *shapes[members[0]])
        encoded = name.encode()
        infos += struct.pack("<Q", len(encoded)) + encoded + struct.pack("<I", len(shape))
        kind = _MXFP4 if each == "mxfp4" else TYPES[each][0]
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)
        offset += _padded(len(members) * _nbytes(shapes[members[0]], each))
    part = out.with_suffix(".part")
    with part.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(stacks), len(values)) + b"".join(values) + infos)
        file.write(bytes(-file.tell() % ALIGNMENT))
        for members in stacks.values():
            for member in members:
                if (blocks := _packed_experts(opened, member)) is not None:
                    file.write(_as_mxfp4(blocks()).tobytes())
                    continue
                for piece in _pieces(_interleaved(member, tensors[member], spec)):
                    file.write(encode(np.asarray(piece, np.float32), widths[member]).tobytes())
            file.write(bytes(-file.tell() % ALIGNMENT))
    opened.close()
    part.rename(out)


def encode(values: npt.NDArray[np.float32], width: str) -> npt.NDArray[Any]:
    """float32 of any shape whose last axis is a multiple of 32 → what a GGUF tensor of that width stores.

    Q8_0: groups of 32, a float16 scale (the largest magnitude / 127), then 32 signed bytes. Q4_0: a float16 scale (the value of
    largest magnitude / -8), then 16 bytes: element i in the low, i + 16 in the high four bits, plus 8.
    """
    if width == "f32":
        return values
    if width in ("f16", "bf16"):
        return values.astype(np.float16 if width == "f16" else ml_dtypes.bfloat16)
    groups = values.reshape(-1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1, keepdims=True), 1)
    scale = np.abs(largest) / np.float32(127) if width == "q8" else largest / np.float32(-8)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    scaled = groups * inverse
    if width == "q8":
        stored = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8).view(np.uint8)
    else:
        fours = np.minimum(15, scaled + np.float32(8.5)).astype(np.uint8)
        stored = fours[:, : GROUP // 2] | fours[:, GROUP // 2 :] << 4
    return np.concatenate([scale.astype(np.float16).view(np.uint8), stored], axis=1)


def _hyperparameters(spec: TransformerSpec, file_type: int, name: str) -> Iterator[bytes]:
    assert spec.rope is not None
    prefix = ARCHITECTURES[spec.architecture]
    yield _value("general.architecture", STRING, prefix)
    yield _value("general.name", STRING, name)
    yield _value("general.file_type", UINT32, file_type)
    yield _value("general.alignment", UINT32, ALIGNMENT)
    for key, number in {
        "vocab_size": spec.vocab_size, "context_length": spec.max_positions, "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers, "feed_forward_length": spec.intermediate_size, "rope.dimension_count": spec.head_dim,
        "attention.head_count": spec.num_heads, "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim,
        **({"expert_count": spec.num_experts, "expert_used_count": spec.experts_per_token,
            "expert_feed_forward_length": spec.intermediate_size} if spec.num_experts else {}),
    }.items():  # fmt: skip
        yield _value(f"{prefix}.{key}", UINT32, number)
    yield _value(f"{prefix}.attention.layer_norm_rms_epsilon", FLOAT32, spec.norm_eps)
    yield _value(f"{prefix}.rope.freq_base", FLOAT32, spec.rope.theta)
    if any(spec.windows):
        yield _value(f"{prefix}.attention.sliding_window", UINT32, max(spec.windows))
    if spec.rope.scaling == "yarn":
        yield _value(f"{prefix}.rope.scaling.type", STRING, "yarn")
        yield _value(f"{prefix}.rope.scaling.factor", FLOAT32, spec.rope.factor)
        yield _value(f"{prefix}.rope.scaling.original_context_length", UINT32, spec.rope.original_max_positions)


def _vocabulary(model: Path, spec: TransformerSpec) -> Iterator[bytes]:
    """Byte-level BPE, as tokenizer.json has it. Prompts are sent as token ids, so the pre-tokenizer does not matter."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    bpe = tokenizer["model"]
    if bpe["type"] != "BPE":
        raise ModelLoadError(f"{model}/tokenizer.json: only BPE is written to GGUF here, got {bpe['type']}")
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {i: text for text, i in bpe["vocab"].items()} | special
    tokens = [by_id.get(i, f"<unused {i}>") for i in range(spec.vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    yield _value("tokenizer.ggml.model", STRING, "gpt2")
    yield _value("tokenizer.ggml.pre", STRING, "gpt-2")
    yield _array("tokenizer.ggml.tokens", STRING, tokens)
    yield _array("tokenizer.ggml.token_type", 5, [3 if i in special else 1 for i in range(spec.vocab_size)])
    yield _array("tokenizer.ggml.merges", STRING, merges)
    if spec.eos_token_ids:
        yield _value("tokenizer.ggml.eos_token_id", UINT32, spec.eos_token_ids[0])
    yield _value("tokenizer.ggml.add_bos_token", BOOL, False)


def _packed_experts(model: Model, name: str) -> Callable[[], npt.NDArray[np.uint8]] | None:
    """The blocks of a linear that is stored in MXFP4."""
    kept = model.blocks(name)
    return kept[1] if kept is not None and kept[0] == "mxfp4" else None


def _as_mxfp4(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """[rows, groups * 20], half of a group's power in float32 and its numbers, neighbours in a byte → the power's exponent and the numbers,
    those of the first half of a group in the low halves of bytes."""
    groups = blocks.reshape(-1, 20)
    power = (groups[:, :4].copy().view(np.uint32) >> 23) + 1
    codes = np.stack([groups[:, 4:] & 15, groups[:, 4:] >> 4], axis=-1).reshape(len(groups), GROUP)
    return np.concatenate([power.astype(np.uint8), codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4], axis=1)


def _name(canonical: str, spec: TransformerSpec) -> str:
    """layers.3.q.weight → blk.3.attn_q.weight; all experts of a layer are one tensor."""
    module, _, parameter = canonical.rpartition(".")
    if ".experts." in module:
        layer, _, part = module.rpartition(".")
        return f"{layer.partition('.experts.')[0].replace('layers.', 'blk.')}.{NAMES[part]}_exps.{parameter}"
    head, _, part = module.rpartition(".")
    name = "post_attention_norm" if part == "mlp_norm" and spec.attention_sinks else NAMES[part]
    return f"{head.replace('layers.', 'blk.')}{'.' if head else ''}{name}.{parameter}"


def _interleaved(name: str, array: npt.NDArray[Any], spec: TransformerSpec) -> npt.NDArray[Any]:
    """llama.cpp rotates neighbours where the checkpoint rotates halves: the rows of each head of q and k change places."""
    if spec.architecture != "LlamaForCausalLM" or name.split(".")[-2] not in ("q", "k"):
        return array
    return array.reshape(-1, 2, spec.head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _width(name: str, shape: tuple[int, ...], width: str) -> str:
    """Vectors and routers are float32."""
    return width if len(shape) == 2 and ".router." not in name else "f32"


def _pieces(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    rows = max(1, CHUNK // array.shape[-1]) if array.ndim == 2 else len(array)
    for at in range(0, len(array), rows):
        yield array[at : at + rows]


def _nbytes(shape: tuple[int, ...], width: str) -> int:
    if len(shape) != 2:
        return prod(shape) * 4
    if width in _BLOCKS:
        if shape[1] % GROUP:
            raise ModelLoadError(f"rows of {shape[1]} can't be cut into groups of {GROUP}")
        return prod(shape) // GROUP * _BLOCKS[width]
    return prod(shape) * (4 if width == "f32" else 2)


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _value(key: str, kind: int, value: Any) -> bytes:
    return _string(key) + struct.pack("<I", kind) + _packed(kind, value)


def _array(key: str, kind: int, values: list[Any]) -> bytes:
    return _string(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(_packed(kind, value) for value in values)


def _packed(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else struct.pack({UINT32: "<I", 5: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
