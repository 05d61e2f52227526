"""``quantization_config`` of a config.json: how the linears of a checkpoint are quantized and packed.

Of the formats that transformers knows: AWQ (arXiv 2306.00978, as AutoAWQ's "gemm" packs it), GPTQ (arXiv 2210.17323, as AutoGPTQ and
GPTQModel pack it), fp8 (as DeepSeek-V3, arXiv 2412.19437, and Qwen3 have it), MXFP4 (of the experts of gpt-oss), and compressed-tensors
(https://github.com/vllm-project/compressed-tensors) for weights alone ("pack-quantized"), or weights of 8 bits ("int-quantized",
"float-quantized"), whose activations its other readers round to 8 bits of the same kind.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Final, Literal

from quire.models.families.base import MAX_WIDTH, Config
from quire.models.spec import TransformerSpec

GROUPS: Final = (128, 64, 32)
"""Inputs that share a scale, as the kernels have them; the largest that fits is taken."""


@dataclass(slots=True, frozen=True)
class Packing:
    """How the numbers of a quantized linear lie in its tensors."""

    method: Literal["awq", "gptq", "pack-quantized", "int-quantized", "float-quantized", "fp8", "mxfp4"]
    bits: int
    """4 or 8"""
    group_size: int
    """Inputs that share a scale; 0: all of an output."""
    offsets: bool
    """Whether zero may be another number than the middle one."""
    rows: int = 1
    """Outputs that share scales; 0: all."""
    zero_shift: int = 0
    """What is to be added to stored zeros (the first format of GPTQ has 1)."""
    in_order: bool = True
    """False where inputs were probably sorted before they were put into groups: tensors say."""

    def kind(self, inputs: int, offsets: bool, in_order: bool) -> str:
        """What a linear is multiplied as: see TransformerSpec.stored."""
        if self.method == "mxfp4":
            return "mxfp4"
        if self.bits != 4 or not in_order:
            return "int8"
        for group in GROUPS:
            if inputs % group == 0 and (self.group_size or group) % group == 0:
                return f"int4:{group}" + ("+offsets" if offsets else "")
        return "int8"

    def stored(self, spec: TransformerSpec, packed: Container[str] | None = None) -> tuple[tuple[str, str], ...]:
        """TransformerSpec.stored, as far as configuration and names tell. packed: the linears that are quantized; None: those of layers,
        or, in MXFP4, of experts."""
        usual = ".experts." if self.method == "mxfp4" else "layers."
        found = {}
        for name, (_, inputs) in spec.quantizable().items():
            quantized = usual in name if packed is None else name in packed
            found[name] = self.kind(inputs, self.offsets, self.in_order or not self.group_size) if quantized else "int8"
        return tuple(found.items())


def packing_of(config: Config) -> Packing | None:
    """None where the weights are not quantized. Raises ModelLoadError for what is not supported."""
    values = config.values.get("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        config.refuse("'quantization_config' is not an object")
    about = Config(values, f"{config.where}: quantization_config")
    method = values.get("quant_method")
    if method == "awq":
        return _awq(about)
    if method == "gptq":
        return _gptq(about)
    if method == "compressed-tensors":
        return _compressed_tensors(about)
    if method == "fp8":
        return _fp8(about)
    if method == "mxfp4":
        return Packing("mxfp4", 4, 32, False)
    return about.refuse(
        f"quant_method {method!r:.40} is not supported; supported: awq, gptq, fp8, mxfp4, compressed-tensors. Take the model in 16 bits, "
        "as a GGUF file, or in one of these"
    )


def _awq(about: Config) -> Packing:
    version = about.values.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        about.refuse(f"version {version!r:.40} is not supported (only 'gemm')")
    bits = _only(about, "w_bit" if "w_bit" in about.values else "bits", (4,))
    size = _group(about, "q_group_size" if "q_group_size" in about.values else "group_size")
    return Packing("awq", bits, size, about.flag("zero_point", True))


def _gptq(about: Config) -> Packing:
    bits = _only(about, "bits", (4, 8))
    layout = about.values.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        about.refuse(f"checkpoint_format {layout!r:.40} is not supported (only 'gptq' and 'gptq_v2')")
    dynamic = about.values.get("dynamic")
    if dynamic and not (isinstance(dynamic, dict) and all(name.startswith("-:") for name in dynamic)):  # -: what is not quantized
        about.refuse("'dynamic', which gives layers formats of their own, is not supported")
    return Packing(
        "gptq",
        bits,
        _group(about, "group_size"),
        not about.flag("sym", True),
        zero_shift=int(layout == "gptq"),
        in_order=not about.flag("desc_act", False),
    )


def _compressed_tensors(about: Config) -> Packing:
    layout, groups = about.values.get("format"), about.values.get("config_groups")
    if layout not in ("pack-quantized", "int-quantized", "float-quantized"):
        about.refuse(f"format {layout!r:.40} is not supported (only {', '.join(_LAYOUTS)})")
    type_, widths, strategies = _LAYOUTS[layout]
    if not isinstance(groups, dict) or len(groups) != 1:
        about.refuse("'config_groups' must have one group: several formats in a model are not supported")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        about.refuse("'config_groups' says nothing about weights")
    sparsity = about.values.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        about.refuse(f"sparse weights (sparsity_config, format {sparsity['format']!r:.40}) are not supported")
    if about.values.get("transform_config"):
        about.refuse("'transform_config', which turns weights and activations, is not supported")
    if about.values.get("kv_cache_scheme") or (layout == "pack-quantized" and group.get("input_activations")):
        about.refuse("rounded activations or KV ('input_activations', 'kv_cache_scheme') are not supported in this format")
    each = Config(weights, f"{about.where}: weights")
    if each.values.get("type", "int") != type_:
        each.refuse(f"type {each.values.get('type', 'int')!r:.40} is not supported (only {type_!r} in {layout!r})")
    bits = _only(each, "num_bits", widths)
    strategy = each.values.get("strategy") or ("group" if each.values.get("group_size") else "channel")
    if strategy not in strategies:
        each.refuse(f"strategy {strategy!r:.40} is not supported (only {', '.join(strategies)} in {layout!r})")
    symmetric = each.flag("symmetric", True)
    if layout != "pack-quantized" and not symmetric:
        each.refuse(f"zeros of weights in {layout!r} are not supported")
    if strategy == "block":
        rows, size = _block(each, "block_structure")
    else:
        rows, size = int(strategy != "tensor"), _group(each, "group_size") if strategy == "group" else 0
    return Packing(layout, bits, size, not symmetric, rows, in_order=each.values.get("actorder") not in ("group", "dynamic", True))


_LAYOUTS: Final[dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]] = {
    "pack-quantized": ("int", (4, 8), ("group", "channel")),
    "int-quantized": ("int", (8,), ("channel",)),
    "float-quantized": ("float", (8,), ("channel", "tensor", "block")),
}
"""Of compressed-tensors: format → type of the numbers, their bits, and what shares a scale."""


def _fp8(about: Config) -> Packing:
    if about.values.get("fmt", "e4m3") != "e4m3":
        about.refuse(f"fmt {about.values['fmt']!r:.40} is not supported (only 'e4m3')")
    if about.values.get("weight_block_size") is None:
        return Packing("float-quantized", 8, 0, False, rows=0)
    rows, size = _block(about, "weight_block_size")
    return Packing("fp8", 8, size, False, rows)


def _block(config: Config, name: str) -> tuple[int, int]:
    """Outputs and inputs of a block."""
    value = config.values.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n <= MAX_WIDTH for n in value):
        config.refuse(f"{name!r} must be two numbers above 0, got {value!r:.40}")
    return value[0], value[1]


def _only(config: Config, name: str, choices: tuple[int, ...]) -> int:
    value: Any = config.values.get(name)
    if isinstance(value, bool) or value not in choices:
        config.refuse(f"{name} {value!r:.40} is not supported (only {' and '.join(map(str, choices))})")
    return int(value)


def _group(config: Config, name: str) -> int:
    """-1 in the file: one scale for each output."""
    if config.values.get(name) == -1:
        return 0
    return config.integer(name, low=1)
