"""GGUF files, in which llama.cpp and Ollama keep models: the metadata, and where each tensor is. No tensor is read here.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian, versions 2 and 3: ``GGUF``, the version, the numbers
of tensors and of fields; the fields, each a name, a type and a value; of each tensor its name, shape, type and place; then the data, at
the next multiple of ``general.alignment``. A model of several files (``-00001-of-00003.gguf``) has all fields in the first.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final, NoReturn

from quire.errors import ModelLoadError

TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Number of a tensor's type → its name, the values that are stored together, and the bytes that these take (ggml.h)."""

_MAGIC: Final = b"GGUF"
_LFS: Final = b"version https://git-lfs"
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_LENGTH: Final = struct.Struct("<Q")
_KIND: Final = struct.Struct("<I")
_MAX_DIMENSIONS: Final = 4
_MAX_PARTS: Final = 1000
_MAX_LIST: Final = 1 << 22  # entries of one field; the largest vocabularies have a quarter of a million tokens
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""``tokenizer.ggml.token_type`` of a token."""
_ENDS: Final = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<|return|>", "<|call|>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
))  # fmt: skip
"""How tokens are spelt that end a turn wherever they are special, as llama.cpp has it: a file names one, and a model may use another."""
_SENTENCE_PIECE: Final = {"unknown": 0, "bos": 1, "eos": 2}
"""Ids where a file with a tokenizer of this kind does not say them."""
PART: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
"""Name of one of a model's files: what all begin with, its number from 1 on, and how many there are."""


@dataclass(slots=True, frozen=True)
class GgufTensor:
    """One tensor, as the file describes it."""

    file: Path
    kind: int
    """Number of its type, see TYPES."""
    shape: tuple[int, ...]
    """As in PyTorch: rows first. (The file has the dimensions the other way round.)"""
    offset: int
    """First byte, from the start of the file."""
    nbytes: int

    @property
    def type(self) -> str:
        return TYPES[self.kind][0]


@dataclass(slots=True)
class Gguf:
    """A model's GGUF file, or files."""

    path: Path
    """The first."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Name → number, text, truth value, or a list of these. Numbers of 32 bits are the shortest decimals that they stand for."""
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def refuse(self, problem: str) -> NoReturn:
        raise ModelLoadError(f"{self.path} {problem}")

    def text(self, name: str, default: str | None = None) -> str:
        """A field that is a text; required unless there is a default. Raises ModelLoadError, as the next two."""
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            self.refuse(f"has no field {name}" if value is None else f"has {value!r:.60} in {name}, which must be a text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            self.refuse(f"has {value!r:.60} in {name}, which must be true or false")
        return value

    def list_of(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        """A field that is a list, all of one type; empty where there is none. length: that it must have, where it is there."""
        values = self.fields.get(name, [])
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            self.refuse(f"has something else in {name} than a list of {kind.__name__}")
        if values and length is not None and len(values) != length:
            self.refuse(f"has {len(values):,} entries in {name} and needs {length:,}")
        return values

    def tokens(self) -> tuple[list[str], list[int]]:
        """The vocabulary, and the type of each token: those that are spelt like the end of a turn are special, whatever they are called.
        Raises ModelLoadError."""
        tokens = self.list_of("tokenizer.ggml.tokens", str)
        given = self.list_of("tokenizer.ggml.token_type", int, len(tokens))
        types = given or [NORMAL] * len(tokens)
        may_end = (CONTROL, USER_DEFINED) if given else (NORMAL,)
        return tokens, [CONTROL if type_ in may_end and token in _ENDS else type_ for token, type_ in zip(tokens, types, strict=True)]

    def special_token(self, role: str) -> int | None:
        """The id of bos, eos, eot, eom, unknown, ..., as the format spells them; None where there is none, or none in the vocabulary
        (llama.cpp passes over those, too)."""
        default = _SENTENCE_PIECE.get(role) if self.fields.get("tokenizer.ggml.model") == "llama" else None
        value = self.fields.get(f"tokenizer.ggml.{role}_token_id", default)
        return value if type(value) is int and 0 <= value < len(self.fields.get("tokenizer.ggml.tokens", ())) else None

    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer, the one that the file names first. Raises ModelLoadError."""
        tokens, types = self.tokens()
        named = [self.special_token(role) for role in ("eos", "eot", "eom")]
        named += [i for i in self.list_of("tokenizer.ggml.eos_token_ids", int) if 0 <= i < len(tokens)]
        named += [i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == CONTROL and token in _ENDS]
        found = dict.fromkeys(i for i in named if i is not None)
        if {"<|return|>", "<|call|>"} <= {tokens[i] for i in found}:  # of gpt-oss, whose answers are several messages
            found = dict.fromkeys(i for i in found if tokens[i] != "<|end|>")
        return list(found)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do, whatever its name is: Ollama's have none. One that can't be read is what its name says."""
    if not path.is_file():  # a pipe would have to be waited for
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return path.suffix.lower() == ".gguf"


def read_gguf(path: Path) -> Gguf:
    """Fields and tensors of a file, or of all files of a model that was split. Raises ModelLoadError for what is not whole and well
    formed."""
    model = _read(path)
    count = model.fields.get("split.count", 1)
    if count in (0, 1):  # 0: of files that were put together again
        return model
    match = PART.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= _MAX_PARTS or match is None or int(match[3]) != count:
        model.refuse(f"is one of {count!r} parts, which must be called NAME-00001-of-{count!s:0>5}.gguf and so on")
    if int(match[2]) != 1:
        first = f"{match[1]}-00001-of-{match[3]}.gguf"
        model.refuse(f"is part {int(match[2])} of {count}: give the first one, {first}")
    for number in range(2, count + 1):
        other = path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf")
        if not other.exists():
            raise ModelLoadError(f"{other} is missing: {path.name} is the first of {count} parts; download all of them")
        for name, tensor in _read(other).tensors.items():
            if name in model.tensors:
                raise ModelLoadError(f"tensor {name!r} is both in {model.tensors[name].file} and in {other}")
            model.tensors[name] = tensor
    return model


class _Cursor:
    """Reads one value after the other. Raises ModelLoadError beyond the end."""

    __slots__ = ("at", "data", "path", "size")

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 4

    def refuse(self, problem: str) -> NoReturn:
        raise ModelLoadError(f"{self.path} {problem}")

    def take(self, nbytes: int) -> int:
        """Where the next ``nbytes`` bytes are."""
        at = self.at
        if nbytes > self.size - at:
            self.refuse(f"is cut short: it describes something that ends at byte {at + nbytes:,}, and has {self.size:,}; download it again")
        self.at = at + nbytes
        return at

    def kind(self) -> int:
        return int(_KIND.unpack_from(self.data, self.take(4))[0])

    def length(self) -> int:
        return int(_LENGTH.unpack_from(self.data, self.take(8))[0])

    def string(self) -> str:
        nbytes = self.length()
        at = self.take(nbytes)
        # Vocabularies hold whatever bytes their tokenizer had.
        return self.data[at : at + nbytes].decode("utf-8", "surrogateescape")

    def strings(self, count: int) -> list[str]:
        """``string`` many times: a vocabulary and its merges are hundreds of thousands."""
        data, at, size, unpack, found = self.data, self.at, self.size, _LENGTH.unpack_from, []
        for _ in range(count):
            start = at + 8
            if start > size:
                self.take(start - self.at)
            at = start + unpack(data, at)[0]
            if at > size:
                self.take(at - self.at)
            found.append(data[start:at])
        self.at = at
        return [text.decode("utf-8", "surrogateescape") for text in found]

    def value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.kind(), self.length()
            if count > _MAX_LIST:
                self.refuse(f"has {count:,} entries in {name}, and at most {_MAX_LIST:,} are read")
            if inner == _STRING:
                return self.strings(count)
            if inner not in _SCALARS:
                self.refuse(f"has a malformed header: {name} is a list of type {inner}, which is none")
            code = _SCALARS[inner]
            at = self.take(count * struct.calcsize(f"<{code}"))
            values = list(struct.unpack_from(f"<{count}{code}", self.data, at))
            return [_shortest(value) for value in values] if inner == _FLOAT32 and count < 1000 else values
        if kind not in _SCALARS:
            self.refuse(f"has a malformed header: {name} is of type {kind}, which is none")
        code = _SCALARS[kind]
        value = struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]
        return _shortest(value) if kind == _FLOAT32 else value


def _shortest(value: float) -> float:
    """A number that was written as 32 bits, as its author wrote it: 1e-05 and not 9.999999747378752e-06."""
    stored = struct.pack("<f", value)
    for digits in range(6, 9):
        near = float(f"{value:.{digits}g}")
        if abs(near) < 3.4e38 and struct.pack("<f", near) == stored:
            return near
    return value


def _read(path: Path) -> Gguf:
    try:
        with path.open("rb") as file:
            first = file.read(24)
            if _LFS.startswith(first[:20]) and first:
                raise ModelLoadError(f"{path} is a Git LFS pointer and not the model: fetch it with 'git lfs pull'")
            if first[:4] != _MAGIC:
                raise ModelLoadError(f"{path} is not a GGUF file: it does not begin with GGUF")
            if len(first) < 24:
                raise ModelLoadError(f"{path} is cut short: it has {len(first)} bytes; download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parse(path, mapped)
    except OSError as e:
        raise ModelLoadError(f"{path} can't be read: {e.strerror or e}") from None


def _parse(path: Path, mapped: mmap.mmap) -> Gguf:
    cursor, model = _Cursor(path, mapped), Gguf(path)
    if (version := cursor.kind()) not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "is big endian" if swapped in (2, 3) else f"is of version {version} of the format"
        cursor.refuse(f"{what}; little endian files of versions 2 and 3 are supported: convert the model again")
    num_tensors, num_fields = cursor.length(), cursor.length()
    for _ in range(num_fields):
        name = cursor.string()
        if name in model.fields:
            cursor.refuse(f"has a malformed header: {name!r:.80} is there twice")
        model.fields[name] = cursor.value(cursor.kind(), repr(name)[:80])
    places = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = model.fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment % 8:
        cursor.refuse(f"has a malformed header: general.alignment is {alignment!r:.40} and must be a multiple of 8")
    start = -(-cursor.at // alignment) * alignment
    end = start
    for name, kind, shape, offset in sorted(places, key=lambda place: place[3]):
        _, values, nbytes = TYPES[kind]
        if offset % alignment:
            cursor.refuse(f"has a malformed header: tensor {name!r:.80} starts at byte {offset} of the data, no multiple of {alignment}")
        tensor = GgufTensor(path, kind, shape, start + offset, prod(shape) // values * nbytes)
        if tensor.offset < end:
            cursor.refuse(f"has a malformed header: tensor {name!r:.80} lies over another one")
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            cursor.refuse(f"is cut short: tensor {name!r:.80} ends at byte {end:,}, the file at {cursor.size:,}; download it again")
        if name in model.tensors:
            cursor.refuse(f"has a malformed header: tensor {name!r:.80} is there twice")
        model.tensors[name] = tensor
    return model


def _tensor(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """(name, type, shape, offset within the data) of the next tensor."""
    name, dimensions = cursor.string(), cursor.kind()
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        cursor.refuse(f"has a malformed header: tensor {name!r:.80} has {dimensions} dimensions")
    shape = tuple(cursor.length() for _ in range(dimensions))[::-1]
    kind, offset = cursor.kind(), cursor.length()
    if kind not in TYPES:
        cursor.refuse(f"has the tensor {name!r:.80} in a type that is not known here (number {kind})")
    if not all(0 < n < 1 << 40 for n in shape) or shape[-1] % TYPES[kind][1]:
        cursor.refuse(f"has a malformed header: tensor {name!r:.80} has the shape {list(shape)} and the type {TYPES[kind][0]}")
    return name, kind, shape, offset
