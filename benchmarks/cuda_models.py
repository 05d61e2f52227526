"""Models of known shapes with random weights, made on the device: for measuring steps, where what the weights say does not matter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.backends.cuda.backend import CudaBackend
from quire.backends.cuda.decoder import Decoder
from quire.backends.cuda.memory import device_room
from quire.backends.cuda.weights import Loader
from quire.backends.memory import KVMemory, context_length, kv_memory
from quire.backends.progress import Progress
from quire.config import EngineConfig
from quire.models.families import find_family, spec_from_config
from quire.models.spec import TransformerSpec

_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256, "torch_dtype": "bfloat16", "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "rope_scaling": _LLAMA3,
    },
    "Llama-3.2-1B": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": _LLAMA3 | {"factor": 32.0},
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 500, "tie_word_embeddings": True, "torch_dtype": "float32",
        "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""config.json of each. The 8B's and 1B's contexts are cut to 16,384: nothing here is longer, and tables of rows grow with it."""


class DeviceLoader(Loader):
    """Of tensors that are on the device already, or are drawn there: N(0, 0.02²), norms 1."""

    def __init__(self, spec: TransformerSpec, device: torch.device, ops: Any, given: dict[str, Tensor] | None = None,
                 same: bool = False) -> None:  # fmt: skip
        shapes = {name: torch.empty(shape, device="meta") for name, shape in spec.tensor_shapes().items()}
        super().__init__(shapes, device, spec.dtype, None, ops, Progress("making weights", 1), lambda: None, same)
        self._given, self._drawn = given, torch.Generator(device).manual_seed(0)

    def _copy(self, name: str, array: Any, there: Tensor) -> None:
        if self._given is not None:
            there.copy_(self._given[name])
        elif there.ndim == 1 and not name.endswith("bias"):
            there.fill_(1.0)
        else:
            there.normal_(0.0, 0.02, generator=self._drawn)


def make_decoder(name: str, device: torch.device, ops: Any, given: dict[str, Tensor] | None = None, same: bool = False) -> Decoder:
    """given: the weights by their canonical names; None draws them. same: as --deterministic has products."""
    spec = spec_from_config(SHAPES[name])
    with torch.inference_mode():
        return Decoder(spec, DeviceLoader(spec, device, ops, given, same), ops, device, spec.max_positions)


def canonical(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers by canonical names."""
    spec = spec_from_config(SHAPES[name])
    family = find_family(SHAPES[name], "config.json")
    stripped = {family.strip(key): tensor for key, tensor in state.items()}
    return {key: stripped[source.name] for key, source in family.sources(spec).items()}


def make_backend(decoder: Decoder, device: torch.device, ops: Any, most_blocks: int = 0, **options: Any) -> CudaBackend:
    """most_blocks: a pool of so many; 0: as large as memory allows."""
    spec = decoder.spec
    config = EngineConfig(device="cuda" if device.type == "cuda" else "torch-cpu", dtype=spec.dtype, **options)
    length = context_length(config, spec)
    make = partial(CudaBackend, spec, Path(), decoder, ops, config, max_model_len=length, device=device)
    memory = KVMemory(most_blocks, 0)
    if not most_blocks:
        memory = kv_memory(config, spec, length, device_room(config, decoder, length, device, make))
    backend = make(memory=memory)
    if config.cuda_graphs:
        backend.capture()
    return backend
