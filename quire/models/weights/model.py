"""A model's files, opened."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.models.spec import TransformerSpec

Blocks = Callable[[str], tuple[str, Callable[[], npt.NDArray[np.uint8]]] | None]
"""Name of a tensor → (type, what makes its rows of blocks, in bytes), for types that kernels take as they are; None for another tensor."""


class Made(Mapping[str, npt.NDArray[Any]]):
    """Arrays that are made when they are asked for, each time anew."""

    def __init__(self, makers: Mapping[str, Callable[[], npt.NDArray[Any]]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the array
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def no_blocks(name: str) -> None:
    """Of a checkpoint that is not quantized."""


@dataclass(slots=True)
class Model:
    """A model folder, opened: what it is, and its tensors as views of the mapped files."""

    spec: TransformerSpec
    folder: Path
    tensors: Mapping[str, npt.NDArray[Any]]
    """Canonical name → array, in the dtype that is stored (float32, float16, ml_dtypes.bfloat16), read-only, not always
    contiguous (GPT-2's linears are transposed views); a copy, made anew each time, where rows have another order in the file."""
    files: list[mmap.mmap]
    nbytes: int
    """Of all tensors, as ``tensors`` gives them."""
    blocks: Blocks = no_blocks
    """What the file has of a linear that is stored in 4 bits (see TransformerSpec.stored)."""
    reading: str = ""
    """How numbers are made of the files, where not all of that is in the files: a part of what packed weights are made from."""

    def release(self) -> None:
        """Give back the memory in which the files were read so far: it stays in the system's cache as long as there is room, and
        a tensor that is used again is mapped again. A model would else be resident twice while it is packed."""
        for mapped in self.files:
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Forget the tensors. A file is unmapped when the last array that shows it is gone."""
        self.tensors = {}
        for mapped in self.files:
            with suppress(BufferError):  # somebody still holds a view; the mapping goes with it
                mapped.close()
        self.files = []
