"""A model folder in Hugging Face format, or a GGUF file: which files there are, and its tensors under their canonical names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from quire.config import EMBEDDED_MODEL
from quire.errors import ModelLoadError
from quire.gguf import is_gguf
from quire.models.families import Config, Family, Packing, Source, find_family, packing_of, spec_from_config
from quire.models.spec import DTYPE_BYTES, TransformerSpec
from quire.models.weights.gguf import Widen, gguf_files, gguf_spec, load_gguf
from quire.models.weights.hub import fetch, is_name
from quire.models.weights.messages import SHOWN, some
from quire.models.weights.model import Made, Model
from quire.models.weights.mxfp4 import Mxfp4Tensor, Mxfp4Weight, find_mxfp4
from quire.models.weights.order import in_halves
from quire.models.weights.packed import PackedTensor, find_packed
from quire.models.weights.safetensors import SUPPORTED, TensorInfo, map_file, read_header, view

Packed = Mapping[str, PackedTensor | Mxfp4Tensor]
"""Linears that are quantized, by their names in the checkpoint."""


def resolve_model(name: str | Path, weights: bool = True) -> Path:
    """The folder of a model, or its GGUF file: the packaged one for ``"embedded"``, else the path itself, or the one GGUF file in a folder
    that has no config.json; of a model that is named as on the Hugging Face Hub, where it was downloaded to.

    weights: whether they are needed, or the configuration will do. Raises ModelLoadError.
    """
    if name == EMBEDDED_MODEL:
        return Path(__file__).parent.parent / "embedded"
    path = Path(name).expanduser()
    if path.is_dir():
        return path if (path / "config.json").exists() else _gguf_in(path)
    if is_gguf(path):
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file and no GGUF: give the folder that holds it, with config.json and the tokenizer")
    if is_name(str(name)):
        return fetch(str(name), _read_config, weights)
    raise ModelLoadError(
        f"there is no folder or file {path}: give a model folder in Hugging Face format, a GGUF file, a "
        f"name on the Hugging Face Hub (org/name), or {EMBEDDED_MODEL!r}"
    )


def _gguf_in(folder: Path) -> Path:
    """The one GGUF model in a folder (of several parts the first), or the folder where there is none. Raises ModelLoadError."""
    others = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$|mmproj|imatrix", re.IGNORECASE)
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf" and not others.search(file.name) and is_gguf(file))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:SHOWN])
        raise ModelLoadError(f"{folder} holds {len(found)} GGUF files ({names}{', ...' if len(found) > SHOWN else ''}): give one of them")
    return found[0] if found else folder


def load_spec(folder: str | Path) -> TransformerSpec:
    """The spec of a model folder, from config.json and generation_config.json alone (the weights need not be there), or of a GGUF file.

    Raises ModelLoadError.
    """
    folder = resolve_model(folder)
    return gguf_spec(folder) if folder.is_file() else _read_config(folder).spec


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold a model's weights. Raises ModelLoadError."""
    folder = resolve_model(folder)
    return gguf_files(folder) if folder.is_file() else sorted({info.file for info in read_headers(folder).values()})


def read_headers(folder: str | Path) -> dict[str, TensorInfo]:
    """Checkpoint name → tensor info for all files of a model folder, from their headers alone. Raises ModelLoadError."""
    folder = resolve_model(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        _refuse_without_weights(folder)
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelLoadError(f"{index} has no 'weight_map' from tensor names to files")
    headers: dict[str, TensorInfo] = {}
    for name in dict.fromkeys(table.values()):
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ModelLoadError(f"{index} names the file {name!r}, which is not a file name in its own folder")
        file = folder / name
        if not file.exists():
            missing = sum(value == name for value in table.values())
            raise ModelLoadError(f"{file} is missing: {index.name} expects {missing} tensors in it; download it again")
        for tensor, info in read_header(file).items():
            if tensor in headers:
                raise ModelLoadError(f"tensor {tensor!r} is both in {headers[tensor].file} and in {file}")
            headers[tensor] = info
    for tensor, name in table.items():
        if tensor not in headers or headers[tensor].file.name != name:
            raise ModelLoadError(f"{index} places the tensor {tensor!r} in {name}, which does not have it")
    return headers


def load_model(folder: str | Path, widen: Widen | None = None) -> Model:
    """Open a model folder or a GGUF file: read its configuration, check every tensor's name, dtype and shape, and map the files.

    folder: a path, or ``"embedded"``. ``spec.dtype`` becomes the dtype that most weights are stored in, whatever config.json says.
    widen: makes floats of quantized tensors, faster than the gguf library. Raises ModelLoadError, naming the file, field or tensor.
    """
    folder = resolve_model(folder)
    if folder.is_file():
        return load_gguf(folder, widen)
    config = _read_config(folder)
    family, spec = config.family, config.spec
    headers = read_headers(folder)
    infos, packed = _named(folder, config, headers)
    if config.packing is not None and not packed:
        raise ModelLoadError(f"{folder}: config.json says that the model is quantized, but no linear is: there are no tensors of such")
    sources = _match(folder, family, spec, infos)
    stored: Counter[str] = Counter()
    for info in infos.values():
        stored[SUPPORTED[info.dtype]] += info.nbytes
    spec = replace(spec, dtype=stored.most_common(1)[0][0])
    maps = {file: map_file(file) for file in dict.fromkeys(info.file for info in headers.values())}
    for name in ("embed.weight", "positions.weight"):
        if name in sources and sources[name].name in packed:
            raise ModelLoadError(f"{folder}: the tensor {sources[name].name}, which is looked up, is quantized: that is not supported")
    if spec.tied and "lm_head.weight" in infos and "lm_head.weight" not in {s.name for s in sources.values()}:
        if "lm_head.weight" in packed:
            raise ModelLoadError(f"{folder}: config.json ties lm_head to the embedding, but a quantized lm_head is stored")
        _check_tied(folder, _view(sources["embed.weight"], infos, maps), _view(Source("lm_head.weight"), infos, maps))
    if packed:
        return _load_packed(folder, spec, infos, sources, packed, maps, repr(config.packing))
    shapes = spec.tensor_shapes()
    nbytes = sum(prod(shapes[name]) * DTYPE_BYTES[SUPPORTED[infos[source.name].dtype]] for name, source in sources.items())
    made = Made({name: partial(_view, source, infos, maps) for name, source in sources.items()})
    return Model(spec, folder, made, list(maps.values()), nbytes)


def _load_packed(
    folder: Path,
    spec: TransformerSpec,
    infos: Mapping[str, TensorInfo],
    sources: Mapping[str, Source],
    packed: Packed,
    maps: dict[Path, mmap],
    reading: str,
) -> Model:
    """The model of a checkpoint that is quantized."""
    weights = {name: tensor.open(maps) for name, tensor in packed.items()}
    makers: dict[str, Callable[[], npt.NDArray[Any]]] = {}
    kept: dict[str, tuple[str, Callable[[], npt.NDArray[np.uint8]]]] = {}
    shapes, stored, nbytes = spec.tensor_shapes(), {}, 0
    for name, source in sources.items():
        nbytes += prod(shapes[name]) * DTYPE_BYTES[SUPPORTED[infos[source.name].dtype]]
        if (weight := weights.get(source.name)) is None:
            makers[name] = partial(_view, source, infos, maps)
            continue
        if isinstance(weight, Mxfp4Weight) and source.expert is not None:
            weight = weight.expert(source.expert[0])
        elif source.transpose or source.expert is not None:
            raise ModelLoadError(f"{folder}: {spec.architecture} with quantized linears ({source.name}) is not supported")
        rows = slice(*(source.rows or (0, shapes[name][0])))
        makers[name] = partial(_of_packed, weight.floats, rows, source)
        stored[name.removesuffix(".weight")] = weight.kind
        if weight.kind != "int8":
            kept[name] = (weight.kind, partial(_of_packed, weight.blocks, rows, source))
    spec = replace(spec, stored=tuple((name, stored.get(name, "int8")) for name, _ in spec.stored))
    return Model(spec, folder, Made(makers), list(maps.values()), nbytes, kept.get, reading)


def _view(source: Source, infos: Mapping[str, TensorInfo], maps: Mapping[Path, mmap]) -> npt.NDArray[Any]:
    array = view(maps[infos[source.name].file], infos[source.name])
    if source.expert is not None:
        array = array[source.expert[0]]
    if source.transpose:
        array = array.T
    return in_halves(array if source.rows is None else array[slice(*source.rows)], source)


def _of_packed(make: Callable[[slice], npt.NDArray[Any]], rows: slice, source: Source) -> npt.NDArray[Any]:
    return in_halves(make(rows), source)


def _named(folder: Path, config: ModelConfig, headers: Mapping[str, TensorInfo]) -> tuple[dict[str, TensorInfo], Packed]:
    """The checkpoint's tensors by their names without the family's prefix, and those of them that are packed linears."""
    infos: dict[str, TensorInfo] = {}
    guesses = f"layers.{config.spec.num_layers}."
    guessing = any(config.family.strip(full) == guesses + config.family.guesses for full in headers)
    for full, info in headers.items():
        name = config.family.strip(full)
        if re.fullmatch(config.family.buffers, name) or (guessing and name.startswith(guesses)):
            continue
        if name in infos:
            raise ModelLoadError(f"{folder}: the tensor {name!r} is there twice, with and without the prefix of {full!r}")
        infos[name] = info
    packed: Packed = {}
    if config.packing is not None:
        packed = find_mxfp4(infos) if config.packing.method == "mxfp4" else find_packed(config.packing, infos)
    sources = {source.name for source in config.family.sources(config.spec).values()}
    for bias in [name.removesuffix(".weight") + ".bias" for name in packed]:  # GPTQ's tools give every linear one
        if bias in infos and bias not in sources and infos[bias].dtype in SUPPORTED:
            info = infos.pop(bias)
            if view(map_file(info.file), info).any():
                raise ModelLoadError(
                    f"{info.file}: {bias} is not zero, and {config.spec.architecture} with this config.json has no such bias"
                )
    return infos, packed


def _match(folder: Path, family: Family, spec: TransformerSpec, infos: Mapping[str, TensorInfo]) -> dict[str, Source]:
    """Check the checkpoint's tensors against the spec: canonical name → source."""
    shapes, sources = spec.tensor_shapes(), family.sources(spec)
    embed = sources["embed.weight"].name
    if spec.tied and embed not in infos and "lm_head.weight" in infos:
        # Tied tensors are stored once, and either name may be the one that was kept.
        sources["embed.weight"] = replace(sources["embed.weight"], name="lm_head.weight")

    wanted = {source.name: source.stored_shape(shapes[name]) for name, source in sources.items()}
    if spec.tied and "lm_head.weight" in infos:
        wanted["lm_head.weight"] = wanted[sources["embed.weight"].name]
    if missing := [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in infos]:
        raise ModelLoadError(f"{folder} lacks {some(missing, 'tensor')} that {spec.architecture} with this config.json has")
    if extra := [f"{name} {list(info.shape)} ({info.file.name})" for name, info in infos.items() if name not in wanted]:
        raise ModelLoadError(f"{folder} has {some(extra, 'tensor')} that {spec.architecture} with this config.json does not have")
    for name, shape in wanted.items():
        info = infos[name]
        if info.shape != shape:
            raise ModelLoadError(f"{info.file}: tensor {name} has the shape {list(info.shape)}, config.json asks for {list(shape)}")
        if info.dtype not in SUPPORTED:
            raise ModelLoadError(f"{info.file}: tensor {name} has the dtype {info.dtype}; supported: {', '.join(SUPPORTED)}")
    return sources


def _check_tied(folder: Path, embed: npt.NDArray[Any], head: npt.NDArray[Any]) -> None:
    """Both are stored although one is the other. Versions of transformers differ in which they take: they must be equal."""
    for i in range(0, len(embed), 4096):
        if embed.dtype != head.dtype or not np.array_equal(embed[i : i + 4096], head[i : i + 4096]):
            raise ModelLoadError(
                f"{folder}: config.json ties lm_head to the embedding, but lm_head.weight is stored and differs from it; "
                'set "tie_word_embeddings": false in config.json to use it, or remove the tensor'
            )


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """What config.json says."""

    family: Family
    spec: TransformerSpec
    packing: Packing | None


def _read_config(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.exists():
        hint = " (it holds an adapter: merge it into its base model first)" if (folder / "adapter_config.json").exists() else ""
        raise ModelLoadError(f"{folder} has no config.json: it is not a model folder in Hugging Face format{hint}")
    values = _read_json(file)
    generation, older = folder / "generation_config.json", folder / "quantize_config.json"
    alone = "quantization_config" not in values and older.exists()
    if alone:  # as AutoGPTQ wrote it before transformers knew GPTQ
        values["quantization_config"] = {"quant_method": "gptq", **_read_json(older)}
    family = find_family(values, str(file))
    spec = spec_from_config(values, _read_json(generation) if generation.exists() else None, str(file))
    packing = packing_of(Config(values, str(file)))
    headers = _headers_if_there(folder) if packing is not None else None
    if packing is not None and headers is not None:
        packed = _named(folder, ModelConfig(family, spec, packing), headers)[1]
        if not packed and alone:  # left over from another model
            return ModelConfig(family, replace(spec, stored=()), None)
        linears = {name.removesuffix(".weight") for name, source in family.sources(spec).items() if source.name in packed}
        spec = replace(spec, stored=packing.stored(spec, linears))
    return ModelConfig(family, spec, packing)


def _headers_if_there(folder: Path) -> dict[str, TensorInfo] | None:
    """None for a folder without its weights, or a part of them: its configuration is read nevertheless."""
    try:
        return read_headers(folder)
    except ModelLoadError:
        return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelLoadError(f"{file} can't be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise ModelLoadError(f"{file} is not valid JSON: {e}") from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{file} is not a JSON object")
    return values


def _refuse_without_weights(folder: Path) -> NoReturn:
    suffixes = (".bin", ".pt", ".pth", ".ckpt")
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in suffixes)
    if pickled:
        raise ModelLoadError(
            f"{folder} has {pickled[0]} but no model.safetensors: pickled weights can run code and are never loaded. Convert them, "
            "for example with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    others = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx"))
    found = f" (found: {', '.join(others[:SHOWN])})" if others else ""
    raise ModelLoadError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{found}")
