"""A GPU that is not there, is too old, or lacks what it needs: a clear message each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

import quire
from quire.backends.base import open_backend
from quire.backends.cuda import device, swap
from quire.backends.cuda.group import Group
from quire.config import EngineConfig
from quire.errors import CapacityError, ConfigError
from sample_models import QWEN3, write_model

CUDA = EngineConfig(device="cuda")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One of compute capability 7.5."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(device, "_check_compiler", lambda: None)
    return monkeypatch


def test_pytorch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"this PyTorch \(.+\) was built without CUDA: install one that was, or use --device cpu"):
        open_backend(CUDA)


@pytest.mark.parametrize(
    "message",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.\nMore text",
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.",
    ],
)
def test_no_driver_or_an_old_one(with_gpu: pytest.MonkeyPatch, message: str) -> None:
    def init() -> None:
        raise RuntimeError(message)

    with_gpu.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError) as caught:
        open_backend(CUDA)
    assert caught.value.message == "--device cuda: " + message.splitlines()[0].rstrip(".")


def test_an_old_gpu(with_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5; 8\.0 \(Ampere\) is the least .*: use --device cpu"):
        open_backend(CUDA)


def test_fewer_gpus_than_asked_for(with_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="4 GPUs are asked for, this machine shows 1"):
        device.open_device("cuda", 3)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton says it where it wants to compile its launcher: on machines that have the libraries alone."""

    class Driver:
        @property
        def utils(self) -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore text")

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    with pytest.raises(ConfigError, match=r"Failed to find C compiler.*: install a C compiler and the headers of Python"):
        device._check_compiler()


def test_a_second_model_on_several_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="--tensor-parallel 2: this process has opened a model on several devices already"):
        Group(0, 2, tmp_path, torch.device("cpu"))


def test_no_triton(with_gpu: pytest.MonkeyPatch) -> None:
    with_gpu.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with_gpu.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Triton is not installed: pip install 'quire\[cuda\]', or use --device cpu"):
        open_backend(CUDA)


def test_an_old_triton(with_gpu: pytest.MonkeyPatch) -> None:
    with_gpu.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with_gpu.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(ConfigError, match=r"Triton 3\.4\.0 is too old: 3\.5 is the least .*: pip install 'triton>=3\.5' with the PyTorch"):
        open_backend(CUDA)


def quire_run(*arguments: str, without: str = "nothing") -> subprocess.CompletedProcess[str]:
    """The command line, where a module can't be imported."""
    script = f"import sys; sys.modules[{without!r}] = None; from quire.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "run", "embedded", *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(quire.__file__).parent.parent)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "without", "says"),
    [
        (("--device", "cuda"), "torch", "--device cuda: PyTorch is not installed: pip install 'quire[cuda]', or use --device cpu"),
        (("--device", "torch-cpu"), "torch", "--device torch-cpu: PyTorch is not installed"),
        (("--device", "tpu"), "nothing", "--device 'tpu' is not supported; choose from: cpu, cuda, torch-cpu"),
        (("--kv-dtype", "fp8"), "nothing", "--kv-dtype fp8 needs a GPU (--device cuda): take --kv-dtype int8"),
        (("--quantize", "fp8"), "nothing", "--quantize fp8 needs a GPU"),
        (
            ("--device", "torch-cpu", "--quantize", "int4"),
            "nothing",
            "--quantize int4 is not there with --device torch-cpu: take int8 or fp8",
        ),
        (
            ("--device", "torch-cpu", "--quantize", "int8", "--group-size", "64"),
            "nothing",
            "--group-size 64 is not there with --device torch-cpu",
        ),
        (
            ("--device", "torch-cpu", "--quantize", "int8", "--cache-dir", "x"),
            "nothing",
            "--cache-dir is of no use with --device torch-cpu",
        ),
        (("--tensor-parallel", "2"), "nothing", "--tensor-parallel 2 is for GPUs: add --device cuda"),
        (
            ("--device", "torch-cpu", "--tensor-parallel", "3"),
            "nothing",
            "--tensor-parallel 3 does not divide the model's 8 attention heads",
        ),
    ],
)
def test_the_command_line_says_so(arguments: tuple[str, ...], without: str, says: str) -> None:
    found = quire_run("--prompt", "x", *arguments, without=without)
    assert found.returncode == 2, found.stderr
    assert says in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_pool_that_holds_no_request() -> None:
    with pytest.raises(CapacityError, match=r"--kv-memory 256KiB holds .* raise --kv-memory to at least .*, or lower --max-model-len"):
        open_backend(EngineConfig(device="torch-cpu", kv_memory="256KiB"))
    with pytest.raises(CapacityError, match=r"--kv-memory 900GiB .* need more than the .* GB of memory that are free: lower --kv-memory"):
        open_backend(EngineConfig(device="torch-cpu", kv_memory="900GiB"))


@pytest.mark.parametrize("options", [{"kv_dtype": "fp8"}, {"quantize": "fp8"}], ids=str)
def test_a_gpu_without_fp8(with_gpu: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    with_gpu.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    with pytest.raises(ConfigError, match=r"fp8: Tesla T4 has compute capability 8\.0; 8\.9 \(Ada\) is the least: take int8"):
        open_backend(EngineConfig(model="m", device="cuda", **options))


def test_heads_that_no_tile_has_room_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {**QWEN3, "head_dim": 288, "num_hidden_layers": 1})
    with pytest.raises(ConfigError, match=r"--device torch-cpu: heads of 288 numbers: .* for 256 at most: use --device cpu"):
        open_backend(EngineConfig(model=str(folder), device="torch-cpu"))


def test_host_memory_that_can_not_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with")

    monkeypatch.setattr(swap.torch, "empty", refuse)
    with pytest.raises(
        CapacityError, match=r"--swap-memory: .* 6,144 bytes of pinned memory to give \(CUDA error: out of memory\): lower it"
    ):
        swap.HostBlocks(6, (1024,), pinned=True)
