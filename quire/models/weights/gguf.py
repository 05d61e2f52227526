"""A model in a GGUF file: its spec from the metadata, its tensors as views of the file or, where they are quantized, as they are asked for.

What a type's bytes mean is the gguf library's part. Linears of 4 bits that the kernels can multiply are kept; other quantized ones are
quantized again when they are packed: int8 adds 0.2 % at most to the perplexity of whatever the file has (docs/gguf.md).
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from quire.errors import ModelLoadError
from quire.gguf import TYPES, Gguf, GgufTensor, read_gguf
from quire.models.families import Source, spec_from_config
from quire.models.families.gguf import FACTORS, as_converted, config_of, guessing_layers, sources_of
from quire.models.spec import TransformerSpec
from quire.models.weights.messages import some
from quire.models.weights.model import Made, Model
from quire.models.weights.order import in_halves
from quire.models.weights.safetensors import array_dtype, map_file

_FLOATS: Final = ("F32", "F16", "BF16")
_KEPT: Final = {"Q4_0": "int4:32", "Q4_1": "int4:32+offsets", "Q4_K": "int4:32+offsets", "MXFP4": "mxfp4"}
"""Types that are multiplied as they are → what TransformerSpec.stored calls them."""
_CHUNK: Final = 1 << 16
"""Values that are widened at a time: they stay in a core's cache."""

Maps = dict[Path, mmap.mmap]
Widen = Callable[[npt.NDArray[np.uint8], str, npt.NDArray[np.float16]], bool]
"""(a tensor's blocks [rows, bytes of a row], name of its type, out [rows, values]) → whether ``out`` was filled: not every type may be
known. As the native kernels have it; without one the gguf library does it, at a fiftieth of the speed."""


def gguf_spec(path: Path) -> TransformerSpec:
    """The spec of a GGUF file. Raises ModelLoadError."""
    model = read_gguf(path)
    return _spec(model, {})


def gguf_files(path: Path) -> list[Path]:
    """All files of a model, the given one being the first. Raises ModelLoadError."""
    return sorted({path, *(tensor.file for tensor in read_gguf(path).tensors.values())})


def load_gguf(path: Path, widen: Widen | None = None) -> Model:
    """Open a GGUF file, or the files whose first it is. Raises ModelLoadError, naming field or tensor."""
    model, maps = read_gguf(path), Maps()
    spec = _spec(model, maps)
    sources = _match(model, spec)
    used = {source.name: model.tensors[source.name] for source in sources.values()}
    maps = {file: maps.get(file) or map_file(file) for file in dict.fromkeys(tensor.file for tensor in used.values())}
    widths = {name: 4 if used[source.name].type == "F32" else 2 for name, source in sources.items()}
    nbytes = sum(prod(shape) * widths[name] for name, shape in spec.tensor_shapes().items())
    tensors = _Tensors(sources, used, maps, widen)
    made = Made({name: partial(tensors.array, name) for name in sources})
    return Model(spec, path, made, list(maps.values()), nbytes, tensors.blocks)


def _spec(model: Gguf, maps: Maps) -> TransformerSpec:
    """maps: gets the files of which tensors had to be read."""
    factors = {}
    for name in FACTORS:
        if (tensor := model.tensors.get(name)) is not None:
            if len(tensor.shape) != 1 or tensor.type not in _FLOATS or tensor.shape[0] > 1 << 16:
                model.refuse(f"has {name} of the type {tensor.type} and the shape {list(tensor.shape)}, which is no list of factors")
            if tensor.file not in maps:
                maps[tensor.file] = map_file(tensor.file)
            factors[name] = tuple(float(value) for value in _floats(_bytes(maps[tensor.file], tensor), tensor)[:, 0])
            if not all(0 < value < 1e6 for value in factors[name]):
                model.refuse(f"has a factor in {name} that is not above 0 and below 1e+06")
    values, generation = config_of(model, factors)
    spec = as_converted(spec_from_config(values, generation, str(model.path)), factors, model)
    stored: Counter[str] = Counter()
    for name, tensor in model.tensors.items():
        if len(tensor.shape) > 1 and name.startswith("blk."):
            stored[tensor.type] += prod(tensor.shape)
    most = stored.most_common(1)[0][0] if stored else "F32"
    dtype = {"F32": "float32", "BF16": "bfloat16"}.get(most, "float16")
    if most in _FLOATS:
        return replace(spec, dtype=dtype)
    sources = sources_of(model, spec)
    found = {name: model.tensors.get(sources[f"{name}.weight"].name) for name in spec.quantizable()}
    held = {name: tensor.type for name, tensor in found.items() if tensor is not None}
    return replace(spec, dtype=dtype, stored=tuple((name, _KEPT.get(kind, "int8")) for name, kind in held.items()))


def _match(model: Gguf, spec: TransformerSpec) -> dict[str, Source]:
    """Canonical name → source, where the file has exactly the tensors that the spec asks for."""
    shapes, sources = spec.tensor_shapes(), sources_of(model, spec)
    wanted = {source.name: source.stored_shape(shapes[name]) for name, source in sources.items()}
    if missing := [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in model.tensors]:
        model.refuse(f"lacks {some(missing, 'tensor')} that its architecture, {model.architecture}, has")
    left_out = (f"blk.{spec.num_layers}.",) if guessing_layers(model) else ()
    known = {*wanted, *FACTORS}
    if extra := [f"{name} {list(t.shape)}" for name, t in model.tensors.items() if name not in known and not name.startswith(left_out)]:
        model.refuse(f"has {some(extra, 'tensor')} that the architecture {model.architecture} does not have here")
    for name, shape in wanted.items():
        tensor = model.tensors[name]
        if tensor.shape != shape:
            model.refuse(f"has the tensor {name} of the shape {list(tensor.shape)}, and its fields ask for {list(shape)}")
        if tensor.type not in _FLOATS and (len(shape) == 1 or TYPES[tensor.kind][1] == 1):
            model.refuse(f"has the tensor {name} in the type {tensor.type}, which is not supported for it")
    return sources


class _Tensors:
    """Canonical name → array: a view of the mapped file, or float16 that is made; and blocks."""

    def __init__(self, sources: Mapping[str, Source], infos: Mapping[str, GgufTensor], maps: Maps, widen: Widen | None) -> None:
        self._sources, self._infos, self._maps, self._widen = sources, infos, maps, widen

    def array(self, name: str) -> npt.NDArray[Any]:
        """In its canonical shape."""
        rows, tensor = self._rows(name)
        found = _floats(rows, tensor) if tensor.type in _FLOATS else self._dequantized(rows, tensor)
        return found[:, 0] if len(tensor.shape) == 1 + (self._sources[name].expert is not None) else found

    def blocks(self, name: str) -> tuple[str, Callable[[], npt.NDArray[np.uint8]]] | None:
        """See Model."""
        type_ = self._infos[self._sources[name].name].type
        return (type_, lambda: self._rows(name)[0]) if type_ in _KEPT else None

    def _rows(self, name: str) -> tuple[npt.NDArray[np.uint8], GgufTensor]:
        """[rows, bytes of a row], in the order in which the model wants them."""
        source = self._sources[name]
        tensor = self._infos[source.name]
        rows = _bytes(self._maps[tensor.file], tensor)
        if source.expert is not None:
            rows = rows.reshape(tensor.shape[0], tensor.shape[1], -1)[source.expert[0]]
        if source.rows is not None:
            rows = rows[slice(*source.rows)]
        return in_halves(rows, source), tensor

    def _dequantized(self, rows: npt.NDArray[np.uint8], tensor: GgufTensor) -> npt.NDArray[np.float16]:
        _, values, nbytes = TYPES[tensor.kind]
        made = np.empty((len(rows), rows.shape[1] // nbytes * values), np.float16)
        if self._widen is None or not self._widen(rows, tensor.type, made):
            _widen(rows, tensor, made)
        return made


def _bytes(mapped: mmap.mmap, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
    """[rows, bytes of a row]; of a list, each value is a row; of three axes, the rows of one matrix follow those of another."""
    flat = np.frombuffer(mapped, np.uint8, tensor.nbytes, tensor.offset)
    return flat.reshape(prod(tensor.shape[:-1]) if len(tensor.shape) > 1 else tensor.shape[0], -1)


def _floats(rows: npt.NDArray[np.uint8], tensor: GgufTensor) -> npt.NDArray[Any]:
    return rows.view(array_dtype(tensor.type))


def _widen(rows: npt.NDArray[np.uint8], tensor: GgufTensor, made: npt.NDArray[np.float16]) -> None:
    """By the library, a piece at a time."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize  # where it is used: it imports its whole library
    except ModuleNotFoundError as e:
        raise ModelLoadError(
            f"{tensor.file} has tensors of the type {tensor.type}, and the library that reads them is not installed ({e}): pip install gguf"
        ) from None
    kind, step = GGMLQuantizationType(tensor.kind), max(1, _CHUNK // made.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # infinite, as the kernels have it
        for start in range(0, len(rows), step):
            made[start : start + step] = dequantize(rows[start : start + step], kind)
