"""``quantization_config`` of a config.json: how the linears of a checkpoint are quantized and packed.

Three of the formats that transformers knows: AWQ (arXiv 2306.00978, as AutoAWQ's "gemm" packs it), GPTQ (arXiv 2210.17323, as AutoGPTQ
and GPTQModel pack it), and compressed-tensors (https://github.com/vllm-project/compressed-tensors) for weights alone ("pack-quantized")
or weights of 8 bits with activations that are rounded as they come ("int-quantized").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from quire.models.families.base import Config
from quire.models.spec import TransformerSpec

GROUPS: Final = (128, 64, 32)
"""Inputs that share a scale, as the kernels have them; the largest that fits is taken."""


@dataclass(slots=True, frozen=True)
class Packing:
    """How the numbers of a quantized linear lie in its tensors."""

    method: Literal["awq", "gptq", "pack-quantized", "int-quantized"]
    bits: int
    """4 or 8"""
    group_size: int
    """Inputs that share a scale; 0: all of an output."""
    offsets: bool
    """Whether zero may be another number than the middle one."""
    zero_shift: int = 0
    """What is to be added to stored zeros (the first format of GPTQ has 1)."""
    in_order: bool = True
    """False where inputs were sorted before they were put into groups."""

    def kind(self, inputs: int, offsets: bool) -> str:
        """What a linear is multiplied as: see TransformerSpec.stored."""
        if self.bits != 4 or not self.in_order:
            return "int8"
        for group in GROUPS:
            if inputs % group == 0 and (self.group_size or group) % group == 0:
                return f"int4:{group}" + ("+offsets" if offsets else "")
        return "int8"

    def stored(self, spec: TransformerSpec) -> tuple[tuple[str, str], ...]:
        """TransformerSpec.stored, where nothing but the configuration is known: all linears of the layers are quantized."""
        shapes = {name.removesuffix(".weight"): shape for name, shape in spec.tensor_shapes().items() if len(shape) == 2}
        layers = {name: self.kind(shape[1], self.offsets) for name, shape in shapes.items() if name.startswith("layers.")}
        others = {name: "int8" for name in shapes if name not in layers and name not in ("positions", "embed")}
        return tuple((layers | others | ({"embed": "int8"} if spec.tied else {})).items())


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
    return about.refuse(
        f"quant_method {method!r:.40} is not supported; supported: awq, gptq, compressed-tensors. Take the model in 16 bits, as a GGUF "
        "file, or in one of these"
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
    if about.values.get("dynamic"):
        about.refuse("'dynamic', which gives layers formats of their own, is not supported")
    return Packing(
        "gptq", bits, _group(about, "group_size"), not about.flag("sym", True), int(layout == "gptq"), not about.flag("desc_act", False)
    )


def _compressed_tensors(about: Config) -> Packing:
    layout, groups = about.values.get("format"), about.values.get("config_groups")
    if layout not in ("pack-quantized", "int-quantized"):
        about.refuse(f"format {layout!r:.40} is not supported (only 'pack-quantized' and 'int-quantized')")
    if not isinstance(groups, dict) or len(groups) != 1:
        about.refuse("'config_groups' must have one group: several formats in a model are not supported")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        about.refuse("'config_groups' says nothing about weights")
    if about.values.get("kv_cache_scheme") or (layout == "pack-quantized" and group.get("input_activations")):
        about.refuse("rounded activations or KV ('input_activations', 'kv_cache_scheme') are not supported in this format")
    each = Config(weights, f"{about.where}: weights")
    if each.values.get("type", "int") != "int":
        each.refuse(f"type {each.values['type']!r:.40} is not supported (only 'int')")
    bits = _only(each, "num_bits", (4, 8) if layout == "pack-quantized" else (8,))
    strategy = each.values.get("strategy") or ("group" if each.values.get("group_size") else "channel")
    if strategy not in (("group", "channel") if layout == "pack-quantized" else ("channel",)):
        each.refuse(f"strategy {strategy!r:.40} is not supported")
    symmetric = each.flag("symmetric", True)
    if layout == "int-quantized" and not symmetric:
        each.refuse("zeros of weights in 'int-quantized' are not supported")
    size = _group(each, "group_size") if strategy == "group" else 0
    return Packing(layout, bits, size, not symmetric, in_order=each.values.get("actorder") not in ("group", True))


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
