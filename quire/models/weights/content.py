"""What a checkpoint holds, as one number: to tell whether something made from it still belongs to it.

The content decides, and files are only read where they may have changed: the digest is remembered beside each file's size,
times and inode, as git does it for the files of a work tree. A change of content changes the time of the inode's last change,
which no program can set back; a copy, a checkout or a download of the same content is recognized by reading it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from quire.models.weights.safetensors import map_file

_PIECE: Final = 4 << 20
_SETTLED_S: Final = 2.0
"""Times of files have a resolution: one that was changed this recently may be changed again without a trace."""


def content_digest(files: Sequence[Path], memory: Path, progress: Callable[[int], None] | None = None, threads: int | None = None) -> str:
    """SHA-256 (hex) over names and bytes of ``files``; of the pieces' digests, so that several threads can share the work.

    memory: the file that remembers it; it need not be writable. progress: hears the number of bytes after each piece.
    Raises ModelLoadError for a file that can't be read.
    """
    stamps = {file.name: _stamp(file) for file in files}
    with suppress(OSError, ValueError):
        known = json.loads(memory.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.get("files") == stamps and isinstance(known.get("digest"), str):
            return str(known["digest"])
    whole = hashlib.sha256()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            whole.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with memoryview(map_file(file)) as view:  # hashing lets other threads run
                pieces = range(0, len(view), _PIECE)
                for start, digest in zip(pieces, pool.map(lambda at: hashlib.sha256(view[at : at + _PIECE]).digest(), pieces), strict=True):
                    whole.update(digest)
                    if progress is not None:
                        progress(min(_PIECE, len(view) - start))
    latest = max(max(file.stat().st_mtime, file.stat().st_ctime) for file in files)
    if {file.name: _stamp(file) for file in files} == stamps and latest < time.time() - _SETTLED_S:
        with suppress(OSError):
            write_atomically(memory, json.dumps({"digest": whole.hexdigest(), "files": stamps}, indent=1).encode())
    return whole.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there with its old content or with the new one, whole. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _stamp(file: Path) -> list[Any]:
    of = file.stat()
    return [of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino, of.st_dev]
