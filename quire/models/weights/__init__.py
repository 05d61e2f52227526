"""Loading a model folder (config.json → TransformerSpec, safetensors files → canonical tensors, mapped and not copied), or a GGUF file."""

from __future__ import annotations

from quire.models.weights.checkpoint import load_model, load_spec, read_headers, resolve_model, weight_files
from quire.models.weights.content import content_digest
from quire.models.weights.model import Blocks, Model, no_blocks
from quire.models.weights.safetensors import TensorInfo

__all__ = [
    "Blocks", "Model", "TensorInfo", "content_digest", "load_model", "load_spec", "no_blocks", "read_headers", "resolve_model",
    "weight_files",
]  # fmt: skip
